"""Quantisation-aware training: the forward pass rounds to int8, the weights stay float."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distill.training.horizon import position_of
from distill.utils.compat import is_compiled_in_place

log = logging.getLogger(__name__)

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
INT8, UINT8 = (-127, 127), (0, 255)
LEAST = 1e-12  # width of a range, whose inverse float32 still holds


class FakeQuantize(pl.Callback):
    """Train, and validate in training, a student whose layers are rounded to int8.

    Weights of convolutions and linear layers are rounded for each output channel, symmetrically;
    their inputs for each tensor, over a range that holds 0 and follows the extremes of training
    batches by an exponential average: `r ← d·r + (1 − d)·extreme`. Gradients pass rounding as if it
    were not there, and are 0 where a value is clipped. Parameters, optimiser and checkpoints know
    nothing of it, and after training the student is a plain float one again. An int8 export rounds
    sums and pooled features too, and finds ranges of its own.

    Args:
        decay: d of the average, in [0, 1).
        freeze: last share of training in which ranges stay as they are, in [0, 1].

    Raises:
        ValueError: if a number is out of range, or the student is compiled.

    Reference: Jacob et al., 1712.05877.
    """

    def __init__(self, decay: float = 0.9, freeze: float = 0.25) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"callbacks.fake_quantize.decay must lie in [0, 1), got {decay}")
        if not 0 <= freeze <= 1:
            raise ValueError(f"callbacks.fake_quantize.freeze must lie in [0, 1], got {freeze}")
        self.decay, self.freeze = decay, freeze
        self.layers: dict[str, Layer] = {}
        self.known: Mapping[str, Sequence[float]] = {}  # of a run that is resumed

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put rounding before the student's layers, whose ranges a checkpoint may have brought."""
        student = pl_module.student
        assert isinstance(student, nn.Module)
        if any(map(is_compiled_in_place, student.modules())):
            raise ValueError("callbacks.fake_quantize needs trainer.compile=false")
        self.layers = {
            name: Layer(layer, self.known.get(name), pl_module.device)
            for name, layer in student.named_modules()
            if isinstance(layer, LAYERS)
        }
        if not self.layers:
            raise ValueError("callbacks.fake_quantize: the student has no layer to quantise")

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Move the ranges, on every rank alike, by what the batch has shown."""
        position, total = position_of(trainer, "step")
        frozen = position > (1 - self.freeze) * total
        moved = [layer for layer in self.layers.values() if layer.first or not frozen]
        moved = [layer for layer in moved if layer.seen is not None]
        if not moved:
            return
        extremes = torch.stack([layer.seen for layer in moved])  # type: ignore[misc]
        if trainer.world_size > 1:
            torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX)
        for layer, own in zip(moved, extremes, strict=True):
            layer.follow(own, self.decay)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave a float student."""
        self.remove()
        if trainer.is_global_zero:
            log.info("fake_quantize: validation was of int8; what follows is of the float weights")

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leave a float student also where training has failed."""
        self.remove()

    def remove(self) -> None:
        """Take the rounding away; the ranges stay readable."""
        for layer in self.layers.values():
            layer.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return the ranges, as plain numbers, by the layers' names."""
        found = {name: layer.limits for name, layer in self.layers.items()}
        return {"ranges": {name: limits for name, limits in found.items() if limits is not None}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the ranges of the run that is resumed."""
        self.known = state_dict["ranges"]


class Layer:
    """One layer that sees a rounded input and, while it computes, a rounded weight.

    Ranges are kept as `(−low, high)`, so that both grow with what is seen.
    """

    def __init__(
        self, layer: nn.Module, limits: Sequence[float] | None, device: torch.device
    ) -> None:
        self.range: Tensor | None = None
        if limits is not None:
            self.range = torch.tensor([-limits[0], limits[1]], device=device)
        self.seen: Tensor | None = None  # the extremes of this batch
        self.first = self.range is None
        self.handles: list[RemovableHandle] = [
            layer.register_forward_pre_hook(self.before),
            layer.register_forward_hook(after, always_call=True),
        ]

    @property
    def limits(self) -> list[float] | None:
        """The range `[low, high]`, or None before the first batch."""
        if self.range is None:
            return None
        below, above = self.range.tolist()
        return [-below, above]

    def before(self, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Round the layer's input, and put a rounded weight in front of its own."""
        values, *others = inputs
        extremes = widest(values.detach())
        if layer.training and torch.is_grad_enabled():
            self.observe(extremes)
        # Lightning's sanity check comes before training, and so before any range.
        limits = extremes if self.range is None else self.range
        # An instance's own attributes are found before parameters, which stay as they are.
        layer.__dict__["weight"] = rounded_weight(layer.weight)  # type: ignore[arg-type]
        return (rounded_input(values, limits), *others)

    def observe(self, extremes: Tensor) -> None:
        """Note the extremes of what a training batch shows; the first ones are a range at once."""
        self.seen = extremes if self.seen is None else torch.maximum(self.seen, extremes)
        if self.range is None:
            self.range = extremes

    def follow(self, extremes: Tensor, decay: float) -> None:
        """Move the range towards a batch's extremes; the first batch's become the range."""
        assert self.range is not None
        self.range = extremes if self.first else torch.lerp(extremes, self.range, decay)
        self.seen, self.first = None, False

    def remove(self) -> None:
        """Leave the layer as it was."""
        for handle in self.handles:
            handle.remove()


def after(layer: nn.Module, inputs: Any, output: Any) -> None:
    """Take the rounded weight away."""
    layer.__dict__.pop("weight", None)


def widest(values: Tensor) -> Tensor:
    """Return `(−low, high)` of the range of values, which holds 0, float32 `[2]`."""
    low, high = torch.aminmax(values)
    return torch.stack([-low, high]).float().clamp(min=0)


def rounded_weight(weight: Tensor) -> Tensor:
    """Return a weight rounded to int8 for each output channel: `Δ = max|w|/127`.

    Args:
        weight: `[out, …]`.
    """
    scale = weight.detach().float().flatten(1).abs().amax(dim=1).clamp(min=LEAST) / INT8[1]
    zero = torch.zeros_like(scale, dtype=torch.int32)
    wide = torch.fake_quantize_per_channel_affine(weight.float(), scale, zero, 0, *INT8)
    return wide.to(weight.dtype)


def rounded_input(values: Tensor, limits: Tensor) -> Tensor:
    """Return values rounded to uint8 over a range: `Δ = (high − low)/255`, 0 stays 0.

    Args:
        values: any shape.
        limits: `(−low, high)`, both at least 0.
    """
    scale = limits.sum().clamp(min=LEAST) / UINT8[1]
    zero = (limits[0] / scale).round().int()
    wide = torch.fake_quantize_per_tensor_affine(values.float(), scale, zero, *UINT8)
    return wide.to(values.dtype)
