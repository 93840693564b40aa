"""How long steps and decoding take here, and how much memory: a few of each are tried out."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from distill.config import read
from distill.config.keys import with_values
from distill.data import DataModule
from distill.data.batch import Batch
from distill.data.sources.splits import Streamed
from distill.data.views.undecoded import Undecoded
from distill.plan.fits import Fit
from distill.plan.memory import (
    Memory,
    gradient_bytes,
    optimizer_bytes,
    saved_bytes,
    weight_bytes,
)
from distill.plan.timing import Clock
from distill.teacher.cached import CachedTeacher
from distill.teacher.records import Array, Fields, Layout
from distill.teacher.store import TeacherStore
from distill.teacher.teacher import Teacher
from distill.training.cache import topk_of
from distill.training.capture import build_graph
from distill.training.fit import student_module
from distill.training.module import Distiller
from distill.training.trainer import compile_model
from distill.training.untrained import build_untrained
from distill.utils.process import cores

WARM, STEPS = 2, 4  # of a trial: that do not count, and that do
FEW = 8  # images of the first batch on a CPU
PATIENCE = 1.0  # seconds of a step on a CPU, for which its batch is made smaller
# Of the trainer, what decides how long a step takes.
KEPT = ("_target_", "accelerator", "precision", "gradient_clip_val", "gradient_clip_algorithm",
        "accumulate_grad_batches", "deterministic", "benchmark", "detect_anomaly", "graph",
        "compile", "log_every_n_steps", "sync_batchnorm")  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """What a few steps of a fit came to.

    Args:
        batch: images of a step as it was tried.
        live: seconds of an image, its teacher asked, or without one.
        fed: seconds of an image, its teacher's answer read; None where it cannot be kept.
        memory: bytes at the full batch.
        checkpoint: bytes of a checkpoint.
    """

    batch: int
    live: float
    fed: float | None
    memory: Memory
    checkpoint: int

    @property
    def step(self) -> float:
        """Seconds of an image without asking its teacher, as far as that is known."""
        return self.live if self.fed is None else self.fed

    @property
    def teacher(self) -> float:
        """Seconds of an image that asking its teacher takes."""
        return max(self.live - self.step, 0.0)


@dataclass(frozen=True)
class Decoding:
    """How fast pictures are read, decoded and cut by themselves.

    Args:
        images_per_second: of all workers together.
        workers: processes; 0 is the one that trains.
        cores: that this machine has for them.
        beside: whether training is on another device, so that it does not share these cores.
    """

    images_per_second: float
    workers: int
    cores: int
    beside: bool

    @property
    def seconds(self) -> float:
        """Seconds that training would wait for an image, if it did nothing itself."""
        if self.workers and not self.beside:  # the cores' share that is gone for training
            return min(self.workers, self.cores) / self.cores / self.images_per_second
        return 1 / self.images_per_second

    def together(self, images: float, seconds: float) -> float:
        """Return the seconds in which so many images are decoded and training has had its own."""
        apart = self.workers and self.beside
        return max(images * self.seconds, seconds) if apart else images * self.seconds + seconds

    def balancing(self, images_per_second: float) -> int:
        """Return how many workers decode as fast as training takes images."""
        each = self.images_per_second / max(self.workers, 1)
        return max(1, math.ceil(images_per_second / each))


class Answered(TeacherStore):
    """A store that has every answer, the same for all, and takes no room on a disk.

    Args:
        samples: rows per view.
        layout: of its records.
    """

    def __init__(self, samples: int, layout: Layout) -> None:
        self.samples, self.views, self.layout = samples, 1, layout
        generator = torch.Generator().manual_seed(0)
        self._answer = layout.encode(torch.randn(1, layout.classes, generator=generator))

    @property
    def writes(self) -> bool:
        """Nothing is ever missing."""
        return False

    def read_fields(self, view: int, rows: Tensor) -> tuple[Fields, Tensor]:
        """Return a copy of the answer for each row."""
        places = torch.zeros(len(rows), dtype=torch.long)
        fields = {name: field[places] for name, field in self._answer.items()}
        return fields, torch.ones(len(rows), dtype=torch.bool)

    def close(self) -> None:
        """There is nothing to let go of."""

    def _there(self, view: int, rows: Array) -> Array:
        return torch.ones(len(rows), dtype=torch.bool).numpy()


@dataclass(frozen=True)
class Repeated:
    """A loader that gives one batch again and again."""

    batch: Any
    times: int

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[Any]:
        return repeat(self.batch, self.times)


class Repeating(DataModule):
    """Data of which training shows one batch, read once, again and again.

    Args:
        data: whose batch it is.
        steps: how often.
    """

    def __init__(self, data: DataModule, steps: int) -> None:
        self.__dict__.update(data.__dict__)
        self.num_workers, self._steps = 0, steps

    def train_dataloader(self) -> Any:
        """Return the batch as often as it is to be shown."""
        return Repeated(next(iter(super().train_dataloader())), self._steps)


def tried(fit: Fit, teacher: Teacher | None, work: Path) -> Trial:
    """Take a few steps of a fit and throw them away.

    Args:
        fit: what is to be trained.
        teacher: one of its teacher's size.
        work: a folder for what is written meanwhile.

    Raises:
        ValueError: for what a person can put right.
    """
    cfg = for_trial(fit.cfg, work)
    batch, activations = fit.data.batch_size, None
    if not read.on_gpu(cfg):
        batch, activations = on_cpu(cfg, fit.data, teacher)
    gathered = cfg.trainer.accumulate_grad_batches
    steps = WARM + gathered * math.ceil(STEPS / gathered)
    data = fit.data.with_options(
        seed=fit.data.seed, batch_size=batch, views=fit.data.views,
        unlabeled=fit.data.unlabeled is not None,
    )  # fmt: skip
    data = Repeating(data, steps)
    cfg = with_values(cfg, {"data.batch_size": batch})
    live = trained(cfg, data, teacher, work / "live")
    fed = None
    if teacher is not None and not live.module.objective.needs_teacher_features:
        store = fit.cfg.store
        layout = Layout(data.num_classes, store.dtype, topk_of(fit.cfg, data))
        answered = Answered(int(data.pool.index.max()) + 1, layout)
        device_gb = store.device_gb if read.on_gpu(cfg) else 0.0
        kept = CachedTeacher(teacher, {"train": answered}, device_gb)
        fed = trained(cfg, data, teacher, work / "fed", kept).seconds
    memory = live.memory
    if activations is not None:
        memory = replace(memory, activations=activations)
    return Trial(batch, live.seconds, fed, memory, live.checkpoint)


def for_trial(cfg: DictConfig, work: Path) -> DictConfig:
    """Return the configuration of a fit of one epoch on one device, without what it would keep."""
    trainer = {key: value for key, value in read.plain(cfg.trainer).items() if key in KEPT}
    callbacks = {
        name: read.plain(node) for name, node in read.present(cfg.callbacks)
        if not ({"dirpath", "monitor"} & {*node} or name in ("progress", "head_first"))
    }  # fmt: skip
    short = {"max_epochs": 1, "devices": 1, "num_nodes": 1, "limit_val_batches": 0,
             "num_sanity_val_steps": 0}  # fmt: skip
    values: dict[str, Any] = {
        "trainer": {**trainer, **short}, "callbacks": callbacks, "logger": {}, "scheduler": None,
        "ckpt_path": None, "resume": None, "paths.output_dir": str(work),
    }  # fmt: skip
    if "layer_decay" in cfg.optimizer:  # a schedule applies it
        values["optimizer.layer_decay"] = None
    if cfg.objective.get("temperature") == "auto":
        values["objective.temperature"] = 1.0  # any takes as long
    return with_values(cfg, values)


@dataclass(frozen=True)
class Steps:
    """What a short training came to: seconds of an image, bytes, and the student it left."""

    seconds: float
    memory: Memory
    checkpoint: int
    module: Distiller


def trained(
    cfg: DictConfig,
    data: DataModule,
    teacher: Teacher | None,
    work: Path,
    cached: CachedTeacher | None = None,
) -> Steps:
    """Train for a few steps as a run would, and measure the last of them."""
    work.mkdir(parents=True, exist_ok=True)
    untrained = build_untrained(cfg, data)
    trainer, clock = untrained.trainer, Clock(WARM)
    trainer.callbacks.append(clock)  # type: ignore[attr-defined]  # that Lightning adds later
    if teacher is not None:
        teacher = copy.copy(teacher)
        teacher.batch_size = data.batch_size
    student = student_module(cfg, data, teacher, untrained)
    compile_model(cfg, student.student)
    if cached is not None:
        student.cached_teacher = cached
    student.graph = build_graph(cfg, student, data, trainer)
    device, before = trainer.strategy.root_device, 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    try:
        trainer.fit(student, datamodule=data)
    finally:
        data.views_by_step = False
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
    trainer.save_checkpoint(work / "trial.ckpt")
    parts = Memory(
        teacher=weight_bytes(teacher.model if teacher else None),
        weights=weight_bytes(student.student) + weight_bytes(student.objective),
        gradients=gradient_bytes(student),
        optimizer=optimizer_bytes(trainer.optimizers[0]),
        activations=0,
    )
    memory = replace(parts, activations=max(peak - parts.total, 0))
    images = clock.steps * data.batch_size
    return Steps(clock.seconds / images, memory, (work / "trial.ckpt").stat().st_size, student)


def on_cpu(cfg: DictConfig, data: DataModule, teacher: Teacher | None) -> tuple[int, int]:
    """Return a batch size whose steps take no more than a moment, and a full batch's activations.

    They are counted on a few images: what is kept of each is the same.
    """
    few = min(FEW, data.labeled_per_batch)
    untrained = build_untrained(cfg, data)
    if teacher is not None:
        teacher = copy.copy(teacher)
        teacher.batch_size = few
    module = student_module(cfg, data, teacher, untrained)
    module.student.train()
    keys = torch.arange(few)
    batch = next(data.in_order(data.train, 0, [keys], torch.device("cpu"), name="train"))
    weights = [*module.parameters(), *module.buffers()]
    with untrained.trainer.precision_plugin.forward_context():
        module.learned(batch, step=0)  # what is allocated at the first call is not counted
        started = time.perf_counter()
        kept, learned = saved_bytes(lambda: module.learned(batch, step=0), weights)
    learned.losses["loss"].backward()
    each = (time.perf_counter() - started) / few
    fitting = int(PATIENCE / each)
    size = data.batch_size if fitting >= data.batch_size else max(min(few, fitting), 2, fitting)
    return min(size, data.batch_size), kept * data.batch_size // few


def decoding_of(data: DataModule, seconds: float, device: torch.device) -> Decoding | None:
    """Return how fast a training loader gives pictures; None of images that lie in memory.

    Args:
        data: whose loader is asked, with its workers.
        seconds: for how long, after each worker's first batch.
        device: where training is, and some pictures are decoded.
    """
    if not isinstance(data.train, Streamed):
        return None
    batches = passes(data)
    for _ in range(max(1, data.num_workers)):
        next(batches).to(device)
    started, images = time.perf_counter(), 0
    while (spent := time.perf_counter() - started) < seconds or not images:
        batch = next(batches)
        if isinstance(batch.view, Undecoded):
            batch.to(device).view.max().item()  # which waits for the device
        images += len(batch)
    spent = time.perf_counter() - started
    return Decoding(images / spent, data.num_workers, cores(), device.type != "cpu")


def passes(data: DataModule) -> Iterator[Batch]:
    """Yield the batches of a training loader without an end."""
    loader = data.train_dataloader()
    while True:
        yield from islice(loader, len(loader))


def same_trial(fit: Fit, teacher: Teacher | None) -> str:
    """Return a text that is the same for fits whose steps take as long: one is tried for all."""
    cfg = fit.cfg
    plain: Mapping[str, Any] = read.plain(cfg)
    trainer = {key: plain["trainer"].get(key) for key in KEPT}
    terms = {name: term.get("loss") for name, term in plain["objective"]["terms"].items()}
    callbacks = {name: node and node.get("_target_") for name, node in (
        plain["callbacks"] or {}).items()}  # fmt: skip
    student = {key: plain["student"].get(key) for key in ("name", "args")}
    taught = None
    if teacher is not None:
        taught = [repr(teacher.model), teacher.batch_size, teacher.precision, teacher.device]
    shown = fit.data.batch_size, fit.data.image_size, fit.data.num_classes, plain["data"]["view"]
    kept = {key: plain["store"].get(key) for key in ("dtype", "topk")}
    about = student, taught, terms, trainer, callbacks, shown, plain["optimizer"].get("opt"), kept
    return repr(about)
