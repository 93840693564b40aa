"""A trained student as files that other runtimes run, each judged on the whole test split."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor, nn

from distill import __version__, config, report
from distill.data import DataModule
from distill.export import program, verify
from distill.export.program import Deployed, Runtime
from distill.export.verify import Row
from distill.models.build import build_model, normalization
from distill.models.bundle import WEIGHTS, read_facts

log = logging.getLogger(__name__)

FILES = {"onnx": "student.onnx", "onnx_int8": "student_int8.onnx", "torch_export": "student.pt2"}
FLOAT = "torch float"  # the row that the others are compared with
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
WEIGHTS_BY = ("per_channel", "per_tensor")


class TooMuchLost(ValueError):
    """A file answers worse than `export.max_drop` allows."""

    exit_code = 3


@dataclass(frozen=True)
class Job:
    """What is exported, and what it is judged by."""

    options: DictConfig
    data: DataModule
    model: Deployed
    prepare: Callable[[Tensor], Tensor]  # images in [0, 1] → what the model takes
    facts: dict[str, Any]
    folder: Path

    @property
    def shape(self) -> tuple[int, ...]:
        """`(C, H, W)` of an image."""
        return (self.data.in_chans, *self.data.image_size)


def export(cfg: DictConfig) -> None:
    """Write a student in every format, judge each file on the test split, and print the table.

    Raises:
        TooMuchLost: if a file loses more than `export.max_drop` points of top-1.
        ValueError: for what a person can put right.
    """
    check(cfg)
    job = load(cfg)
    reference = verify.answers(job.model, verify.test_images(job.data, job.prepare))
    bundle = Path(cfg.student.checkpoint)
    rows = {FLOAT: judged(job, job.model, reference, bundle / WEIGHTS)}
    traced = program.trace(job.model, job.shape)
    for name in cfg.export.formats:
        path = job.folder / FILES[name]
        rows[name] = judged(job, WRITERS[name](job, traced, path), reference, path)
    study = studied(job, traced, reference, rows[FLOAT]) if cfg.export.study else {}
    lost = {name: points_lost(rows[FLOAT], rows[name]) for name in cfg.export.formats}
    failed = [name for name, points in lost.items() if points > cfg.export.max_drop]
    write_record(cfg, job, rows, study, failed)
    verify.print_rows(rows, f"test split, {len(job.data.test):,} images")
    if study:
        verify.print_rows({FLOAT: rows[FLOAT], **study}, "what quantising does")
    log.info(
        "%s, export.json in %s", ", ".join(FILES[n] for n in lost), os.path.relpath(job.folder)
    )
    if failed:
        raise TooMuchLost(
            ", ".join(f"{name} loses {lost[name]:.2f} points of top-1" for name in failed)
            + f", more than export.max_drop={cfg.export.max_drop}"
        )


def check(cfg: DictConfig) -> None:
    """Refuse options that are no options, and formats whose packages are not installed."""
    options = cfg.export
    unknown = [name for name in options.formats if name not in FILES]
    if unknown or not options.formats:
        asked = unknown[0] if unknown else "[]"
        raise ValueError(f"export.formats: {asked} is none of {', '.join(FILES)}")
    if options.weights not in WEIGHTS_BY:
        raise ValueError(f"export.weights={options.weights} is none of {', '.join(WEIGHTS_BY)}")
    if not isinstance(options.calibration_images, int) or options.calibration_images < 1:
        raise ValueError(f"export.calibration_images={options.calibration_images} are no images")
    if not isinstance(options.max_drop, int | float) or not options.max_drop >= 0:
        raise ValueError(f"export.max_drop must be points from 0 on, got {options.max_drop}")
    asked = [name for name in options.formats if name.startswith("onnx")]
    asked += ["export.study"] if options.study else []
    if asked and not all(map(find_spec, PACKAGES)):
        raise ValueError(f"{asked[0]} needs pip install 'distill-kd[export]'")
    if not cfg.student.checkpoint:
        raise ValueError("give student.checkpoint=PATH: a student bundle")


def load(cfg: DictConfig) -> Job:
    """Return a bundle's student as it is exported, with its data."""
    options, known = cfg.export, read_facts(cfg.student.checkpoint)
    data = config.build_data(cfg)
    student = build_model(config.model_spec(cfg.student), config.data_shape(data), "student")
    normalize = normalization(student, data.in_chans)
    temperature = known.get("temperature") if options.temperature else None
    model = Deployed(student, normalize if options.preprocessing else None, temperature).eval()
    facts = {
        "classes": data.classes,
        "temperature": temperature,
        "input": input_facts(data, normalize, options.preprocessing),
        "distill": __version__,
    }
    folder = Path(cfg.paths.output_dir)
    return Job(options, data, model, model_input(model, normalize), facts, folder)


def model_input(model: Deployed, normalize: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what makes the model's input of images in [0, 1]."""
    inside = model.normalize is normalize
    return (lambda images: images) if inside else normalize


def input_facts(data: DataModule, normalize: Any, inside: bool) -> dict[str, Any]:
    """Return what a program's input is, in words and numbers."""
    mean, std = (values.flatten().tolist() for values in (normalize.mean, normalize.std))
    described = "float32 pixels in [0, 1]" if inside else "float32, (pixels in [0, 1] − mean) / std"
    shape = ["batch", data.in_chans, *data.image_size]
    return {"name": "images", "shape": shape, "values": described, "mean": mean, "std": std}


def judged(job: Job, run: Runtime, reference: Tensor, path: Path) -> Row:
    """Return the numbers of one file, from its own runtime's logits."""
    logits = verify.answers(run, verify.test_images(job.data, job.prepare))
    found = verify.scores(logits, job.data.test.labels, reference)
    found |= verify.costs(run, job.shape, job.data.num_classes)
    return found | {"file": path.name, "bytes": path.stat().st_size}


def write_float(job: Job, traced: Any, path: Path) -> Runtime:
    """Write the student as float ONNX."""
    from distill.export import onnx

    onnx.write_onnx(onnx.as_onnx(traced), path, job.facts)
    return onnx.open_onnx(path)


def write_int8(job: Job, traced: Any, path: Path) -> Runtime:
    """Write the student as int8 ONNX, as the options say."""
    per_channel, activations = job.options.weights == "per_channel", job.options.activations
    return write_quantized(job, traced, path, per_channel, activations)


def write_quantized(
    job: Job, traced: Any, path: Path, per_channel: bool, activations: bool
) -> Runtime:
    """Write the student as ONNX with int8 weights, and with int8 activations or float ones."""
    from distill.export import onnx, quantize

    model = onnx.as_onnx(traced)
    if activations:
        count = job.options.calibration_images
        batches = verify.calibration_images(job.data, count, job.prepare)
        model = quantize.quantized(model, batches, per_channel)
    else:
        model = quantize.weights_only(model, per_channel)
    onnx.write_onnx(model, path, job.facts)
    return onnx.open_onnx(path)


def write_program(job: Job, traced: Any, path: Path) -> Runtime:
    """Write the student as a `torch.export` program."""
    program.write_program(traced, path, job.facts)
    return program.open_program(path)


WRITERS: dict[str, Callable[[Job, Any, Path], Runtime]] = {
    "onnx": write_float,
    "onnx_int8": write_int8,
    "torch_export": write_program,
}


def studied(job: Job, traced: Any, reference: Tensor, exact: Row) -> dict[str, Row]:
    """Return the numbers of every way to quantise the student, whose files go to `study/`."""
    rows: dict[str, Row] = {}
    for weights in WEIGHTS_BY:
        for activations in (False, True):
            name = f"{weights}, {'weights+activations' if activations else 'weights only'}"
            path = job.folder / "study" / f"{weights}{'_activations' if activations else ''}.onnx"
            run = write_quantized(job, traced, path, weights == "per_channel", activations)
            rows[name] = judged(job, run, reference, path)
    return rows | studied_answers(reference, job.data.test.labels, exact)


def studied_answers(reference: Tensor, target: Tensor, exact: Row) -> dict[str, Row]:
    """Return what rounding the answers alone to 8 bits does.

    Args:
        reference: the float student's logits `[N, K]`.
        target: labels `[N]`.
        exact: the float student's own numbers.
    """
    from distill.export import quantize

    logits, step = quantize.quantized_logits(reference)
    changed = verify.scores(logits, target, reference)
    moved = {"step": step, "nll_change": abs(changed["nll"] - exact["nll"])}
    probs = quantize.quantized_probabilities(reference)
    lost = probs.gather(1, target[:, None]) == 0
    rounded = verify.scores(quantize.log_probabilities(probs), target, reference)
    rounded["nll"] = math.inf if lost.any() else rounded["nll"]
    return {
        "logits": changed | moved,
        "probabilities": rounded | {"share_of_labels_at_0": float(lost.double().mean())},
    }


def points_lost(exact: Row, row: Row) -> float:
    """Return how many points of top-1 a row has lost."""
    return 100 * (exact["top1"] - row["top1"])


def write_record(
    cfg: DictConfig, job: Job, rows: dict[str, Row], study: dict[str, Row], failed: list[str]
) -> None:
    """Write `export.json`: every number, what the files take, and how they were made."""
    circumstances = report.circumstances(cfg, job.data)
    runtimes = {name: version(name) for name in PACKAGES if find_spec(name)}
    content = {
        "formats": rows,
        "study": study,
        "failed": failed,
        **job.facts,
        **circumstances,
        "versions": circumstances["versions"] | runtimes,
    }
    report.write_json(job.folder / "export.json", content)
