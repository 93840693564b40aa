"""Compare int8 students at equal data on digits: mean ± deviation over seeds, on the test split.

A student is distilled, then trained on under the same teacher for the same epochs once as it is and
once with int8's rounding in the forward pass (experiment=qad). Each of the three is exported as
int8 by onnxruntime, calibrated on the same training views, and judged by that file's answers.
Runs are kept in a file as they finish, so an interrupted study continues.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from distill.config import build
from distill.deploy.export import WEIGHTS_BY, Job, verify, write_quantized
from distill.deploy.export.program import Deployed
from distill.training import fit, teachers
from distill.training.module import Distiller
from shared import Row, Rows, composed, quiet, spread

STUDENTS = {
    "small": [],
    "mobilenetv3_small_050": [
        "student=timm", "student.name=mobilenetv3_small_050", "trainer.max_epochs=20",
    ],
}  # fmt: skip
FURTHER = {"as distilled": None, "trained on": ["callbacks=none"], "trained on, int8 aware": []}
SHOWN = (("top1", 100, 2), ("nll", 1, 4), ("agreement", 100, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--students", nargs="+", default=list(STUDENTS), choices=list(STUDENTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("outputs/studies/quantization"))
    options = parser.parse_args()
    quiet()
    table = "\n\n".join(study(name, options) for name in options.students)
    (options.out / "table.md").write_text(table + "\n", encoding="utf-8")
    print(table)


def study(student: str, options: argparse.Namespace) -> str:
    """Run what is missing for one student and return its table in Markdown."""
    rows = Rows(options.out / f"{student}.jsonl")
    for seed in range(options.seeds):
        if seed not in {row["seed"] for row in rows}:
            rows.keep(one_seed(student, seed, options.out.absolute() / "run"))
    return as_markdown(student, rows)


def one_seed(student: str, seed: int, folder: Path) -> list[Row]:
    """Train one student three ways and return the numbers of each, float and int8."""
    start, rows = folder / "student", []
    fixed = [f"seed={seed}", f"paths.output_dir={folder}", "logger=none", "trainer.accelerator=cpu"]
    for name, overrides in FURTHER.items():
        if overrides is None:
            chosen = ["callbacks=none", *STUDENTS[student]]
        else:
            chosen = ["experiment=qad", f"student.checkpoint={start}", *overrides]
        cfg = composed(*fixed, *chosen)
        data = build.build_data(cfg)
        fitted, _ = fit.fit(cfg, data, teachers.prepare_teacher(cfg, data))
        if overrides is None:
            fit.save_bundle(fitted, data, start, {})
        for kind, numbers in judged(fitted, data, folder).items():
            rows.append({"seed": seed, "training": name, "kind": kind, **numbers})
    return rows


def judged(fitted: Distiller, data: Any, folder: Path) -> dict[str, Row]:
    """Return a student's numbers on the test split, in float and as int8 files."""
    model = Deployed(fitted.student, fitted.normalize, None).eval()
    job = Job(composed(name="export").export, data, model, lambda images: images, {}, folder)
    target = data.test.labels
    reference = verify.answers(model, verify.test_images(data, job.prepare))
    rows = {"float": verify.scores(reference, target, reference)}
    for weights in WEIGHTS_BY:
        file = write_quantized(job, folder / f"{weights}.onnx", weights, activations=True)
        logits = verify.answers(file.run, verify.test_images(data, job.prepare))
        rows[f"int8 {weights}"] = verify.scores(logits, target, reference)
    return rows


def as_markdown(student: str, rows: list[Row]) -> str:
    """Return one line for each way of training and each kind of file."""
    lines = [
        f"**{student}**",
        "",
        "| training | file | top-1 % | NLL | agreement with its float % |",
        "|---|---|---|---|---|",
    ]
    for told in FURTHER:
        for kind in dict.fromkeys(row["kind"] for row in rows):
            mine = [r for r in rows if (r["training"], r["kind"]) == (told, kind)]
            cells = [spread([scale * r[key] for r in mine], n) for key, scale, n in SHOWN]
            lines.append(f"| {told} | {kind.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
