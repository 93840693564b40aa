"""Time every loss against the leanest direct torch expression of its formula.

Forward and backward in float32 on one thread of the CPU. The references skip what the losses guard
against (cancellation, overflow, ties), not parts of the formula.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from measure import Row, print_rows, rounds, seconds
from torch import Tensor

from distill import losses

T = 4.0
Function = Callable[[Tensor], Tensor]


class Case(NamedTuple):
    """A loss, what it is measured against, and the ratio it may reach."""

    loss: Function
    reference: Function
    limit: float


def lean_kl(s: Tensor, z: Tensor, t: float = T) -> Tensor:
    teacher = z / t
    p, log_p = torch.softmax(teacher, 1), torch.log_softmax(teacher, 1)
    return t * t * (p * (log_p - torch.log_softmax(s / t, 1))).sum(1)


def lean_decoupled(s: Tensor, z: Tensor, y: Tensor) -> Tensor:
    index = y.unsqueeze(1)
    s, z = s / T, z / T
    s_rest, z_rest = s.scatter(1, index, -1e9), z.scatter(1, index, -1e9)
    s_log, z_log = torch.log_softmax(s_rest, 1), torch.log_softmax(z_rest, 1)
    others = (z_log.exp() * (z_log - s_log)).sum(1)
    s_odds = s.gather(1, index) - torch.logsumexp(s_rest, 1, keepdim=True)
    z_odds = z.gather(1, index) - torch.logsumexp(z_rest, 1, keepdim=True)
    s_two = F.logsigmoid(torch.cat([s_odds, -s_odds], 1))
    z_two = F.logsigmoid(torch.cat([z_odds, -z_odds], 1))
    return T * T * ((z_two.exp() * (z_two - s_two)).sum(1) + 8 * others)


def lean_dist(s: Tensor, z: Tensor) -> Tensor:
    p, q = torch.softmax(s / T, 1), torch.softmax(z / T, 1)
    total = torch.zeros(len(s))
    for dim in (1, 0):
        a, b = p - p.mean(dim, keepdim=True), q - q.mean(dim, keepdim=True)
        rho = (a * b).sum(dim) / ((a * a).sum(dim) * (b * b).sum(dim)).sqrt()
        total = total + (1 - rho if dim else (1 - rho).mean())
    return T * T * total


def lean_normalized(s: Tensor, z: Tensor, y: Tensor) -> Tensor:
    index = y.unsqueeze(1)
    label = torch.softmax(z, 1).gather(1, index).squeeze(1) * F.cross_entropy(
        s, y, reduction="none"
    )
    s_rest, z_rest = (x.scatter(1, index, -1e9) / T for x in (s, z))
    shares = -(torch.softmax(z_rest, 1) * torch.log_softmax(s_rest, 1)).sum(1)
    return label + 3.5 * T * T * shares


def lean_refined(s: Tensor, z: Tensor, y: Tensor) -> Tensor:
    index = y.unsqueeze(1)
    p, q = torch.softmax(z, 1).amax(1), torch.softmax(s, 1).gather(1, index).squeeze(1)
    sure = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    above = z >= z.gather(1, index)
    return sure + 8 * lean_kl(s.masked_fill(above, -1e9), z.masked_fill(above, -1e9))


def lean_transformed(s: Tensor, z: Tensor, weighted: bool = False) -> Tensor:
    powers = torch.softmax(z, 1) ** (1 / T)
    total = powers.sum(1)
    p = powers / total.unsqueeze(1)
    kl = (p * (p.log() - torch.log_softmax(s, 1))).sum(1)
    return total * kl if weighted else kl


def lean_entropy_weighted(s: Tensor, z: Tensor) -> Tensor:
    log_p = torch.log_softmax(z / 3, 1)
    return -(log_p.exp() * log_p).sum(1) / math.log(s.shape[1]) * lean_kl(s, z)


def lean_multi_level(s: Tensor, z: Tensor) -> Tensor:
    total = torch.zeros(len(s))
    for t in (2.0, 3.0, 4.0, 5.0, 6.0):
        p, q = torch.softmax(s / t, 1), torch.softmax(z / t, 1)
        classes = (p.T @ p - q.T @ q).square().sum() / s.shape[1]
        total = total + lean_kl(s, z, t) + (p @ p.T - q @ q.T).square().sum(1) + classes
    return total


def lean_streamlined(s: Tensor, z: Tensor) -> Tensor:
    a, b = F.normalize(s), F.normalize(z)
    d = (a @ a.T - b @ b.T) / s.shape[1]
    lower = torch.linalg.cholesky(torch.cov(d.T) + 0.1 * torch.eye(len(s)))
    angles = torch.linalg.solve_triangular(lower, d.T, upper=False).norm(dim=0)
    return lean_kl(s, z) + angles


def signed(z: Tensor) -> Tensor:
    k = z.shape[1]
    return (torch.softmax(z, 1) * k - 1) / (k - 1)


def lean_squared(s: Tensor, z: Tensor) -> Tensor:
    p = (1 + signed(z)) / 2
    return (p * torch.relu(1 - s).square() + (1 - p) * torch.relu(1 + s).square()).sum(1)


def lean_soft_hinge(s: Tensor, z: Tensor) -> Tensor:
    t = signed(z)
    return torch.relu(t.abs() - t.sign() * s).sum(1)


def lean_weighted(s: Tensor, z: Tensor) -> Tensor:
    t = signed(z)
    return torch.relu(t.abs() - t * s).sum(1)


def sorted_pairs(s: Tensor, z: Tensor) -> Tensor:
    """Without ties, `Σ relu(x) = Σ (x + |x|)/2`: one sort by p for x, one by gain for |x|."""
    p = torch.softmax(z, 1)
    gain = p - s
    weight = torch.arange(s.shape[1]) - (s.shape[1] - 1) / 2
    by_p = gain.gather(1, p.argsort(1))
    return ((by_p + gain.sort(1).values) * weight).sum(1)


def lean_one_vs_rest(s: Tensor, y: Tensor) -> Tensor:
    index = y.unsqueeze(1)
    return torch.relu(1 + s.scatter(1, index, -s.gather(1, index))).sum(1)


def margin(s: Tensor, y: Tensor) -> Tensor:
    index = y.unsqueeze(1)
    others = s.scatter(1, index, -torch.inf).max(1).values
    return s.gather(1, index).squeeze(1) - others


def lean_weston_watkins(s: Tensor, y: Tensor) -> Tensor:
    return torch.relu(1 + s - s.gather(1, y.unsqueeze(1))).sum(1) - 1


def lean_topk(s: Tensor, y: Tensor) -> Tensor:
    index = y.unsqueeze(1)
    rival = s.scatter(1, index, -torch.inf).topk(5, 1).values[:, 4]
    return torch.relu(1 + (rival - s.gather(1, index).squeeze(1)) / 5)


def lean_ldam(s: Tensor, y: Tensor, margins: Tensor) -> Tensor:
    index = y.unsqueeze(1)
    return F.cross_entropy(
        30 * s.scatter_add(1, index, -margins[y].unsqueeze(1)), y, reduction="none"
    )


def cases(z: Tensor, y: Tensor) -> dict[str, Case]:
    classes = z.shape[1]
    counts = torch.linspace(1000, 10, classes)
    weights = losses.class_balanced_weights(counts, 0.9999)
    margins = 0.5 * (counts / counts.min()) ** -0.25
    prior = (counts / counts.sum()).log()
    ce = partial(F.cross_entropy, target=y, reduction="none")

    def teacher(function: Callable[..., Tensor], **options: float) -> Function:
        return lambda s: function(s, z, **options)

    def label(function: Callable[..., Tensor], *options: object) -> Function:
        return lambda s: function(s, y, *options)

    def pair(
        loss: Callable[..., Tensor], lean: Function, limit: float = 1.5, **options: float
    ) -> Case:
        return Case(teacher(loss, **options), lean, limit)

    mse = lambda s: (lambda d: (d - d.mean(1, keepdim=True)).square().sum(1) / (2 * classes))(s - z)  # noqa: E731
    norm = lambda x: F.layer_norm(x, x.shape[1:], eps=1e-6)  # noqa: E731
    return {
        "cross_entropy": Case(label(losses.cross_entropy), ce, 1.5),
        "tempered_cross_entropy": Case(
            label(losses.tempered_cross_entropy, T), lambda s: T * ce(s / T), 1.5
        ),
        "kl_divergence": pair(losses.kl_divergence, teacher(lean_kl), temperature=T),
        "kl_divergence T=1000": pair(
            losses.kl_divergence, teacher(lean_kl, t=1000.0), 2.2, temperature=1000.0
        ),
        "soft_cross_entropy": pair(
            losses.soft_cross_entropy,
            lambda s: -T * T * (torch.softmax(z / T, 1) * torch.log_softmax(s / T, 1)).sum(1),
            temperature=T,
        ),
        "logit_mse": pair(losses.logit_mse, mse),
        "standardized_kl": pair(
            losses.standardized_kl, lambda s: lean_kl(norm(s), norm(z), 2.0), temperature=2.0
        ),
        "decoupled": Case(
            lambda s: losses.decoupled(s, z, y, temperature=T),
            lambda s: lean_decoupled(s, z, y),
            1.5,
        ),
        "dist": pair(losses.dist, teacher(lean_dist), temperature=T),
        "normalized_kd": Case(
            lambda s: losses.normalized_kd(s, z, y, temperature=T),
            lambda s: lean_normalized(s, z, y),
            1.5,
        ),
        "refined_kd": Case(
            lambda s: losses.refined_kd(s, z, y, temperature=T),
            lambda s: lean_refined(s, z, y),
            1.5,
        ),
        "transformed_teacher": pair(
            losses.transformed_teacher, teacher(lean_transformed), temperature=T
        ),
        "weighted_transformed_teacher": pair(
            losses.weighted_transformed_teacher,
            teacher(lean_transformed, weighted=True),
            temperature=T,
        ),
        "entropy_weighted_kl": pair(
            losses.entropy_weighted_kl, teacher(lean_entropy_weighted), temperature=T
        ),
        "multi_level_kd": pair(
            losses.multi_level_kd, teacher(lean_multi_level), 2.0, temperature=T
        ),
        "streamlined_kd": pair(losses.streamlined_kd, teacher(lean_streamlined), temperature=T),
        "soft_hinge": pair(losses.soft_hinge, teacher(lean_soft_hinge)),
        "squared_soft_hinge": pair(losses.squared_soft_hinge, teacher(lean_squared)),
        "weighted_sign_hinge": pair(losses.weighted_sign_hinge, teacher(lean_weighted)),
        "product_hinge": pair(losses.product_hinge, lambda s: torch.relu(1 - signed(z) * s).sum(1)),
        "epsilon_insensitive_hinge": pair(
            losses.epsilon_insensitive_hinge,
            lambda s: torch.relu((s - signed(z)).abs() - 0.1).sum(1),
            epsilon=0.1,
        ),
        "pairwise_soft_hinge": pair(losses.pairwise_soft_hinge, teacher(sorted_pairs)),
        "one_vs_rest_hinge": Case(label(losses.one_vs_rest_hinge), label(lean_one_vs_rest), 1.5),
        "crammer_singer": Case(
            label(losses.crammer_singer), lambda s: torch.relu(1 - margin(s, y)), 1.5
        ),
        "weston_watkins": Case(label(losses.weston_watkins), label(lean_weston_watkins), 1.5),
        "class_balanced_cross_entropy": Case(
            label(losses.class_balanced_cross_entropy, counts), lambda s: weights[y] * ce(s), 1.5
        ),
        "ldam": Case(label(losses.ldam, counts), lambda s: lean_ldam(s, y, margins), 1.5),
        "logit_adjusted_cross_entropy": Case(
            label(losses.logit_adjusted_cross_entropy, counts), lambda s: ce(s + prior), 1.5
        ),
        "generalized_cross_entropy": Case(
            label(losses.generalized_cross_entropy), lambda s: (1 - (-0.7 * ce(s)).exp()) / 0.7, 1.5
        ),
        "symmetric_cross_entropy": Case(
            label(losses.symmetric_cross_entropy),
            lambda s: (lambda c: 0.1 * c + 9.2103404 * (1 - (-c).exp()))(ce(s)),
            1.5,
        ),
        "ramp_hinge": Case(
            label(losses.ramp_hinge), lambda s: torch.relu(1 - margin(s, y)).clamp(max=2), 1.5
        ),
        "smooth_topk / cross_entropy": Case(label(losses.smooth_topk), ce, 20.0),
        "hard_topk_hinge": Case(label(losses.hard_topk_hinge), label(lean_topk), 1.5),
    }


def turn(function: Function, student: Tensor) -> float:
    student.grad = None
    return seconds(lambda: function(student).sum().backward())


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--only", default="", help="a part of the names to time")


def measure(options: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    torch.set_num_threads(options.threads or 1)  # more would time how threads share the rows
    shape = options.rows, options.classes
    student = (3 * torch.randn(shape)).requires_grad_()
    teacher, target = 3 * torch.randn(shape), torch.randint(shape[1], shape[:1])
    rows, tables = [], {}
    for name, case in cases(teacher, target).items():
        if options.only in name:
            sides = {"loss": case.loss, "reference": case.reference}
            turns = {side: partial(turn, function, student) for side, function in sides.items()}
            taken = rounds(turns, options.repeats or 25, warm=2)
            loss, reference = (1e3 * median(values) for values in taken.values())
            note = f"{loss:.2f} and {reference:.2f} ms"
            # Not pair by pair: turns of milliseconds are at the scheduler's mercy.
            rows.append(Row(name, loss / reference, most=case.limit, note=note))
            tables[name] = {"milliseconds": loss, "reference_milliseconds": reference}
    print_rows(rows)
    return rows, {"losses": tables}
