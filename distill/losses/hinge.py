"""Hinge losses: against the teacher's soft answer and against labels.

A teacher's probability p becomes a signed target t in [−1, 1]: `signed`, `t = 2p − 1`; or
`centred`, `t = (K·p − 1)/(K − 1)`, 0 for a teacher without opinion, so that the likeliest class
keeps a positive sign when no class passes one half. Both agree at K = 2. At a kink the gradient is
0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from distill.losses._common import (
    Temperature,
    at_label,
    checked_temperature,
    labels,
    largest_other,
    logit_pair,
    non_negative,
    require,
    student_logits,
)

SignedTarget = Literal["centred", "signed"]


def soft_hinge(
    student: Tensor,
    teacher: Tensor,
    target: SignedTarget = "centred",
    temperature: Temperature = 1.0,
) -> Tensor:
    """Hinge whose margin is the teacher's confidence.

    `Σ_k relu(|t_k| − sgn(t_k)·s_k)`: zero once each logit passes its signed target. A sure teacher
    (`t = ±1`) makes it the one-vs-rest hinge.

    Args:
        student: logits `[N, K]`, K ≥ 2.
        teacher: logits `[N, K]`; no gradient flows into them.
        target: how probabilities become t, `"centred"` or `"signed"`.
        temperature: T > 0 of the teacher's softmax, a float or a tensor `[]` or `[N, 1]`.

    Returns:
        Logits summed over classes, `[N]`.

    Raises:
        ValueError: K < 2, shapes or types do not fit, `target` is another word, or the temperature
            is not positive and finite.

    Example:
        >>> soft_hinge(torch.tensor([[0.5, -2.0]]), torch.tensor([[40.0, 0.0]]))
        tensor([0.5000])

    Reference: one-vs-rest hinge with confidence as margin; cousins arXiv:1811.03233 and
    arXiv:1106.3397.
    """
    s, t = _student_and_signed(student, teacher, target, temperature)
    return torch.relu((t - s) * t.sign()).sum(dim=1)


def squared_soft_hinge(
    student: Tensor,
    teacher: Tensor,
    target: SignedTarget = "centred",
    temperature: Temperature = 1.0,
) -> Tensor:
    """Squared hinge of both signs, weighted by the teacher's probability of each.

    `Σ_k p_k·relu(1 − s_k)² + (1 − p_k)·relu(1 + s_k)²` with `p = (1 + t)/2`. Its minimiser is
    `s = t`: the student's logits keep all the teacher knows.

    Args:
        student: logits `[N, K]`, K ≥ 2.
        teacher: logits `[N, K]`; no gradient flows into them.
        target: how probabilities become t, `"centred"` or `"signed"`.
        temperature: T > 0 of the teacher's softmax, a float or a tensor `[]` or `[N, 1]`.

    Returns:
        Squared logits summed over classes, `[N]`.

    Raises:
        ValueError: K < 2, shapes or types do not fit, `target` is another word, or the temperature
            is not positive and finite.

    Example:
        >>> squared_soft_hinge(torch.zeros(1, 2), torch.tensor([[3.0, -1.0]]))
        tensor([2.])

    Reference: Fenchel–Young losses, arXiv:1901.02324.
    """
    s, t = _student_and_signed(student, teacher, target, temperature)
    p = (1 + t) / 2
    losses = p * torch.relu(1 - s).square() + (1 - p) * torch.relu(1 + s).square()
    return losses.sum(dim=1)


def weighted_sign_hinge(
    student: Tensor,
    teacher: Tensor,
    target: SignedTarget = "centred",
    temperature: Temperature = 1.0,
) -> Tensor:
    """Hinge of margin 1 on the teacher's sign, weighted by its confidence.

    `Σ_k |t_k|·relu(1 − sgn(t_k)·s_k)`: confidence is a weight, not a margin.

    Args:
        student: logits `[N, K]`, K ≥ 2.
        teacher: logits `[N, K]`; no gradient flows into them.
        target: how probabilities become t, `"centred"` or `"signed"`.
        temperature: T > 0 of the teacher's softmax, a float or a tensor `[]` or `[N, 1]`.

    Returns:
        Weighted logits summed over classes, `[N]`.

    Raises:
        ValueError: K < 2, shapes or types do not fit, `target` is another word, or the temperature
            is not positive and finite.

    Example:
        >>> weighted_sign_hinge(torch.tensor([[0.5, -2.0]]), torch.tensor([[40.0, 0.0]]))
        tensor([0.5000])

    Reference: cousin of arXiv:1106.3397.
    """
    s, t = _student_and_signed(student, teacher, target, temperature)
    return torch.relu(t.abs() - t * s).sum(dim=1)


def product_hinge(
    student: Tensor,
    teacher: Tensor,
    target: SignedTarget = "centred",
    temperature: Temperature = 1.0,
) -> Tensor:
    """The hinge with the signed target in place of ±1, kept for study.

    `Σ_k relu(1 − t_k·s_k)`: zero at `|s| ≥ 1/|t|`, so an unsure teacher demands a larger margin.

    Args:
        student: logits `[N, K]`, K ≥ 2.
        teacher: logits `[N, K]`; no gradient flows into them.
        target: how probabilities become t, `"centred"` or `"signed"`.
        temperature: T > 0 of the teacher's softmax, a float or a tensor `[]` or `[N, 1]`.

    Returns:
        Margins missed, summed over classes, `[N]`.

    Raises:
        ValueError: K < 2, shapes or types do not fit, `target` is another word, or the temperature
            is not positive and finite.

    Example:
        >>> product_hinge(torch.tensor([[0.5, -2.0]]), torch.tensor([[40.0, 0.0]]))
        tensor([0.5000])
    """
    s, t = _student_and_signed(student, teacher, target, temperature)
    return torch.relu(1 - t * s).sum(dim=1)


def epsilon_insensitive_hinge(
    student: Tensor,
    teacher: Tensor,
    epsilon: float = 0.0,
    target: SignedTarget = "centred",
    temperature: Temperature = 1.0,
) -> Tensor:
    """Support-vector regression of the logits on the signed target.

    `Σ_k relu(|s_k − t_k| − ε)`: free within ε of the target, linear outside.

    Args:
        student: logits `[N, K]`, K ≥ 2.
        teacher: logits `[N, K]`; no gradient flows into them.
        epsilon: half-width ε ≥ 0 of the free zone, in logits.
        target: how probabilities become t, `"centred"` or `"signed"`.
        temperature: T > 0 of the teacher's softmax, a float or a tensor `[]` or `[N, 1]`.

    Returns:
        Logits summed over classes, `[N]`.

    Raises:
        ValueError: K < 2, `epsilon` is negative, shapes or types do not fit, `target` is another
            word, or the temperature is not positive and finite.

    Example:
        >>> epsilon_insensitive_hinge(torch.zeros(1, 2), torch.tensor([[40.0, 0.0]]), epsilon=0.25)
        tensor([1.5000])

    Reference: Drucker et al., Support vector regression machines, NIPS 1996.
    """
    s, t = _student_and_signed(student, teacher, target, temperature)
    return torch.relu((s - t).abs() - non_negative("epsilon", epsilon)).sum(dim=1)


def pairwise_soft_hinge(
    student: Tensor, teacher: Tensor, margin: float = 1.0, temperature: Temperature = 1.0
) -> Tensor:
    """Hinge on every pair of classes, its margin the teacher's difference of probability.

    `Σ_{p_i > p_j} relu(m·(p_i − p_j) − (s_i − s_j))`: blind to a shift of the logits, keeps the
    teacher's order. A sure teacher and m = 1 make it Weston–Watkins. Computed by sorting in
    O(K log K).

    Args:
        student: logits `[N, K]`, K ≥ 2.
        teacher: logits `[N, K]`; no gradient flows into them.
        margin: m ≥ 0, logits per unit of probability.
        temperature: T > 0 of the teacher's softmax, a float or a tensor `[]` or `[N, 1]`.

    Returns:
        Logits summed over pairs, `[N]`.

    Raises:
        ValueError: K < 2, `margin` is negative, shapes or types do not fit, or the temperature is
            not positive and finite.

    Example:
        >>> pairwise_soft_hinge(torch.tensor([[0.5, 0.0, -2.0]]), torch.tensor([[99.0, 0.0, 0.0]]))
        tensor([0.5000])

    Reference: Weston & Watkins, ESANN 1999, with soft margins.
    """
    s, z = logit_pair(student, teacher, classes=2)
    p = torch.softmax(z / checked_temperature(temperature, s), dim=1)
    gain = non_negative("margin", margin) * p - s
    # Large counts of either sign meet nearly equal gains: float64 keeps what they leave.
    weighted = _pairs_won_minus_lost(p.detach(), gain.detach()) * gain.double()
    return weighted.sum(dim=1).to(s.dtype)


def one_vs_rest_hinge(student: Tensor, target: Tensor) -> Tensor:
    """One binary hinge per class: the label's logit above 1, all others below −1.

    `Σ_k relu(1 − y_k·s_k)` with `y = +1` at the label and −1 elsewhere.

    Args:
        student: logits `[N, K]`.
        target: class indices `[N]`.

    Returns:
        Logits summed over classes, `[N]`.

    Raises:
        ValueError: shapes or types do not fit, or the target is not class indices.

    Example:
        >>> one_vs_rest_hinge(torch.tensor([[0.5, -2.0]]), torch.tensor([0]))
        tensor([0.5000])

    Reference: Rifkin & Klautau, JMLR 2004.
    """
    s = student_logits(student)
    index = labels(s, target).unsqueeze(1)
    wrong_way = s.scatter(1, index, -s.gather(1, index))
    return torch.relu(1 + wrong_way).sum(dim=1)


def crammer_singer(student: Tensor, target: Tensor) -> Tensor:
    """Multiclass hinge against the strongest other class.

    `relu(1 + max_{j≠y} s_j − s_y)`.

    Args:
        student: logits `[N, K]`, K ≥ 2.
        target: class indices `[N]`.

    Returns:
        Logits per example, `[N]`.

    Raises:
        ValueError: K < 2, shapes or types do not fit, or the target is not class indices.

    Example:
        >>> crammer_singer(torch.tensor([[0.5, 0.0, -2.0]]), torch.tensor([0]))
        tensor([0.5000])

    Reference: Crammer & Singer, JMLR 2001.
    """
    s = student_logits(student, classes=2)
    label = labels(s, target)
    return torch.relu(1 + largest_other(s, label) - at_label(s, label))


def weston_watkins(student: Tensor, target: Tensor) -> Tensor:
    """Multiclass hinge against every other class.

    `Σ_{j≠y} relu(1 + s_j − s_y)`.

    Args:
        student: logits `[N, K]`, K ≥ 2.
        target: class indices `[N]`.

    Returns:
        Logits summed over the other classes, `[N]`.

    Raises:
        ValueError: K < 2, shapes or types do not fit, or the target is not class indices.

    Example:
        >>> weston_watkins(torch.tensor([[0.5, 0.0, -2.0]]), torch.tensor([0]))
        tensor([0.5000])

    Reference: Weston & Watkins, ESANN 1999.
    """
    s = student_logits(student, classes=2)
    label = labels(s, target)
    # The label's own term is exactly 1, with no gradient.
    return torch.relu(s - at_label(s, label).unsqueeze(1) + 1).sum(dim=1) - 1


def _student_and_signed(
    student: Tensor, teacher: Tensor, target: str, temperature: Temperature
) -> tuple[Tensor, Tensor]:
    require(
        target in ("centred", "signed"), f'target must be "centred" or "signed", got {target!r}'
    )
    s, z = logit_pair(student, teacher, classes=2)
    p = torch.softmax(z / checked_temperature(temperature, s), dim=1)
    classes = s.shape[1]
    # Subtracting first makes t exactly 0 for a teacher without opinion, whose sign is then 0.
    if target == "centred":
        return s, (p - 1 / classes) * (classes / (classes - 1))
    return s, (p - 0.5) * 2


def _pairs_won_minus_lost(p: Tensor, gain: Tensor) -> Tensor:
    """For each class, pairs with `p_i > p_j` and `gain_i > gain_j`: how often as i, less as j.

    With all values different a class at place a by p and b by gain has won W of the `a` pairs below
    it and lost to `(K − 1 − a) − (b − W)` above: the difference is `a + b − (K − 1)`. Ties count as
    not won when equal p are placed by falling gain, and equal gains against the order by p.
    """
    classes = p.shape[1]
    by_p = _order_by_p_then_falling_gain(p, gain)
    backwards = by_p.flip(1)
    by_gain = backwards.gather(1, gain.gather(1, backwards).sort(dim=1, stable=True).indices)
    place = torch.arange(classes, dtype=torch.int32, device=p.device).expand_as(by_p)
    places = torch.empty_like(by_p, dtype=torch.int32).scatter_(1, by_p, place)
    return places.scatter_add_(1, by_gain, place).sub_(classes - 1)


def _order_by_p_then_falling_gain(p: Tensor, gain: Tensor) -> Tensor:
    if p.dtype == torch.float32:
        # One sort of both keys side by side in 64 bits, instead of two sorts. The bits of a float
        # rise with its value once those of a negative one are inverted; p has no negative.
        bits = gain.contiguous().view(torch.int32)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        key = (p.contiguous().view(torch.int32).long() << 32).sub_(bits)
        return key.sort(dim=1).indices
    falling = gain.argsort(dim=1, descending=True, stable=True)
    return falling.gather(1, p.gather(1, falling).argsort(dim=1, stable=True))
