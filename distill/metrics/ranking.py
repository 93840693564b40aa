"""Where the true class stands in the model's order of classes, and a class in that of examples.

The rank of the label is the number of classes whose score is at least the label's own: 1 is best,
and ties count against the model, so that constant scores rank last instead of first. A NaN counts
against the model as well.

The area under the ROC curve compares the scores of one class between examples. It takes scores as
they are: a softmax or a sigmoid would round different scores to the same one. Scores that a shift
of a whole row must not change are `log_odds`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distill.metrics._shared import (
    SumMetric,
    blocks_of_rows,
    check_classes,
    check_count,
    check_logits,
    check_ordered,
    check_scores,
    check_target,
    mean_over_rows,
    sum_over_rows,
)

_COLUMNS = 16
_BITS_OF_ONE = 127 << 23
# Sixteen doublings above one.
_LAST_BITS = (16 << 23) - 1


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
    return mean_over_rows(_reciprocal_rank, logits, target, widen=False)


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
    return mean_over_rows(lambda s, y: rank_of_label(s, y) <= k, logits, target, widen=False)


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
    logits = logits.detach()
    own = logits.gather(1, target.long()[:, None])
    # On the CPU a comparison written as floats, and their sum, take a third of the time of bools.
    below = torch.lt(logits, own, out=torch.empty_like(logits, dtype=torch.float32))
    return logits.shape[1] - below.sum(dim=1).long()


def auroc(scores: Tensor, target: Tensor) -> Tensor:
    """Chance that a member of a class scores higher than a non-member, averaged over classes.

    `1/|C| · Σ_{k∈C} 1/(P_k·N_k) · Σ_{i: y_i=k} Σ_{j: y_j≠k} ([s_ik > s_jk] + ½·[s_ik = s_jk])`, C
    being the classes that have both members and non-members. Exact, whatever the scores.

    Args:
        scores: Scores `[N, K]`, any real numbers; or `[N]`, for one yes-or-no question.
        target: Labels `[N]`; for scores `[N]` the answers, 0 or 1 (or booleans).

    Returns:
        A float64 scalar in `[0, 1]`; NaN if no class has both members and non-members.

    Raises:
        ValueError: If shapes or labels are wrong, a score is NaN, or there is no example.

    Example:
        >>> scores = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> float(auroc(scores, torch.tensor([0, 1, 1])))
        1.0
        >>> confidence, right = torch.tensor([0.9, 0.8, 0.8]), torch.tensor([1, 1, 0])
        >>> float(auroc(confidence, right))
        0.75

    Reference: Fawcett, An Introduction to ROC Analysis, 2006; Hanley and McNeil, 1982.
    """
    if scores.ndim == 1:
        return _auroc_of_answers(scores, target)
    check_scores(scores, "scores")
    check_target(target, *scores.shape)
    check_ordered(scores, "scores")
    # Enough columns together to use the whole of each stretch of memory that is read.
    columns = scores.detach().split(_COLUMNS, dim=1)
    by_class = (row for block in columns for row in block.T.contiguous())
    areas = [_area(row, target == k) for k, row in enumerate(by_class)]
    return torch.stack(areas).nanmean()


def log_odds(logits: Tensor) -> Tensor:
    """Log-odds of each class against all others, the score for `auroc`.

    `s_k − logsumexp_{j≠k} s_j = log(p_k / (1 − p_k))`, `p = softmax(s)`: in the order of the
    probabilities and, like them, blind to a shift of a row, but never saturated.

    Args:
        logits: Scores before the softmax `[N, K]`.

    Returns:
        A float64 tensor `[N, K]` without gradient.

    Raises:
        ValueError: If the shape is wrong or there is no example.

    Example:
        >>> log_odds(torch.tensor([[1000.0, 0.0], [2000.0, 0.0]]))[:, 0].tolist()
        [1000.0, 2000.0]

    Reference: Carlini et al., Membership Inference Attacks From First Principles, arXiv:2112.03570.
    """
    check_scores(logits, "logits")
    return torch.cat([_log_odds(block.double()) for (block,) in blocks_of_rows(logits)])


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
        self.reciprocal = self.reciprocal + sum_over_rows(
            _reciprocal_rank, logits, target, widen=False
        )
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
    total: Tensor

    def __init__(self, k: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_count(k, "k")
        self.k = k
        # A MetricCollection lets metrics share a state that has one name and, so far, one value:
        # those of another k must not look alike, though all labels of a first batch rank first.
        self._hits = f"hits_at_{k}"
        self._add_sum(self._hits)
        self._add_sum("total")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add scores `[N, K]` and labels `[N]`."""
        check_logits(logits, target)
        _check_k(self.k, logits.shape[1])
        hits = sum_over_rows(
            lambda s, y: rank_of_label(s, y) <= self.k, logits, target, widen=False
        )
        setattr(self, self._hits, getattr(self, self._hits) + hits)
        self.total = self.total + len(logits)

    def compute(self) -> Tensor:
        """Return the top-k accuracy of everything added; NaN if nothing was."""
        return getattr(self, self._hits) / self.total


class AUROC(SumMetric):
    """`auroc` over batches, on a fixed fine grid of scores.

    Scores of one cell count as ties, so the value differs from the function's by at most
    `½ · Σ_c pos_c·neg_c / (P·N)`, averaged over classes (`error_bound()`). The grid takes all real
    numbers, whatever the class: each doubling of `1 + |s|` up to 2^16 has `cells/32` equal cells
    on either side of zero, 1/128 wide there by default; the two outer cells take what is beyond.

    State: `counts` `[2, K, cells]` in int32 (33 MB for 1,000 classes), the rows being members of
    the class and all examples, of which there may be 2^31 − 1.

    Args:
        num_classes: K.
        cells: Number of grid cells, even.
        **kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ValueError: If an argument, or an input of `update(scores, target)`, is wrong.

    Example:
        >>> metric = AUROC(num_classes=2)
        >>> scores = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> metric.update(scores, torch.tensor([0, 1, 1]))
        >>> float(metric.compute()), float(metric.error_bound())
        (1.0, 0.0)
    """

    higher_is_better = True
    counts: Tensor

    def __init__(self, num_classes: int, cells: int = 4096, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_count(num_classes, "num_classes", least=2)
        check_count(cells, "cells", least=2)
        if cells % 2:
            raise ValueError(f"cells must be even, one half on each side of zero, not {cells}.")
        self.num_classes, self.cells = num_classes, cells
        self._add_counts("counts", 2, num_classes, cells)

    def update(self, scores: Tensor, target: Tensor) -> None:
        """Add scores `[N, K]` and labels `[N]`."""
        check_classes(scores, self.num_classes, "scores")
        check_logits(scores, target, "scores")
        check_ordered(scores, "scores")
        # In place, as a copy of this state would cost more than a batch; what inference mode made
        # cannot be changed outside it.
        fixed = self.counts.is_inference() and not torch.is_inference_mode_enabled()
        self.counts = self.counts.clone() if fixed else self.counts
        _count_cells(self.counts, scores, target)

    def compute(self) -> Tensor:
        """Return the area of everything added; NaN if no class has members and non-members."""
        return _mean_over_classes(_grid_area, self.counts)

    def error_bound(self) -> Tensor:
        """Return how far, at most, the grid can have moved the value (of this process's data)."""
        return _mean_over_classes(_grid_error, self.counts)


def _reciprocal_rank(logits: Tensor, target: Tensor) -> Tensor:
    return 1 / rank_of_label(logits, target).double()


def _check_k(k: int, classes: int) -> None:
    check_count(k, "k")
    if k > classes:
        raise ValueError(f"k must not exceed the {classes} classes, but is {k}.")


def _auroc_of_answers(scores: Tensor, target: Tensor) -> Tensor:
    check_scores(scores[:, None].expand(-1, 2), "scores")
    answers = target.long() if target.dtype == torch.bool else target
    check_target(answers, len(scores), 2)
    check_ordered(scores, "scores")
    return _area(scores.detach().contiguous(), answers == 1)


def _area(scores: Tensor, positive: Tensor) -> Tensor:
    """Area under the ROC curve of one question; NaN where all answers are the same."""
    members = scores[positive].sort().values
    below = torch.searchsorted(members, scores).sum()
    upto = torch.searchsorted(members, scores, right=True).sum()
    many, all_of_them = len(members), len(scores)
    # Twice the wins of members over all examples; among themselves they win half of their pairs.
    wins = 2 * many * all_of_them - below - upto - many**2
    return wins.double() / (2 * many * (all_of_them - many))


def _log_odds(logits: Tensor) -> Tensor:
    top, best = logits.max(dim=1, keepdim=True)
    rest = logits.scatter(1, best, -torch.inf)
    # Where all the others are −inf, they still are after a finite number is taken off.
    second = rest.amax(dim=1, keepdim=True).clamp(min=torch.finfo(rest.dtype).min)
    shares = rest.sub_(second).exp_()
    total = shares.sum(dim=1, keepdim=True)
    # Without class k ≠ best, 1 of best and the others' shares remain: at least half of the sum, so
    # that the difference loses no digits.
    others = shares.neg_().add_(total).mul_((second - top).exp()).log1p_()
    return (logits - top).sub_(others).scatter_(1, best, top - second - total.log())


def _count_cells(counts: Tensor, scores: Tensor, target: Tensor) -> None:
    _, classes, cells = counts.shape
    members, everyone = counts.view(2, classes * cells)
    first_cell = torch.arange(0, classes * cells, cells, device=counts.device)
    for block, label in blocks_of_rows(scores, target):
        cell = _score_cell(block, cells).add_(first_cell)
        for row, index in (members, cell.gather(1, label.long()[:, None])), (everyone, cell):
            row.index_add_(0, index.flatten(), torch.ones_like(index.flatten(), dtype=row.dtype))


def _score_cell(scores: Tensor, cells: int) -> Tensor:
    """Cell of each score; rounding, bits and floor all keep the order, so cells do too."""
    half = cells // 2
    scores = scores.float() + 0.0  # −0 becomes 0, which has another sign
    # The bits of a float above one, read as an integer, grow with it by 2^23 to the doubling.
    bits = ((scores.abs() + 1).view(torch.int32) - _BITS_OF_ONE).clamp_(max=_LAST_BITS)
    outward = bits.double().mul_(half / (_LAST_BITS + 1)).floor_().add_(0.5)
    return outward.copysign_(scores).add_(half).long()


def _mean_over_classes(per_class: Callable[[Tensor, Tensor], Tensor], counts: Tensor) -> Tensor:
    """Mean over classes of the doubled pairs `per_class` counts, out of all their pairs."""
    shares = []
    for members, everyone in blocks_of_rows(*counts):
        others = everyone.long() - members
        pairs = members.sum(dim=1) * others.sum(dim=1)
        shares.append(per_class(members, others).double() / (2 * pairs))
    return torch.cat(shares).nanmean()


def _grid_area(members: Tensor, others: Tensor) -> Tensor:
    return (members * (2 * others.cumsum(dim=1) - others)).sum(dim=1)


def _grid_error(members: Tensor, others: Tensor) -> Tensor:
    return (members * others).sum(dim=1)
