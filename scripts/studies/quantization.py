"""Compare int8 students at equal data on digits: mean ± deviation over seeds, on the test split.

A student is distilled, then trained on under the same teacher for the same epochs once as it is and
once with int8's rounding in the forward pass (experiment=qad). Each of the three is exported as
int8 by onnxruntime, calibrated on the same training views, and judged by that file's answers.
Runs are kept in a file as they finish, so an interrupted study continues.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import distill  # noqa: F401  (first: it makes torchvision importable)
from distill import config, run
from distill.cli import CONF
from distill.export import WEIGHTS_BY, Job, verify, write_quantized
from distill.export.program import Deployed
from distill.module import Distiller

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
    options.out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)  # models this small lose more to a second thread than they gain
    table = "\n\n".join(study(name, options) for name in options.students)
    (options.out / "table.md").write_text(table + "\n", encoding="utf-8")
    print(table)


def study(student: str, options: argparse.Namespace) -> str:
    """Run what is missing for one student and return its table in Markdown."""
    file = options.out / f"{student}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for seed in range(options.seeds):
        if seed not in {row["seed"] for row in rows}:
            found = one_seed(student, seed, options.out.absolute() / "run")
            rows += found
            with file.open("a") as log:
                log.writelines(json.dumps(row) + "\n" for row in found)
    return as_markdown(student, rows)


def one_seed(student: str, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Train one student three ways and return the numbers of each, float and int8."""
    start, rows = folder / "student", []
    for name, overrides in FURTHER.items():
        if overrides is None:
            cfg = composed(folder, seed, "callbacks=none", *STUDENTS[student])
        else:
            cfg = composed(
                folder, seed, "experiment=qad", f"student.checkpoint={start}", *overrides
            )
        data = config.build_data(cfg)
        fitted, _ = run.fit(cfg, data, run.prepare_teacher(cfg, data))
        if overrides is None:
            run.save_bundle(fitted, data, start, {})
        for kind, numbers in judged(fitted, data, folder).items():
            rows.append({"seed": seed, "training": name, "kind": kind, **numbers})
            print(student, rows[-1], flush=True)
    return rows


def composed(folder: Path, seed: int, overrides: list[str]) -> DictConfig:
    """Return a run's configuration."""
    fixed = [f"seed={seed}", f"paths.output_dir={folder}", "logger=none", "trainer.accelerator=cpu"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=[*fixed, *overrides])


def judged(fitted: Distiller, data: Any, folder: Path) -> dict[str, dict[str, Any]]:
    """Return a student's numbers on the test split, in float and as int8 files."""
    model = Deployed(fitted.student, fitted.normalize, None).eval()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        options = compose("export").export
    job = Job(options, data, model, lambda images: images, {}, folder)
    target = data.test.labels
    reference = verify.answers(model, verify.test_images(data, job.prepare))
    rows = {"float": verify.scores(reference, target, reference)}
    for weights in WEIGHTS_BY:
        file = write_quantized(job, folder / f"{weights}.onnx", weights, activations=True)
        logits = verify.answers(file.run, verify.test_images(data, job.prepare))
        rows[f"int8 {weights}"] = verify.scores(logits, target, reference)
    return rows


def as_markdown(student: str, rows: list[dict[str, Any]]) -> str:
    """Return one line for each way of training and each kind of file."""
    lines = [
        f"**{student}**",
        "",
        "| training | file | top-1 % | NLL | agreement with its float % |",
        "|---|---|---|---|---|",
    ]
    for training in FURTHER:
        for kind in dict.fromkeys(row["kind"] for row in rows):
            mine = [r for r in rows if (r["training"], r["kind"]) == (training, kind)]
            cells = [spread([scale * r[key] for r in mine], n) for key, scale, n in SHOWN]
            lines.append(f"| {training} | {kind.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    """Return mean ± standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    main()
