"""What distillation is worth where labels are few: a pretrained teacher, a small student.

From an image folder (`train/CLASS/*` and `val/CLASS/*` or `test/CLASS/*`) some classes are taken,
and of each a few training pictures with their labels; the other training pictures lose theirs. The
teacher's published weights are fine-tuned on the labelled ones. A student that begins with random
weights then learns from the labels alone, under the teacher on the same pictures, and under the
teacher on the unlabelled pictures too, for as many steps. Every run is an installed command, which
is printed; what has finished is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from distill.metrics import mean_interval
from shared import spread

ROLES = {"teacher": "teacher, fine-tuned", "alone": "student alone", "taught": "distilled"}
MORE = "distilled, also on unlabelled pictures"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="an image folder, such as CIFAR-100 unpacked")
    parser.add_argument("--weights", type=Path, required=True, help="the teacher's, of ImageNet")
    parser.add_argument("--teacher", default="tf_efficientnet_lite0")
    parser.add_argument("--student", default="mobilenetv3_small_050")
    parser.add_argument("--classes", type=int, default=10, help="the first so many by name")
    parser.add_argument("--labelled", type=int, default=50, help="pictures of each class")
    parser.add_argument("--size", type=int, default=96, help="pixels at which they are shown")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=60, help="passes over the labelled pictures")
    parser.add_argument("--lr", default="6e-3", help="of every student")
    parser.add_argument("--teacher-epochs", type=int, default=30)
    parser.add_argument("--override", action="append", default=[], help="of both sweeps")
    parser.add_argument("--out", type=Path, default=Path("outputs/studies/pictures"))
    options = parser.parse_args()
    started = time.perf_counter()
    lay_out(options.folder, options.out, options.classes, options.labelled)
    few, many = options.out / "few", options.out / "many"
    run(command(options, few, "data.batch_size=32"), options.out)
    run(command(options, many, "data.batch_size=64", "data.unlabeled=unlabelled"), options.out)
    table = as_markdown(rows(few), rows(many))
    (options.out / "table.md").write_text(table + "\n", encoding="utf-8")
    print(f"{table}\n{time.perf_counter() - started:.0f} s")


def lay_out(folder: Path, out: Path, classes: int, labelled: int) -> None:
    """Copy the pictures of the case: some with their labels, the others without, and the test's."""
    if (out / "pictures").is_dir():
        return
    held_out = next(folder / name for name in ("test", "val") if (folder / name).is_dir())
    names = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())[:classes]
    building = out / "pictures.part"
    shutil.rmtree(building, ignore_errors=True)
    (out / "unlabelled").mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copytree(held_out / name, building / "test" / name)
        (building / "train" / name).mkdir(parents=True)
        for number, file in enumerate(sorted((folder / "train" / name).iterdir())):
            kept = building / "train" / name / file.name
            rest = out / "unlabelled" / f"{name}-{file.name}"
            shutil.copy(file, kept if number < labelled else rest)
    building.rename(out / "pictures")


def command(options: argparse.Namespace, sweep: Path, *more: str) -> list[str]:
    """Return the command of one sweep over seeds."""
    seeds = ",".join(map(str, range(options.seeds)))
    return [
        "distill", "-m", f"seed={seeds}", "data.seed=0", f"sweep.resume={sweep.name}",
        "data=folder", "data.root=pictures", f"data.image_size={options.size}",
        "teacher=finetuned", f"teacher.name={options.teacher}",
        f"teacher.checkpoint={os.path.relpath(options.weights, options.out)}",
        "teacher.key_map=order", "teacher.fit.batch_size=32",
        f"teacher.fit.max_epochs={options.teacher_epochs}",
        "teacher.fit.ema=0.98",
        "objective.temperature=4",
        "student=timm", f"student.name={options.student}",
        f"trainer.max_epochs={options.epochs}", f"optimizer.lr={options.lr}",
        *more, *options.override,
    ]  # fmt: skip


def run(words: list[str], folder: Path) -> None:
    """Run an installed command in a folder, and print it."""
    print(shlex.join(words), flush=True)
    subprocess.run(words, cwd=folder, check=True)


def rows(sweep: Path) -> list[dict[str, Any]]:
    """Return the summaries of a sweep's runs, in the order of their seeds."""
    found = [json.loads(file.read_text()) for file in sweep.glob("*/summary.json")]
    return sorted(found, key=lambda summary: summary["seed"])


def as_markdown(few: list[dict[str, Any]], many: list[dict[str, Any]]) -> str:
    """Return the table: means over seeds, and what each gains on the line it is compared with."""
    teacher = few[0]["teacher"]
    low, high = teacher["intervals"]["top1"]
    alone, taught, more = (
        [summary[role] for summary in found]
        for found, role in ((few, "baseline"), (few, "student"), (many, "student"))
    )
    lines = [
        "| | top-1 % | NLL | ECE % | gain, points (95 % over seeds) |",
        "|---|---|---|---|---|",
        f"| {ROLES['teacher']} | {100 * teacher['top1']:.2f} ({100 * low:.1f} to "
        f"{100 * high:.1f}) | {teacher['nll']:.3f} | {100 * teacher['ece']:.2f} | |",
        line(ROLES["alone"], alone, None),
        line(ROLES["taught"], taught, alone),
        line(MORE, more, alone),
    ]
    return "\n".join(lines)


def line(label: str, models: list[dict[str, Any]], others: list[dict[str, Any]] | None) -> str:
    """Return one line: mean ± deviation over seeds, and the mean paired difference of top-1."""
    cells = [
        spread([scale * model[name] for model in models], digits)
        for name, scale, digits in (("top1", 100, 2), ("nll", 1, 3), ("ece", 100, 2))
    ]
    gain = ""
    if others is not None:
        points = [
            100 * (one["top1"] - two["top1"]) for one, two in zip(models, others, strict=True)
        ]
        gain = f"{sum(points) / len(points):+.1f}"
        if ends := mean_interval(points):
            gain += f" ({ends[0]:+.1f} to {ends[1]:+.1f})"
            gain += ", cannot be told apart" if ends[0] <= 0 <= ends[1] else ""
    return f"| {label} | {' | '.join(cells)} | {gain} |"


if __name__ == "__main__":
    main()
