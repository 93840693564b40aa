"""What a model gets right if it may decline to answer where it is unsure.

Confidence is any score `[N]` that ranks the examples, most often the largest probability of a row;
correct says of each example whether the prediction was right. Examples are accepted from the most
confident down, equal confidences together, so the order in which they come never matters.
Everything works in float64 and returns tensors without gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.metrics._shared import check_probabilities


@dataclass(frozen=True, eq=False)
class RiskCoverage:
    """One point for each distinct confidence, from the highest down.

    Attributes:
        coverage: Share of the examples that are accepted, `[G]`, rising to 1.
        risk: Share of errors among the accepted, `[G]`; the last one is that of all examples.
        threshold: The confidence `[G]` that accepted examples reach or exceed, falling.
    """

    coverage: Tensor
    risk: Tensor
    threshold: Tensor


def risk_coverage(confidence: Tensor, correct: Tensor) -> RiskCoverage:
    """Risk among the accepted for every threshold on the confidence.

    With `A_t = {i : c_i ≥ t}` accepted at threshold t, coverage is `|A_t| / N` and risk is
    `Σ_{i ∈ A_t} [i wrong] / |A_t|`, for each distinct t among the confidences.

    Args:
        confidence: Scores `[N]`, larger where the model is surer.
        correct: Whether each prediction is right `[N]`, boolean or 0 and 1.

    Returns:
        A `RiskCoverage` of float64 tensors.

    Raises:
        ValueError: If shapes or values are wrong, or there is no example.

    Example:
        >>> curve = risk_coverage(torch.tensor([0.5, 0.75, 0.5, 1.0]), torch.tensor([0, 1, 1, 1]))
        >>> curve.coverage.tolist(), curve.risk.tolist(), curve.threshold.tolist()
        ([0.25, 0.5, 1.0], [0.0, 0.0, 0.25], [1.0, 0.75, 0.5])

    Reference: Geifman and El-Yaniv, Selective Classification for Deep Neural Networks,
    arXiv:1705.08500.
    """
    threshold, size, errors = _groups(confidence, correct)
    accepted = size.cumsum(0)
    return RiskCoverage(accepted / accepted[-1], errors.cumsum(0) / accepted, threshold)


def area_under_risk_coverage(confidence: Tensor, correct: Tensor) -> Tensor:
    """Mean risk over all numbers of accepted examples (AURC).

    `1/N · Σ_{n=1}^N E[errors among the n most confident] / n`, the expectation over a random order
    within each group of equal confidences: where n ends j examples into a group of m with e errors,
    j·e/m of them are expected. It is exact, and with equal confidences only it is the error rate.

    Args:
        confidence: Scores `[N]`, larger where the model is surer.
        correct: Whether each prediction is right `[N]`, boolean or 0 and 1.

    Returns:
        A float64 scalar in `[0, 1]`.

    Raises:
        ValueError: If shapes or values are wrong, or there is no example.

    Example:
        >>> float(area_under_risk_coverage(torch.tensor([0.9, 0.6]), torch.tensor([1, 0])))
        0.25
        >>> float(area_under_risk_coverage(torch.tensor([0.6, 0.6]), torch.tensor([1, 0])))
        0.5

    Reference: Geifman et al., Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers,
    arXiv:1805.08206.
    """
    expected, _ = _expected_and_fewest_errors(confidence, correct)
    return (expected / _counting(expected)).mean()


def excess_area_under_risk_coverage(confidence: Tensor, correct: Tensor) -> Tensor:
    """How far the ranking is from one that puts every error last (E-AURC).

    `AURC − 1/N · Σ_{n=1}^N max(0, n − R) / n`, R the number of right examples: the AURC of the best
    ranking of the same predictions is taken off, exactly rather than by its limit for large N.

    Args:
        confidence: Scores `[N]`, larger where the model is surer.
        correct: Whether each prediction is right `[N]`, boolean or 0 and 1.

    Returns:
        A float64 scalar in `[0, 1]`, 0 if no error is as sure as a right answer.

    Raises:
        ValueError: If shapes or values are wrong, or there is no example.

    Example:
        >>> confidence, correct = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([1, 0, 0])
        >>> float(excess_area_under_risk_coverage(confidence, correct))
        0.0
        >>> float(excess_area_under_risk_coverage(torch.tensor([0.6, 0.9]), torch.tensor([1, 0])))
        0.5

    Reference: Geifman et al., arXiv:1805.08206.
    """
    expected, fewest = _expected_and_fewest_errors(confidence, correct)
    # No term is negative but by rounding.
    return ((expected - fewest).clamp(min=0) / _counting(expected)).mean()


def accuracy_at_confidence(
    probs: Tensor, target: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    """Accuracy among the examples whose confidence reaches a threshold, and their share.

    `Σ_{i ∈ A} [right] / |A|` and `|A| / N`, with `A = {i : max_k p_ik ≥ threshold}`. The threshold
    is rounded to the type of the probabilities first: 0.9 in float32 reaches 0.9.

    Args:
        probs: Probabilities `[N, K]`.
        target: Labels `[N]`.
        threshold: Least confidence, from 0 to 1.

    Returns:
        Accuracy and coverage, float64 scalars; accuracy is NaN if no example reaches the threshold.

    Raises:
        ValueError: If shapes, values or `threshold` are wrong, or there is no example.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
        >>> accuracy, coverage = accuracy_at_confidence(probs, torch.tensor([0, 1, 1]), 0.8)
        >>> float(accuracy), round(float(coverage), 4)
        (1.0, 0.6667)

    Reference: Geifman and El-Yaniv, arXiv:1705.08500.
    """
    check_probabilities(probs, target)
    _check_share(threshold, "threshold")
    confidence, prediction = probs.detach().max(dim=1)
    accepted = confidence >= confidence.new_tensor(threshold)
    right = (prediction == target) & accepted
    count = accepted.double().sum()
    return right.double().sum() / count, count / len(probs)


def coverage_at_risk(confidence: Tensor, correct: Tensor, risk: float) -> Tensor:
    """Largest share of the examples that can be accepted at no more than a given risk.

    `max {|A_t| / N : risk(A_t) ≤ risk}` over thresholds t, the risk of no example counting as none.
    It is the risk on these examples, not a promise for others.

    Args:
        confidence: Scores `[N]`, larger where the model is surer.
        correct: Whether each prediction is right `[N]`, boolean or 0 and 1.
        risk: Largest share of errors among the accepted, from 0 to 1.

    Returns:
        A float64 scalar in `[0, 1]`; 0 if the surest group already has a larger risk and no larger
        set a smaller one.

    Raises:
        ValueError: If shapes, values or `risk` are wrong, or there is no example.

    Example:
        >>> confidence, correct = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([1, 0, 1, 1])
        >>> float(coverage_at_risk(confidence, correct, risk=0.25))
        1.0
        >>> float(coverage_at_risk(confidence, correct, risk=0.1))
        0.25

    Reference: Geifman and El-Yaniv, arXiv:1705.08500.
    """
    _check_share(risk, "risk")
    curve = risk_coverage(confidence, correct)
    return torch.where(curve.risk <= risk, curve.coverage, 0.0).max()


def _expected_and_fewest_errors(confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """Errors among the n most confident for n = 1 … N: expected, and of the best ranking."""
    _, size, errors = _groups(confidence, correct)
    before, errors_before = size.cumsum(0) - size, errors.cumsum(0) - errors
    group = torch.repeat_interleave(size.long())
    n = _counting(group)
    within = (n - before[group]) * errors[group] / size[group]
    return errors_before[group] + within, (n - (len(n) - errors.sum())).clamp(min=0)


def _counting(values: Tensor) -> Tensor:
    return torch.arange(1, len(values) + 1, dtype=torch.float64, device=values.device)


def _groups(confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Confidence, size and errors of each group of equal confidences, the surest first."""
    _check_ranking(confidence, correct)
    values, group = torch.unique(confidence.detach().double(), return_inverse=True)
    wrong = 1 - correct.detach().double()
    size = torch.zeros_like(values).index_add_(0, group, torch.ones_like(wrong))
    errors = torch.zeros_like(values).index_add_(0, group, wrong)
    return values.flip(0), size.flip(0), errors.flip(0)


def _check_ranking(confidence: Tensor, correct: Tensor) -> None:
    if confidence.ndim != 1 or not confidence.is_floating_point():
        raise ValueError(
            f"confidence must be floating point of shape [N], not {confidence.dtype} of shape "
            f"{list(confidence.shape)}."
        )
    if len(confidence) == 0:
        raise ValueError("confidence is empty: there is no example to measure.")
    if confidence.isnan().any():
        raise ValueError(f"confidence holds NaN in {int(confidence.isnan().sum())} places.")
    if correct.shape != confidence.shape:
        raise ValueError(
            f"correct must have shape {list(confidence.shape)}, not {list(correct.shape)}."
        )
    if not bool(((correct == 0) | (correct == 1)).all()):
        raise ValueError("correct must be true or false (1 or 0) for each example.")


def _check_share(value: float, name: str) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in 0 … 1, not {value}.")
