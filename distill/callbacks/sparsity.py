"""Sparsity: weights, or whole channels, that become exactly zero as training goes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F

from distill.callbacks.annealing import position_of
from distill.models.channels import channel_groups, dense_weights
from distill.schedules import SCHEDULES, check_timing, value_at


class Sparsity(pl.Callback):
    """Shrink the student's weights towards zero after each optimiser step.

    The step is proximal, so that zeros are exact, which an L1 term in the loss never gives under
    Adam. With η the learning rate that the optimiser has just used for the weight and λ the
    strength at this position, a weight of a convolution or linear layer becomes
    `sign(w)·max(0, |w| − ηλ)`; with `groups` all n weights that write a channel become
    `w·max(0, 1 − ηλ√n/‖w‖)` together (1101.0057 §4.2; Yuan and Lin, 2006). η is the plain learning
    rate, not Adam's step: where Adam moves a weight by about η, λ = 1 outweighs any gradient.

    λ is a function of the trainer's position alone, and where it is 0 nothing is done. It is logged
    as `sparsity_strength` when it changes, and the share of zeros as `train/zeros` each epoch.

    Args:
        strength: λ at the end, in units of the gradient as the optimiser scales it.
        schedule: `linear`, `cosine`, `exponential` or `step`.
        start: λ at the beginning.
        unit: `epoch` or `step` (one optimiser step).
        warmup: units (below 1: the share of training) during which `start` is held.
        duration: units from the end of the warm-up to `strength`; None lasts until training ends.
        groups: whether whole channels become zero; they are removed after training where timm can
            build the smaller model.

    Raises:
        ValueError: for an unknown schedule or unit, or a strength below zero.
    """

    def __init__(
        self,
        strength: float = 0.1,
        schedule: str = "linear",
        start: float = 0.0,
        unit: str = "step",
        warmup: float = 0,
        duration: int | None = None,
        groups: bool = False,
    ) -> None:
        check_timing("sparsity", schedule, unit, warmup, duration)
        for name, number in (("start", start), ("strength", strength)):
            if not (math.isfinite(number) and number >= 0):
                raise ValueError(f"sparsity.{name} must be finite and at least 0, got {number}")
        SCHEDULES[schedule](0.0, start, strength)  # refuses now the ends that it cannot join
        self.schedule, self.start, self.strength = schedule, start, strength
        self.unit, self.warmup, self.duration, self.groups = unit, warmup, duration, groups
        self._together: list[tuple[Tensor, ...]] = []  # what becomes zero together
        self._rates: dict[Tensor, float] = {}  # of the step that is being made
        self._current: float | None = None

    def at(self, position: int, total: int) -> float:
        """Return λ at unit `position` of `total` (the last is `total − 1`)."""
        return value_at(
            self.schedule, position, total, self.start, self.strength, self.warmup, self.duration
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the weights that are to become zero."""
        if stage != "fit":
            return
        check_averaging(trainer.callbacks)  # type: ignore[attr-defined]
        student: nn.Module = pl_module.student  # type: ignore[assignment]
        named = dict(student.named_parameters())
        self._together = (
            [tuple(named[key] for key in group.tensors) for group in channel_groups(student)]
            if self.groups
            else [(weight,) for weight in dense_weights(student).values()]
        )

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Note λ and the learning rates of this step: the schedule moves on right after it."""
        strength = self.at(*position_of(trainer, self.unit))
        if strength != self._current:
            self._current = strength
            for logger in trainer.loggers:
                logger.log_metrics({"sparsity_strength": strength}, step=trainer.global_step)
        self._rates = {
            parameter: float(group["lr"])
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Shrink, if the optimiser has made a step with this batch."""
        if self._rates and self._current:
            shrink = shrink_channels if self.groups else shrink_weights
            for tensors in self._together:
                learned = [tensor for tensor in tensors if tensor in self._rates]
                shrink(learned, [self._rates[tensor] * self._current for tensor in learned])
        self._rates = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log which share of the weights of convolutions and linear layers is zero."""
        weights = dense_weights(pl_module.student).values()  # type: ignore[arg-type]
        zeros = sum((weight.detach() == 0).sum() for weight in weights)
        pl_module.log("train/zeros", zeros / sum(weight.numel() for weight in weights))


@torch.no_grad()
def shrink_weights(tensors: Sequence[Tensor], amounts: Sequence[float]) -> None:
    """Move each weight towards zero by an amount a, in place: `sign(w)·max(0, |w| − a)`.

    This is the minimiser of `(x − w)²/2 + a·|x|`.

    Args:
        tensors: weights of any shape.
        amounts: a of each tensor, at least 0.
    """
    for tensor, amount in zip(tensors, amounts, strict=True):
        tensor.copy_(F.softshrink(tensor, amount))


@torch.no_grad()
def shrink_channels(tensors: Sequence[Tensor], amounts: Sequence[float]) -> None:
    """Shrink the slices that write a channel together, in place: `w·max(0, 1 − a·√n/‖w‖)`.

    For equal amounts this is the minimiser of `‖x − w‖²/2 + a·√n·‖x‖`, for each channel alone.

    Args:
        tensors: `[C, …]`; the n weights of a channel are the slices at its index in all of them.
        amounts: a of each tensor, at least 0.
    """
    if not tensors:
        return
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    flat = [tensor.reshape(len(tensor), -1).to(wide) for tensor in tensors]
    size = sum(slices.shape[1] for slices in flat)
    norm = torch.cat(flat, dim=1).norm(dim=1).clamp(min=torch.finfo(wide).tiny)
    for tensor, amount in zip(tensors, amounts, strict=True):
        factor = (1 - amount * math.sqrt(size) / norm).clamp(min=0)
        tensor.mul_(factor.to(tensor.dtype).view(-1, *[1] * (tensor.ndim - 1)))


def check_averaging(callbacks: Iterable[pl.Callback]) -> None:
    """Refuse the average of weights beside sparsity.

    Raises:
        ValueError: if both are among the callbacks.
    """
    found = list(callbacks)
    averaging = (WeightAveraging, StochasticWeightAveraging)
    if any(isinstance(c, Sparsity) for c in found) and any(isinstance(c, averaging) for c in found):
        raise ValueError(
            "callbacks: the average of weights that are zero at times is not zero: leave out "
            "sparsity or ema"
        )
