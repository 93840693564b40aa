"""Losses for the error of the k best guesses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.losses._common import (
    at_label,
    finite,
    labels,
    positive,
    require,
    student_logits,
    without_label,
)

# Dividing a value out of the polynomials can magnify rounding by 2^k/(k + 1).
_LARGEST_DIVISION = 10
_LARGEST_EXPONENT = 86.0  # of float32, with room for a few sums


def smooth_topk(
    student: Tensor, target: Tensor, k: int = 5, tau: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """Smooth top-k support-vector loss.

    `τ·log Σ_{|S|=k} exp((1[y∉S]·α + mean s_S)/τ) − τ·log Σ_{S∋y} exp(mean s_S/τ)` over the sets S
    of k classes. k = 1, α = 0, τ = 1 is cross-entropy; τ → 0 gives `hard_topk_hinge`.

    Args:
        student: logits `[N, K]`.
        target: class indices `[N]`.
        k: guesses allowed, from 1 to K − 1.
        tau: smoothing τ > 0, in logits.
        alpha: margin α, in logits.

    Returns:
        Logits per example, `[N]`.

    Raises:
        ValueError: k, τ or α out of range, shapes or types do not fit, or the target is not class
            indices.

    Example:
        >>> smooth_topk(torch.zeros(1, 4), torch.tensor([0]), k=1, alpha=0.0)
        tensor([1.3863])

    Reference: arXiv:1802.07595.
    """
    positive("tau", tau)
    finite("alpha", alpha)
    s = student_logits(student, classes=2)
    label = labels(s, target)
    unit = _checked_k(k, s) * tau
    excess = alpha / tau + _log_ratio_of_others(s, label, k, unit) - at_label(s, label) / unit
    return tau * torch.logaddexp(excess, torch.zeros_like(excess))


def hard_topk_hinge(student: Tensor, target: Tensor, k: int = 5, alpha: float = 1.0) -> Tensor:
    """Hinge between the label and the k-th best of the other classes.

    `relu(α + (s_[k]^{∖y} − s_y)/k)`.

    Args:
        student: logits `[N, K]`.
        target: class indices `[N]`.
        k: guesses allowed, from 1 to K − 1.
        alpha: margin α, in logits.

    Returns:
        Logits per example, `[N]`.

    Raises:
        ValueError: k or α out of range, shapes or types do not fit, or the target is not class
            indices.

    Example:
        >>> hard_topk_hinge(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), torch.tensor([0]), k=2)
        tensor([1.5000])

    Reference: arXiv:1802.07595.
    """
    finite("alpha", alpha)
    s = student_logits(student, classes=2)
    label = labels(s, target)
    rival = without_label(s, label).topk(_checked_k(k, s), dim=1).values[:, -1]
    return torch.relu(alpha + (rival - at_label(s, label)) / k)


def _checked_k(k: int, student: Tensor) -> int:
    last = student.shape[1] - 1
    require(
        isinstance(k, int) and 1 <= k <= last,
        f"k must be a whole number from 1 to K − 1 = {last}, got {k}",
    )
    return k


def _log_ratio_of_others(s: Tensor, label: Tensor, k: int, unit: float) -> Tensor:
    """`log(e_k/e_{k−1})`, elementary symmetric polynomials of `exp(s_j/unit)` over `j ≠ y`.

    With `t` the k largest of them and `w` the rest, both over the k-th,
    `e_k/Πt = Σ_j e_j(w)·e_j(1/t)` and `e_{k−1}/Πt = Σ_j e_j(w)·e_{j+1}(1/t)`. Nothing there is
    negative, `w` and `1/t` are at most 1, and both sums have a term of at least 1.
    """
    best = without_label(s.detach(), label).topk(k, dim=1).indices
    top = s.gather(1, best)
    pivot = top[:, -1:].detach()
    apart = torch.cat([best, label.unsqueeze(1)], dim=1)
    w = ((s.scatter(1, apart, -math.inf) - pivot) / unit).exp()
    log_w = _log_symmetric(w, k, _Symmetric.apply if k <= _LARGEST_DIVISION else _symmetric)
    log_t = _log_symmetric(((pivot - top) / unit).exp(), k, _symmetric)
    larger = torch.logsumexp(log_w + log_t, dim=1)
    smaller = torch.logsumexp(log_w[:, :-1] + log_t[:, 1:], dim=1)
    return (larger - smaller).to(s.dtype) + (pivot / unit).squeeze(1)


def _log_symmetric(values: Tensor, k: int, symmetric: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Logarithms of the elementary symmetric polynomials of degree 0 to k, 0 taken as tiny."""
    # As they are, those of degree j are below K^j; scaled to a sum of k, below e^k and, where they
    # count, not far from 1.
    scale = None
    if k * math.log(values.shape[1]) > _LARGEST_EXPONENT:
        values = values.double() if k > _LARGEST_EXPONENT / 2 else values
        scale = (values.detach().sum(dim=1, keepdim=True) / min(k, 500)).clamp(min=1.0)
        values = values / scale
    logs = symmetric(values, k).clamp(min=torch.finfo(values.dtype).tiny).log()
    return logs if scale is None else logs + torch.arange(k + 1, device=logs.device) * scale.log()


class _Symmetric(torch.autograd.Function):
    """`_symmetric` with a gradient in k passes instead of k² smaller ones.

    The slope in a value is the polynomials of all others, divided out of those of all:
    `e_{i−1} − w·e_{i−2} + w²·e_{i−3} − …`, summed by Horner's rule. Digits are lost where the loss
    is steep in `e_i`: not for `w`, but for `1/t`.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, k: int) -> Tensor:
        polynomials = _symmetric(values, k)
        ctx.save_for_backward(values, polynomials)
        return polynomials

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        values, polynomials = ctx.saved_tensors
        k = polynomials.shape[1] - 1
        slope = gradient[:, k:].expand_as(values)
        for power in range(k - 2, -1, -1):
            shifted = polynomials[:, : k - power]
            constant = (gradient[:, power + 1 :] * shifted).sum(dim=1, keepdim=True)
            slope = torch.addcmul(constant, values, slope, value=-1)
        return slope, None


def _symmetric(values: Tensor, k: int) -> Tensor:
    """Elementary symmetric polynomials of degree 0 to k of each row, by a tree of products."""
    degrees = [values]
    while degrees[0].shape[1] > 1:
        if degrees[0].shape[1] % 2:
            degrees = [F.pad(e, (0, 1)) for e in degrees]
        degrees = _merged_halves(degrees, k)
    missing = values.new_zeros(len(values), k - len(degrees))
    return torch.cat([torch.ones_like(degrees[0]), *degrees, missing], dim=1)


def _merged_halves(degrees: list[Tensor], k: int) -> list[Tensor]:
    """Degrees 1 to k for each set of the first half joined with its like in the second."""
    left, right = zip(*(e.chunk(2, dim=1) for e in degrees), strict=True)
    known = len(degrees)
    merged = []
    for degree in range(1, min(2 * known, k) + 1):
        total = left[degree - 1] + right[degree - 1] if degree <= known else None
        for i in range(max(1, degree - known), min(degree - 1, known) + 1):
            a, b = left[i - 1], right[degree - i - 1]
            total = a * b if total is None else torch.addcmul(total, a, b)
        assert total is not None
        merged.append(total)
    return merged
