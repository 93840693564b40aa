"""Time what the host does in a step besides the tensors' work: Lightning's loop, hooks, logging.

The student is so small that a step is little else. `floor` is an empty module under the same
trainer, `tensors` the operations that any such training has to launch (views, teacher, objective,
backward pass, optimiser) in a bare loop, `ours` the whole of what `distill` runs. What `ours` takes
longer than `tensors` is held to 1.2 × `floor` + 0.5 ms. The last rows are the digits' default
pair, and that loop under Lightning, against the leanest loop, whose views are made ahead.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
from measure import Row, print_rows, ratio, rounds
from steps import Pair, clock_of, lean_loss
from torch import nn
from torch.utils.data import DataLoader

from distill.config import build, read
from distill.models.build import build_model
from distill.plan.timing import Clock
from distill.teacher.teacher import Teacher
from distill.training.fit import train
from distill.training.module import Distiller, create_optimizer
from distill.training.untrained import build_untrained

BATCH = 8
DIGITS = "digits' default pair"


class Empty(pl.LightningModule):
    """A module that has next to nothing to do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Return a loss."""
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an optimiser."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Plain(pl.LightningModule):
    """The bare loop under Lightning: what no training with it can be faster than."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.pair, self.cfg = pair, pair.config(["store=off"])
        spec = read.model_spec(self.cfg.student)
        self.student = build_model(spec, build.data_shape(pair.data), "student")

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Return the loss."""
        (view, target), objective = batch, self.cfg.objective
        teacher, values = self.pair.teacher.model, (objective.alpha, objective.temperature)
        return lean_loss(self.student(view), target, teacher, view, *values)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the run's optimiser."""
        return create_optimizer(self.student, read.plain(self.cfg.optimizer))


def tiny(classes: int = 10) -> nn.Module:
    model = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(16, classes))
    model.num_classes = classes  # type: ignore[assignment]
    return model


def floor(pair: Pair) -> float:
    """Return the ms of a step of an empty module."""
    return under_lightning(Empty(), [torch.zeros(1)] * (pair.steps + pair.warm), pair)


def plain(pair: Pair) -> float:
    """Return the images per second of the bare loop under Lightning."""
    pair.teacher.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return 1e3 * pair.batch / under_lightning(Plain(pair), pair.batches, pair)


def under_lightning(module: pl.LightningModule, batches: Sequence[Any], pair: Pair) -> float:
    """Return the ms of a step of a module that is given ready-made batches."""
    clock = Clock(pair.warm)
    trainer = pl.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[clock],
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return 1e3 * clock.seconds / clock.steps


def ours(pair: Pair) -> float:
    """Return the ms of a step of a run with a tiny student and teacher."""
    cfg = pair.config(["store=off"])
    data = pair.data.with_options(seed=0, batch_size=pair.batch)
    parts = replace(build_untrained(cfg, data), model=tiny())
    options, schedule = read.plain(cfg.optimizer), read.plain(cfg.scheduler)
    student = Distiller(
        parts.model, Teacher(tiny()), parts.objective, optimizer=options, scheduler=schedule
    )
    train(cfg, student, data, parts.trainer)
    clock = clock_of(parts.trainer)
    return 1e3 * clock.seconds / clock.steps


def tensors(pair: Pair) -> float:
    """Return the ms of the same operations without a trainer."""
    cfg = pair.config(["store=off"])
    device = build_untrained(cfg, pair.data).trainer.strategy.root_device
    student, teacher = tiny().to(device), Teacher(tiny()).to(device)
    objective = build.build_objective(cfg, pair.data)
    objective.checked = True
    optimizer = create_optimizer(student, read.plain(cfg.optimizer))
    data = pair.data.with_options(seed=0, batch_size=pair.batch)
    batches = islice(data.train_dataloader(), pair.steps + pair.warm)
    for step, batch in enumerate(batches):
        if step == pair.warm:
            began = time.perf_counter()
        shown = data.with_views(batch.to(device))
        loss = objective(student(shown.view), teacher(shown.view), shown.target)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    float(loss)  # waits for a device
    return 1e3 * (time.perf_counter() - began) / pair.steps


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=400, help="steps of a turn that count")


def measure(options: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    repeats = options.repeats or 7
    with tempfile.TemporaryDirectory(prefix="distill-bench-") as work:
        small = Pair(DIGITS, options.steps, Path(work), batch=BATCH)
        sides = {"floor": floor, "tensors": tensors, "ours": ours}
        taken = rounds({name: partial(side, small) for name, side in sides.items()}, repeats)
        whole = Pair(DIGITS, max(options.steps // 6, 2), Path(work))
        pair = {"ours": partial(whole.ours, "live"), "bare": partial(whole.bare, "live")}
        speeds = rounds({**pair, "lightning": partial(plain, whole)}, repeats)
    taken["host"] = [a - b for a, b in zip(taken["ours"], taken["tensors"], strict=True)]
    taken["allowed"] = [1.2 * ms + 0.5 for ms in taken["floor"]]
    ms = {name: round(median(values), 3) for name, values in taken.items()}
    note = ", ".join(f"{name} {value} ms" for name, value in ms.items())
    images = f"{median(speeds['ours']):,.0f} and {median(speeds['bare']):,.0f} images/s"
    rows = [
        Row("tiny student: host / allowed", ratio(taken, "host", "allowed"), most=1.0, note=note),
        Row(f"{DIGITS}: ours / bare", ratio(speeds, "ours", "bare"), least=0.95, note=images),
        Row(f"{DIGITS}: Lightning alone / bare", ratio(speeds, "lightning", "bare")),
    ]
    print_rows(rows)
    return rows, {"ms_per_step": taken, "images_per_second": speeds}
