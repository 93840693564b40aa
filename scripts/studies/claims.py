"""Check ten claims about cross-entropy, hinge and distillation by experiment.

Each study leaves a figure (PNG and SVG) and summary.json with the verdict and its numbers; all ten
together leave one page as well. Students are kept as they finish, so that an interrupted study
continues, and studies share those that they have in common.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from distill.utils.provenance import versions
from shared import quiet
from ten_claims import STUDIES
from ten_claims.page import Checked, as_markdown, write_page, write_study
from ten_claims.runs import Runs

BUDGETS = {  # overrides of every run
    "quick": ("data=digits",),
    "full": ("data=fashion_mnist", "trainer.max_epochs=5", "teacher.fit.max_epochs=5"),
}


def main() -> None:
    options = parsed()
    quiet()
    started = time.perf_counter()
    common = (*BUDGETS[options.budget], *options.override)
    if options.epochs:
        common += (f"trainer.max_epochs={options.epochs}",)
    runs, seeds = Runs(options.out / "runs", common), range(options.seeds)
    chosen = {number: study for number, study in enumerate(STUDIES.values(), start=1)
              if not options.names or study.name in options.names}  # fmt: skip
    runs.train(run for study in chosen.values() for seed in seeds for run in study.runs(seed))
    told = {"budget": options.budget, "overrides": list(common), "seeds": len(seeds),
            "versions": versions()}  # fmt: skip
    found = {}
    for number, study in chosen.items():
        found[number] = Checked(study, study.examine(seeds, runs))
        write_study(options.out / study.name, found[number], told)
        one = found[number]
        print(f"{number}. {study.claim}\n   {one.in_short}\n   {one.verdict}", flush=True)
    seconds = time.perf_counter() - started
    if not options.names:
        write_page(options.out / "claims.html", found, in_words(told))
        (options.out / "table.md").write_text(as_markdown(found) + "\n", encoding="utf-8")
    print(f"{len(found)} of 10 claims checked in {seconds:.0f} s: {os.path.relpath(options.out)}")


def parsed() -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    known = ", ".join(STUDIES)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"all, and their page, without one; of {known}"
    )
    parser.add_argument(
        "--budget", default="quick", choices=BUDGETS,
        help="quick: digits; full: Fashion-MNIST (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=5, help="of each student (%(default)s)")
    parser.add_argument("--epochs", type=int, help="of each student; the budget's own without it")
    parser.add_argument(
        "--override", nargs="+", default=[], metavar="KEY=VALUE",
        help="of `distill`, for every run, such as data=idx data.root=mnist",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("outputs/studies/claims"))
    options = parser.parse_args()
    if unknown := set(options.names) - set(STUDIES):
        parser.error(f"there is no claim {', '.join(unknown)}; there are {known}")
    if options.seeds < 2:
        parser.error("--seeds must be at least 2: an interval needs them")
    options.out = options.out.absolute()
    return options


def in_words(told: dict[str, Any]) -> dict[str, Any]:
    """Return what the page says of how it was made."""
    budget = f"{told['budget']} budget: {' '.join(told['overrides'])}, {told['seeds']} seeds"
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    command = shlex.join(["scripts/studies/claims", *sys.argv[1:]])
    return {"told": f"{budget}. {versions}", "command": command}


if __name__ == "__main__":
    main()
