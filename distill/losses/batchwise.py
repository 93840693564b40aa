"""Losses on what a batch's predictions have in common, beside each prediction itself.

As in `soft.py`, `s` are the student's logits, `z` the teacher's and `t` is the temperature. With
several processes, each compares the examples of its own batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.losses._common import (
    Temperature,
    checked_temperature,
    logit_pair,
    matrix_product,
    non_negative,
    positive,
    require,
    unit,
)
from distill.losses._divergence import tempered_kl

_LEVELS = (0.5, 0.75, 1.0, 1.25, 1.5)  # the paper's temperatures 2, 3, 4, 5 and 6 around 4


def multi_level_kd(
    student: Tensor,
    teacher: Tensor,
    beta: float = 1.0,
    gamma: float = 1.0,
    spread: Sequence[float] = _LEVELS,
    temperature: Temperature = 1.0,
) -> Tensor:
    """Agreement in each prediction, between the predictions of a batch and between classes.

    `Σ_τ [τ²·KL(p_z ‖ p_s) + β·Σ_j (P_z·P_zᵀ − P_s·P_sᵀ)_ij² + γ/K·‖P_zᵀ·P_z − P_sᵀ·P_s‖²]` over
    the temperatures `τ = T·spread`; P `[N, K]` are the tempered probabilities of a batch, of each
    process its own. The mean over the examples i is the paper's loss of a batch, whose second part
    is `‖P_z·P_zᵀ − P_s·P_sᵀ‖²/N`; the third belongs to the whole batch and is added to every
    example. This is one view; the paper sums it over a weakly and a strongly augmented one, as
    `objective=mlkd_two_views` does. The authors' code is another: of the strong view it has the
    first part alone, at τ = 3, 4 and 5, and at 2 and 6 the weak view's once more; and it multiplies
    what is of the weak view by the share of examples, or of classes, up to the median of the
    teacher's confidence, a constant of one half. The paper's formula is taken, and a constant is
    left to the term's weight.

    Args:
        student: logits `[N, K]`.
        teacher: logits `[N, K]`; no gradient flows into them.
        beta: weight of the part between examples.
        gamma: weight of the part between classes.
        spread: positive factors of the temperature, summed over.
        temperature: T > 0, a float or a tensor `[]` or `[N, 1]`; 4 in the paper.

    Returns:
        One value per example, `[N]`.

    Raises:
        ValueError: shapes or types do not fit, the temperature or a factor is not positive and
            finite, or there is no factor.

    Example:
        >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
        >>> multi_level_kd(logits + 7.0, logits, temperature=4.0).round(decimals=4)
        tensor([0., 0.])

    Reference: Jin et al., Multi-Level Logit Distillation, CVPR 2023.
    """
    s, z = logit_pair(student, teacher)
    t = checked_temperature(temperature, s)
    non_negative("beta", beta)
    non_negative("gamma", gamma)
    require(
        isinstance(spread, Sequence) and len(spread) > 0,
        f"spread must list at least one factor of the temperature, got {spread}",
    )
    total = torch.zeros_like(s[:, 0])
    for factor in spread:
        tau = t * positive("spread", factor)
        s_prob, z_prob = torch.softmax(s / tau, dim=1), torch.softmax(z / tau, dim=1)
        examples, classes = _between_examples_and_classes(s_prob, z_prob)
        total = total + tempered_kl(s, z, tau) + beta * examples + gamma * classes
    return total


def streamlined_kd(
    student: Tensor,
    teacher: Tensor,
    beta: float = 1.0,
    regularization: float = 0.1,
    temperature: Temperature = 1.0,
) -> Tensor:
    """Agreement in each prediction, and in the angles between a batch's logits, whitened.

    `T²·KL(p_z ‖ p_s) + β·√(D_iᵀ·(Cov(D) + λ·1)⁻¹·D_i)`, `D = (Ŝ·Ŝᵀ − Ẑ·Ẑᵀ)/K` for rows of logits
    Ŝ and Ẑ of a batch, of each process its own, at length 1; `D_i` its rows, Cov their covariance.
    `(Cov + λ·1)⁻¹ = (L·Lᵀ)⁻¹` by Cholesky's decomposition, so the root is `‖L⁻¹·D_i‖`. Lengths are
    ignored, but a shift of the logits is not. A batch of one has no angles, and no such part. The
    paper's formula is written without `1/K` and `T²`; the authors' code has both, and they are
    taken because λ = 0.1 and its weights belong to them. Its masks only halve both parts, which is
    left to the term's weight.

    Args:
        student: logits `[N, K]`.
        teacher: logits `[N, K]`; no gradient flows into them.
        beta: weight of the angles.
        regularization: λ > 0, how little is whitened.
        temperature: T > 0, a float or a tensor `[]` or `[N, 1]`.

    Returns:
        One value per example, `[N]`.

    Raises:
        ValueError: shapes or types do not fit, or the temperature or λ is not positive and finite.

    Example:
        >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
        >>> streamlined_kd(logits, logits)
        tensor([0., 0.])

    Reference: Jeong et al., Streamlined Knowledge Distillation, CVPR 2026.
    """
    s, z = logit_pair(student, teacher)
    t = checked_temperature(temperature, s)
    non_negative("beta", beta)
    difference = (_gram(unit(s)) - _gram(unit(z))) / s.shape[1]
    angles = _whitened_length(difference, positive("regularization", regularization))
    return tempered_kl(s, z, t) + beta * angles


def _gram(x: Tensor) -> Tensor:
    return matrix_product(x, x.mT)


def _between_examples_and_classes(s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """`Σ_j (zzᵀ − ssᵀ)_ij²` and `‖zᵀz − sᵀs‖²/K`, without a matrix of K² classes.

    With `e = s − z` the matrix of classes is `eᵀs + zᵀe`, whose square is a sum over pairs of
    examples that does not cancel where s is near z.
    """
    e = s - z
    s_gram, z_gram = _gram(s), _gram(z)
    same = _gram(e) * (s_gram + z_gram)
    crossed = matrix_product(e, s.mT) * matrix_product(z, e.mT)
    classes = (same + 2 * crossed).sum().clamp(min=0) / s.shape[1]
    return (z_gram - s_gram).square().sum(dim=1), classes


def _whitened_length(rows: Tensor, regularization: float) -> Tensor:
    count = len(rows)
    centred = rows - rows.mean(dim=0)
    covariance = matrix_product(centred.mT, centred) / max(count - 1, 1)
    ridge = regularization * torch.eye(count, dtype=rows.dtype, device=rows.device)
    # Positive definite by the ridge; asking whether it worked would wait for the device.
    lower, _ = torch.linalg.cholesky_ex(covariance + ridge)
    whitened = torch.linalg.solve_triangular(lower, rows.mT, upper=False)
    return torch.linalg.vector_norm(whitened, dim=0)
