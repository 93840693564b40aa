"""Compare every soft objective: top-1, NLL and ECE of the student, mean ± deviation over seeds.

Each objective is trained at several temperatures; the one with the best mean top-1 on validation
(NLL breaks ties) is reported, on the test split, last epoch. Runs are kept in a file as they
finish, so an interrupted study continues.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import cache
from pathlib import Path

from distill import evaluation
from distill.config import build
from distill.data import DataModule
from distill.metrics import evaluate
from distill.training import auxiliary, fit, teachers
from distill.training.module import Distiller
from shared import Row, Rows, composed, quiet, spread

SOFT = {  # objective → the temperatures tried
    "kd": (2, 4, 8),
    "soft_ce": (2, 4, 8),
    "logit_mse": (1,),  # has no temperature
    "standardized_kd": (0.25, 0.5, 1),
    "dkd": (2, 4, 8),
    "dist": (2, 4, 8),
    "soft_hinge": (1, 2, 4),
    "squared_soft_hinge": (1, 2, 4),
    "weighted_sign_hinge": (1, 2, 4),
    "product_hinge": (1, 2, 4),
    "epsilon_insensitive_hinge": (1, 2, 4),
    "pairwise_soft_hinge": (1, 2, 4),
}
BUDGET = {
    "digits": [],
    # 40 batches an epoch, drawn anew each epoch, instead of the whole 54,000 images
    "fashion_mnist": [
        "trainer.limit_train_batches=40", "trainer.limit_val_batches=0", "trainer.max_epochs=4",
        "teacher.fit.max_epochs=12",
    ],
}  # fmt: skip
METRICS = ("top1", "nll", "ece")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", default=list(BUDGET), choices=list(BUDGET))
    parser.add_argument("--objectives", nargs="+", default=list(SOFT), choices=list(SOFT))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("outputs/studies/objectives"))
    options = parser.parse_args()
    quiet()
    table = "\n\n".join(study(name, options) for name in options.data)
    (options.out / "table.md").write_text(table + "\n", encoding="utf-8")
    print(table)


def study(data: str, options: argparse.Namespace) -> str:
    """Run what is missing for one data set and return its table in Markdown."""
    rows = Rows(options.out / f"{data}.jsonl")
    done = {(row["objective"], row["temperature"], row["seed"]) for row in rows}
    jobs = [("baseline", 1), *((name, t) for name in options.objectives for t in SOFT[name])]
    for seed in range(options.seeds):
        for objective, temperature in jobs:
            if (objective, temperature, seed) not in done:
                rows.keep([one_run(data, objective, temperature, seed, options.out)])
    return as_markdown(data, rows)


def one_run(data_name: str, objective: str, temperature: float, seed: int, out: Path) -> Row:
    """Train one student and return its numbers on validation and test."""
    started = time.perf_counter()
    chosen = [] if objective == "baseline" else [
        f"objective={objective}", f"objective.temperature={temperature}"
    ]  # fmt: skip
    folder = out.absolute() / "run"
    overrides = [
        f"data={data_name}", f"seed={seed}", f"paths.output_dir={folder}", "logger=none",
        "callbacks=none", "trainer.accelerator=cpu", *BUDGET[data_name], *chosen,
    ]  # fmt: skip
    cfg = composed(*overrides)
    data = read_once(data_name).with_options(seed=seed, batch_size=cfg.data.batch_size)
    if objective == "baseline":
        fitted, _ = fit.fit(auxiliary.supervised_config(cfg, "baseline"), data, None)
    else:
        fitted, _ = fit.fit(cfg, data, teachers.prepare_teacher(cfg, data))
    student = Distiller(
        fitted.student, normalize=fitted.normalize
    )  # the teacher's answers are known
    row = {"objective": objective, "temperature": temperature, "seed": seed}
    answers = evaluation.predict(cfg, student, data)
    for split in evaluation.SPLITS:
        numbers = evaluate(*answers.of("student", split))
        row |= {f"{split}_{name}": numbers[name] for name in METRICS}
    row["seconds"] = round(time.perf_counter() - started, 1)
    return row


@cache
def read_once(data_name: str) -> DataModule:
    """Return a data set; seeds share its splits."""
    return build.build_data(composed(f"data={data_name}"))


def as_markdown(data: str, rows: list[Row]) -> str:
    """Return one line per objective, at the temperature that validation chose."""
    lines = [
        f"**{data}**",
        "",
        "| objective | T | top-1 % | NLL | ECE % |",
        "|---|---|---|---|---|",
    ]
    for objective in dict.fromkeys(row["objective"] for row in rows):
        mine = [row for row in rows if row["objective"] == objective]
        by_temperature = {
            t: [r for r in mine if r["temperature"] == t] for t in {r["temperature"] for r in mine}
        }
        chosen = max(by_temperature, key=lambda t: merit(by_temperature[t]))
        cells = [
            spread([scale * row[f"test_{name}"] for row in by_temperature[chosen]], digits)
            for name, scale, digits in (("top1", 100, 2), ("nll", 1, 4), ("ece", 100, 2))
        ]
        shown = "–" if objective in ("baseline", "logit_mse") else f"{chosen:g}"
        lines.append(f"| {objective} | {shown} | {' | '.join(cells)} |")
    return "\n".join(lines)


def merit(rows: list[Row]) -> tuple[float, float]:
    """Return what validation says of one temperature: higher is better."""
    return (
        statistics.mean(row["val_top1"] for row in rows),
        -statistics.mean(row["val_nll"] for row in rows),
    )


if __name__ == "__main__":
    main()
