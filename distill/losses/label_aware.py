"""Distillation losses that read the label: where the teacher errs, and what the rest shares.

As in `soft.py`, `s` are the student's logits, `z` the teacher's and `t` is the temperature.
`decoupled` of that module is their ancestor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.losses._common import (
    Temperature,
    at_label,
    checked_temperature,
    confident_cross_entropy,
    labels,
    logit_pair,
    non_negative,
    other_classes,
    per_example,
    positive,
    without_label,
)
from distill.losses._divergence import NEVER, binary_kl, log_odds, tempered_kl


def normalized_kd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    gamma: float = 3.5,
    temperature: Temperature = 1.0,
) -> Tensor:
    """Normalised distillation: the label at the teacher's confidence, the other classes as shares.

    `−p_{z,y}·log p_{s,y} − γ·T²·Σ_{k≠y} p̂_{z,k}·log p̂_{s,k}`: p untempered, p̂ the other classes
    tempered and renormalised, so that both sides sum to 1. The cross-entropy with the label, weight
    1 in the paper, is a term of its own. As there, the second part is a cross-entropy: it has the
    gradient of `decoupled` at α = 0 and β = γ, and is not 0 where student and teacher agree.

    Args:
        student: logits `[N, K]`, K ≥ 3.
        teacher: logits `[N, K]`; no gradient flows into them.
        target: class indices `[N]`.
        gamma: weight of the other classes; the authors take 3.5 at T = 3 for CIFAR-100, 1.5 at
            T = 1 for ImageNet.
        temperature: T > 0 of the other classes, a float or a tensor `[]` or `[N, 1]`.

    Returns:
        Nats per example, those of the other classes times γ·T², `[N]`.

    Raises:
        ValueError: K < 3 (one other class has nothing to share), shapes or types do not fit, or the
            temperature is not positive and finite.

    Example:
        >>> label = torch.tensor([0])
        >>> normalized_kd(torch.zeros(1, 4), torch.zeros(1, 4), label, gamma=0.0)
        tensor([0.3466])

    Reference: arXiv:2303.13005.
    """
    s, z = logit_pair(student, teacher)
    label = labels(s, target)
    other_classes("normalised", s)
    t = checked_temperature(temperature, s)
    non_negative("gamma", gamma)
    s_rest, z_rest = without_label(s, label, NEVER), without_label(z, label, NEVER)
    others = F.cross_entropy(s_rest / t, torch.softmax(z_rest / t, dim=1), reduction="none")
    return confident_cross_entropy(s, z, label) + gamma * per_example(t) ** 2 * others


def refined_kd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    confidence_temperature: float = 1.0,
    temperature: Temperature = 1.0,
) -> Tensor:
    """Refined distillation: how sure the teacher is, but of the label, and only what it ranks low.

    `α·τ²·KL((max p_z, 1 − max p_z) ‖ (p_{s,y}, 1 − p_{s,y})) + β·T²·KL(p̃_z ‖ p̃_s)`: p at τ, and p̃
    at T over the classes whose teacher logit lies below the label's, so that nothing the teacher
    wrongly prefers is taught. Where it ranks the label first this is `decoupled`, at τ = T. The
    paper writes one temperature; the authors' configurations leave τ at 1, as here.

    Args:
        student: logits `[N, K]`, K ≥ 3.
        teacher: logits `[N, K]`; no gradient flows into them.
        target: class indices `[N]`.
        alpha: weight of the confidence.
        beta: weight of the classes below the label.
        confidence_temperature: τ > 0.
        temperature: T > 0, a float or a tensor `[]` or `[N, 1]`.

    Returns:
        Nats per example, times τ² and T², `[N]`.

    Raises:
        ValueError: K < 3 (one other class has nothing to share), shapes or types do not fit, or a
            temperature is not positive and finite.

    Example:
        >>> sure, label = torch.tensor([[0.0, 9.0, 1.0]]), torch.tensor([0])
        >>> refined_kd(torch.tensor([[9.0, 0.0, 1.0]]), sure, label)  # sure of the label: right
        tensor([0.])

    Reference: arXiv:2408.07703.
    """
    s, z = logit_pair(student, teacher)
    label = labels(s, target)
    other_classes("refined", s)
    t = checked_temperature(temperature, s)
    tau = positive("confidence_temperature", confidence_temperature)
    non_negative("alpha", alpha)
    non_negative("beta", beta)
    first = z.argmax(dim=1)
    s_odds = log_odds(s, without_label(s, label, NEVER), label, tau)
    z_odds = log_odds(z, without_label(z, first, NEVER), first, tau)
    misleading = z >= at_label(z, label).unsqueeze(1)
    below = tempered_kl(s.masked_fill(misleading, NEVER), z.masked_fill(misleading, NEVER), t)
    return alpha * tau**2 * binary_kl(s_odds, z_odds) + beta * below
