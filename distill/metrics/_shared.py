"""What the metrics share: checks a person can read, sums over blocks of rows, a summing Metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torchmetrics import Metric

# Two float64 copies of a block fit into a core's cache: larger blocks were up to 4 times slower.
BLOCK_ELEMENTS = 1 << 18

# A softmax rounded to bfloat16, and its sum rounded again, miss one by up to 2^−7.
_SUM_TOLERANCE = 1e-2


def check_scores(scores: Tensor, name: str) -> None:
    """Refuse anything but a floating tensor `[N, K]` with at least one row and two classes."""
    if scores.ndim != 2:
        raise ValueError(f"{name} must have shape [N, K], not {list(scores.shape)}.")
    if not scores.is_floating_point():
        raise ValueError(f"{name} must be floating point, not {scores.dtype}.")
    if scores.shape[0] == 0:
        raise ValueError(f"{name} is empty: there is no example to measure.")
    if scores.shape[1] < 2:
        raise ValueError(f"{name} must have at least two classes, not {scores.shape[1]}.")


def check_target(target: Tensor, rows: int, classes: int) -> None:
    """Refuse labels that are not integers `[rows]` in `0 … classes − 1`."""
    if target.ndim != 1 or target.shape[0] != rows:
        raise ValueError(f"target must have shape [{rows}], not {list(target.shape)}.")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise ValueError(f"target must hold integer class labels, not {target.dtype}.")
    if not bool(((target >= 0) & (target < classes)).all()):
        low, high = int(target.min()), int(target.max())
        raise ValueError(
            f"target must lie in 0 … {classes - 1} for {classes} classes, not in {low} … {high}."
        )


def check_logits(logits: Tensor, target: Tensor, name: str = "logits") -> None:
    """Refuse logits `[N, K]` and labels `[N]` that do not belong together."""
    check_scores(logits, name)
    check_target(target, *logits.shape)


def check_probabilities(probs: Tensor, target: Tensor) -> None:
    """Refuse rows that are negative, not finite, or do not sum to one (logits, most likely)."""
    check_scores(probs, "probs")
    check_target(target, *probs.shape)
    off = (probs.detach().sum(dim=1) - 1).abs().amax()
    if not bool((probs.detach().amin() >= 0) & (off <= _SUM_TOLERANCE)):
        raise ValueError(
            "probs must hold probabilities: every row non-negative with sum 1. "
            "Logits need softmax(dim=1) first."
        )


def check_classes(scores: Tensor, num_classes: int, name: str) -> None:
    """Refuse scores whose class count is not the declared one."""
    if scores.ndim == 2 and scores.shape[1] != num_classes:
        raise ValueError(f"{name} has {scores.shape[1]} classes, but num_classes={num_classes}.")


def check_count(value: int, name: str, least: int = 1) -> None:
    """Refuse a count that is not an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}.")


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not a positive finite number."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite, not {temperature}.")


def check_finite(logits: Tensor, name: str) -> None:
    """Refuse NaN and infinity, which a diverged model produces."""
    bad = int((~torch.isfinite(logits)).any(dim=1).sum())
    if bad:
        raise ValueError(f"{name} holds NaN or infinity in {bad} of {len(logits)} rows.")


def check_ordered(scores: Tensor, name: str) -> None:
    """Refuse NaN, which has no place in an order; infinity has one."""
    if bool(scores.detach().amax().isnan()):
        raise ValueError(f"{name} holds NaN, which has no place in an order.")


def blocks_of_rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split all tensors alike into blocks of rows, without gradient."""
    rows = max(1, BLOCK_ELEMENTS // tensors[0][0].numel())
    return zip(*(tensor.detach().split(rows) for tensor in tensors), strict=True)


def sum_over_blocks(
    block_sum: Callable[..., Tensor], *tensors: Tensor, widen: bool = True
) -> Tensor:
    """Sum `block_sum(*blocks)` over blocks of rows, floating blocks widened to float64.

    Memory for the wide copies stays constant however many rows there are. `widen=False` leaves the
    blocks as they are, where only their order matters.
    """
    total = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    for block in blocks_of_rows(*tensors):
        wide = (x.double() if widen and x.is_floating_point() else x for x in block)
        total = total + block_sum(*wide)
    return total


def sum_over_rows(per_row: Callable[..., Tensor], *tensors: Tensor, widen: bool = True) -> Tensor:
    """Sum over all rows of the value `per_row` gives each, in float64."""
    return sum_over_blocks(
        lambda *blocks: per_row(*blocks).double().sum(dim=0), *tensors, widen=widen
    )


def mean_over_rows(per_row: Callable[..., Tensor], *tensors: Tensor, widen: bool = True) -> Tensor:
    """Mean over all rows of the value `per_row` gives each, in float64."""
    return sum_over_rows(per_row, *tensors, widen=widen) / len(tensors[0])


class SumMetric(Metric):
    """A torchmetrics `Metric` whose whole state is float64 sums, or whole counts, of fixed size.

    Updates replace a sum rather than add in place, so that a state made in inference mode serves
    outside it too.
    """

    is_differentiable = False
    full_state_update = False

    def _add_sum(self, name: str, *shape: int) -> None:
        zeros = torch.zeros(shape, dtype=torch.float64)
        self.add_state(name, default=zeros, dist_reduce_fx="sum")

    def _add_counts(self, name: str, *shape: int) -> None:
        zeros = torch.zeros(shape, dtype=torch.int32)
        self.add_state(name, default=zeros, dist_reduce_fx="sum")
