"""How fast training went, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl

from distill.data.batch import Batch


class Speed(pl.Callback):
    """Count training images per second: loading, views, steps and logging, without validation.

    Args:
        clock: a time in seconds, which stands still while other runs have their turns.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.images = self.epochs = 0
        self.seconds = 0.0
        self._mark = self._began = 0.0
        self._first_epoch = 0

    @property
    def images_per_second(self) -> float | None:
        """Training images per second over all ranks, or None before the first step."""
        return self.images / self.seconds if self.seconds else None

    def seconds_left(self, trainer: pl.Trainer) -> float | None:
        """Return how long the epochs that are left will take at the pace so far, if it is known."""
        if not self.epochs or trainer.max_epochs in (None, -1):
            return None
        each = (self.clock() - self._began) / self.epochs
        return each * max(trainer.max_epochs - trainer.current_epoch - 1, 0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of the epochs."""
        self._began, self._first_epoch = self.clock(), trainer.current_epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._mark = self.clock()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count a batch and the time since the last."""
        now = self.clock()
        self.seconds += now - self._mark
        self.images += len(Batch.of(batch)) * trainer.world_size
        self.epochs = trainer.current_epoch + 1 - self._first_epoch
        self._mark = now

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave out the time that validation took."""
        self._mark = self.clock()
