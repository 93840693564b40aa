"""What makes a model's confidence honest after training: one temperature, or a line per class."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from distill.metrics._shared import check_finite, check_logits, mean_over_rows, sum_over_blocks
from distill.metrics.calibration import negative_log_likelihood

# A slope this small against the scale of the logits is rounding, not evidence.
_NO_EVIDENCE = 1e-13
_MOST_STEPS = 200
# Largest derivative, in variables scaled to curvature one, at which a vector scaling is found.
_FLAT = 1e-9
_LEAST_CURVATURE = 1e-6
# Ridges per example. Where a loss falls for ever, each next one moves the minimum on by about
# log(100) = 4.6 in log-odds; near a minimum, by next to nothing.
_FADING_RIDGES = 1e-6, 1e-8, 1e-10
_MOVES_ON = 2.0


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

    def apply(self, logits: Tensor) -> Tensor:
        """Divide logits of any shape by the temperature; unless status is "ok" leave them as is.

        The result is float64, in which no two scores that differed become equal.
        """
        return logits.double() / (1.0 if self.temperature is None else self.temperature)


@dataclass(frozen=True)
class VectorScaling:
    """What `fit_vector_scaling` found.

    Attributes:
        scale: What each class's logit is multiplied by, K numbers; None unless status is "ok".
        bias: What is then added to it, K numbers with mean zero; None unless status is "ok".
        status: "ok"; "unbounded" where the likelihood has no maximum (only without a ridge).
        nll_before: Negative log-likelihood of the logits as they are, in nats.
        nll_after: The same of `apply(logits)`.
    """

    scale: list[float] | None
    bias: list[float] | None
    status: Literal["ok", "unbounded"]
    nll_before: float
    nll_after: float

    def apply(self, logits: Tensor) -> Tensor:
        """Scale and shift logits `[…, K]`; unless status is "ok" leave them as they are.

        The result is float64, as that of `Scaling.apply`. Unlike a temperature, it can change which
        class comes first.
        """
        if self.scale is None or self.bias is None:
            return logits.double()
        if logits.shape[-1] != len(self.scale):
            raise ValueError(
                f"logits have {logits.shape[-1]} classes, but {len(self.scale)} were fitted."
            )
        return logits.double() * _like(logits, self.scale) + _like(logits, self.bias)


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
        ValueError: If shapes or labels are wrong, logits or their differences are not finite, or
            there is no example.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0]] * 4)
        >>> fit = fit_temperature(logits, torch.tensor([0, 0, 0, 1]))
        >>> fit.status, round(4.0 / fit.temperature, 6), round(math.log(3), 6)
        ('ok', 1.098612, 1.098612)

    Reference: Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599.
    """
    check_logits(logits, target)
    scale = _largest_spread(logits)
    if not math.isfinite(scale):
        check_finite(logits, "logits")
        raise ValueError("logits of one row differ by more than float64 holds.")
    before = float(negative_log_likelihood(logits, target))
    if scale == 0 or _slope(logits, target, scale, 0.0)[0] >= -_NO_EVIDENCE:
        return Scaling(None, "infinite", before, before)
    if _shortfall(logits, target) == 0:
        return Scaling(None, "zero", before, before)
    temperature = scale / _root(logits, target, scale)
    after = _mean_surprise(lambda s: s / temperature, logits, target)
    return Scaling(temperature, "ok", before, after)


def fit_vector_scaling(logits: Tensor, target: Tensor, ridge: float = 1.0) -> VectorScaling:
    """Fit a factor and an offset for each class by penalised maximum likelihood.

    Minimises `Σ_i NLL(w ⊙ s_i + b) + ridge/2 · (r²·‖w − 1/T‖² + ‖b‖²)`, T the temperature of
    `fit_temperature` (1 where that is not "ok") and r the root mean square of the logits, which
    frees the penalty from their unit. The loss is convex and ends no higher than the temperature
    alone brings it; the ridge keeps classes with few labels near that temperature. It is minimised
    by L-BFGS in float64, over blocks of rows and with variables scaled to curvature one, until no
    derivative of the mean loss exceeds 1e−9 or rounding hides any further descent.

    Without a ridge it is the vector scaling of Guo et al., whose likelihood may have no maximum: a
    class without labels, or labels that some w and b separate. Status is then "unbounded", judged
    by whether log-odds still grow as a ridge fades from 1e−6·N to 1e−10·N; a maximum still farther
    off, at weights of no use, counts as none.

    Args:
        logits: Scores before the softmax `[N, K]`, of a split that training did not see. A constant
            added to a row changes the result, so they should come from the model as they are.
        target: Labels `[N]`.
        ridge: Weight of the penalty, at least 0.

    Returns:
        A `VectorScaling`.

    Raises:
        ValueError: If shapes, labels or `ridge` are wrong, logits are not finite, or there is no
            example.

    Example:
        >>> logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(4, 1)
        >>> target = torch.tensor([0, 0, 0, 1, 0, 0, 1, 1])  # class 0: 3 in 4, then 2 in 4
        >>> fit = fit_vector_scaling(logits, target, ridge=0)
        >>> [round(p, 6) for p in fit.apply(logits[:2]).softmax(1)[:, 0].tolist()]
        [0.75, 0.5]

    Reference: Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599.
    """
    if not (ridge >= 0 and math.isfinite(ridge)):
        raise ValueError(f"ridge must be at least 0 and finite, not {ridge}.")
    start = fit_temperature(logits, target)
    problem = _Problem(logits.detach(), target, ridge, 1 / (start.temperature or 1.0))
    point = torch.zeros(2, logits.shape[1], dtype=torch.float64)
    if ridge == 0:
        lacking = len(target.unique()) < logits.shape[1]
        bounded = None if lacking or start.status == "zero" else problem.within_bounds(point)
        if bounded is None:
            return VectorScaling(None, None, "unbounded", start.nll_before, start.nll_before)
        point = bounded
    w, b = problem.scale_and_bias(problem.minimise(point))
    after = _mean_surprise(lambda s: s * w + b, logits, target)
    return VectorScaling(w.tolist(), b.tolist(), "ok", start.nll_before, after)


@dataclass(frozen=True)
class _Problem:
    """The mean penalised loss as a function of `[2, K]`: the change of r·w, and b."""

    logits: Tensor
    target: Tensor
    ridge: float
    start: float

    @cached_property
    def size(self) -> float:
        """The root mean square r of the logits; 1 where all are zero."""
        largest = float(torch.maximum(self.logits.amax(), -self.logits.amin()))
        if largest == 0:
            return 1.0
        # Divided first, since squares of large numbers overflow.
        mean = mean_over_rows(lambda s: (s / largest).square().mean(dim=1), self.logits)
        return largest * math.sqrt(float(mean))

    @cached_property
    def curvature(self) -> Tensor:
        """The second derivative of the mean loss in each variable at the start."""

        def of_rows(s: Tensor) -> Tensor:
            p = (self.start * s).softmax(dim=1)
            variance = p * (1 - p)
            return torch.stack([variance * (s / self.size).square(), variance], dim=1)

        return mean_over_rows(of_rows, self.logits).cpu()

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        v, b = x.to(self.logits.device)

        def sums(s: Tensor, y: Tensor) -> Tensor:
            log_p = ((self.start + v / self.size) * s + b).log_softmax(dim=1)
            excess = log_p.exp().scatter_add(1, y.long()[:, None], log_p.new_full((len(y), 1), -1))
            slopes = (excess * (s / self.size)).sum(dim=0), excess.sum(dim=0)
            return torch.cat([-_at_label(log_p, y).sum()[None], *slopes])

        mean = sum_over_blocks(sums, self.logits, self.target).cpu() / len(self.logits)
        weight = self.ridge / len(self.logits)
        value = float(mean[0]) + weight / 2 * float(x.square().sum())
        return value, mean[1:].view_as(x) + weight * x

    def scale_and_bias(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v, b = x.to(self.logits.device)
        return self.start + v / self.size, b - b.mean()

    def within_bounds(self, x: Tensor) -> Tensor | None:
        """Descend from x to near the minimum without a ridge; None if there is none."""
        largest = torch.maximum(self.logits.amax(dim=0), -self.logits.amin(dim=0)).double().cpu()
        reach = torch.stack([largest / self.size, torch.ones_like(largest)])
        first, *following = (
            replace(self, ridge=ridge * len(self.logits)) for ridge in _FADING_RIDGES
        )
        x = first.minimise(x)
        for problem in following:
            before, x = x, problem.minimise(x)
            if float(((x - before).abs() * reach).sum(dim=0).max()) < _MOVES_ON:
                return x
        return None

    def minimise(self, x: Tensor) -> Tensor:
        """Descend from x until the loss is flat, or rounding hides what is left to gain."""
        from scipy.optimize import minimize  # slow to import, and seldom needed

        ridge = self.ridge / len(self.logits)
        unit = (self.curvature + ridge).clamp(min=_LEAST_CURVATURE).rsqrt()

        def objective(scaled: Any) -> tuple[float, Any]:
            value, gradient = self.value_and_gradient(torch.from_numpy(scaled).view_as(x) * unit)
            return value, (gradient * unit).flatten().numpy()

        optimum = minimize(
            objective,
            (x / unit).flatten().numpy(),
            jac=True,
            method="L-BFGS-B",
            options={"gtol": _FLAT, "ftol": 0.0, "maxcor": 20},
        )
        return torch.from_numpy(optimum.x).view_as(x) * unit


def _mean_surprise(change: Callable[[Tensor], Tensor], logits: Tensor, target: Tensor) -> float:
    # Changed block by block: a copy of all logits in float64 may not fit.
    def surprise(s: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(change(s), y.long(), reduction="none")

    return float(mean_over_rows(surprise, logits, target))


def _like(logits: Tensor, values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=logits.device)


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
