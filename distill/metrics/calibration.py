"""How far a model's confidence can be trusted.

Confidence is the largest probability of a row, and a row is right when its first largest class is
the label. Every function reads probabilities `[N, K]` (`negative_log_likelihood` reads logits) and
labels `[N]`, works in float64, and returns a scalar tensor without gradient; `reliability`,
`class_reliability` and `brier_decomposition` return a few named tensors.

The functions see all samples. The `Metric` classes keep sums of fixed size instead, so that any
split of the data into batches or processes, in any order, gives the same value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, threshold

from distill.metrics._shared import (
    SumMetric,
    blocks_of_rows,
    check_classes,
    check_count,
    check_logits,
    check_probabilities,
    mean_over_rows,
    sum_over_rows,
)

Norm = Literal["l1", "l2", "max"]

GRID_CELLS = 65_536

# A share of the first edge that stays below it however coarsely the probabilities are rounded.
_BELOW_FIRST_EDGE = 0.9
# Below this bandwidth the search for the smooth error stops. Its spectrum there has 2^16 modes.
_NARROWEST = 2.0**-14
# exp(−(9π)²/2·…): modes beyond 3/σ carry a factor exp(−(3π)²/2) < 1e−19.
_MODES_PER_BANDWIDTH = 3
_NODES_PER_BANDWIDTH = 64
# The offset from the nearest node is at most π/8, and (π/8)^14 / 14! < 1e−16.
_TAYLOR_TERMS = 14


@dataclass(frozen=True, eq=False)
class Reliability:
    """The counts behind a reliability diagram, per bin `[B]` or per class and bin `[K, B]`.

    Attributes:
        edges: The `B + 1` edges `b / B`; bins are `[lo, hi)`, the last one closed.
        count: Examples in the bin.
        correct: How many of them are right (per class: how many are of the class).
        confidence: Sum of their confidences (per class: of their probabilities of the class).
    """

    edges: Tensor
    count: Tensor
    correct: Tensor
    confidence: Tensor

    @property
    def accuracy(self) -> Tensor:
        """Share of right examples per bin; NaN where a bin is empty."""
        return self.correct / self.count

    @property
    def mean_confidence(self) -> Tensor:
        """Mean confidence per bin; NaN where a bin is empty."""
        return self.confidence / self.count


class BrierDecomposition(NamedTuple):
    """Parts of the Brier score: `brier = reliability − resolution + uncertainty + within`."""

    reliability: Tensor
    resolution: Tensor
    uncertainty: Tensor
    within: Tensor

    @property
    def brier(self) -> Tensor:
        """The Brier score that the parts make up."""
        return self.reliability - self.resolution + self.uncertainty + self.within


def reliability(probs: Tensor, target: Tensor, bins: int = 15) -> Reliability:
    """Count examples, right ones and confidence in equal-width bins of confidence.

    `n_b`, `Σ_{i∈b} [right_i]` and `Σ_{i∈b} c_i`, in the bins of `expected_calibration_error`.

    Args:
        probs: Probabilities `[N, K]`.
        target: Labels `[N]`.
        bins: Number of bins.

    Returns:
        A `Reliability` of float64 tensors `[bins]`.

    Raises:
        ValueError: If shapes, values or `bins` are wrong, or there is no example.

    Example:
        >>> probs = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.0, 1.0]])
        >>> diagram = reliability(probs, torch.tensor([0, 1, 1]), bins=4)
        >>> diagram.count.tolist(), diagram.accuracy.tolist()
        ([0.0, 0.0, 0.0, 3.0], [nan, nan, nan, 0.6666666666666666])

    Reference: DeGroot and Fienberg, The Comparison and Evaluation of Forecasters, 1983.
    """
    _check_binning(bins)
    confidence, correct = _top_label(probs, target)
    return _reliability_of(_bin_sums(confidence, correct, bins))


def class_reliability(probs: Tensor, target: Tensor, bins: int = 15) -> Reliability:
    """Count examples, members and probability of each class in equal-width bins.

    `n_kb`, `Σ_{i∈kb} [y_i = k]` and `Σ_{i∈kb} p_ik`, with all N probabilities of class k in its
    bins, as in `classwise_calibration_error`.

    Args:
        probs: Probabilities `[N, K]`.
        target: Labels `[N]`.
        bins: Number of bins.

    Returns:
        A `Reliability` of float64 tensors `[K, bins]`.

    Raises:
        ValueError: If shapes, values or `bins` are wrong, or there is no example.

    Example:
        >>> probs = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
        >>> diagram = class_reliability(probs, torch.tensor([0, 0]), bins=2)
        >>> diagram.accuracy.tolist()
        [[1.0, 1.0], [0.0, 0.0]]

    Reference: Kull et al., Beyond temperature scaling, arXiv:1910.12656.
    """
    _check_binning(bins)
    check_probabilities(probs, target)
    return _reliability_of(_class_sums(probs, target, bins))


def expected_calibration_error(
    probs: Tensor, target: Tensor, bins: int = 15, norm: Norm = "l1"
) -> Tensor:
    """Gap between accuracy and confidence over equal-width bins of confidence.

    `l1` (ECE): `Σ_b n_b/N · |acc_b − conf_b|`; `l2` (RMSCE): `sqrt(Σ_b n_b/N · (acc_b − conf_b)²)`;
    `max` (MCE): `max_b |acc_b − conf_b|` over bins that are not empty. Bins are `[lo, hi)`, the
    last one closed, compared with the edges `b / bins`. Always
    `|acc − conf| ≤ ECE ≤ RMSCE ≤ MCE ≤ 1`.

    Args:
        probs: Probabilities `[N, K]`.
        target: Labels `[N]`.
        bins: Number of bins.
        norm: `"l1"`, `"l2"` or `"max"`.

    Returns:
        A float64 scalar in `[0, 1]`.

    Raises:
        ValueError: If shapes, values, `bins` or `norm` are wrong, or there is no example.

    Example:
        >>> probs = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.4, 0.6], [0.4, 0.6]])
        >>> target = torch.tensor([0, 0, 0, 1])
        >>> round(float(expected_calibration_error(probs, target, bins=5)), 4)
        0.15

    Reference: Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599.
    """
    _check_binning(bins, norm)
    confidence, correct = _top_label(probs, target)
    return _error_of_bins(_bin_sums(confidence, correct, bins), norm)


def calibration_error_of_confidence(
    confidence: Tensor, correct: Tensor, bins: int = 15, norm: Norm = "l1"
) -> Tensor:
    """Return the error of `expected_calibration_error` where the confidences are known already.

    Args:
        confidence: Probability of each answer, float64 `[N]` in `[0, 1]`.
        correct: Whether each answer is right `[N]`.
        bins: Number of bins.
        norm: `"l1"`, `"l2"` or `"max"`.

    Returns:
        A float64 scalar in `[0, 1]`.

    Raises:
        ValueError: If `bins` or `norm` is wrong.

    Example:
        >>> confidence = torch.tensor([0.8, 0.8, 0.6, 0.6]).double()
        >>> correct = torch.tensor([True, False, True, False])
        >>> round(float(calibration_error_of_confidence(confidence, correct, bins=5)), 4)
        0.2
    """
    _check_binning(bins, norm)
    return _error_of_bins(_bin_sums(confidence.clamp(max=1), correct.double(), bins), norm)


def classwise_calibration_error(probs: Tensor, target: Tensor, bins: int = 15) -> Tensor:
    """Mean over classes of the calibration error of each class against the rest.

    `1/K · Σ_k Σ_b n_kb/N · |freq_kb − conf_kb|`, with all N probabilities of class k in its bins.

    Args:
        probs: Probabilities `[N, K]`.
        target: Labels `[N]`.
        bins: Number of equal-width bins, as in `expected_calibration_error`.

    Returns:
        A float64 scalar in `[0, 1]`.

    Raises:
        ValueError: If shapes, values or `bins` are wrong, or there is no example.

    Example:
        >>> probs = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
        >>> float(classwise_calibration_error(probs, torch.tensor([0, 1])))
        0.25

    Reference: Kull et al., Beyond temperature scaling, arXiv:1910.12656.
    """
    _check_binning(bins)
    check_probabilities(probs, target)
    return _error_of_classes(_class_sums(probs, target, bins), len(probs))


def adaptive_calibration_error(probs: Tensor, target: Tensor, bins: int = 15) -> Tensor:
    """Gap between accuracy and confidence over bins that hold about equally many examples.

    `Σ_b n_b/N · |acc_b − conf_b|`. Examples are sorted by confidence, equal confidences form one
    group, and bin b ends with the group where the running count first reaches `b·N/bins`. Groups
    are never split and empty bins vanish, so the order of the examples does not matter and
    `bins > N` is fine.

    Args:
        probs: Probabilities `[N, K]`.
        target: Labels `[N]`.
        bins: Largest number of bins.

    Returns:
        A float64 scalar in `[0, 1]`.

    Raises:
        ValueError: If shapes, values or `bins` are wrong, or there is no example.

    Example:
        >>> probs = torch.tensor([[0.75, 0.25], [0.875, 0.125]])
        >>> float(adaptive_calibration_error(probs, torch.tensor([0, 1]), bins=2))
        0.5625

    Reference: Nixon et al., Measuring Calibration in Deep Learning, arXiv:1904.01685.
    """
    _check_binning(bins)
    confidence, correct = _top_label(probs, target)
    _, group = torch.unique(confidence, return_inverse=True)
    groups = int(group.max()) + 1
    return _error_of_bins(_merge_evenly(_tally(confidence, correct, group, groups), bins))


def smooth_calibration_error(probs: Tensor, target: Tensor) -> Tensor:
    """Gap between accuracy and confidence, smoothed by a kernel in place of bins.

    `smECE(σ) = ∫₀¹ |1/N · Σ_i K_σ(t, c_i)·(right_i − c_i)| dt`, K the Gaussian of width σ reflected
    at 0 and 1, c the confidence; the result is the σ with `smECE(σ) = σ`, found by bisection. The
    sum over examples is a cosine series exact to 1e−14; the integral's midpoint rule stays within
    about 1e−5 of the value. Below σ = 6.1e−5 the search ends: smECE of that width is returned,
    which is less than 6.1e−5 under the fixed point.

    Args:
        probs: Probabilities `[N, K]`.
        target: Labels `[N]`.

    Returns:
        A float64 scalar in `[0, 1]`.

    Raises:
        ValueError: If shapes or values are wrong, or there is no example.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1]]).repeat(10, 1)
        >>> target = torch.tensor([0] * 9 + [1])
        >>> float(smooth_calibration_error(probs.double(), target)) < 1e-7
        True

    Reference: Błasiok and Nakkiran, Smooth ECE, arXiv:2309.12236.
    """
    confidence, correct = _top_label(probs, target)
    return _smooth_error(confidence, (correct - confidence) / len(confidence))


def brier_score(probs: Tensor, target: Tensor) -> Tensor:
    """Squared distance of the probabilities from the one-hot label, summed over classes.

    `1/N · Σ_i Σ_k (p_ik − [k = y_i])²`, from 0 (certain and right) to 2 (certain and wrong).

    Args:
        probs: Probabilities `[N, K]`.
        target: Labels `[N]`.

    Returns:
        A float64 scalar in `[0, 2]`.

    Raises:
        ValueError: If shapes or values are wrong, or there is no example.

    Example:
        >>> float(brier_score(torch.tensor([[0.75, 0.25]]), torch.tensor([1])))
        1.125

    Reference: Brier, Verification of forecasts expressed in terms of probability, 1950.
    """
    check_probabilities(probs, target)
    return mean_over_rows(_squared_distance, probs, target)


def brier_decomposition(probs: Tensor, target: Tensor, bins: int = 15) -> BrierDecomposition:
    """Split the Brier score into calibration, sharpness and what no forecast can change.

    Per class, over bins of its probability, then summed over classes:
    `reliability = Σ_b n_b/N · (conf_b − freq_b)²`, `resolution = Σ_b n_b/N · (freq_b − freq)²`,
    `uncertainty = freq·(1 − freq)`, and
    `within = 1/N · Σ_b Σ_{i∈b} (f_i − conf_b)·((f_i − conf_b) − 2·(o_i − freq_b))`, which is zero
    when the forecasts of each bin are equal. Then
    `brier = reliability − resolution + uncertainty + within`.

    Args:
        probs: Probabilities `[N, K]`.
        target: Labels `[N]`.
        bins: Number of equal-width bins, as in `classwise_calibration_error`.

    Returns:
        A `BrierDecomposition` of float64 scalars; only `within` may be negative.

    Raises:
        ValueError: If shapes, values or `bins` are wrong, or there is no example.

    Example:
        >>> probs = torch.tensor([[0.75, 0.25]]).repeat(4, 1)
        >>> parts = brier_decomposition(probs, torch.tensor([0, 0, 1, 1]), bins=4)
        >>> [float(part) for part in parts], float(parts.brier)
        ([0.125, 0.0, 0.5, 0.0], 0.625)

    Reference: Murphy, A New Vector Partition of the Probability Score, 1973, and Stephenson et
    al., Two Extra Components in the Brier Score Decomposition, 2008.
    """
    _check_binning(bins)
    check_probabilities(probs, target)
    score = sum_over_rows(_squared_distance, probs, target)
    return _decompose(_class_sums(probs, target, bins), score, len(probs))


def negative_log_likelihood(logits: Tensor, target: Tensor) -> Tensor:
    """Mean surprise at the label, in nats.

    `1/N · Σ_i (logsumexp_k s_ik − s_{i,y_i})`.

    Args:
        logits: Scores before the softmax `[N, K]`.
        target: Labels `[N]`.

    Returns:
        A float64 scalar, at least 0; NaN if the logits hold NaN.

    Raises:
        ValueError: If shapes or labels are wrong, or there is no example.

    Example:
        >>> logits = torch.zeros(1, 4)
        >>> round(float(negative_log_likelihood(logits, torch.tensor([2]))), 4)
        1.3863

    Reference: Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599.
    """
    check_logits(logits, target)
    return mean_over_rows(_surprise, logits, target)


class _ProbabilityMetric(SumMetric):
    higher_is_better = False

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_count(num_classes, "num_classes", least=2)
        self.num_classes = num_classes

    def _check(self, probs: Tensor, target: Tensor) -> None:
        check_classes(probs, self.num_classes, "probs")
        check_probabilities(probs, target)


class CalibrationError(_ProbabilityMetric):
    """`expected_calibration_error` over batches, from counts and sums per bin.

    State: `sums` `[3, bins]`, the rows being examples, right ones, and their confidences summed.

    Args:
        num_classes: K.
        bins: Number of bins.
        norm: `"l1"`, `"l2"` or `"max"`.
        **kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ValueError: If an argument, or an input of `update(probs, target)`, is wrong.

    Example:
        >>> metric = CalibrationError(num_classes=2)
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1]))
        >>> float(metric.compute())
        0.25
    """

    sums: Tensor

    def __init__(self, num_classes: int, bins: int = 15, norm: Norm = "l1", **kwargs: Any) -> None:
        super().__init__(num_classes, **kwargs)
        _check_binning(bins, norm)
        self.bins, self.norm = bins, norm
        self._add_sum("sums", 3, bins)

    def update(self, probs: Tensor, target: Tensor) -> None:
        """Add probabilities `[N, K]` and labels `[N]`."""
        self._check(probs, target)
        self.sums = self.sums + _bin_sums(*_confidence_and_hits(probs, target), self.bins)

    def compute(self) -> Tensor:
        """Return the calibration error of everything added; NaN if nothing was."""
        return _error_of_bins(self.sums, self.norm)

    def reliability(self) -> Reliability:
        """Return the counts of everything added, as the function `reliability` does.

        They are this process's own; within `sync_context()` they are those of all processes.
        """
        return _reliability_of(self.sums)


class ClasswiseCalibrationError(_ProbabilityMetric):
    """`classwise_calibration_error` over batches, from counts and sums per class and bin.

    State: `sums` `[3, K, bins]`, first index examples, examples of that class, probabilities.

    Args:
        num_classes: K.
        bins: Number of bins.
        **kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ValueError: If an argument, or an input of `update(probs, target)`, is wrong.

    Example:
        >>> metric = ClasswiseCalibrationError(num_classes=2)
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 1]))
        >>> float(metric.compute())
        0.25
    """

    sums: Tensor
    total: Tensor

    def __init__(self, num_classes: int, bins: int = 15, **kwargs: Any) -> None:
        super().__init__(num_classes, **kwargs)
        _check_binning(bins)
        self.bins = bins
        self._add_sum("sums", 3, num_classes, bins)
        self._add_sum("total")

    def update(self, probs: Tensor, target: Tensor) -> None:
        """Add probabilities `[N, K]` and labels `[N]`."""
        self._check(probs, target)
        self.sums = self.sums + _class_sums(probs, target, self.bins)
        self.total = self.total + len(probs)

    def compute(self) -> Tensor:
        """Return the classwise error of everything added; NaN if nothing was."""
        return _error_of_classes(self.sums, self.total)

    def reliability(self) -> Reliability:
        """Return the counts of everything added, as the function `class_reliability` does.

        They are this process's own; within `sync_context()` they are those of all processes.
        """
        return _reliability_of(self.sums)


class _GridMetric(_ProbabilityMetric):
    sums: Tensor

    def __init__(self, num_classes: int, cells: int, **kwargs: Any) -> None:
        super().__init__(num_classes, **kwargs)
        check_count(cells, "cells")
        self.cells = cells
        self._add_sum("sums", 3, cells)

    def update(self, probs: Tensor, target: Tensor) -> None:
        """Add probabilities `[N, K]` and labels `[N]`."""
        self._check(probs, target)
        self.sums = self.sums + _bin_sums(*_confidence_and_hits(probs, target), self.cells)


class AdaptiveCalibrationError(_GridMetric):
    """`adaptive_calibration_error` over batches, on a fixed fine grid of confidence.

    Confidences of one grid cell count as one group, so a cut between bins can only move to the end
    of its cell. The value differs from the function's by at most `2/N · Σ min(n_c − 1, g_c)` over
    the cells c that hold a cut, with n_c examples whose `|right − confidence|` sum to at most g_c
    (`error_bound()`). That is zero where such cells hold one example each, as is usual for
    `N ≪ cells`, and small where many sure and right examples crowd near one.

    State: `sums` `[3, cells]`, the rows being examples, right ones, and confidences summed.

    Args:
        num_classes: K.
        bins: Largest number of bins.
        cells: Number of equal-width grid cells on `[0, 1]`.
        **kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ValueError: If an argument, or an input of `update(probs, target)`, is wrong.

    Example:
        >>> metric = AdaptiveCalibrationError(num_classes=2, bins=2)
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.875, 0.125]]), torch.tensor([0, 1]))
        >>> float(metric.compute()), float(metric.error_bound())
        (0.5625, 0.0)
    """

    def __init__(
        self, num_classes: int, bins: int = 15, cells: int = GRID_CELLS, **kwargs: Any
    ) -> None:
        super().__init__(num_classes, cells, **kwargs)
        _check_binning(bins)
        self.bins = bins

    def compute(self) -> Tensor:
        """Return the adaptive error of everything added; NaN if nothing was."""
        return _error_of_bins(_merge_evenly(self.sums, self.bins))

    def error_bound(self) -> Tensor:
        """Return how far, at most, the grid can have moved the value (of this process's data)."""
        count, correct, _ = self.sums
        running = count.long().cumsum(0)
        cuts = (running * self.bins // running[-1].clamp(min=1)).clamp(max=self.bins - 1)
        holds_cut = cuts.diff(prepend=cuts.new_zeros(1)) > 0
        lower = torch.arange(self.cells, device=count.device) / self.cells
        reach = (count - correct) * (lower + 1 / self.cells) + correct * (1 - lower)
        return 2 * torch.minimum(count - 1, reach)[holds_cut].sum() / count.sum()


class SmoothCalibrationError(_GridMetric):
    """`smooth_calibration_error` over batches, on a fixed fine grid of confidence.

    The examples of a grid cell stand together at their mean confidence. The value differs from
    the function's by at most `0.4 / (cells · s)`, s being the larger of the two; as signs mostly
    cancel, real data shows far less.

    State: `sums` `[3, cells]`, the rows being examples, right ones, and confidences summed.

    Args:
        num_classes: K.
        cells: Number of equal-width grid cells on `[0, 1]`.
        **kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ValueError: If an argument, or an input of `update(probs, target)`, is wrong.

    Example:
        >>> metric = SmoothCalibrationError(num_classes=2)
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1]))
        >>> round(float(metric.compute()), 6)
        0.25
    """

    def __init__(self, num_classes: int, cells: int = GRID_CELLS, **kwargs: Any) -> None:
        super().__init__(num_classes, cells, **kwargs)

    def compute(self) -> Tensor:
        """Return the smooth error of everything added; NaN if nothing was."""
        count, correct, confidence = self.sums[:, self.sums[0] > 0]
        return _smooth_error(confidence / count, (correct - confidence) / count.sum())


class BrierScore(_ProbabilityMetric):
    """`brier_score` over batches.

    Args:
        num_classes: K.
        **kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ValueError: If an argument, or an input of `update(probs, target)`, is wrong.

    Example:
        >>> metric = BrierScore(num_classes=2)
        >>> metric.update(torch.tensor([[0.75, 0.25]]), torch.tensor([1]))
        >>> float(metric.compute())
        1.125
    """

    score: Tensor
    total: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(num_classes, **kwargs)
        self._add_sum("score")
        self._add_sum("total")

    def update(self, probs: Tensor, target: Tensor) -> None:
        """Add probabilities `[N, K]` and labels `[N]`."""
        self._check(probs, target)
        self.score = self.score + sum_over_rows(_squared_distance, probs, target)
        self.total = self.total + len(probs)

    def compute(self) -> Tensor:
        """Return the Brier score of everything added; NaN if nothing was."""
        return self.score / self.total


class DecomposedBrierScore(_ProbabilityMetric):
    """`brier_decomposition` over batches, from counts and sums per class and bin.

    State: `sums` `[3, K, bins]` as in `ClasswiseCalibrationError`, and the Brier score's own sum.

    Args:
        num_classes: K.
        bins: Number of bins.
        **kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ValueError: If an argument, or an input of `update(probs, target)`, is wrong.

    Example:
        >>> metric = DecomposedBrierScore(num_classes=2, bins=4)
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1]))
        >>> parts = metric.compute()
        >>> float(parts.reliability), float(parts.uncertainty), float(parts.brier)
        (0.125, 0.5, 0.625)
    """

    sums: Tensor
    score: Tensor
    total: Tensor

    def __init__(self, num_classes: int, bins: int = 15, **kwargs: Any) -> None:
        super().__init__(num_classes, **kwargs)
        _check_binning(bins)
        self.bins = bins
        self._add_sum("sums", 3, num_classes, bins)
        self._add_sum("score")
        self._add_sum("total")

    def update(self, probs: Tensor, target: Tensor) -> None:
        """Add probabilities `[N, K]` and labels `[N]`."""
        self._check(probs, target)
        self.sums = self.sums + _class_sums(probs, target, self.bins)
        self.score = self.score + sum_over_rows(_squared_distance, probs, target)
        self.total = self.total + len(probs)

    def compute(self) -> BrierDecomposition:
        """Return the parts of the Brier score of everything added; NaN if nothing was."""
        return _decompose(self.sums, self.score, self.total)


class NegativeLogLikelihood(SumMetric):
    """`negative_log_likelihood` over batches; the only metric here that takes logits.

    Args:
        num_classes: K.
        **kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ValueError: If an argument, or an input of `update(logits, target)`, is wrong.

    Example:
        >>> metric = NegativeLogLikelihood(num_classes=4)
        >>> metric.update(torch.zeros(1, 4), torch.tensor([2]))
        >>> round(float(metric.compute()), 4)
        1.3863
    """

    higher_is_better = False
    surprise: Tensor
    total: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_count(num_classes, "num_classes", least=2)
        self.num_classes = num_classes
        self._add_sum("surprise")
        self._add_sum("total")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add logits `[N, K]` and labels `[N]`."""
        check_classes(logits, self.num_classes, "logits")
        check_logits(logits, target)
        self.surprise = self.surprise + sum_over_rows(_surprise, logits, target)
        self.total = self.total + len(logits)

    def compute(self) -> Tensor:
        """Return the mean surprise of everything added, in nats; NaN if nothing was."""
        return self.surprise / self.total


def _check_binning(bins: int, norm: Norm = "l1") -> None:
    check_count(bins, "bins")
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be one of {', '.join(get_args(Norm))}, not {norm!r}.")


def _top_label(probs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    check_probabilities(probs, target)
    return _confidence_and_hits(probs, target)


def _confidence_and_hits(probs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    confidence, prediction = probs.detach().max(dim=1)
    # A softmax in float32 may round a certain class to just above one.
    return confidence.double().clamp(max=1), (prediction == target).double()


def _squared_distance(probs: Tensor, target: Tensor) -> Tensor:
    label = target.long()[:, None]
    at_label = (1 - probs.gather(1, label)).square()
    return probs.square().scatter_(1, label, at_label).sum(dim=1)


def _surprise(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits, target.long(), reduction="none")


def _bin_index(values: Tensor, bins: int) -> Tensor:
    inner_edges = torch.arange(1, bins, dtype=torch.float64, device=values.device) / bins
    return torch.bucketize(values, inner_edges, right=True)


def _sum_by_cell(values: Tensor, cell: Tensor, cells: int) -> Tensor:
    # index_add_ in one dimension: fast on CPU, and deterministic on request on CUDA.
    return values.new_zeros(cells).index_add_(0, cell, values)


def _tally(confidence: Tensor, correct: Tensor, cell: Tensor, cells: int) -> Tensor:
    columns = (torch.ones_like(confidence), correct, confidence)
    return torch.stack([_sum_by_cell(column, cell, cells) for column in columns])


def _bin_sums(confidence: Tensor, correct: Tensor, bins: int) -> Tensor:
    return _tally(confidence, correct, _bin_index(confidence, bins), bins)


def _class_sums(probs: Tensor, target: Tensor, bins: int) -> Tensor:
    classes = probs.shape[1]
    sums = torch.zeros(3, classes * bins, dtype=torch.float64, device=probs.device)
    count, hits, mass = sums
    for block, label in blocks_of_rows(probs, target):
        # Of a row's K probabilities hardly more than `bins` pass this: only they need binning.
        high = threshold(block, _BELOW_FIRST_EDGE / bins, 0.0)
        place = high.flatten().nonzero().squeeze(1)
        value = high.flatten()[place].double()
        cell = _class_cell(value, place % classes, bins)
        count.index_add_(0, cell, torch.ones_like(value))
        mass.index_add_(0, cell, value)
        mass[::bins] += (block - high).double().sum(dim=0)
        own = block.gather(1, label.long()[:, None]).squeeze(1).double()
        hits.index_add_(0, _class_cell(own, label.long(), bins), torch.ones_like(own))
    count[::bins] += len(probs) - count.view(classes, bins).sum(dim=1)
    return sums.view(3, classes, bins)


def _class_cell(value: Tensor, of_class: Tensor, bins: int) -> Tensor:
    return _bin_index(value, bins) + of_class * bins


def _reliability_of(sums: Tensor) -> Reliability:
    bins = sums.shape[-1]
    edges = torch.arange(bins + 1, dtype=torch.float64, device=sums.device) / bins
    return Reliability(edges, *sums.clone())


def _decompose(sums: Tensor, score: Tensor, total: Tensor | int) -> BrierDecomposition:
    count, correct, confidence = sums
    filled = count.clamp(min=1)
    frequency = correct.sum(dim=1, keepdim=True) / total
    reliability = ((confidence - correct).square() / filled).sum() / total
    resolution = (count * (correct / filled - frequency).square()).sum() / total
    uncertainty = (frequency * (1 - frequency)).sum()
    within = score / total - (reliability - resolution + uncertainty)
    return BrierDecomposition(reliability, resolution, uncertainty, within)


def _error_of_bins(sums: Tensor, norm: Norm = "l1") -> Tensor:
    count, correct, confidence = sums
    gap, total = (correct - confidence).abs(), count.sum()
    if norm == "l1":
        return gap.sum() / total
    per_example = gap / count.clamp(min=1)
    if norm == "max":
        return torch.where(total > 0, per_example.max(), torch.nan)
    return ((gap * per_example).sum() / total).sqrt()


def _error_of_classes(sums: Tensor, total: Tensor | int) -> Tensor:
    _, correct, confidence = sums
    return (correct - confidence).abs().sum() / (correct.shape[0] * total)


def _merge_evenly(sums: Tensor, bins: int) -> Tensor:
    # Whole counts as integers: the cut `running ≥ b·N/bins` is then exact.
    count = sums[0].long()
    before = count.cumsum(0) - count
    merged = (before * bins // count.sum().clamp(min=1)).clamp(max=bins - 1)
    return torch.stack([_sum_by_cell(row, merged, bins) for row in sums])


def _smooth_error(points: Tensor, gaps: Tensor) -> Tensor:
    if len(points) == 0:
        return gaps.new_tensor(torch.nan)
    narrow, coefficients = 1.0, _cosine_sums(points, gaps, _MODES_PER_BANDWIDTH)
    while (error := _smoothed_gap(coefficients, narrow, narrow)) < narrow:
        if narrow <= _NARROWEST:
            return gaps.new_tensor(error)
        narrow /= 2
        coefficients = _cosine_sums(points, gaps, math.ceil(_MODES_PER_BANDWIDTH / narrow))
    low, high = narrow, min(2 * narrow, 1.0)
    while high - low > 1e-14:
        middle = (low + high) / 2
        if _smoothed_gap(coefficients, middle, narrow) < middle:
            high = middle
        else:
            low = middle
    return gaps.new_tensor(low)


def _cosine_sums(points: Tensor, weights: Tensor, modes: int) -> Tensor:
    """`Σ_i w_i cos(nπ x_i)` for n < modes: Taylor series about grid nodes, summed by FFT."""
    nodes = 4 * modes
    nearest = (points * nodes).round().long()
    offset = math.pi * modes * (points - nearest.double() / nodes)
    mode = torch.arange(modes, dtype=torch.float64, device=points.device) / modes
    total, power, factor = torch.zeros_like(mode), weights, torch.ones_like(mode).to(torch.cdouble)
    for order in range(1, _TAYLOR_TERMS + 1):
        at_nodes = _sum_by_cell(power, nearest, nodes + 1)
        total = total + (factor * torch.fft.rfft(at_nodes, n=2 * nodes)[:modes]).real
        power, factor = power * offset, factor * (-1j * mode / order)
    return total


def _smoothed_gap(coefficients: Tensor, bandwidth: float, narrowest: float) -> float:
    """`∫ |smoothed gap|`: the reflected Gaussian damps cosine n by `exp(−(nπσ)²/2)`."""
    nodes = math.ceil(_NODES_PER_BANDWIDTH / narrowest)
    mode = torch.arange(len(coefficients), dtype=torch.float64, device=coefficients.device)
    damped = coefficients * torch.exp(-((math.pi * bandwidth * mode) ** 2) / 2)
    at_midpoints = damped * torch.exp(1j * math.pi * mode / (2 * nodes))
    values = torch.fft.irfft(at_midpoints, n=2 * nodes, norm="forward")[:nodes]
    return float(values.abs().mean())
