"""Cross-entropies for classes of unequal size, weighted, with margins or with shifted logits.

`class_counts` are the training examples per class: numbers, or a tensor. Numbers and tensors on
the CPU are checked at every call; a tensor on an accelerator is trusted, since looking would wait
for it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.losses._common import (
    at_label,
    finite,
    labels,
    labels_or_probabilities,
    largest_other,
    non_negative,
    positive,
    require,
    student_logits,
)

ClassCounts: TypeAlias = Tensor | Sequence[float]


def class_balanced_weights(class_counts: ClassCounts, beta: float) -> Tensor:
    """Weight of each class by its effective number of examples.

    `w_k = (1 − β)/(1 − β^{n_k})`, scaled to sum to K: ones at β = 0, in proportion to `1/n_k`
    as β → 1. A class without examples gets weight 0 and a warning; the others still sum to K.

    Args:
        class_counts: n_k ≥ 0, `[K]`.
        beta: β in [0, 1).

    Returns:
        Weights `[K]`, float32, or float64 for float64 counts.

    Raises:
        ValueError: counts negative, not finite or all 0, or β outside [0, 1).

    Example:
        >>> class_balanced_weights([1, 3], beta=0.999999)
        tensor([1.5000, 0.5000])

    Reference: arXiv:1901.05555.
    """
    require(0.0 <= beta < 1.0, f"beta must be in [0, 1), got {beta}")
    counts = _checked_counts(class_counts)
    weights = _weights(counts, beta)
    is_double = isinstance(class_counts, Tensor) and class_counts.dtype == torch.float64
    return weights if is_double else weights.float()


def class_balanced_cross_entropy(
    student: Tensor, target: Tensor, class_counts: ClassCounts, beta: float = 0.9999
) -> Tensor:
    """Cross-entropy weighted by `class_balanced_weights`.

    `w_y·CE(s, y)`. Take its mean over the batch, dividing by N: dividing by `Σ w_y`, as torch's
    weighted cross-entropy does, leaves a batch of one unweighted.

    Args:
        student: logits `[N, K]`.
        target: class indices `[N]`, or class probabilities `[N, K]`.
        class_counts: training examples n_k ≥ 0, `[K]`.
        beta: β in [0, 1), 0 for no weighting.

    Returns:
        Weighted nats per example, `[N]`.

    Raises:
        ValueError: shapes or types do not fit, counts negative, not finite or all 0, or β outside
            [0, 1).

    Example:
        >>> class_balanced_cross_entropy(torch.zeros(1, 4), torch.tensor([0]), [9, 9, 9, 9])
        tensor([1.3863])

    Reference: arXiv:1901.05555.
    """
    require(0.0 <= beta < 1.0, f"beta must be in [0, 1), got {beta}")
    s = student_logits(student)
    goal = labels_or_probabilities(s, target)
    weights = _beside(s, _weights(_counts_for(s, class_counts), beta))
    return F.cross_entropy(s, goal, weight=weights, reduction="none")


def ldam(
    student: Tensor,
    target: Tensor,
    class_counts: ClassCounts,
    max_margin: float = 0.5,
    scale: float = 30.0,
    hinge: bool = False,
) -> Tensor:
    """Label-distribution-aware margins: the rarer the class, the wider its margin.

    `CE(s₀·(s − Δ_y·e_y), y)`, or with `hinge` `relu(max_{j≠y} s_j − s_y + Δ_y)`; `Δ_k` goes with
    `n_k^{−1/4}`, the largest is `max_margin`. A class without examples warns and takes the margin
    of the rarest that has some.

    Args:
        student: logits `[N, K]`, cosines in the paper, which the scale expects.
        target: class indices `[N]`.
        class_counts: training examples n_k ≥ 0, `[K]`.
        max_margin: the rarest class's margin ≥ 0, in logits.
        scale: s₀ > 0, the logits' factor in the cross-entropy form.
        hinge: the hinge form.

    Returns:
        Nats per example, or logits in the hinge form, `[N]`.

    Raises:
        ValueError: shapes or types do not fit, the target is not class indices, K < 2 in the hinge
            form, counts negative, not finite or all 0, or a margin or scale out of range.

    Example:
        >>> ldam(torch.tensor([[0.5, 0.25]]), torch.tensor([0]), [10, 1000], hinge=True)
        tensor([0.2500])

    Reference: arXiv:1906.07413.
    """
    s = student_logits(student, classes=2 if hinge else 1)
    label = labels(s, target)
    counts = _occupied(_counts_for(s, class_counts))
    rarity = (counts / counts.amin()) ** -0.25
    margin = _beside(s, non_negative("max_margin", max_margin) * rarity)[label]
    if hinge:
        return torch.relu(largest_other(s, label) - at_label(s, label) + margin)
    moved = s.scatter_add(1, label.unsqueeze(1), -margin.unsqueeze(1))
    return F.cross_entropy(positive("scale", scale) * moved, label, reduction="none")


def logit_adjusted_cross_entropy(
    student: Tensor, target: Tensor, class_counts: ClassCounts, tau: float = 1.0
) -> Tensor:
    """Cross-entropy of logits shifted by the log-prior: balanced softmax.

    `CE(s + τ·log π, y)`, `π_k = n_k/Σn`. At τ = 1 the unshifted logits then predict as if classes
    were equally frequent. A class without examples warns and takes the prior of the rarest
    that has some.

    Args:
        student: logits `[N, K]`.
        target: class indices `[N]`, or class probabilities `[N, K]`.
        class_counts: training examples n_k ≥ 0, `[K]`.
        tau: weight of the log-prior, 0 for plain cross-entropy.

    Returns:
        Nats per example, `[N]`.

    Raises:
        ValueError: shapes or types do not fit, counts negative, not finite or all 0, or τ not
            finite.

    Example:
        >>> logit_adjusted_cross_entropy(torch.zeros(1, 2), torch.tensor([0]), [1, 3])
        tensor([1.3863])

    Reference: arXiv:2007.07314, arXiv:2007.10740.
    """
    s = student_logits(student)
    goal = labels_or_probabilities(s, target)
    counts = _occupied(_counts_for(s, class_counts))
    shift = finite("tau", tau) * (counts / counts.sum()).log()
    return F.cross_entropy(s + _beside(s, shift), goal, reduction="none")


def _weights(counts: Tensor, beta: float) -> Tensor:
    rate = math.log(beta) if beta > 0 else -math.inf
    seen = counts > 0
    # 1 − β^n, where an empty class must not form 0·∞.
    lost = -torch.expm1(torch.where(seen, counts, 1.0) * rate)
    weights = torch.where(seen, (1 - beta) / lost, 0.0)
    return weights * (len(counts) / weights.sum())


def _occupied(counts: Tensor) -> Tensor:
    rarest = torch.where(counts > 0, counts, math.inf).amin()
    return torch.where(counts > 0, counts, rarest)


def _counts_for(student: Tensor, class_counts: ClassCounts) -> Tensor:
    counts = _checked_counts(class_counts)
    require(
        len(counts) == student.shape[1],
        f"class_counts must have one count per class, {student.shape[1]}, got {len(counts)}",
    )
    return counts


def _beside(student: Tensor, values: Tensor) -> Tensor:
    # A blocking copy would make the accelerator's queue run dry at every step.
    return values.to(student.device, student.dtype, non_blocking=True)


def _checked_counts(class_counts: ClassCounts) -> Tensor:
    if isinstance(class_counts, Tensor):
        counts = class_counts.detach().double()
    else:
        counts = torch.tensor(list(class_counts), dtype=torch.float64)
    require(
        counts.dim() == 1 and len(counts) > 0,
        f"class_counts must have shape [K], got {list(counts.shape)}",
    )
    if counts.device.type == "cpu":
        _check_values(counts)
    return counts


def _check_values(counts: Tensor) -> None:
    require(
        bool(((counts >= 0) & counts.isfinite()).all()) and bool((counts > 0).any()),
        "class_counts must be finite and ≥ 0, with at least one class that has examples",
    )
    empty = int((counts == 0).sum())
    if empty:
        warnings.warn(f"{empty} of {len(counts)} classes have no training examples", stacklevel=4)
