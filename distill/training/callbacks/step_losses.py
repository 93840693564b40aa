"""The course of the loss from step to step, for loggers that draw it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger


class StepLosses(pl.Callback):
    """Log the losses of every so many optimiser steps as `train/NAME_step`.

    Reading them waits for the device. `metrics.csv` has the means of epochs alone.

    Args:
        loggers: where to.
        every: optimiser steps from one to the next.
    """

    def __init__(self, loggers: Sequence[Logger], every: int) -> None:
        self.loggers, self.every = loggers, every
        self._logged = 0  # the step that was logged last

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log the losses of the batch that ended a step, if it is one of those."""
        step = trainer.global_step
        if step % self.every or step == self._logged:
            return
        self._logged = step
        losses = {f"train/{name}_step": float(v) for name, v in outputs["losses"].items()}
        for logger in self.loggers:
            logger.log_metrics(losses, step=step)
