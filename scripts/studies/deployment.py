"""What int8 and sparsity cost students of three objectives: mean ± deviation over seeds, on test.

Each student is trained twice for the same epochs, dense and with `callbacks=sparsity`, and both are
exported as int8 by onnxruntime, calibrated on the same training views; int8 is judged by that
file's answers. A temperature is fitted on the float student's validation answers and kept for its
int8 file. Runs are kept in a file as they finish, so an interrupted study continues.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from distill import evaluation
from distill.config import build
from distill.deploy.export import Job, verify, write_quantized
from distill.deploy.export.program import Deployed
from distill.metrics import expected_calibration_error, fit_temperature
from distill.training import fit, pruning, teachers
from distill.training.module import Distiller
from shared import Row, Rows, composed, quiet, spread

OBJECTIVES = {
    "cross-entropy": ["objective=supervised", "teacher=none"],
    "KL": ["objective=kd"],
    "soft hinge": ["objective=soft_hinge"],
}
WEIGHTS = {"dense": "callbacks=none", "sparse": "callbacks=sparsity"}
SHOWN = (("top1", 100, 2), ("nll", 1, 4), ("ece", 100, 2), ("ece_after_scaling", 100, 2),
         ("zeros", 100, 0), ("kilobytes", 1, 0))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="fashion_mnist")
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=OBJECTIVES)
    parser.add_argument("--epochs", type=int, default=5, help="of students and teacher")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("outputs/studies/deployment"))
    options = parser.parse_args()
    quiet()
    rows = Rows(options.out / f"{options.data}.jsonl")
    for seed in range(options.seeds):
        for objective in options.objectives:
            for weights in WEIGHTS:
                key = {"seed": seed, "objective": objective, "weights": weights}
                if not any(key.items() <= row.items() for row in rows):
                    rows.keep({**key, **row} for row in one_run(key, options))
    table = as_markdown(rows)
    (options.out / "table.md").write_text(table + "\n", encoding="utf-8")
    print(table)


def one_run(key: Row, options: argparse.Namespace) -> list[Row]:
    """Train one student and return its numbers, float and int8."""
    folder = options.out.absolute() / "run"
    cfg = composed(
        f"data={options.data}", f"seed={key['seed']}", f"paths.output_dir={folder}", "logger=none",
        "trainer.accelerator=cpu", "trainer.limit_val_batches=0",
        f"trainer.max_epochs={options.epochs}", *OBJECTIVES[key["objective"]],
        WEIGHTS[key["weights"]],
    )  # fmt: skip
    if cfg.teacher.fit:
        cfg.teacher.fit.max_epochs = options.epochs
    data = build.build_data(cfg)
    fitted, _ = fit.fit(cfg, data, teachers.prepare_teacher(cfg, data))
    return judged(cfg, Distiller(fitted.student, normalize=fitted.normalize), data, folder)


def judged(cfg: Any, student: Distiller, data: Any, folder: Path) -> list[Row]:
    """Return a student's numbers on the test split, in float and as an int8 file."""
    scaling = fit_temperature(*evaluation.predict(cfg, student, data).of("student", "val"))
    model = Deployed(student.student, student.normalize, None).cpu().eval()
    job = Job(composed(name="export").export, data, model, lambda images: images, {}, folder)
    file = write_quantized(job, folder / "int8.onnx", "per_channel", activations=True)
    size = fit.save_bundle(student, data, folder / "student", {}) / "model.safetensors"
    counted = pruning.zeros(student.student)
    zeros = counted["zeros"] / counted["weights"]
    reference = verify.answers(model, verify.test_images(data, job.prepare))
    rows = []
    for kind, answer, path in (("float", model, size), ("int8", file.run, file.path)):
        logits = verify.answers(answer, verify.test_images(data, job.prepare))
        scaled = (logits.double() / (scaling.temperature or 1.0)).softmax(dim=1)
        after = float(expected_calibration_error(scaled, data.test.labels))
        numbers = verify.scores(logits, data.test.labels, reference)
        rows.append({"kind": kind, **numbers, "ece_after_scaling": after, "zeros": zeros,
                     "kilobytes": path.stat().st_size / 1000})  # fmt: skip
    return rows


def as_markdown(rows: list[Row]) -> str:
    """Return one line for each objective, kind of weights and kind of numbers."""
    lines = [
        "| objective | student | top-1 % | NLL | ECE % | ECE % after T | zeros % | KB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = ("objective", "weights", "kind")
    for told in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        mine = [row for row in rows if tuple(row[name] for name in names) == told]
        cells = [spread([scale * row[key] for row in mine], n) for key, scale, n in SHOWN]
        objective, weights, kind = told
        lines.append(f"| {objective} | {weights}, {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
