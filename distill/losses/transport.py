"""Optimal transport between predictions: a mistake costs less between classes that are alike.

As in `soft.py`, `s` are the student's logits, `z` the teacher's and `t` is the temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.losses._common import (
    Temperature,
    checked_temperature,
    confident_cross_entropy,
    labels,
    logit_pair,
    matrix_product,
    non_negative,
    other_classes,
    positive,
    require,
    unit,
    upcast,
    without_label,
)
from distill.losses._divergence import NEVER

_DEAREST = 60.0  # e^-60 and its inverse are ordinary float32 numbers


def class_costs(prototypes: Tensor, sharpness: float = 1.0) -> Tensor:
    """What moving probability from one class to another costs, from a vector for each class.

    `c_ij = 1 − exp(−κ·(1 − cos(w_i, w_j)))`, 0 between a class and itself. Of the paper's
    similarities this is the one of a teacher's classifier, whose weights are such vectors; its
    best, centred kernel alignment of the features of each class's images, needs a pass over the
    training data and is not computed here.

    Args:
        prototypes: one vector for each class `[K, D]`.
        sharpness: κ > 0; 1 in the paper for CIFAR-100.

    Returns:
        Costs in [0, 1), `[K, K]`, symmetric, without a gradient.

    Raises:
        ValueError: the prototypes are no floating-point matrix, or κ is not positive and finite.

    Example:
        >>> class_costs(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).round(decimals=4)
        tensor([[0.0000, 0.6321],
                [0.6321, 0.0000]])

    Reference: arXiv:2412.08139.
    """
    require(
        prototypes.dim() == 2 and prototypes.is_floating_point(),
        "prototypes must be a floating-point tensor of shape [K, D], "
        f"got {prototypes.dtype} of shape {list(prototypes.shape)}",
    )
    directions = unit(upcast(prototypes.detach()))
    distance = (1 - matrix_product(directions, directions.mT)).clamp(min=0)
    return -torch.expm1(-positive("sharpness", sharpness) * distance)


def wasserstein_kd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    cost: Tensor,
    gamma: float = 800.0,
    regularization: float = 0.05,
    iterations: int = 10,
    temperature: Temperature = 1.0,
) -> Tensor:
    """The label at the teacher's confidence, and the cost of moving the other classes' shares.

    `−p_{z,y}·log p_{s,y} + γ·Σ_ij F_ij·c_ij`: p untempered as in `normalized_kd`, whose second part
    is replaced by optimal transport. F is the flow from p̂_s to p̂_z, the other classes tempered and
    renormalised, that Sinkhorn's iteration reaches for `min Σ F_ij·c_ij + η·Σ F_ij·log F_ij`. The
    entropy spreads the flow, so the value is not 0 where student and teacher agree; as η → 0 it is
    Wasserstein's distance. There is no factor T², nor has the authors' code one. The cross-entropy
    with the label, weight 1 there, is a term of its own. Costs above 60·η count as 60·η in the
    flow. It is computed on logarithms, where the authors add 1e-8 to each denominator.

    Args:
        student: logits `[N, K]`, K ≥ 3.
        teacher: logits `[N, K]`; no gradient flows into them.
        target: class indices `[N]`.
        cost: what moving probability from class i to class j costs, c_ij ≥ 0 and c_ii = 0,
            `[K, K]`, such as `class_costs` of the teacher's classifier; no gradient flows into it.
        gamma: weight of the transport; the authors take 800 at T = 8 for CIFAR-100.
        regularization: η > 0, in units of the costs.
        iterations: how often both marginals are fitted, at least once; the student's is exact.
        temperature: T > 0 of the other classes, a float or a tensor `[]` or `[N, 1]`.

    Returns:
        Nats and γ times a cost per example, `[N]`.

    Raises:
        ValueError: K < 3 (one other class has nothing to share), shapes or types do not fit, or an
            option is out of range.

    Example:
        >>> cost = 1 - torch.eye(3)
        >>> s, z = torch.tensor([[0.0, 9.0, 0.0]]), torch.tensor([[0.0, 0.0, 9.0]])
        >>> label = torch.tensor([0])
        >>> moved = wasserstein_kd(s, z, label, cost, gamma=1.0)
        >>> (moved - wasserstein_kd(s, z, label, cost, gamma=0.0)).round(decimals=3)
        tensor([1.])

    Reference: arXiv:2412.08139, WKD-L.
    """
    s, z = logit_pair(student, teacher)
    label = labels(s, target)
    other_classes("Wasserstein", s)
    t = checked_temperature(temperature, s)
    non_negative("gamma", gamma)
    positive("regularization", regularization)
    require(iterations >= 1, f"iterations must be at least 1, got {iterations}")
    require(
        cost.shape == (s.shape[1], s.shape[1]) and cost.is_floating_point(),
        f"cost must be a floating-point tensor of shape [{s.shape[1]}, {s.shape[1]}], "
        f"got {cost.dtype} of shape {list(cost.shape)}",
    )
    s_log, z_log = (torch.log_softmax(without_label(x, label, NEVER) / t, dim=1) for x in (s, z))
    costs = upcast(cost.detach()).to(s)
    start = without_label(torch.zeros_like(s), label, NEVER)
    moved = _transport(s_log, z_log, costs, regularization, iterations, start)
    return confident_cross_entropy(s, z, label) + gamma * moved


def _transport(
    s_log: Tensor,
    z_log: Tensor,
    cost: Tensor,
    regularization: float,
    iterations: int,
    start: Tensor,
) -> Tensor:
    """The cost of the flow from logarithms of probabilities to others, by Sinkhorn's iteration."""
    kernel = torch.exp(-(cost / regularization).clamp(max=_DEAREST))
    from_student = to_teacher = start
    for _ in range(iterations):
        to_teacher = z_log - matrix_product(_scaled(from_student), kernel).log()
        from_student = s_log - matrix_product(_scaled(to_teacher), kernel.mT).log()
    # What leaves a student's class goes to the teacher's in these shares.
    shares = _scaled(to_teacher)
    mean_cost = matrix_product(shares, (kernel * cost).mT) / matrix_product(shares, kernel.mT)
    return (s_log.exp() * mean_cost).sum(dim=1)


def _scaled(logarithms: Tensor) -> Tensor:
    # A factor common to a row changes no flow: the other side's takes it back.
    return torch.exp(logarithms - logarithms.detach().amax(dim=1, keepdim=True))
