"""Losses that a wrong label cannot pull without bound."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.losses._common import (
    at_label,
    finite,
    labels,
    labels_or_probabilities,
    largest_other,
    require,
    student_logits,
)

_LOG_OF_ZERO = math.log(1e-4)  # what the reverse cross-entropy takes for the log of a zero label


def generalized_cross_entropy(student: Tensor, target: Tensor, q: float = 0.7) -> Tensor:
    """From cross-entropy (q → 0) to the bounded mean absolute error (q = 1).

    `(1 − p_y^q)/q` with `p = softmax(s)`; for mixed labels the target-weighted mean over y.

    Args:
        student: logits `[N, K]`.
        target: class indices `[N]`, or class probabilities `[N, K]`.
        q: in (0, 1].

    Returns:
        A value in [0, 1/q] per example, `[N]`.

    Raises:
        ValueError: shapes or types do not fit, or q outside (0, 1].

    Example:
        >>> generalized_cross_entropy(torch.zeros(1, 4), torch.tensor([0]), q=1.0)
        tensor([0.7500])

    Reference: arXiv:1805.07836.
    """
    require(0.0 < q <= 1.0, f"q must be in (0, 1], got {q}; for q = 0 use cross_entropy")
    s = student_logits(student)
    goal = labels_or_probabilities(s, target)
    if not goal.is_floating_point():
        return _power_gap(F.cross_entropy(s, goal, reduction="none"), q)
    return (goal * _power_gap(-torch.log_softmax(s, dim=1), q)).sum(dim=1)


def symmetric_cross_entropy(
    student: Tensor, target: Tensor, alpha: float = 0.1, beta: float = 1.0
) -> Tensor:
    """Cross-entropy plus its reverse, which is bounded and forgives wrong labels.

    `α·CE + β·RCE`, `RCE = −ln(1e−4)·(1 − p_y)`; for mixed labels the target-weighted mean over y.

    Args:
        student: logits `[N, K]`.
        target: class indices `[N]`, or class probabilities `[N, K]`.
        alpha: weight of the cross-entropy.
        beta: weight of the reverse cross-entropy.

    Returns:
        Nats per example, `[N]`.

    Raises:
        ValueError: shapes or types do not fit, or a weight is not finite.

    Example:
        >>> symmetric_cross_entropy(torch.zeros(1, 4), torch.tensor([0]), alpha=1.0, beta=0.0)
        tensor([1.3863])

    Reference: arXiv:1908.06112.
    """
    finite("alpha", alpha)
    finite("beta", beta)
    s = student_logits(student)
    goal = labels_or_probabilities(s, target)
    if not goal.is_floating_point():
        surprise = F.cross_entropy(s, goal, reduction="none")
        return alpha * surprise - beta * _LOG_OF_ZERO * _power_gap(surprise, 1.0)
    surprise = -torch.log_softmax(s, dim=1)
    losses = alpha * surprise - beta * _LOG_OF_ZERO * _power_gap(surprise, 1.0)
    return (goal * losses).sum(dim=1)


def ramp_hinge(student: Tensor, target: Tensor, a: float = -1.0) -> Tensor:
    """Multiclass hinge cut off where an example is hopeless.

    `min(1 − a, relu(1 − m))`, `m = s_y − max_{j≠y} s_j`: no gradient below `m = a` or above 1.

    Args:
        student: logits `[N, K]`, K ≥ 2.
        target: class indices `[N]`.
        a: margin ≤ 0 at which the loss stops growing.

    Returns:
        A value in [0, 1 − a] per example, `[N]`.

    Raises:
        ValueError: a > 0 or not finite, K < 2, shapes or types do not fit, or the target is not
            class indices.

    Example:
        >>> ramp_hinge(torch.tensor([[0.0, 9.0], [0.5, 0.0]]), torch.tensor([0, 0]))
        tensor([2.0000, 0.5000])

    Reference: Collobert et al., Trading convexity for scalability, ICML 2006.
    """
    require(finite("a", a) <= 0, f"a must be at most 0, got {a}")
    s = student_logits(student, classes=2)
    label = labels(s, target)
    margin = at_label(s, label) - largest_other(s, label)
    return torch.relu(1 - margin).clamp(max=1 - a)


def _power_gap(surprise: Tensor, q: float) -> Tensor:
    """`(1 − p^q)/q` of `−log p`, exact as q or the surprise goes to 0."""
    return torch.expm1(-q * surprise) / -q
