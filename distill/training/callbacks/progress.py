"""Progress for a person: a Rich bar in a terminal, one line per epoch elsewhere."""

from __future__ import annotations

import logging
import sys

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar

log = logging.getLogger(__name__)


def progress_callback() -> pl.Callback:
    """Return the progress display that fits where standard output goes."""
    return RichProgressBar(leave=False) if sys.stdout.isatty() else EpochLines()


class EpochLines(pl.Callback):
    """Log one line per epoch with the loss and the main validation metrics."""

    shown = ("train/loss", "train/top1", "val/loss", "val/top1", "val/nll", "val/ece")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what the finished epoch gave."""
        if not trainer.is_global_zero:
            return
        values = {
            k: trainer.callback_metrics[k] for k in self.shown if k in trainer.callback_metrics
        }
        text = "  ".join(f"{name} {value.item():.4g}" for name, value in values.items())
        log.info("  epoch %d/%s  %s", trainer.current_epoch + 1, trainer.max_epochs, text)
