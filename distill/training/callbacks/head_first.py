"""Train the last layer before the others, so that a new one does not disturb what they know."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from torch import nn
from torch.optim import Optimizer


class HeadFirst(pl.Callback):
    """Train the student's classifier alone for the first epochs, then all of it.

    Normalisation layers go on averaging the data's statistics meanwhile.

    Args:
        epochs: how many epochs at the start.

    Raises:
        ValueError: if a student does not say which layer is its last one.

    Reference:
        Kumar et al., Fine-Tuning can Distort Pretrained Features, 2202.10054.
    """

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self._waiting: list[nn.Parameter] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Let the other layers wait, or let them go on."""
        self._release()
        if trainer.current_epoch >= self.epochs:
            return
        head = {id(parameter) for parameter in classifier_parameters(pl_module.student)}
        self._waiting = [
            parameter
            for parameter in pl_module.student.parameters()
            if parameter.requires_grad and id(parameter) not in head
        ]
        if trainer.world_size == 1:  # several ranks exchange every gradient, needed or not
            for parameter in self._waiting:
                parameter.requires_grad_(False)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Leave no gradient to what waits: an optimiser moves nothing without one."""
        for parameter in self._waiting:
            parameter.grad = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the model as it was found."""
        self._release()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leave the model as it was found."""
        self._release()

    def _release(self) -> None:
        for parameter in self._waiting:
            parameter.requires_grad_(True)
        self._waiting = []


def classifier_parameters(model: Any) -> list[nn.Parameter]:
    """Return the parameters of a timm model's last layer, or layers."""
    if not hasattr(model, "get_classifier"):
        raise ValueError(
            f"fit.head_epochs: {type(model).__name__} has no get_classifier() to say which layer "
            "is its last one: set it to 0"
        )
    found = model.get_classifier()
    heads = found if isinstance(found, tuple | list) else [found]
    return [parameter for head in heads for parameter in head.parameters()]
