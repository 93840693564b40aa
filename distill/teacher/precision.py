"""A teacher's weights in fewer bits, for its forward pass alone, and where it answers."""

from __future__ import annotations

from typing import Any

import torch
from lightning_utilities import apply_to_collection
from torch import Tensor, nn
from torch.nn.utils import parametrize

INT8 = "int8"
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = (*FLOATS, INT8)
LARGEST = 127
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Dequantized(nn.Module):
    """A weight that is kept in eight bits, `w ≈ q·Δ`, with `Δ = max|w|/127` of its output channel.

    Weights alone are rounded. Torch's dynamic quantisation also rounds what a layer reads, by the
    largest value in the batch, so that an answer would depend on which others were asked for; and
    it leaves convolutions as they are.

    Reference:
        Jacob et al., 1712.05877, §2.1, symmetric.
    """

    def forward(self, rounded: Tensor, scale: Tensor) -> Tensor:
        """Return the weight, float, of int8 `[out, …]` and scales `[out, 1, …]`."""
        return rounded.to(scale.dtype) * scale

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return int8 numbers and the scales of a weight `[out, …]`."""
        peak = weight.detach().abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)
        scale = (peak / LARGEST).clamp(min=torch.finfo(weight.dtype).tiny)
        return (weight.detach() / scale).round().to(torch.int8), scale


def reduce_precision(model: nn.Module, precision: str) -> None:
    """Keep a frozen model's weights in another precision, in place.

    It is called as before: in `bf16` and `fp16` what it is shown is cast to that type, and what it
    answers to float32. In `int8` the weights of linear layers and convolutions are kept in eight
    bits, and it computes in the type of its others.

    Args:
        model: images `[N, C, H, W]` → logits `[N, K]`.
        precision: `fp32`, `bf16`, `fp16` or `int8`.

    Raises:
        ValueError: if there is no such precision.

    >>> model = nn.Linear(3, 2)
    >>> reduce_precision(model, "bf16")
    >>> model.weight.dtype, model(torch.ones(1, 3)).dtype
    (torch.bfloat16, torch.float32)
    """
    if precision not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise ValueError(f"teacher.precision must be one of {known}, got {precision!r}")
    model.requires_grad_(False)
    if precision == INT8:
        for layer in [layer for layer in model.modules() if isinstance(layer, WEIGHTED)]:
            if not parametrize.is_parametrized(layer, "weight"):
                parametrize.register_parametrization(layer, "weight", Dequantized(), unsafe=True)
        model.requires_grad_(False)
        return
    model.to(FLOATS[precision])
    if precision != "fp32":
        model.register_forward_pre_hook(_cast_inputs)
        model.register_forward_hook(_widen_outputs)


def computes_in(model: nn.Module) -> torch.dtype:
    """Return the type of a model's weights, of those in eight bits the one they are read in."""
    kinds = (value.dtype for value in model.parameters() if value.is_floating_point())
    return next(kinds, torch.float32)


def widened(values: Any) -> Any:
    """Return tensors in any containers with those of half precision as float32."""
    return apply_to_collection(values, Tensor, _wide)


def checked_device(name: str) -> torch.device:
    """Return a device of this machine by its name, such as `cpu` or `cuda:1`.

    Raises:
        ValueError: if there is none of that name.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise ValueError(
            f"teacher.device={name} is not on this machine: there are {', '.join(there)}"
        ) from error
    return torch.empty(0, device=device).device  # with its number: cuda is cuda:0


def _cast_inputs(model: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    kind = computes_in(model)
    images, *more = given
    return images.to(kind), *more


def _widen_outputs(model: nn.Module, given: tuple[Any, ...], answer: Any) -> Any:
    return widened(answer)


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
