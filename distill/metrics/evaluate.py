"""The honest numbers of one model on one split, in one call."""

from __future__ import annotations

from torch import Tensor

from distill.metrics._shared import check_finite, check_logits, check_scores
from distill.metrics.calibration import (
    adaptive_calibration_error,
    brier_score,
    classwise_calibration_error,
    expected_calibration_error,
    negative_log_likelihood,
    smooth_calibration_error,
)
from distill.metrics.fidelity import agreement, kl_from_teacher
from distill.metrics.ranking import mean_reciprocal_rank, topk_accuracy
from distill.metrics.scaling import fit_temperature

Numbers = dict[str, float | str | None]


def evaluate(
    logits: Tensor,
    target: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    topk: tuple[int, ...] = (1, 5),
    bins: int = 15,
    validation: tuple[Tensor, Tensor] | None = None,
) -> Numbers:
    """Measure accuracy, calibration and fidelity of a model from its logits.

    Keys: `top1` and `top{k}` for each k, `nll`, `brier`, `ece`, `classwise_ece`, `adaptive_ece`,
    `smooth_ece`, `mrr`, `temperature_star`, `temperature_status`, `ece_after_scaling`,
    `nll_after_scaling`; with a teacher also `agreement` and `kl_from_teacher` (at T = 1). The
    temperature is fitted on `validation` and applied to `logits`; where no temperature is best
    (status other than "ok") nothing is applied, and the two scaled values are the plain ones.

    Args:
        logits: Scores before the softmax `[N, K]`, of the split to report.
        target: Labels `[N]`.
        teacher_logits: The teacher's scores `[N, K]` on the same examples.
        topk: The k of each top-k accuracy; None is reported where `k > K`.
        bins: Number of bins of the binned calibration errors.
        validation: Logits and labels of the split on which the temperature is fitted; without it
            the four keys about scaling are None.

    Returns:
        Plain Python values: floats, the status as a word, None for what is undefined.

    Raises:
        ValueError: If an argument is wrong, a logit is not finite, or there is no example.

    Example:
        >>> import torch
        >>> numbers = evaluate(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))
        >>> numbers["top1"], numbers["top5"], numbers["mrr"]
        (0.5, None, 0.75)

    Reference: Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599.
    """
    check_logits(logits, target)
    check_finite(logits, "logits")
    classes = logits.shape[1]
    numbers: Numbers = {
        f"top{k}": None if k > classes else float(topk_accuracy(logits, target, k))
        for k in dict.fromkeys((1, *topk))
    }
    numbers |= _calibration(logits, target, bins)
    numbers["mrr"] = float(mean_reciprocal_rank(logits, target))
    numbers |= _after_scaling(logits, target, numbers, bins, validation)
    if teacher_logits is not None:
        check_scores(teacher_logits, "teacher_logits")
        check_finite(teacher_logits, "teacher_logits")
        numbers["agreement"] = float(agreement(logits, teacher_logits))
        numbers["kl_from_teacher"] = float(kl_from_teacher(logits, teacher_logits))
    return numbers


def _probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    return (logits.detach().double() / temperature).softmax(dim=1)


def _calibration(logits: Tensor, target: Tensor, bins: int) -> Numbers:
    probs = _probabilities(logits)
    return {
        "nll": float(negative_log_likelihood(logits, target)),
        "brier": float(brier_score(probs, target)),
        "ece": float(expected_calibration_error(probs, target, bins)),
        "classwise_ece": float(classwise_calibration_error(probs, target, bins)),
        "adaptive_ece": float(adaptive_calibration_error(probs, target, bins)),
        "smooth_ece": float(smooth_calibration_error(probs, target)),
    }


def _after_scaling(
    logits: Tensor,
    target: Tensor,
    plain: Numbers,
    bins: int,
    validation: tuple[Tensor, Tensor] | None,
) -> Numbers:
    temperature, status = None, None
    ece, nll = (None, None) if validation is None else (plain["ece"], plain["nll"])
    if validation is not None:
        _check_validation(validation, logits.shape[1])
        fit = fit_temperature(*validation)
        temperature, status = fit.temperature, fit.status
    if temperature is not None:
        probs = _probabilities(logits, temperature)
        ece = float(expected_calibration_error(probs, target, bins))
        nll = float(negative_log_likelihood(logits.detach().double() / temperature, target))
    return {
        "temperature_star": temperature,
        "temperature_status": status,
        "ece_after_scaling": ece,
        "nll_after_scaling": nll,
    }


def _check_validation(validation: tuple[Tensor, Tensor], classes: int) -> None:
    check_scores(validation[0], "validation logits")
    if validation[0].shape[1] != classes:
        raise ValueError(
            f"validation logits have {validation[0].shape[1]} classes, but logits have {classes}."
        )
