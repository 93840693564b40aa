"""How fast training went."""

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
        self.images = 0
        self.seconds = 0.0
        self._mark = 0.0

    @property
    def images_per_second(self) -> float | None:
        """Training images per second over all ranks, or None before the first step."""
        return self.images / self.seconds if self.seconds else None

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
        self._mark = now

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave out the time that validation took."""
        self._mark = self.clock()
