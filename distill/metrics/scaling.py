"""The one temperature that makes a model's confidence honest, fitted after training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distill.metrics._shared import check_finite, check_logits, mean_over_rows
from distill.metrics.calibration import negative_log_likelihood

# A slope this small against the scale of the logits is rounding, not evidence.
_NO_EVIDENCE = 1e-13
_MOST_STEPS = 200


@dataclass(frozen=True)
class Scaling:
    """What `fit_temperature` found.

    Attributes:
        temperature: The T that minimises the negative log-likelihood; None unless status is "ok".
        status: "ok"; "infinite" where no finite temperature is large enough (constant logits, or
            scores against the labels); "zero" where none is small enough (every label has the
            largest score).
        nll_before: Negative log-likelihood of the logits as they are, in nats.
        nll_after: The same of `logits / temperature`; equal to `nll_before` unless status is "ok",
            since then nothing is applied.
    """

    temperature: float | None
    status: Literal["ok", "infinite", "zero"]
    nll_before: float
    nll_after: float


def fit_temperature(logits: Tensor, target: Tensor) -> Scaling:
    """Fit the temperature that minimises the negative log-likelihood of `softmax(logits / T)`.

    The minimum is convex in `β = 1/T` and lies where `g(β) = 1/N · Σ_i (Σ_k p_ik s_ik − s_{i,y_i})`
    is zero, `p = softmax(β·s)`. The root is bracketed by powers of eight and found by Newton steps
    in log β that fall back to bisection, in float64, until β stands to a relative 1e−12: g is then
    zero to 1e−8 of the logits' largest spread within a row, and usually to 1e−14. Dividing by a
    temperature never changes an argmax or a top-k set.

    Args:
        logits: Scores before the softmax `[N, K]`, of a split that training did not see.
        target: Labels `[N]`.

    Returns:
        A `Scaling`.

    Raises:
        ValueError: If shapes or labels are wrong, logits are not finite, or there is no example.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0]] * 4)
        >>> fit = fit_temperature(logits, torch.tensor([0, 0, 0, 1]))
        >>> fit.status, round(4.0 / fit.temperature, 6), round(math.log(3), 6)
        ('ok', 1.098612, 1.098612)

    Reference: Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599.
    """
    check_logits(logits, target)
    check_finite(logits, "logits")
    before = float(negative_log_likelihood(logits, target))
    scale = _largest_spread(logits)
    if scale == 0 or _slope(logits, target, scale, 0.0)[0] >= -_NO_EVIDENCE:
        return Scaling(None, "infinite", before, before)
    if _shortfall(logits, target) == 0:
        return Scaling(None, "zero", before, before)
    temperature = scale / _root(logits, target, scale)
    after = negative_log_likelihood(logits.detach().double() / temperature, target)
    return Scaling(temperature, "ok", before, float(after))


def _root(logits: Tensor, target: Tensor, scale: float) -> float:
    low, high = _bracket(logits, target, scale)
    x = (low + high) / 2
    for _ in range(_MOST_STEPS):
        slope, curvature = _slope(logits, target, scale, math.exp(x))
        low, high = (x, high) if slope < 0 else (low, x)
        newton = x - slope / curvature if curvature > 0 else math.inf
        following = newton if low <= newton <= high else (low + high) / 2
        if abs(following - x) <= 1e-12:
            return math.exp(following)
        x = following
    return math.exp(x)


def _bracket(logits: Tensor, target: Tensor, scale: float) -> tuple[float, float]:
    x, step = 0.0, math.log(8)
    if _slope(logits, target, scale, 1.0)[0] < 0:
        while _slope(logits, target, scale, math.exp(x + step))[0] < 0:
            x += step
        return x, x + step
    while _slope(logits, target, scale, math.exp(x - step))[0] >= 0:
        x -= step
    return x - step, x


def _slope(logits: Tensor, target: Tensor, scale: float, beta: float) -> tuple[float, float]:
    """Return g and its derivative in log β for logits divided by their scale."""

    def moments(s: Tensor, y: Tensor) -> Tensor:
        scaled = _below_largest(s) / scale
        p = (beta * scaled).softmax(dim=1)
        mean = (p * scaled).sum(dim=1)
        variance = (p * (scaled - mean[:, None]).square()).sum(dim=1)
        return torch.stack([mean - _at_label(scaled, y), beta * variance], dim=1)

    slope, curvature = mean_over_rows(moments, logits, target).tolist()
    return slope, curvature


def _shortfall(logits: Tensor, target: Tensor) -> float:
    return float(mean_over_rows(lambda s, y: -_at_label(_below_largest(s), y), logits, target))


def _largest_spread(logits: Tensor) -> float:
    return float((logits.detach().amax(dim=1).double() - logits.detach().amin(dim=1)).max())


def _below_largest(s: Tensor) -> Tensor:
    # Relative to the row's largest score, so that constant rows are exactly zero.
    return s - s.amax(dim=1, keepdim=True)


def _at_label(s: Tensor, y: Tensor) -> Tensor:
    return s.gather(1, y.long()[:, None]).squeeze(1)
