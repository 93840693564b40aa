"""How faithfully a student follows its teacher.

Every function takes the student's logits `[N, K]`, then the teacher's, works in float64 and returns
a scalar tensor without gradient. Notation: s student, z teacher, `p_s = softmax(s / T)`,
`p_z = softmax(z / T)`. The class a model names is its first largest one.

Reference for all of them: Stanton et al., Does Knowledge Distillation Really Work?,
arXiv:2106.05945.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distill.metrics._shared import (
    SumMetric,
    check_count,
    check_scores,
    check_target,
    check_temperature,
    mean_over_rows,
    sum_over_blocks,
    sum_over_rows,
)


def agreement(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Share of examples on which both models name the same class.

    `1/N · Σ_i [argmax s_i = argmax z_i]`.

    Args:
        student_logits: `[N, K]`.
        teacher_logits: `[N, K]`.

    Returns:
        A float64 scalar in `[0, 1]`.

    Raises:
        ValueError: If the shapes are wrong or there is no example.

    Example:
        >>> student = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> float(agreement(student, torch.tensor([[2.0, 1.0], [1.0, 2.0]])))
        0.5

    Reference: Stanton et al., arXiv:2106.05945.
    """
    _check_pair(student_logits, teacher_logits)
    return mean_over_rows(_same_class, student_logits, teacher_logits)


def agreement_where_teacher_wrong(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor
) -> Tensor:
    """Share of the teacher's mistakes that the student repeats exactly.

    `#{i : argmax s_i = argmax z_i ≠ y_i} / #{i : argmax z_i ≠ y_i}`.

    Args:
        student_logits: `[N, K]`.
        teacher_logits: `[N, K]`.
        target: Labels `[N]`.

    Returns:
        A float64 scalar in `[0, 1]`; NaN where the teacher makes no mistake.

    Raises:
        ValueError: If shapes or labels are wrong or there is no example.

    Example:
        >>> student = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> float(agreement_where_teacher_wrong(student, teacher, torch.tensor([0, 0, 0])))
        0.5

    Reference: Stanton et al., arXiv:2106.05945.
    """
    _check_pair(student_logits, teacher_logits)
    check_target(target, *student_logits.shape)
    wrong = teacher_logits.argmax(dim=1) != target
    repeated = wrong & _same_class(student_logits, teacher_logits)
    return repeated.double().sum() / wrong.double().sum()


def kl_from_teacher(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0
) -> Tensor:
    """Information lost when the student stands in for the teacher, in nats.

    `1/N · Σ_i KL(p_z ‖ p_s)`, both tempered, without the factor T² of the training loss.

    Args:
        student_logits: `[N, K]`.
        teacher_logits: `[N, K]`.
        temperature: T > 0, which divides both.

    Returns:
        A float64 scalar, at least 0; NaN if the logits hold NaN.

    Raises:
        ValueError: If shapes or temperature are wrong or there is no example.

    Example:
        >>> student = torch.zeros(1, 2)
        >>> round(float(kl_from_teacher(student, torch.tensor([[0.0, 50.0]]))), 4)
        0.6931

    Reference: Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531.
    """
    return _mean_divergence(_kl_from_teacher, student_logits, teacher_logits, temperature)


def kl_to_teacher(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0
) -> Tensor:
    """The other direction of `kl_from_teacher`: heavy where the student invents probability.

    `1/N · Σ_i KL(p_s ‖ p_z)`, both tempered, in nats.

    Args:
        student_logits: `[N, K]`.
        teacher_logits: `[N, K]`.
        temperature: T > 0, which divides both.

    Returns:
        A float64 scalar, at least 0; NaN if the logits hold NaN.

    Raises:
        ValueError: If shapes or temperature are wrong or there is no example.

    Example:
        >>> student = torch.tensor([[0.0, 50.0]])
        >>> round(float(kl_to_teacher(student, torch.zeros(1, 2))), 4)
        0.6931

    Reference: Stanton et al., arXiv:2106.05945.
    """
    return _mean_divergence(_kl_to_teacher, student_logits, teacher_logits, temperature)


def jensen_shannon(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0
) -> Tensor:
    """Symmetric, bounded divergence of the two predictions, in nats.

    `1/N · Σ_i ½·KL(p_s ‖ m) + ½·KL(p_z ‖ m)`, `m = (p_s + p_z)/2`.

    Args:
        student_logits: `[N, K]`.
        teacher_logits: `[N, K]`.
        temperature: T > 0, which divides both.

    Returns:
        A float64 scalar in `[0, log 2]`.

    Raises:
        ValueError: If shapes or temperature are wrong or there is no example.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 99.0]]), torch.tensor([[99.0, 0.0]])
        >>> round(float(jensen_shannon(student, teacher)), 4)
        0.6931

    Reference: Lin, Divergence Measures Based on the Shannon Entropy, 1991.
    """
    return _mean_divergence(_jensen_shannon, student_logits, teacher_logits, temperature)


def total_variation(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0
) -> Tensor:
    """Probability on which the two predictions differ.

    `1/N · Σ_i ½ · Σ_k |p_s − p_z|`.

    Args:
        student_logits: `[N, K]`.
        teacher_logits: `[N, K]`.
        temperature: T > 0, which divides both.

    Returns:
        A float64 scalar in `[0, 1]`.

    Raises:
        ValueError: If shapes or temperature are wrong or there is no example.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[99.0, 0.0]])
        >>> float(total_variation(student, teacher))
        0.5

    Reference: Stanton et al., arXiv:2106.05945.
    """
    return _mean_divergence(_total_variation, student_logits, teacher_logits, temperature)


def centred_logit_mse(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Squared distance of the logits once each row has mean zero, per class.

    `1/N · Σ_i ‖c_s − c_z‖² / K`, `c_x = x − mean_k x`.

    Args:
        student_logits: `[N, K]`.
        teacher_logits: `[N, K]`.

    Returns:
        A float64 scalar, at least 0, in squared units of the logits.

    Raises:
        ValueError: If the shapes are wrong or there is no example.

    Example:
        >>> float(centred_logit_mse(torch.tensor([[5.0, 5.0]]), torch.tensor([[1.0, -1.0]])))
        1.0

    Reference: Kim et al., Comparing KL and MSE in Knowledge Distillation, arXiv:2105.08919.
    """
    _check_pair(student_logits, teacher_logits)
    return mean_over_rows(_centred_square, student_logits, teacher_logits)


def entropy_gap(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """How much less sure the student is than the teacher, in nats.

    `1/N · Σ_i H(p_s) − H(p_z)`, `H(p) = −Σ_k p log p`: negative for an overconfident student.

    Args:
        student_logits: `[N, K]`.
        teacher_logits: `[N, K]`.
        temperature: T > 0, which divides both.

    Returns:
        A float64 scalar in `[−log K, log K]`.

    Raises:
        ValueError: If shapes or temperature are wrong or there is no example.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[99.0, 0.0]])
        >>> round(float(entropy_gap(student, teacher)), 4)
        0.6931

    Reference: Stanton et al., arXiv:2106.05945.
    """
    return _mean_divergence(_entropy_difference, student_logits, teacher_logits, temperature)


def confidence_slope(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Least-squares slope of the student's confidence on the teacher's, both as log-odds.

    `cov(a, b) / var(b)` over the examples, with `a = log(p / (1 − p))` of the student's largest
    probability p and b the same of the teacher's: 1 if the student grows sure as its teacher does.

    Args:
        student_logits: `[N, K]`.
        teacher_logits: `[N, K]`.

    Returns:
        A float64 scalar; NaN where the teacher's confidence never varies.

    Raises:
        ValueError: If the shapes are wrong or there is no example.

    Example:
        >>> teacher = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 5.0]])
        >>> round(float(confidence_slope(teacher / 2, teacher)), 4)
        0.5

    Reference: Stanton et al., arXiv:2106.05945.
    """
    _check_pair(student_logits, teacher_logits)
    mean = mean_over_rows(_both_log_odds, student_logits, teacher_logits)

    def products(s: Tensor, z: Tensor) -> Tensor:
        student, teacher = (_both_log_odds(s, z) - mean).unbind(dim=1)
        return torch.stack([student * teacher, teacher.square()], dim=1)

    covariance, variance = sum_over_rows(products, student_logits, teacher_logits)
    noise = len(student_logits) * (1e-14 * mean[1]) ** 2
    return torch.where(variance <= noise, torch.nan, covariance / variance)


def topk_overlap(student_logits: Tensor, teacher_logits: Tensor, k: int = 5) -> Tensor:
    """Share of the teacher's k best classes that are among the student's k best.

    `1/N · Σ_i |top_k(s_i) ∩ top_k(z_i)| / k`; of tied classes the first are taken.

    Args:
        student_logits: `[N, K]`.
        teacher_logits: `[N, K]`.
        k: Size of the sets, from 1 to K.

    Returns:
        A float64 scalar in `[0, 1]`.

    Raises:
        ValueError: If shapes or `k` are wrong or there is no example.

    Example:
        >>> student, teacher = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[3.0, 1.0, 2.0]])
        >>> float(topk_overlap(student, teacher, k=2))
        0.5

    Reference: Stanton et al., arXiv:2106.05945.
    """
    _check_pair(student_logits, teacher_logits)
    check_count(k, "k")
    if k > student_logits.shape[1]:
        raise ValueError(f"k must not exceed the {student_logits.shape[1]} classes, but is {k}.")

    def shared(s: Tensor, z: Tensor) -> Tensor:
        return (_first_k_largest(s, k) & _first_k_largest(z, k)).sum()

    total = sum_over_blocks(shared, student_logits, teacher_logits)
    return total / (k * len(student_logits))


class Agreement(SumMetric):
    """`agreement` over batches.

    Args:
        **kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ValueError: If an input of `update(student_logits, teacher_logits)` is wrong.

    Example:
        >>> metric = Agreement()
        >>> metric.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 1.0]]))
        >>> float(metric.compute())
        1.0
    """

    higher_is_better = True
    same: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_sum("same")
        self._add_sum("total")

    def update(self, student_logits: Tensor, teacher_logits: Tensor) -> None:
        """Add logits of both models, `[N, K]` each."""
        _check_pair(student_logits, teacher_logits)
        self.same = self.same + _same_class(student_logits, teacher_logits).sum()
        self.total = self.total + len(student_logits)

    def compute(self) -> Tensor:
        """Return the agreement over everything added; NaN if nothing was."""
        return self.same / self.total


class KLFromTeacher(SumMetric):
    """`kl_from_teacher` over batches.

    Args:
        temperature: T > 0, which divides both.
        **kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ValueError: If `temperature`, or an input of `update(student_logits, teacher_logits)`, is
            wrong.

    Example:
        >>> metric = KLFromTeacher()
        >>> metric.update(torch.zeros(1, 2), torch.tensor([[0.0, 50.0]]))
        >>> round(float(metric.compute()), 4)
        0.6931
    """

    higher_is_better = False
    divergence: Tensor
    total: Tensor

    def __init__(self, temperature: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_temperature(temperature)
        self.temperature = temperature
        # A collection merges metrics of equal states: at zero divergence only this one differs.
        at = torch.tensor(temperature, dtype=torch.float64)
        self.add_state("at", default=at, dist_reduce_fx="mean")
        self._add_sum("divergence")
        self._add_sum("total")

    def update(self, student_logits: Tensor, teacher_logits: Tensor) -> None:
        """Add logits of both models, `[N, K]` each."""
        mean = kl_from_teacher(student_logits, teacher_logits, self.temperature)
        self.divergence = self.divergence + mean * len(student_logits)
        self.total = self.total + len(student_logits)

    def compute(self) -> Tensor:
        """Return the mean divergence over everything added, in nats; NaN if nothing was."""
        return self.divergence / self.total


def _check_pair(student_logits: Tensor, teacher_logits: Tensor) -> None:
    check_scores(student_logits, "student_logits")
    check_scores(teacher_logits, "teacher_logits")
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "student_logits and teacher_logits must have the same shape, not "
            f"{list(student_logits.shape)} and {list(teacher_logits.shape)}."
        )


def _mean_divergence(
    per_row: Callable[[Tensor, Tensor], Tensor],
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
) -> Tensor:
    _check_pair(student_logits, teacher_logits)
    check_temperature(temperature)

    def of_logits(s: Tensor, z: Tensor) -> Tensor:
        return per_row((s / temperature).log_softmax(dim=1), (z / temperature).log_softmax(dim=1))

    return mean_over_rows(of_logits, student_logits, teacher_logits)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    # 0·log 0 is 0; NaN is not 0 and stays visible. Rounding must not make a divergence negative.
    terms = torch.where(p == 0, 0.0, p * (log_p - log_q))
    return terms.sum(dim=1).clamp(min=0)


def _kl_from_teacher(log_s: Tensor, log_z: Tensor) -> Tensor:
    return _kl(log_z, log_s)


def _kl_to_teacher(log_s: Tensor, log_z: Tensor) -> Tensor:
    return _kl(log_s, log_z)


def _jensen_shannon(log_s: Tensor, log_z: Tensor) -> Tensor:
    middle = ((log_s.exp() + log_z.exp()) / 2).log()
    return (_kl(log_s, middle) + _kl(log_z, middle)) / 2


def _total_variation(log_s: Tensor, log_z: Tensor) -> Tensor:
    return (log_s.exp() - log_z.exp()).abs().sum(dim=1) / 2


def _entropy_difference(log_s: Tensor, log_z: Tensor) -> Tensor:
    return (torch.special.entr(log_s.exp()) - torch.special.entr(log_z.exp())).sum(dim=1)


def _same_class(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    return student_logits.argmax(dim=1) == teacher_logits.argmax(dim=1)


def _centred_square(s: Tensor, z: Tensor) -> Tensor:
    difference = s - s.mean(dim=1, keepdim=True) - (z - z.mean(dim=1, keepdim=True))
    return difference.square().mean(dim=1)


def _both_log_odds(s: Tensor, z: Tensor) -> Tensor:
    return torch.stack([_confidence_log_odds(s), _confidence_log_odds(z)], dim=1)


def _confidence_log_odds(logits: Tensor) -> Tensor:
    largest, place = logits.max(dim=1, keepdim=True)
    others = logits.scatter(1, place, -torch.inf)
    return largest.squeeze(1) - others.logsumexp(dim=1)


def _first_k_largest(logits: Tensor, k: int) -> Tensor:
    threshold = logits.topk(k, dim=1).values[:, -1:]
    above, tied = logits > threshold, logits == threshold
    room = k - above.sum(dim=1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=1) <= room))
