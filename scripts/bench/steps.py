"""Time a training step: ours against the leanest torch loop, and with and without the teacher.

Ours is the whole of what `distill` runs: views made from uint8 images, look-ups in the store,
Lightning, logging, schedule. The bare loop is given the same views as normalised float tensors and
has nothing in it but the two models, the loss and the optimiser. Each turn is a fit of its own; its
first steps do not count. Data are random images of the pair's size: what is in them costs nothing.

A row compares images per second. `per step` of logging is the share of a step's time that is spent
in `log_dict` and in the loggers.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from measure import Row, print_rows, ratio, rounds
from omegaconf import OmegaConf, open_dict
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor
from torch.nn import functional as F

from distill.config import build, read
from distill.config.overrides import CONF
from distill.data import DataModule
from distill.data.sources.splits import Resident, Source
from distill.metrics.cost import flops
from distill.models.build import ModelSpec, build_model
from distill.plan.timing import WARM, Clock, wait
from distill.teacher.teacher import Teacher
from distill.training import fit, teachers
from distill.training.module import Distiller, create_optimizer
from distill.training.untrained import build_untrained

BATCH = 128
CIFAR = ["student=timm", "student.name=cifar_resnet8x4", "student.lr=1e-3"]
PAIRS = {  # name → teacher, overrides for the student, shape of an image, K
    "cifar_resnet32x4 → cifar_resnet8x4": ("cifar_resnet32x4", CIFAR, (3, 32, 32), 100),
    "resnet18 → cifar_resnet8x4": ("resnet18", CIFAR, (3, 32, 32), 100),
    "digits' default pair": (None, [], (1, 32, 32), 10),
}
SIDES = {  # how to run ours
    "live": ["store=off"],
    "fed": ["store=disk", "store.views=1", "store.dtype=float32"],
    "supervised": ["teacher=none", "objective=supervised", "store=off"],
}
LOGGING = (
    (Distiller, "log_dict"),
    (CSVLogger, "log_metrics"),
    (TensorBoardLogger, "log_metrics"),
)


def clock_of(trainer: pl.Trainer) -> Clock:
    """Return the clock among a trainer's callbacks."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next(callback for callback in callbacks if isinstance(callback, Clock))


class Pair:
    """A teacher and a student, with data of their size.

    Args:
        name: of `PAIRS`.
        steps: of a turn that count.
        work: a folder.
        batch: images in a step.
        warm: steps of a turn that do not count.
    """

    def __init__(
        self, name: str, steps: int, work: Path, batch: int = BATCH, warm: int = WARM
    ) -> None:
        self.name, self.steps, self.work = name, steps, work
        self.batch, self.warm = batch, warm
        self.teacher_name, self.overrides, shape, classes = PAIRS[name]
        count = (steps + self.warm) * self.batch
        self.source = Source(
            name="random",
            classes=[str(k) for k in range(classes)],
            train=random_split(count, shape, classes),
            val=random_split(2 * classes, shape, classes),
            test=random_split(2 * classes, shape, classes),
            channels=shape[0],
        )
        self.view = {"pad": 4, "flip": True, "erase": 0.25} if shape[0] == 3 else {"pad": 1}
        self.data = self.make_data()

    def make_data(self, **more: Any) -> DataModule:
        """Return the images and their views."""
        return DataModule(self.source, view=self.view, batch_size=self.batch, **more)

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher that separate runs use."""
        return self.make_teacher()

    def make_teacher(self, data: DataModule | None = None) -> Teacher:
        """Return a teacher with random weights: they cost what trained ones do."""
        data = data or self.data
        spec = ModelSpec(self.teacher_name)
        if self.teacher_name is None:
            spec = read.model_spec(self.config([]).teacher)
        return teachers.as_teacher(build_model(spec, build.data_shape(data), "teacher"), data)

    def config(self, overrides: list[str]) -> Any:
        """Return the default configuration of a run that is as long as a turn."""
        folder = self.work / "run"
        short = [
            "trainer.max_epochs=1", f"trainer.limit_train_batches={self.steps + self.warm}",
            "trainer.limit_val_batches=0", "callbacks=none", f"paths.cache={self.work}/cache",
            f"paths.output_dir={folder}",
        ]  # fmt: skip
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", overrides=[*short, *self.overrides, *overrides])
        with open_dict(cfg):
            cfg.callbacks = {"clock": {"_target_": "distill.plan.timing.Clock", "warm": self.warm}}
            cfg.data.views = OmegaConf.select(cfg, "store.views")
        return cfg

    def ours(self, side: str, more: Sequence[str] = ()) -> float:
        """Return images per second of our own run."""
        clock = clock_of(self.trained(side, more)[1])
        return self.batch * clock.steps / clock.seconds

    def trained(self, side: str, more: Sequence[str] = ()) -> tuple[Distiller, pl.Trainer]:
        """Return the student and the trainer of our own run, as long as a turn."""
        cfg = self.config([*SIDES[side], *more])
        whole = self.data
        if cfg.data.views_per_step > 1:
            whole = self.make_data(views_per_step=2, strong_view=read.plain(cfg.data.strong_view))
        data = whole.with_options(seed=0, batch_size=self.batch, views=cfg.data.views)
        teacher = None if side == "supervised" else self.teacher
        return fit.fit(cfg, data, teacher)

    def bare(self, side: str) -> float:
        """Return images per second of the leanest loop."""
        cfg = self.config(SIDES[side])
        device = build_untrained(cfg, self.data).trainer.strategy
        spec = read.model_spec(cfg.student)
        student = build_model(spec, build.data_shape(self.data), "student")
        student.to(device.root_device).train()
        optimizer = create_optimizer(student, read.plain(cfg.optimizer))
        teacher = None if side == "supervised" else self.teacher.to(device.root_device).model
        alpha, temperature = cfg.objective.get("alpha"), cfg.objective.get("temperature")
        batches = [(v.to(device.root_device), y.to(device.root_device)) for v, y in self.batches]
        for step, (view, target) in enumerate(batches):
            if step == self.warm:
                wait(device.root_device)
                began = time.perf_counter()
            loss = lean_loss(student(view), target, teacher, view, alpha, temperature)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        wait(device.root_device)
        return self.batch * self.steps / (time.perf_counter() - began)

    @cached_property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Normalised views and labels, as many as a turn needs."""
        made = map(lambda b: self.data.on_after_batch_transfer(b, 0), self.data.train_dataloader())
        normalize = self.teacher.normalize
        return [(normalize(b.view), b.target) for b in islice(made, self.steps + self.warm)]

    def logging_share(self, side: str) -> float:
        """Return the share of a step that goes into logging."""
        spent = 0.0

        def timed(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                nonlocal spent
                start = time.perf_counter()
                answer = function(*arguments, **named)
                spent += time.perf_counter() - start
                return answer

            return call

        with ExitStack() as patched:
            for kind, name in LOGGING:
                changed = mock.patch.object(kind, name, timed(getattr(kind, name)))
                patched.enter_context(changed)
            speed = self.ours(side)
        return spent / ((self.steps + self.warm) * self.batch / speed)

    def gflops(self) -> float:
        """Return 10⁹ floating-point operations of one live step: a backward pass is two forward."""
        student = build_model(
            read.model_spec(self.config([]).student), build.data_shape(self.data), "student"
        )
        shape = (self.data.in_chans, *self.data.image_size)
        return (
            self.batch * (3 * flops(student.eval(), shape) + flops(self.teacher.model, shape)) / 1e9
        )


def lean_loss(
    logits: Tensor, target: Tensor, teacher: Any, view: Tensor, alpha: float, temperature: float
) -> Tensor:
    """Return the loss of distillation, or on labels alone, in as few operations as torch has."""
    loss = F.cross_entropy(logits, target)
    if teacher is None:
        return loss
    with torch.inference_mode():
        z = teacher(view)
    soft = F.kl_div(
        F.log_softmax(logits / temperature, 1), F.softmax(z / temperature, 1), reduction="batchmean"
    )
    return (1 - alpha) * loss + alpha * temperature**2 * soft


def random_split(count: int, shape: tuple[int, ...], classes: int) -> Resident:
    images = torch.randint(256, (count, *shape), dtype=torch.uint8)
    return Resident(images, torch.arange(count) % classes)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=8, help="steps of a turn that count")
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--no-variants", action="store_true", help="no bf16, compile, layout")


def measure(options: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    rows: list[Row] = []
    tables: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="distill-bench-") as work:
        for name in options.pairs:
            first = name == next(iter(PAIRS))
            pair = Pair(name, options.steps * (8 if PAIRS[name][0] is None else 1), Path(work))
            found, tables[name] = compare(pair, options.repeats or 5, held=first)
            if first and not options.no_variants:
                found += variants(pair, options.repeats or 2)
            print_rows(found)
            rows += found
    return rows, tables


def compare(pair: Pair, repeats: int, held: bool) -> tuple[list[Row], dict[str, Any]]:
    """Return the rows of one pair; the bounds hold for the first."""
    sides = {f"ours, {side}": partial(pair.ours, side) for side in SIDES}
    sides |= {f"bare, {side}": partial(pair.bare, side) for side in ("live", "supervised")}
    speeds = rounds(sides, repeats)
    logged = median(pair.logging_share("fed") for _ in range(repeats))

    def row(side: str, other: str, least: float | None) -> Row:
        note = f"{median(speeds[side]):,.0f} and {median(speeds[other]):,.0f} images/s"
        label = f"{pair.name}: {side} / {other}"
        return Row(label, ratio(speeds, side, other), least=least if held else None, note=note)

    rows = [
        row("ours, live", "bare, live", 0.97),
        row("ours, fed", "ours, supervised", 0.95),
        row("ours, fed", "ours, live", 2.3),
        row("ours, supervised", "bare, supervised", None),
        Row(f"{pair.name}: logging, share of a fed step", logged, most=0.01 if held else None),
    ]
    achieved = pair.gflops() / 1e3 * median(speeds["ours, live"]) / pair.batch
    return rows, {"images_per_second": speeds, "tflops_live": achieved, "tflops_matmul": matmul()}


def matmul(size: int = 2048) -> float:
    """Return the 10¹² operations per second of a large float32 product: a bound in practice."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(size, size, device=device)
    taken = []
    for _ in range(5):
        wait(a.device)
        start = time.perf_counter()
        a @ a
        wait(a.device)
        taken.append(time.perf_counter() - start)
    return 2 * size**3 / min(taken) / 1e12


def in_plain_layout(pair: Pair, side: str) -> float:
    with mock.patch("distill.models.build.channels_last", lambda model: model):
        return pair.ours(side)


VARIANTS: dict[str, Callable[[Pair, str], float]] = {
    "bf16-mixed": lambda pair, side: pair.ours(side, ["trainer.precision=bf16-mixed"]),
    "torch.compile of the student": lambda pair, side: pair.ours(side, ["trainer.compile=true"]),
    "plain layout": in_plain_layout,
}


def variants(pair: Pair, repeats: int) -> list[Row]:
    """Return what each choice makes of the default's speed, live and fed."""
    rows = []
    for side in ("live", "fed"):
        sides = {name: partial(turn, pair, side) for name, turn in VARIANTS.items()}
        speeds = rounds({"default": partial(pair.ours, side), **sides}, repeats)
        for name in VARIANTS:
            note = f"{median(speeds[name]):,.0f} and {median(speeds['default']):,.0f} images/s"
            label = f"{pair.name}: {side}, {name} / default"
            rows.append(Row(label, ratio(speeds, name, "default"), note=note))
    return rows
