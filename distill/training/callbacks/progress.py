"""Progress for a person: a Rich bar in a terminal, one line per epoch elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar

from distill.training.callbacks.speed import speed_of
from distill.training.horizon import epochs_of

log = logging.getLogger(__name__)

WORTH_TELLING = 120  # seconds


def progress_callback() -> pl.Callback:
    """Return the progress display that fits where standard output goes."""
    return RichProgressBar(leave=False) if sys.stdout.isatty() else EpochLines()


class EpochLines(pl.Callback):
    """Log one line per epoch, and per validation within one: loss and main validation metrics."""

    shown = ("train/loss", "train/top1", "val/loss", "val/top1", "val/nll", "val/ece")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what the finished epoch gave."""
        if not trainer.is_global_zero:
            return
        text = self._values(trainer, self.shown) + self._left(trainer)
        log.info("  epoch %d/%s  %s", trainer.current_epoch + 1, epochs_of(trainer), text)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what a validation in the midst of an epoch gave."""
        over = trainer.is_last_batch or trainer.should_stop  # which the epoch's line follows
        if not trainer.is_global_zero or trainer.sanity_checking or over:
            return
        validated = [name for name in self.shown if name.startswith("val/")]
        log.info("  step %d  %s", trainer.global_step, self._values(trainer, validated))

    @staticmethod
    def _values(trainer: pl.Trainer, names: Iterable[str]) -> str:
        known = trainer.callback_metrics
        return "  ".join(f"{name} {known[name].item():.4g}" for name in names if name in known)

    def _left(self, trainer: pl.Trainer) -> str:
        """Return how long the rest will take at the pace so far, if a person would wait for it."""
        speed = speed_of(trainer)
        seconds = speed.seconds_left(trainer) if speed else None
        if speed is None or seconds is None or seconds < WORTH_TELLING:
            return ""
        return f"  {speed.images_per_second:,.0f} images/s, {duration(seconds)} left"


def duration(seconds: float) -> str:
    """Return a time for a person, to the minute.

    >>> duration(5000)
    '1 h 23 min'
    """
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
