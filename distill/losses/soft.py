"""Losses of a student against a teacher's soft answer, and cross-entropies on labels.

All take raw logits, compute in float32 or wider and return one value per example. In the code `s`
are the student's logits, `z` the teacher's, and `t` is the temperature T, as a column where each
example has its own.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.losses._common import (
    Temperature,
    checked_temperature,
    labels,
    labels_or_probabilities,
    logit_pair,
    non_negative,
    other_classes,
    per_example,
    require,
    student_logits,
    without_label,
    world_size,
)
from distill.losses._divergence import NEVER, binary_kl, log_odds, tempered_kl

_STANDARDISATION_FLOOR = 1e-3  # a smaller one gives constant rows gradients of 1e6
_SMALLEST_MEAN = (
    1e-25  # squares of what it scales do not vanish, its inverse keeps gradients finite
)


def cross_entropy(student: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of the student with labels or with mixed labels.

    `CE = −Σ_k q_k·log softmax(s)_k`, with `q = (1 − ε)·target + ε/K`.

    Args:
        student: logits `[N, K]`.
        target: class indices `[N]`, or class probabilities `[N, K]`.
        label_smoothing: ε in [0, 1], the share of the target spread evenly over the classes.

    Returns:
        Nats per example, `[N]`.

    Raises:
        ValueError: shapes or types do not fit, or `label_smoothing` is outside [0, 1].

    Example:
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([1.3863, 1.3863])

    Reference: label smoothing, arXiv:1512.00567.
    """
    logits = student_logits(student)
    goal = labels_or_probabilities(logits, target)
    require(
        0.0 <= label_smoothing <= 1.0, f"label_smoothing must be in [0, 1], got {label_smoothing}"
    )
    return F.cross_entropy(logits, goal, reduction="none", label_smoothing=label_smoothing)


def tempered_cross_entropy(
    student: Tensor, target: Tensor, temperature: Temperature = 1.0
) -> Tensor:
    """The free-energy gap between the label and the student's tempered distribution.

    `τ·CE(s/τ, y) = F(e_y) − F*`: between the perceptron's gap `max s − s_y` (τ → 0) and a plain
    cross-entropy (τ = 1), so temperature can be annealed without a teacher.

    Args:
        student: logits `[N, K]`.
        target: class indices `[N]`, or class probabilities `[N, K]`.
        temperature: τ > 0, a float or a tensor `[]` or `[N, 1]`.

    Returns:
        The gap in units of the logits, `[N]`.

    Raises:
        ValueError: shapes or types do not fit, or the temperature is not positive and finite.

    Example:
        >>> tempered_cross_entropy(torch.zeros(1, 4), torch.tensor([2]), temperature=2.0)
        tensor([2.7726])
    """
    logits = student_logits(student)
    tau = checked_temperature(temperature, logits)
    goal = labels_or_probabilities(logits, target)
    return per_example(tau) * F.cross_entropy(logits / tau, goal, reduction="none")


def kl_divergence(student: Tensor, teacher: Tensor, temperature: Temperature = 1.0) -> Tensor:
    """Hinton's distillation term: the tempered teacher's divergence from the tempered student.

    `T²·KL(softmax(z/T) ‖ softmax(s/T))`, with gradient `T·(p_s − p_z)` in the student. Summed in a
    form without cancellation, so it is never negative and float32 keeps its digits at T = 1,000,
    where it nears `‖c_s − c_z‖²/(2K)`. Differentiable once.

    Args:
        student: logits `[N, K]`.
        teacher: logits `[N, K]`; no gradient flows into them.
        temperature: T > 0, a float or a tensor `[]` or `[N, 1]`, which may require a gradient.

    Returns:
        T² times nats per example, `[N]`.

    Raises:
        ValueError: shapes or types do not fit, or the temperature is not positive and finite.

    Example:
        >>> kl_divergence(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), temperature=1.0)
        tensor([0.4621])

    Reference: arXiv:1503.02531.
    """
    s, z = logit_pair(student, teacher)
    return tempered_kl(s, z, checked_temperature(temperature, s))


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: Temperature = 1.0) -> Tensor:
    """Cross-entropy of the student with the teacher's tempered distribution.

    `−T²·Σ_k softmax(z/T)_k·log softmax(s/T)_k`: the gradient of `kl_divergence`, its value plus
    `T²` times the teacher's entropy.

    Args:
        student: logits `[N, K]`.
        teacher: logits `[N, K]`; no gradient flows into them.
        temperature: T > 0, a float or a tensor `[]` or `[N, 1]`.

    Returns:
        T² times nats per example, `[N]`.

    Raises:
        ValueError: shapes or types do not fit, or the temperature is not positive and finite.

    Example:
        >>> soft_cross_entropy(torch.zeros(1, 4), torch.randn(1, 4))
        tensor([1.3863])

    Reference: arXiv:1503.02531.
    """
    s, z = logit_pair(student, teacher)
    t = checked_temperature(temperature, s)
    return per_example(t) ** 2 * F.cross_entropy(
        s / t, torch.softmax(z / t, dim=1), reduction="none"
    )


def hard_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """Ask the student for the teacher's first choice, as if it were the label.

    `−log softmax(s)_y` with `y = argmax_k z_k`, the first of equals.

    Args:
        student: logits `[N, K]`.
        teacher: logits `[N, K]`; no gradient flows into them.

    Returns:
        Nats per example, `[N]`.

    Raises:
        ValueError: shapes or types do not fit.

    Example:
        >>> hard_cross_entropy(torch.zeros(1, 4), torch.tensor([[0.0, 3.0, 1.0, 2.0]]))
        tensor([1.3863])

    Reference: Touvron et al., DeiT, arXiv:2012.12877, for a distillation token.
    """
    s, z = logit_pair(student, teacher)
    return F.cross_entropy(s, z.argmax(dim=1), reduction="none")


def logit_mse(student: Tensor, teacher: Tensor, centred: bool = True) -> Tensor:
    """Half the mean squared difference of the logits.

    `‖c_s − c_z‖²/(2K)` with `c_x = x − mean_k x`, the limit of `kl_divergence` as T → ∞; raw,
    `‖s − z‖²/(2K)`.

    Args:
        student: logits `[N, K]`.
        teacher: logits `[N, K]`; no gradient flows into them.
        centred: compare after removing each row's mean, which softmax cannot see.

    Returns:
        Squared logits per example, `[N]`.

    Raises:
        ValueError: shapes or types do not fit.

    Example:
        >>> logit_mse(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]]))
        tensor([0.5000])
        >>> logit_mse(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]]), centred=False)
        tensor([2.5000])

    Reference: arXiv:1503.02531, section 2.1.
    """
    s, z = logit_pair(student, teacher)
    difference = s - z
    if centred:
        difference = difference - difference.mean(dim=1, keepdim=True)
    return difference.square().sum(dim=1) / (2 * s.shape[1])


def standardized_kl(student: Tensor, teacher: Tensor, temperature: Temperature = 1.0) -> Tensor:
    """`kl_divergence` of logits brought to mean 0 and variance 1, row by row.

    `T²·KL(softmax(ẑ/T) ‖ softmax(ŝ/T))`, `x̂ = (x − mean)/√(var + ε²)`, population variance,
    ε = 1e-3. The student need not copy the teacher's scale. Standardised logits bound the
    confidence either can reach (`reachable_confidence`); a bound below 0.9 warns when the
    temperature is a float.

    Args:
        student: logits `[N, K]`, K ≥ 3.
        teacher: logits `[N, K]`; no gradient flows into them.
        temperature: T > 0, a float or a tensor `[]` or `[N, 1]`.

    Returns:
        T² times nats per example, `[N]`.

    Raises:
        ValueError: K < 3 (two standardised logits are always ±1), shapes or types do not fit, or
            the temperature is not positive and finite.

    Example:
        >>> logits = torch.randn(2, 100)
        >>> standardized_kl(3 * logits + 5, logits, temperature=1.0).round(decimals=4)
        tensor([0., 0.])

    Reference: arXiv:2403.01427.
    """
    s, z = logit_pair(student, teacher)
    t = checked_temperature(temperature, s)
    classes = s.shape[1]
    require(
        classes >= 3,
        "standardised logits of two classes are always +1 and −1 and teach nothing; "
        "use kl_divergence, or three classes or more",
    )
    if isinstance(t, float) and reachable_confidence(classes, t) < 0.9:
        # No temperature in the text: an annealed one would print a new warning every step.
        warnings.warn(
            f"standardised logits of {classes} classes cannot reach a confidence of 0.9 at this "
            "temperature; lower it",
            stacklevel=2,
        )
    return tempered_kl(_standardised(s), _standardised(z), t)


def reachable_confidence(classes: int, temperature: float = 1.0) -> float:
    """The largest softmax probability that standardised logits can express.

    `1/(1 + (K − 1)·exp(−K/(τ·√(K − 1))))`: one class far above the others, all equal.

    Args:
        classes: K ≥ 2.
        temperature: τ > 0.

    Returns:
        A probability in (1/K, 1).

    Example:
        >>> round(reachable_confidence(10, temperature=2.0), 2)
        0.37

    Reference: arXiv:2403.01427.
    """
    gap = classes / (temperature * math.sqrt(classes - 1))
    return 1.0 / (1.0 + (classes - 1) * math.exp(-gap))


def decoupled(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: Temperature = 1.0,
) -> Tensor:
    """Decoupled distillation: how sure of the label, and how the rest is shared, weighted apart.

    `T²·[α·KL(b_z ‖ b_s) + β·KL(p̂_z ‖ p̂_s)]` with `b = (p_y, 1 − p_y)` and `p̂` the other classes
    renormalised. `kl_divergence` has α = 1 and β = 1 − p_{z,y}, small where the teacher is sure.

    Args:
        student: logits `[N, K]`, K ≥ 3.
        teacher: logits `[N, K]`; no gradient flows into them.
        target: class indices `[N]`.
        alpha: weight of the target-class term.
        beta: weight of the term of the other classes.
        temperature: T > 0, a float or a tensor `[]` or `[N, 1]`.

    Returns:
        T² times nats per example, `[N]`.

    Raises:
        ValueError: K < 3 (one other class has nothing to share), shapes or types do not fit, or the
            temperature is not positive and finite.

    Example:
        >>> logits = torch.tensor([[3.0, 1.0, 0.0]])
        >>> label = torch.tensor([0])
        >>> decoupled(logits, torch.tensor([[9.0, 1.0, 0.0]]), label, alpha=0.0)
        tensor([0.])

    Reference: arXiv:2203.08679.
    """
    s, z = logit_pair(student, teacher)
    label = labels(s, target)
    t = checked_temperature(temperature, s)
    non_negative("alpha", alpha)
    non_negative("beta", beta)
    other_classes("decoupled", s)
    s_rest, z_rest = without_label(s, label, NEVER), without_label(z, label, NEVER)
    s_odds = log_odds(s, s_rest, label, t)
    z_odds = log_odds(z, z_rest, label, t)
    target_term = per_example(t) ** 2 * binary_kl(s_odds, z_odds)
    return alpha * target_term + beta * tempered_kl(s_rest, z_rest, t)


def dist(
    student: Tensor,
    teacher: Tensor,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: Temperature = 1.0,
) -> Tensor:
    """Correlation with the teacher: within each example, and within each class over the batch.

    `T²·[β·(1 − ρ(S_i·, Z_i·)) + γ·mean_j(1 − ρ(S_·j, Z_·j))]`, ρ Pearson's correlation of the
    tempered probabilities; ρ with a constant row or column is 0. The column term belongs to the
    whole batch, over all ranks of an initialised process group, and is added to every row; a batch
    of one has none. The gradient averaged over ranks is that of the joined batch; every rank must
    call as often as the others. The gradient grows with T², past float16 at T = 1,000.

    Args:
        student: logits `[N, K]`, K ≥ 2.
        teacher: logits `[N, K]`; no gradient flows into them.
        beta: weight of the row term.
        gamma: weight of the column term.
        temperature: T > 0, a float or a tensor `[]` or `[N, 1]`.

    Returns:
        T² times a value in [0, 2·(β + γ)], `[N]`.

    Raises:
        ValueError: K < 2, shapes or types do not fit, or the temperature is not positive and
            finite.

    Example:
        >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
        >>> dist(logits + 7.0, logits).round(decimals=4)
        tensor([0., 0.])

    Reference: arXiv:2205.10536.
    """
    s, z = logit_pair(student, teacher, classes=2)
    t = checked_temperature(temperature, s)
    non_negative("beta", beta)
    non_negative("gamma", gamma)
    s_prob, z_prob = torch.softmax(s / t, dim=1), torch.softmax(z / t, dim=1)
    rows = _decorrelation(s_prob, z_prob, dim=1)
    columns = _column_decorrelation(s_prob, z_prob)
    return per_example(t) ** 2 * (beta * rows + gamma * columns)


def _standardised(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[1:], eps=_STANDARDISATION_FLOOR**2)


def _column_decorrelation(s: Tensor, z: Tensor) -> Tensor:
    """The mean over classes of 1 − ρ along the batch of all ranks; 0 for a batch of one."""
    over_ranks = world_size() > 1
    if not over_ranks and len(s) == 1:
        return s.new_zeros(())
    mean = _decorrelation(s, z, 0, over_ranks).mean()
    if not over_ranks:
        return mean
    return torch.where(_count(s, 0, over_ranks) > 1, mean, 0.0)


class _Decorrelation(torch.autograd.Function):
    """`1 − ρ` along a dimension as `½‖ŝ − ẑ‖²` of centred unit vectors; 1 if one is constant.

    Over ranks every rank's copy of the value is used, so its gradient too is summed over them:
    averaged over ranks, as data-parallel training does, that is the gradient of the joined batch.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, z: Tensor, dim: int, over_ranks: bool) -> Tensor:
        s_unit, s_slope, s_varies = _centred_unit(s, dim, over_ranks)
        z_unit, z_slope, z_varies = _centred_unit(z, dim, over_ranks)
        varies = s_varies & z_varies
        residual = s_unit - z_unit
        half = _total(residual.square(), dim, over_ranks) / 2
        ctx.over_ranks = over_ranks
        ctx.save_for_backward(residual, s_unit, half, s_slope * varies, z_slope * varies)
        return torch.where(varies, half, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        residual, s_unit, half, s_slope, z_slope = ctx.saved_tensors
        if ctx.over_ranks:
            gradient = gradient.clone()
            torch.distributed.all_reduce(gradient)
        in_s = in_z = None
        if ctx.needs_input_grad[0]:
            in_s = torch.addcmul(residual, s_unit, half, value=-1).mul_(gradient * s_slope)
        if ctx.needs_input_grad[1]:
            in_z = torch.addcmul(residual, s_unit - residual, half).mul_(-gradient * z_slope)
        return in_s, in_z, None, None


def _decorrelation(s: Tensor, z: Tensor, dim: int, over_ranks: bool = False) -> Tensor:
    value: Tensor = _Decorrelation.apply(s, z, dim, over_ranks)
    return value.squeeze(dim)


def _centred_unit(x: Tensor, dim: int, over_ranks: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The unit vector, its slope in x, and whether x varies by more than rounding."""
    count = _count(x, dim, over_ranks)
    mean = _total(x, dim, over_ranks) / count
    # ρ ignores the scale, but the squares of a rare class's probabilities underflow.
    scale = mean.clamp(min=_SMALLEST_MEAN).reciprocal()
    unit = torch.sub(x, mean).mul_(scale)
    norm = _total(unit.square(), dim, over_ranks).sqrt()
    varies = norm > 8 * torch.finfo(x.dtype).eps * count**0.5
    inverse = torch.where(varies, norm, 1.0).reciprocal()
    return unit.mul_(inverse), inverse * scale, varies


def _count(x: Tensor, dim: int, over_ranks: bool) -> Tensor:
    return _total(x.new_full((1, 1), x.shape[dim]), dim, over_ranks)


def _total(x: Tensor, dim: int, over_ranks: bool) -> Tensor:
    total = x.sum(dim=dim, keepdim=True)
    if over_ranks:
        torch.distributed.all_reduce(total)
    return total
