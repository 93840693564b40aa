"""The learning rate, beside what it led to."""

from __future__ import annotations

import pytorch_lightning as pl
import torch


class LearningRate(pl.Callback):
    """Log each epoch's last learning rate as `train/lr`: that of its fastest layers."""

    def __init__(self) -> None:
        self.rate: float | None = None

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Note the rate of this update: the schedule moves on right after it."""
        self.rate = max(float(group["lr"]) for group in optimizer.param_groups)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the last update's rate."""
        if self.rate is not None:
            pl_module.log("train/lr", self.rate)
