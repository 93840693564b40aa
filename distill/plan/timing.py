"""Seconds of steps: of a trainer's, and of a function's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch

WARM, REPEATS = 3, 3  # steps, and calls of a function, that do not count and that do


class Clock(pl.Callback):
    """Count the seconds of an epoch's steps after the first few.

    Args:
        warm: how many do not count.
    """

    began = ended = 0.0
    steps = 0

    def __init__(self, warm: int = WARM) -> None:
        self.warm = warm

    @property
    def seconds(self) -> float:
        """The seconds of the steps that count."""
        return self.ended - self.began

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, out: Any, batch: Any, at: int
    ) -> None:
        """Note the time; a device is only waited for where it counts."""
        self.steps = at + 1 - self.warm
        if self.steps == 0 or trainer.is_last_batch:
            wait(trainer.strategy.root_device)
            self.ended = time.perf_counter()
        if self.steps == 0:
            self.began = self.ended


def wait(device: torch.device) -> None:
    """Wait until a device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Return the median seconds of a few calls, after a first one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
