"""Averages of weights that begin late: until then they are the weights themselves."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging

from distill.utils.compat import averaged_model


class UntilAveraged(pl.Callback):
    """Let averages of weights be the weights themselves until they have begun.

    Lightning would validate and save the untrained weights until then. It comes before them.

    Args:
        averages: the callbacks that average.
    """

    def __init__(self, averages: Sequence[WeightAveraging]) -> None:
        self.averages = averages

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the weights their precision before they are copied."""
        trainer.precision_plugin.convert_module(pl_module)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let what has not begun follow."""
        self.follow(pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let what has not begun follow."""
        self.follow(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let what has not begun follow."""
        self.follow(pl_module)

    @torch.no_grad()
    def follow(self, module: pl.LightningModule) -> None:
        """Copy the weights into averages of nothing."""
        for average in self.averages:
            copy = averaged_model(average)
            if copy is not None and int(copy.n_averaged) == 0:
                for own, current in zip(tensors(copy.module), tensors(module), strict=True):
                    own.copy_(current)


def tensors(module: Any) -> Iterable[torch.Tensor]:
    """Return a module's parameters and buffers."""
    return itertools.chain(module.parameters(), module.buffers())
