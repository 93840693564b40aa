"""A trained student as files that other runtimes run, each judged on the whole test split."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.export import ExportedProgram

from distill import __version__, report
from distill.config import build, checks, read
from distill.data import DataModule
from distill.data.views.build import CLEAN_VIEW
from distill.deploy.export import program, verify
from distill.deploy.export.program import Deployed, Runtime
from distill.deploy.export.verify import Row
from distill.models.build import build_model, normalization
from distill.models.bundle import read_facts
from distill.models.checkpoint import WEIGHTS
from distill.utils.files import resolved_path
from distill.utils.json_files import write_json
from distill.utils.sharing import Sharing

log = logging.getLogger(__name__)

FILES = {"onnx": "student.onnx", "onnx_int8": "student_int8.onnx", "torch_export": "student.pt2"}
RECORD = "export.json"
FLOAT = "torch float"  # the row that the others are compared with
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
WEIGHTS_BY = ("per_channel", "per_tensor")


class TooMuchLost(ValueError):
    """A file answers worse than `export.max_drop` allows."""

    exit_code = 3


class NotAllWritten(ValueError):
    """Some formats were written, and others could not be."""

    exit_code = 3


class File(NamedTuple):
    """A student on disk, and what runs it."""

    path: Path
    run: Runtime


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

    @cached_property
    def program(self) -> ExportedProgram:
        """The model, traced."""
        return program.trace(self.model, self.shape)

    @cached_property
    def graph(self) -> Any:
        """The model as ONNX."""
        from distill.deploy.export import onnx

        return onnx.as_onnx(self.program)


def export(cfg: DictConfig, sharing: Sharing | None = None) -> None:
    """Write a student in every format, judge each file on the test split, and print the table.

    A format that cannot be written, or whose file does not run, keeps no other from being written.

    Raises:
        TooMuchLost: if a file loses more than `export.max_drop` points of top-1.
        NotAllWritten: if a format could not be written, and another was.
        ValueError: for what a person can put right, and where no format could be written.
    """
    cfg = checks.with_checked_values(cfg)
    build.run_imports(cfg)
    check(cfg)
    job = load(cfg, sharing)
    for name in (*FILES.values(), RECORD):  # of an earlier export, which would pass for this one's
        (job.folder / name).unlink(missing_ok=True)
    source = resolved_path(cfg.student.checkpoint)
    files = {FLOAT: File(source if source.is_file() else source / WEIGHTS, job.model)}
    unwritten: dict[str, str] = {}
    for name in cfg.export.formats:
        path = job.folder / FILES[name]
        if made := tried(job, name, path, partial(WRITERS[name], job, path), unwritten):
            files[name] = made
    if len(files) == 1:
        raise ValueError("; ".join(dict.fromkeys(unwritten.values())))
    studied = study_files(job, unwritten) if cfg.export.study else {}

    reference = verify.answers(job.model, verify.test_images(job.data, job.prepare))
    judged = {name: judge(job, file, reference) for name, file in (files | studied).items()}
    costs = verify.milliseconds({n: f.run for n, f in (files | studied).items()}, job.shape)
    rows = {name: judged[name] | costs[name] for name in files}
    study = {name: judged[name] | costs[name] for name in studied}
    if cfg.export.study:
        study |= rounded_answers(reference, job.data.test.labels)

    lost = {name: 100 * (rows[FLOAT]["top1"] - rows[name]["top1"]) for name in files}
    failed = [name for name, points in lost.items() if points > cfg.export.max_drop]
    results = {"formats": rows, "study": study, "failed": failed, "unwritten": unwritten}
    write_record(cfg, job, results)
    print_tables(job, rows, study, unwritten)
    if failed:
        raise TooMuchLost(
            ", ".join(f"{name} loses {lost[name]:.2f} points of top-1" for name in failed)
            + f", more than export.max_drop={cfg.export.max_drop}"
        )
    if unwritten:
        raise NotAllWritten("; ".join(f"{name} was not written: {why}" for name, why in
                                      unwritten.items()))  # fmt: skip


def tried(
    job: Job, name: str, path: Path, write: Callable[[], File], unwritten: dict[str, str]
) -> File | None:
    """Return the file that is written, or None, with why under its name, where none that runs is.

    A disk that is full is no matter of the format, and its error goes on.
    """
    try:
        file = write()
        verify.check_batches(file.run, job.shape, job.data.num_classes, path.name)
    except OSError:
        raise
    except Exception as error:  # exporters, quantisers and runtimes fail in ways of their own
        log.debug("%s", name, exc_info=True)
        path.unlink(missing_ok=True)
        unwritten[name] = program.reason(error)
        return None
    return file


def check(cfg: DictConfig) -> None:
    """Refuse options that are no options, and formats whose packages are not installed."""
    options = cfg.export
    if read.swept():
        raise ValueError("distill-export takes one student at a time: leave out -m")
    unknown = [name for name in options.formats if name not in FILES]
    if unknown or not options.formats:
        wrong = unknown[0] if unknown else "[]"
        raise ValueError(f"export.formats: {wrong} is none of {', '.join(FILES)}")
    if options.weights not in WEIGHTS_BY:
        raise ValueError(f"export.weights={options.weights} is none of {', '.join(WEIGHTS_BY)}")
    dependent = [name for name in options.formats if name.startswith("onnx")]
    dependent += ["export.study"] if options.study else []
    if dependent and not all(map(find_spec, PACKAGES)):
        raise ValueError(f"{dependent[0]} needs pip install 'distill-kd[export]'")
    if not cfg.student.checkpoint:
        raise ValueError("give student.checkpoint=PATH: a student bundle, or a run's .ckpt")


def load(cfg: DictConfig, sharing: Sharing | None = None) -> Job:
    """Return a bundle's student as it is exported, with its data."""
    options, recorded = cfg.export, read_facts(cfg.student.checkpoint)
    data = build.build_data(cfg, build.to_judge(cfg, whole=False), sharing)
    checks.check_classes(cfg, data)
    if differing := checks.differing_views(cfg, data):  # the file has one size, and is judged at it
        raise ValueError(differing)
    student = build_model(read.model_spec(cfg.student), build.data_shape(data), "student")
    normalize = normalization(student, data.in_chans)
    temperature = recorded.get("temperature") if options.temperature else None
    model = Deployed(student, normalize if options.preprocessing else None, temperature).eval()
    facts = {
        "classes": recorded.get("classes") or data.classes,
        "temperature": temperature,
        "input": input_facts(student, data, normalize, options.preprocessing),
        "distill": __version__,
    }
    folder = Path(cfg.paths.output_dir)
    return Job(options, data, model, model_input(model, normalize), facts, folder)


def model_input(model: Deployed, normalize: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what makes the model's input of images in [0, 1]."""
    inside = model.normalize is normalize
    return (lambda images: images) if inside else normalize


def input_facts(
    student: nn.Module, data: DataModule, normalize: Any, inside: bool
) -> dict[str, Any]:
    """Return what a program's input is, in words and numbers, and how images come to its size."""
    mean, std = (values.flatten().tolist() for values in (normalize.mean, normalize.std))
    described = "float32 pixels in [0, 1]" if inside else "float32, (pixels in [0, 1] − mean) / std"
    shape = ["batch", data.in_chans, *data.image_size]
    settings = resolve_model_data_config(student)
    resized = {key: settings[key] for key in CLEAN_VIEW}
    tensor = {"name": "images", "shape": shape, "values": described, "mean": mean, "std": std}
    return {**tensor, **resized}


def judge(job: Job, file: File, reference: Tensor) -> Row:
    """Return the numbers of one file, from its own runtime's logits."""
    logits = verify.answers(file.run, verify.test_images(job.data, job.prepare))
    scores = verify.scores(logits, job.data.test.labels, reference)
    return scores | {"file": file.path.name, "bytes": file.path.stat().st_size}


def write_float(job: Job, path: Path) -> File:
    """Write the student as float ONNX."""
    from distill.deploy.export import onnx

    onnx.write_onnx(job.graph, path, job.facts)
    return File(path, onnx.open_onnx(path))


def write_int8(job: Job, path: Path) -> File:
    """Write the student as int8 ONNX, as the options say."""
    return write_quantized(job, path, job.options.weights, job.options.activations)


def write_quantized(job: Job, path: Path, weights: str, activations: bool) -> File:
    """Write the student as ONNX with int8 weights, and with int8 activations or float ones."""
    from distill.deploy.export import onnx, quantize

    per_channel = weights == "per_channel"
    if activations:
        count = job.options.calibration_images
        batches = verify.calibration_images(job.data, count, job.prepare)
        model = quantize.quantized(job.graph, batches, per_channel)
    else:
        model = quantize.weights_only(job.graph, per_channel)
    onnx.write_onnx(model, path, job.facts)
    return File(path, onnx.open_onnx(path))


def write_program(job: Job, path: Path) -> File:
    """Write the student as a `torch.export` program."""
    program.write_program(job.program, path, job.facts)
    return File(path, program.open_program(path))


WRITERS: dict[str, Callable[[Job, Path], File]] = {
    "onnx": write_float,
    "onnx_int8": write_int8,
    "torch_export": write_program,
}


def study_files(job: Job, unwritten: dict[str, str]) -> dict[str, File]:
    """Write the student quantised in every way that is possible, into `study/`."""
    files = {}
    for weights in WEIGHTS_BY:
        for activations, what in ((False, "weights only"), (True, "weights and activations")):
            name = f"{weights.replace('_', ' ')}, {what}"
            path = job.folder / "study" / f"{re.sub('[ ,]+', '_', name)}.onnx"
            write = partial(write_quantized, job, path, weights, activations)
            if made := tried(job, name, path, write, unwritten):
                files[name] = made
    return files


def rounded_answers(reference: Tensor, target: Tensor) -> dict[str, Row]:
    """Return what rounding the answers alone to 8 bits does.

    Args:
        reference: the float student's logits `[N, K]`.
        target: labels `[N]`.
    """
    from distill.deploy.export import quantize

    logits, step = quantize.quantized_logits(reference)
    probs = quantize.quantized_probabilities(reference)
    lost = probs.gather(1, target[:, None]) == 0
    rounded = verify.scores(quantize.log_probabilities(probs), target, reference)
    if lost.any():
        rounded["nll"] = math.inf
    return {
        "logits": verify.scores(logits, target, reference) | {"step": step},
        "probabilities": rounded | {"share_of_labels_at_0": float(lost.double().mean())},
    }


def print_tables(
    job: Job, rows: dict[str, Row], study: dict[str, Row], unwritten: Mapping[str, str]
) -> None:
    """Print what the files answer and take, where they are, and which there are not."""
    missing: dict[str, Row] = {name: {} for name in unwritten if name in FILES}
    verify.print_rows({**rows, **missing}, f"test split, {len(job.data.test):,} images")
    for name, why in unwritten.items():
        log.warning("%s was not written: %s", name, why)
    if study:
        verify.print_rows({FLOAT: rows[FLOAT], **study}, "what quantising does")
        share = study["probabilities"]["share_of_labels_at_0"]
        log.info("probabilities: the label's rounds to 0 on %.2f %% of the images", 100 * share)
    files = ", ".join(FILES[name] for name in rows if name in FILES)
    log.info("%s, export.json in %s", files, os.path.relpath(job.folder))


def write_record(cfg: DictConfig, job: Job, results: dict[str, Any]) -> None:
    """Write `export.json`: every number, what the files take, and how they were made."""
    run_metadata = report.run_metadata(cfg, job.data)
    runtimes = {name: version(name) for name in PACKAGES if find_spec(name)}
    content = {**results, **run_metadata, **job.facts}
    content["versions"] = run_metadata["versions"] | runtimes
    write_json(job.folder / RECORD, content)
