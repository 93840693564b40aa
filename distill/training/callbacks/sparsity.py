"""Sparsity: weights, or whole channels, that become exactly zero as training goes."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F

from distill.models.channels import channel_groups, dense_weights, unknown_structure
from distill.objective.schedules import SCHEDULES, check_timing, value_at
from distill.training.horizon import position_of

log = logging.getLogger(__name__)


class Sparsity(pl.Callback):
    """Shrink the student's weights towards zero after each optimiser step.

    The step is proximal, so that zeros are exact, which an L1 term in the loss never gives under
    Adam. With η the learning rate that the optimiser has just used for the weight and λ the
    strength at this position, a weight of a convolution or linear layer becomes
    `sign(w)·max(0, |w| − ηλ)`. η is the plain learning rate: Adam moves a weight by up to about η,
    so that λ = 1 outweighs any gradient there, and a fraction most.

    With `groups` the C channels of a feature map compete: their norms v become
    `x = max(0, v − ηλ·mean(x))`, the proximal step of `λ(Σx)²/(2C)` (Zhou et al., "Exclusive
    lasso", 2010, of channels; Yoon and Hwang, 2017). What reads a map has a batch norm behind it
    and undoes a common factor: a fixed threshold, as in the group lasso, would meet no resistance
    under Adam and takes all channels at once. Here weak ones die and the strongest never does.

    λ is a function of the trainer's position alone, and where it is 0 nothing is done. It is
    logged as `sparsity_strength` when it changes, and each epoch the share of weights, or of
    channels, that are zero as `train/zeros`.

    Args:
        strength: λ at the end; about 0.5 for weights, 20 for groups.
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
        strength: float = 0.5,
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
        why = unknown_structure(student) if self.groups else None
        if why is not None:
            log.info("sparsity: filters will be zero, and none can be removed: %s", why)
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
        """Shrink what the optimiser has moved with this batch; without a gradient it moves none."""
        moved = {tensor for tensor in self._rates if tensor.grad is not None}
        if moved and self._current:
            shrink = shrink_channels if self.groups else shrink_weights
            for tensors in self._together:
                learned = [tensor for tensor in tensors if tensor in moved]
                shrink(learned, [self._rates[tensor] * self._current for tensor in learned])
        self._rates = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log which share of the weights, or of the channels, is zero."""
        zero = [silent(tensors) if self.groups else tensors[0] == 0 for tensors in self._together]
        share = torch.cat([mask.flatten() for mask in zero]).float().mean()
        pl_module.log("train/zeros", share, sync_dist=True)


def silent(tensors: Sequence[Tensor]) -> Tensor:
    """Return which channels `[C]` are zero in all of the tensors `[C, …]`."""
    return torch.stack([(t == 0).reshape(len(t), -1).all(1) for t in tensors]).all(0)


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
    """Shrink the slices that write a channel together, in place, by an amount for all channels.

    With v the C channels' norms and x what becomes of them, `x = max(0, v − a·mean(x))`: the
    minimiser of `Σ(x − v)²/2 + a·(Σx)²/(2C)`.

    Args:
        tensors: `[C, …]`; a channel's norm is that of the slices at its index in all of them.
        amounts: a of each tensor, at least 0.
    """
    if not tensors:
        return
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    slices = [tensor.reshape(len(tensor), -1).to(wide) for tensor in tensors]
    norms = torch.cat(slices, dim=1).norm(dim=1)
    factors = {a: shrunk(norms, a) / norms.clamp(min=torch.finfo(wide).tiny) for a in set(amounts)}
    for tensor, amount in zip(tensors, amounts, strict=True):
        factor = factors[amount].to(tensor.dtype)
        tensor.mul_(factor.view(-1, *[1] * (tensor.ndim - 1)))


def shrunk(norms: Tensor, amount: float) -> Tensor:
    """Return `x = max(0, v − a·mean(x))` for norms v `[C]`: the largest always stays."""
    largest = norms.sort(descending=True).values
    counts = torch.arange(1, len(norms) + 1, device=norms.device)
    # Not cumsum, which torch refuses on a GPU that is to be deterministic.
    sums = largest.new_ones(len(norms), len(norms)).tril() @ largest
    means = sums / (len(norms) + amount * counts)  # if so many of them stay
    staying = (largest > amount * means).sum().clamp(min=1)
    return (norms - amount * means[staying - 1]).clamp(min=0)


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
