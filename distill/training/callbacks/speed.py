"""How fast training went, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl

from distill.data.batch import Batch
from distill.training.horizon import epochs_of


class Speed(pl.Callback):
    """Count training images per second: loading, views, steps and logging, without validation.

    An image that a step shows in two views counts once.

    Args:
        clock: a time in seconds, which stands still while other runs have their turns.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.images = 0
        self.seconds = 0.0
        self._mark = self._began = 0.0
        self._first_epoch = 0

    @property
    def images_per_second(self) -> float | None:
        """Training images per second over all ranks, or None before the first step."""
        return self.images / self.seconds if self.seconds else None

    def seconds_left(self, trainer: pl.Trainer) -> float | None:
        """Return how long the epochs after this one, which ends, will take at the pace so far.

        None where nobody knows how many there are.
        """
        if (epochs := epochs_of(trainer)) is None:
            return None
        each = (self.clock() - self._began) / (trainer.current_epoch + 1 - self._first_epoch)
        return each * max(epochs - trainer.current_epoch - 1, 0)

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
        self.images += Batch.of(batch).samples * trainer.world_size
        self._mark = now

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave out the time that validation took."""
        self._mark = self.clock()


def speed_of(trainer: pl.Trainer) -> Speed | None:
    """Return what counts a trainer's images, if it is among its callbacks."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # that Lightning adds later
    return next((one for one in callbacks if isinstance(one, Speed)), None)
