"""The table itself: a row for each pair and method, as CSV, as Markdown and as a page."""

from __future__ import annotations

import csv
import io
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from markupsafe import Markup

from benchmark.cells import ALONE, TEACHER, Cell
from benchmark.published import Published, published
from distill.report import figures, page
from distill.utils.files import write_whole
from shared import mean_and_deviation


@dataclass(frozen=True)
class Spread:
    """A number over seeds."""

    mean: float
    deviation: float
    seeds: int

    def text(self, digits: int = 2) -> str:
        """Return it for people: the deviation where there are several seeds."""
        spread = f" ± {self.deviation:.{digits}f}" if self.seeds > 1 else ""
        return f"{self.mean:.{digits}f}{spread}"


@dataclass(frozen=True)
class Line:
    """A method on a pair; accuracies and calibration errors are in percent.

    Args:
        pair: its name.
        method: its name, `alone` or `teacher`.
        last: top-1 of the last epoch.
        best: of the epoch that was best on validation; None where there was no choice.
        gap: `last` less that of the student alone, over the seeds that both have.
        numbers: NLL and ECE, before and after scaling, by key.
        cost: seconds of a training step relative to `kd` on the same pair.
        claim: what was published.
        link: a run of it.
    """

    pair: str
    method: str
    last: Spread
    best: Spread | None
    gap: Spread | None
    numbers: Mapping[str, Spread]
    cost: float | None
    claim: Published | None
    link: str | None

    @property
    def difference(self) -> float | None:
        """What was reproduced less what was published, in points."""
        return None if self.claim is None else self.last.mean - self.claim.top1


NUMBERS = {  # key of summary.json → heading, factor, digits
    "nll": ("NLL", 1.0, 3),
    "nll_after_scaling": ("NLL after scaling", 1.0, 3),
    "ece": ("ECE %", 100.0, 2),
    "ece_after_scaling": ("ECE % after scaling", 100.0, 2),
}
MARK = " †"  # a published figure of the epoch that was best on the test pictures
HEADINGS = (
    *("pair", "method", "seeds", "top-1 % last", "top-1 % best on validation", "gap to alone"),
    *("published", "difference"),
    *(heading for heading, _, _ in NUMBERS.values()),
    *("cost / kd", "protocol of the published"),
)


def lines_of(
    done: Mapping[Cell, dict[str, Any]], out: Path, with_published: bool = True
) -> list[Line]:
    """Return the rows of the table, the teacher's and the lone student's first of each pair.

    Args:
        done: the cells that have finished, and what `summary.json` says of each.
        out: the table's folder.
        with_published: whether they are of the pictures that published figures are of.
    """
    rows: dict[tuple[str, str], dict[int, tuple[Cell, dict[str, Any]]]] = {}
    for cell, summary in done.items():
        rows.setdefault((cell.pair.name, cell.method), {})[cell.seed] = cell, summary
    lines = []
    for pair in dict.fromkeys(name for name, _ in rows):
        own = {method: seeds for (name, method), seeds in rows.items() if name == pair}
        taught = [seeds for method, seeds in own.items() if method != ALONE]
        if taught:
            first = next(iter(taught[0].values()))
            lines.append(line(pair, TEACHER, {0: first}, own, out, TEACHER))
        for method in sorted(own, key=lambda name: name != ALONE):
            lines.append(line(pair, method, own[method], own, out, "student"))
    return lines if with_published else [replace(one, claim=None) for one in lines]


def line(
    pair: str,
    method: str,
    seeds: Mapping[int, tuple[Cell, dict[str, Any]]],
    own: Mapping[str, Mapping[int, tuple[Cell, dict[str, Any]]]],
    out: Path,
    role: str,
) -> Line:
    """Return one row."""
    models = {seed: summary[role] for seed, (_, summary) in seeds.items()}
    last = {seed: 100 * model["top1"] for seed, model in models.items()}
    bests = [s["student_best"]["top1"] for _, s in seeds.values() if s.get("student_best")]
    alone = {seed: 100 * s["student"]["top1"] for seed, (_, s) in own.get(ALONE, {}).items()}
    gaps = [last[seed] - alone[seed] for seed in last.keys() & alone.keys()]
    compared = method not in (ALONE, TEACHER)
    return Line(
        pair=pair,
        method=method,
        last=spread_of(list(last.values())),
        best=spread_of([100 * top1 for top1 in bests]) if bests and role != TEACHER else None,
        gap=spread_of(gaps) if gaps and compared else None,
        numbers={
            key: spread_of([factor * model[key] for model in models.values()])
            for key, (_, factor, _) in NUMBERS.items()
            if all(model.get(key) is not None for model in models.values())
        },
        cost=relative_cost(own, method) if role != TEACHER else None,
        claim=published(pair, method),
        link=link_of(seeds, out),
    )


def spread_of(values: Sequence[float]) -> Spread:
    """Return mean and deviation over seeds."""
    return Spread(*mean_and_deviation(values), len(values))


def relative_cost(own: Mapping[str, Mapping[int, Any]], method: str) -> float | None:
    """Return how much longer a training step takes than that of `kd`, by the runs' own speed."""
    if "kd" not in own:
        return None
    speeds = [
        statistics.median(s["images_per_second"] for _, s in own[name].values())
        for name in ("kd", method)
    ]
    return speeds[0] / speeds[1]


def link_of(seeds: Mapping[int, tuple[Cell, Any]], out: Path) -> str | None:
    """Return the page of the first seed's run, from the table's folder."""
    cell, _ = seeds[min(seeds)]
    file = cell.folder(out) / page.PAGE
    return os.path.relpath(file, out) if file.is_file() else None


def cells_of_line(one: Line) -> list[str]:
    """Return a row's cells as text, in the order of `HEADINGS`."""
    mark = MARK if one.claim and one.claim.is_best_on_test else ""
    return [
        one.pair,
        one.method,
        str(one.last.seeds),
        one.last.text(),
        one.best.text() if one.best else "",
        f"{one.gap.mean:+.2f}" + one.gap.text().removeprefix(f"{one.gap.mean:.2f}")
        if one.gap
        else "",
        f"{one.claim.top1:.2f}{mark}" if one.claim else "",
        f"{one.difference:+.2f}{mark}" if one.difference is not None else "",
        *(
            one.numbers[key].text(digits) if key in one.numbers else ""
            for key, (_, _, digits) in NUMBERS.items()
        ),
        f"{one.cost:.2f}" if one.cost else "",
        one.claim.protocol if one.claim else "",
    ]


def write_table(out: Path, lines: Sequence[Line], title: str, command: str) -> None:
    """Write `table.csv`, `table.md` and `table.html`."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    plain = ([cell.removesuffix(MARK) for cell in cells_of_line(one)] for one in lines)
    writer.writerows([HEADINGS, *plain])
    write_whole(out / "table.csv", file.getvalue())
    write_whole(out / "table.md", as_markdown(lines) + "\n")
    template = page.environment().from_string(
        (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    )
    rows = [(cells_of_line(one), one) for one in lines]
    scatter = claimed_against_reproduced(lines)
    content = {"headings": HEADINGS, "rows": rows, "scatter": scatter, "title": title}
    write_whole(out / "table.html", page.rendered(template, command=command, **content))


def as_markdown(lines: Sequence[Line]) -> str:
    """Return the table for a document, without the columns that are empty."""
    cells = [cells_of_line(one) for one in lines]
    full = [k for k in range(len(HEADINGS)) if any(row[k] for row in cells)]
    head = ["| " + " | ".join(HEADINGS[k] for k in full) + " |", "|" + "---|" * len(full)]
    return "\n".join(head + ["| " + " | ".join(row[k] for k in full) + " |" for row in cells])


def claimed_against_reproduced(lines: Sequence[Line]) -> figures.Figure | None:
    """Draw what was published against what these runs came to, where both are known."""
    both = [(one, one.claim) for one in lines if one.claim is not None]
    if not both:
        return None
    figures_of = [figure for one, claim in both for figure in (one.last.mean, claim.top1)]
    ends = [min(figures_of), max(figures_of)]
    with figures.drawing("claimed", 5.2, 4.6) as (canvas, kept):
        axes = canvas.subplots()
        axes.plot(ends, ends, color=figures.COLOURS["ink"], linewidth=1, linestyle=":")
        for role, is_best in product(figures.ROLES, (False, True)):
            own = [
                (one, claim)
                for one, claim in both
                if role_of(one) == role and claim.is_best_on_test == is_best
            ]
            if own:
                axes.errorbar(
                    [claim.top1 for _, claim in own],
                    [one.last.mean for one, _ in own],
                    yerr=[one.last.deviation for one, _ in own],
                    fmt=figures.MARKERS[role],
                    color=figures.COLOURS[role],
                    markerfacecolor="none" if is_best else figures.COLOURS[role],
                    label=figures.ROLES[role] + (", published best on test" if is_best else ""),
                )
        axes.set(xlabel="published top-1 %", ylabel="reproduced top-1 %, last epoch")
        axes.legend()
    said = "; ".join(
        f"{one.pair} {one.method}: {claim.top1:.2f} published, {one.last.mean:.2f} here"
        for one, claim in both
    )
    caption = "On the dotted line a method came to what was published of it."
    return figures.Figure(Markup(kept["svg"]), caption, said)


def role_of(one: Line) -> str:
    """Return which of the page's colours a row has."""
    return {TEACHER: "teacher", ALONE: "baseline"}.get(one.method, "student")
