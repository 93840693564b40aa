"""Where the true class stands in the model's order of classes.

The rank of the label is the number of classes whose score is at least the label's own: 1 is best,
and ties count against the model, so that constant scores rank last instead of first. A NaN counts
against the model as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.metrics._shared import SumMetric, check_count, check_logits, mean_over_rows


def mean_reciprocal_rank(logits: Tensor, target: Tensor) -> Tensor:
    """Mean of one over the rank of the label.

    `1/N · Σ_i 1/r_i`, `r_i = #{k : s_ik ≥ s_{i,y_i}}`. Ties count against the model.

    Args:
        logits: Scores `[N, K]`; only their order within a row matters.
        target: Labels `[N]`.

    Returns:
        A float64 scalar in `[1/K, 1]`.

    Raises:
        ValueError: If shapes or labels are wrong, or there is no example.

    Example:
        >>> logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
        >>> float(mean_reciprocal_rank(logits, torch.tensor([0, 1])))
        0.75

    Reference: Voorhees, The TREC-8 Question Answering Track Report, 1999.
    """
    check_logits(logits, target)
    return mean_over_rows(_reciprocal_rank, logits, target)


def topk_accuracy(logits: Tensor, target: Tensor, k: int) -> Tensor:
    """Share of examples whose label is among the k best classes.

    `1/N · Σ_i [r_i ≤ k]`, `r_i = #{c : s_ic ≥ s_{i,y_i}}`. Ties count against the model: constant
    scores give 0 for every k < K.

    Args:
        logits: Scores `[N, K]`; only their order within a row matters.
        target: Labels `[N]`.
        k: How many classes may be named, from 1 to K.

    Returns:
        A float64 scalar in `[0, 1]`.

    Raises:
        ValueError: If shapes, labels or `k` are wrong, or there is no example.

    Example:
        >>> logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
        >>> target = torch.tensor([0, 1])
        >>> float(topk_accuracy(logits, target, k=1)), float(topk_accuracy(logits, target, k=2))
        (0.5, 1.0)

    Reference: Lapin et al., Loss Functions for Top-k Error, arXiv:1512.00486.
    """
    check_logits(logits, target)
    _check_k(k, logits.shape[1])
    return mean_over_rows(lambda s, y: rank_of_label(s, y) <= k, logits, target)


def rank_of_label(logits: Tensor, target: Tensor) -> Tensor:
    """Rank of each label among the classes, ties counting against the model.

    `r_i = #{k : s_ik ≥ s_{i,y_i}}`, a NaN counting as larger than anything.

    Args:
        logits: Scores `[N, K]`.
        target: Labels `[N]`.

    Returns:
        Integers `[N]` from 1 (best) to K.

    Example:
        >>> rank_of_label(torch.tensor([[1.0, 2.0], [2.0, 2.0]]), torch.tensor([1, 1]))
        tensor([1, 2])
    """
    own = logits.gather(1, target.long()[:, None])
    return logits.shape[1] - (logits < own).sum(dim=1)


class MeanReciprocalRank(SumMetric):
    """`mean_reciprocal_rank` over batches.

    Args:
        **kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ValueError: If an input of `update(logits, target)` is wrong.

    Example:
        >>> metric = MeanReciprocalRank()
        >>> metric.update(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([1]))
        >>> float(metric.compute())
        0.5
    """

    higher_is_better = True
    reciprocal: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_sum("reciprocal")
        self._add_sum("total")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add scores `[N, K]` and labels `[N]`."""
        check_logits(logits, target)
        self.reciprocal = self.reciprocal + _reciprocal_rank(logits, target).sum()
        self.total = self.total + len(logits)

    def compute(self) -> Tensor:
        """Return the mean reciprocal rank of everything added; NaN if nothing was."""
        return self.reciprocal / self.total


class TopKAccuracy(SumMetric):
    """`topk_accuracy` over batches.

    Args:
        k: How many classes may be named.
        **kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ValueError: If `k`, or an input of `update(logits, target)`, is wrong.

    Example:
        >>> metric = TopKAccuracy(k=2)
        >>> metric.update(torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), torch.tensor([1, 2]))
        >>> float(metric.compute())
        0.5
    """

    higher_is_better = True
    hits: Tensor
    total: Tensor

    def __init__(self, k: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_count(k, "k")
        self.k = k
        self._add_sum("hits")
        self._add_sum("total")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add scores `[N, K]` and labels `[N]`."""
        check_logits(logits, target)
        _check_k(self.k, logits.shape[1])
        self.hits = self.hits + (rank_of_label(logits.detach(), target) <= self.k).sum()
        self.total = self.total + len(logits)

    def compute(self) -> Tensor:
        """Return the top-k accuracy of everything added; NaN if nothing was."""
        return self.hits / self.total


def _reciprocal_rank(logits: Tensor, target: Tensor) -> Tensor:
    return 1 / rank_of_label(logits.detach(), target).to(torch.float64)


def _check_k(k: int, classes: int) -> None:
    check_count(k, "k")
    if k > classes:
        raise ValueError(f"k must not exceed the {classes} classes, but is {k}.")
