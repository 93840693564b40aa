"""Divergences from a teacher smoothed on its own, and weighted by how unsure it is of an example.

As in `soft.py`, `s` are the student's logits, `z` the teacher's and `t` is the temperature.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill.losses._common import (
    Temperature,
    checked_temperature,
    logit_pair,
    per_example,
    positive,
)
from distill.losses._divergence import tempered_kl


def transformed_teacher(student: Tensor, teacher: Tensor, temperature: Temperature = 1.0) -> Tensor:
    """Transformed teacher matching: only the teacher is tempered, the student is not.

    `KL(softmax(z/T) ‖ softmax(s))`, with gradient `p_s − p_z` in the student and so without `T²`.
    Tempering is raising probabilities to `γ = 1/T` and renormalising. It equals `KL` with both
    tempered, times T, less `(T − 1)` times the student's Rényi entropy of order γ, plus what does
    not depend on the student: the student also learns to be unsure.

    Args:
        student: logits `[N, K]`.
        teacher: logits `[N, K]`; no gradient flows into them.
        temperature: T > 0 of the teacher, a float or a tensor `[]` or `[N, 1]`; 10 in the paper for
            most pairs of models on CIFAR-100.

    Returns:
        Nats per example, `[N]`.

    Raises:
        ValueError: shapes or types do not fit, or the temperature is not positive and finite.

    Example:
        >>> logits = torch.tensor([[4.0, 2.0, 0.0]])
        >>> transformed_teacher(logits / 2, logits, temperature=2.0)
        tensor([0.])

    Reference: arXiv:2402.11148.
    """
    s, z = logit_pair(student, teacher)
    return _untempered_kl(s, z, checked_temperature(temperature, s))


def weighted_transformed_teacher(
    student: Tensor, teacher: Tensor, temperature: Temperature = 1.0
) -> Tensor:
    """`transformed_teacher`, with more weight where the teacher is less sure.

    `U·KL(softmax(z/T) ‖ softmax(s))`, `U = Σ_k softmax(z)_k^{1/T}`: 1 where the teacher is certain
    and `K^{1−1/T}` where it knows nothing, so a batch's mean weight is between these. The paper has
    T > 1; below 1 the order turns round, and at 1 every weight is 1.

    Args:
        student: logits `[N, K]`.
        teacher: logits `[N, K]`; no gradient flows into them.
        temperature: T > 0 of the teacher, a float or a tensor `[]` or `[N, 1]`.

    Returns:
        Weighted nats per example, `[N]`.

    Raises:
        ValueError: shapes or types do not fit, or the temperature is not positive and finite.

    Example:
        >>> student, unsure = torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.zeros(1, 4)
        >>> weighted = weighted_transformed_teacher(student, unsure, temperature=2.0)
        >>> weighted / transformed_teacher(student, unsure, temperature=2.0)
        tensor([2.])

    Reference: arXiv:2402.11148.
    """
    s, z = logit_pair(student, teacher)
    t = checked_temperature(temperature, s)
    power_sum = torch.logsumexp(torch.log_softmax(z, dim=1) / t, dim=1).exp()
    return power_sum * _untempered_kl(s, z, t)


def entropy_weighted_kl(
    student: Tensor,
    teacher: Tensor,
    entropy_temperature: float = 3.0,
    temperature: Temperature = 1.0,
) -> Tensor:
    """`kl_divergence` with more weight where the teacher is less sure.

    `w·T²·KL(softmax(z/T) ‖ softmax(s/T))`, `w = H(softmax(z/τ))/log K`: 0 where the teacher is
    certain, 1 where it knows nothing. The weights are not scaled to a mean of 1, so that an
    example's value does not depend on its batch: under a sure teacher they are small, and the
    term's own weight or τ makes up for it. This is the paper's base weight `H(softmax(z/τ))`
    over its upper bound; the factor `(1 + H_s/log K)/2` of its full weight, which follows the
    student, is left out, so that weights depend on the teacher alone. (The authors' code takes
    100 for that bound on CIFAR-100, and `log K` on ImageNet as the paper does.)

    Args:
        student: logits `[N, K]`, K ≥ 2.
        teacher: logits `[N, K]`; no gradient flows into them.
        entropy_temperature: τ > 0; 3 in the paper for CIFAR-100, 2 for ImageNet.
        temperature: T > 0, a float or a tensor `[]` or `[N, 1]`.

    Returns:
        T² times weighted nats per example, `[N]`.

    Raises:
        ValueError: K < 2, shapes or types do not fit, or a temperature is not positive and finite.

    Example:
        >>> unsure, student = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
        >>> entropy_weighted_kl(student, unsure)
        tensor([0.1201])

    Reference: arXiv:2311.13621.
    """
    s, z = logit_pair(student, teacher, classes=2)
    t = checked_temperature(temperature, s)
    tau = positive("entropy_temperature", entropy_temperature)
    z_log = torch.log_softmax(z / tau, dim=1)
    entropy = -(z_log.exp() * z_log).sum(dim=1)
    return entropy / math.log(s.shape[1]) * tempered_kl(s, z, t)


def _untempered_kl(s: Tensor, z: Tensor, t: Temperature) -> Tensor:
    # Scaled up by T, the student is itself after tempering; what is left over is the factor T².
    return tempered_kl(s * t, z, t) / per_example(t) ** 2
