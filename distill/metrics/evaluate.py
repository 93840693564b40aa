"""The honest numbers of one model on one split, in one call."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distill.metrics._shared import check_finite, check_logits, check_scores
from distill.metrics.calibration import (
    _confidence_and_hits,
    _squared_distance,
    _surprise,
    adaptive_calibration_error,
    brier_decomposition,
    brier_score,
    classwise_calibration_error,
    expected_calibration_error,
    negative_log_likelihood,
    smooth_calibration_error,
)
from distill.metrics.classes import (
    balanced_accuracy,
    favourite,
    macro_f1,
    per_class_recall,
    recall_by_shots,
)
from distill.metrics.decisions import anticipated_cost, cost_optimal_decision, expected_cost
from distill.metrics.fidelity import (
    agreement,
    agreement_where_teacher_wrong,
    centred_logit_mse,
    confidence_slope,
    entropy_gap,
    jensen_shannon,
    kl_from_teacher,
    kl_to_teacher,
    topk_overlap,
    total_variation,
)
from distill.metrics.intervals import (
    LEVEL,
    RESAMPLES,
    Interval,
    Statistic,
    balanced_interval,
    balanced_paired_interval,
    bootstrap,
    bootstrap_interval,
    calibration_statistic,
    mcnemar_p,
    mean_statistic,
    paired_interval,
    wilson_interval,
)
from distill.metrics.ranking import (
    auroc,
    log_odds,
    mean_reciprocal_rank,
    rank_of_label,
    topk_accuracy,
)
from distill.metrics.scaling import VectorScaling, fit_temperature
from distill.metrics.selective import (
    accuracy_at_confidence,
    area_under_risk_coverage,
    excess_area_under_risk_coverage,
)

Numbers = dict[str, float | str | None]
LARGEST = {"nll": math.inf, "brier": 2.0, "ece": 1.0}  # of what is resampled


def evaluate(
    logits: Tensor,
    target: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    topk: tuple[int, ...] = (1, 5),
    bins: int = 15,
    validation: tuple[Tensor, Tensor] | None = None,
    confidence: float = 0.9,
    temperature: float | None = None,
) -> Numbers:
    """Measure accuracy, calibration, selective prediction and fidelity of a model from its logits.

    Keys: `top1` and `top{k}` for each k; `nll`, `brier` and its parts `brier_reliability`,
    `brier_resolution`, `brier_uncertainty`, `brier_within`; `ece`, `rmsce`, `mce`, `classwise_ece`,
    `adaptive_ece`, `smooth_ece`; `mrr`; `auroc` (one class against the rest, by log-odds);
    `error_auroc` (does confidence tell right from wrong), `aurc`, `excess_aurc`,
    `accuracy_when_sure` and `coverage_when_sure` (among answers of at least `confidence`);
    `temperature_star`, `temperature_status`, and `ece`, `nll`, `brier`, `accuracy_when_sure`,
    `coverage_when_sure` with `_after_scaling`; with a teacher every function of
    `distill.metrics.fidelity` by its name, at T = 1. The temperature is fitted on `validation` and
    applied to `logits`; where no temperature is best (status other than "ok") nothing is applied,
    and the scaled values are the plain ones.

    Args:
        logits: Scores before the softmax `[N, K]`, of the split to report.
        target: Labels `[N]`.
        teacher_logits: The teacher's scores `[N, K]` on the same examples.
        topk: The k of each top-k accuracy; None is reported where `k > K`.
        bins: Number of bins of the binned calibration errors.
        validation: Logits and labels of the split on which the temperature is fitted; without it
            the keys about scaling are None.
        confidence: From which probability on an answer counts as sure.
        temperature: One that was fitted elsewhere, which is applied in the place of a fit; its
            status is "given".

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
        f"top{k}": None if k > classes else _number(topk_accuracy(logits, target, k))
        for k in dict.fromkeys((1, *topk))
    }
    plain = _of_probabilities(logits, target, 1.0, bins, confidence)
    numbers |= plain | _of_order(logits, target) | _of_bins(logits, target, bins)
    if temperature is None:
        numbers |= _after_scaling(logits, target, plain, bins, confidence, validation)
    else:
        scaled = _of_probabilities(logits, target, temperature, bins, confidence)
        numbers |= _scaled(temperature, "given", scaled)
    if teacher_logits is not None:
        numbers |= _fidelity(logits, teacher_logits, target)
    return numbers


def vector_numbers(fit: VectorScaling, logits: Tensor, target: Tensor, bins: int = 15) -> Numbers:
    """Return what vector scaling makes of a model: `vector_status`, and scores after it.

    Args:
        fit: what `fit_vector_scaling` found on validation.
        logits: Scores `[N, K]` of the split to report.
        target: Labels `[N]`.
        bins: Number of bins of the calibration error.
    """
    scaled = fit.apply(logits.detach().double())
    return {
        "vector_status": fit.status,
        "top1_after_vector": _number(topk_accuracy(scaled, target, 1)),
        "nll_after_vector": _number(negative_log_likelihood(scaled, target)),
        "ece_after_vector": _number(expected_calibration_error(scaled.softmax(1), target, bins)),
    }


def cost_numbers(
    logits: Tensor, target: Tensor, costs: Tensor, temperature: float | None
) -> Numbers:
    """Return what a model's decisions cost on average, by how they are made.

    `cost_of_argmax` names the likeliest class; `cost` decides by what the probabilities expect to
    cost least, `cost_after_scaling` by calibrated ones; `cost_anticipated` and
    `cost_anticipated_after_scaling` are what the two expected to pay.

    Args:
        logits: Scores `[N, K]`.
        target: Labels `[N]`.
        costs: `[K, D]`, row: true class, column: decision.
        temperature: fitted on validation, or None to apply none.
    """
    numbers: Numbers = {"cost_of_argmax": _number(expected_cost(logits.argmax(1), target, costs))}
    for suffix, divisor in (("", 1.0), ("_after_scaling", temperature or 1.0)):
        probs = _probabilities(logits, divisor)
        decision = cost_optimal_decision(probs, costs)
        numbers[f"cost{suffix}"] = _number(expected_cost(decision, target, costs))
        anticipated = anticipated_cost(probs, decision, costs)
        numbers[f"cost_anticipated{suffix}"] = _number(anticipated)
    return numbers


def class_numbers(
    logits: Tensor, target: Tensor, class_counts: Sequence[float], shots: Sequence[int]
) -> dict[str, Any]:
    """Return how the classes fare: `balanced_accuracy`, `macro_f1`, `recall` `[K]`, its means.

    `recall_many`, `recall_medium` and `recall_few` are means over classes by their training
    examples; see `recall_by_shots`. `favourite` has `label`, `share` and `share_of_others` of the
    label that is named most often. What is undefined is None.

    Args:
        logits: Scores `[N, K]`.
        target: Labels `[N]`.
        class_counts: training examples of each class, `[K]`.
        shots: below which a class is few-shot, and above which it is many-shot.
    """
    answers, classes = logits.argmax(dim=1), logits.shape[1]
    recall = per_class_recall(answers, target, classes)
    by_shots = recall_by_shots(recall, class_counts, *shots)
    label, *shares = favourite(answers, target, classes)
    fractions = dict(zip(("share", "share_of_others"), map(_number, shares), strict=True))
    return {
        "balanced_accuracy": _number(balanced_accuracy(answers, target, classes)),
        "macro_f1": _number(macro_f1(answers, target, classes)),
        "favourite": {"label": label, **fractions},
        "recall": [_number(value) for value in recall],
        **{f"recall_{name}": _number(value) for name, value in by_shots.items()},
    }


def uncertainty(
    logits: Mapping[str, Tensor],
    target: Tensor,
    versus: Iterable[str] = (),
    *,
    topk: Sequence[int] = (1, 5),
    bins: int = 15,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return intervals for the numbers of models, and how the first compares with others.

    Top-k accuracies have Wilson's interval, their differences Bonett and Price's for pairs;
    `balanced_accuracy` has what follows from the variances of the classes. None of these shrinks
    to a point where a model is always right, as a bootstrap does. `nll`, `brier`, `ece` and their
    differences have that of a bootstrap over the examples, whose draws all models share. All of
    it is about which examples were drawn, with the models as they are.

    Args:
        logits: model → scores `[N, K]` on the same examples.
        target: Labels `[N]`.
        versus: the models that the first one is compared with.
        topk: the k of each top-k accuracy.
        bins: Number of bins of the calibration error.
        level: how often intervals hold what they are for.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        Model → number → `(low, high)`, None where there is none (of a single example). And other
        model → `images`, `only_first` and `only_second` (how many one alone gets right),
        `mcnemar_p`, `differences` (number → `value` and `interval`, first less other), and a
        `verdict` on top-1: `better` or `worse`, where interval and test agree that there is a
        difference, or `undecided`.

    Raises:
        ValueError: If an argument is wrong, or there is no example.

    Example:
        >>> logits = torch.eye(2)[[0, 1, 1, 0]]
        >>> found, against = uncertainty({"a": logits, "b": -logits}, logits.argmax(1), ["b"])
        >>> [round(end, 2) for end in found["a"]["top1"]], against["b"]["mcnemar_p"]
        ([0.51, 1.0], 0.125)
    """
    first, *_ = logits
    examples, classes = len(target), logits[first].shape[1]
    ks = [k for k in dict.fromkeys((1, *topk)) if k <= classes]
    right = {name: _right(scores, target, ks) for name, scores in logits.items()}
    statistics = {
        f"{name}/{key}": statistic
        for name, scores in logits.items()
        for key, statistic in _statistics(scores, target, bins).items()
    }
    drawn = bootstrap(statistics, examples, resamples, seed)
    whole = {at: float(one(torch.ones(1, examples).double())) for at, one in statistics.items()}

    def of(name: str) -> dict[str, Any]:
        hits = right[name]
        intervals: dict[str, Any] = {
            f"top{k}": wilson_interval(int(hits[k].sum()), examples, level) for k in ks
        }
        intervals["balanced_accuracy"] = _balanced(hits[1], target, classes, level)
        for key, largest in LARGEST.items():
            at = f"{name}/{key}"
            ends = bootstrap_interval(whole[at], drawn[at], examples, level)
            intervals[key] = ends and Interval(max(ends.low, 0.0), min(ends.high, largest))
        return intervals

    def against(other: str) -> dict[str, Any]:
        hits, theirs = right[first], right[other]
        paired = {f"top{k}": _paired(hits[k], theirs[k], level) for k in ks}
        paired["balanced_accuracy"] = _balanced_pair(hits[1], theirs[1], target, classes, level)
        for key in LARGEST:
            one, two = f"{first}/{key}", f"{other}/{key}"
            value = whole[one] - whole[two]
            ends = bootstrap_interval(value, drawn[one] - drawn[two], examples, level)
            paired[key] = {"value": value, "interval": ends}
        return _compared(hits[1], theirs[1], paired, level)

    return {name: of(name) for name in logits}, {name: against(name) for name in versus}


def _right(logits: Tensor, target: Tensor, ks: Sequence[int]) -> dict[int, Tensor]:
    check_logits(logits, target)
    rank = rank_of_label(logits, target)
    return {k: rank <= k for k in ks}


def _statistics(logits: Tensor, target: Tensor, bins: int) -> dict[str, Statistic]:
    probs = _probabilities(logits)
    return {
        "nll": mean_statistic(_surprise(logits.detach().double(), target)),
        "brier": mean_statistic(_squared_distance(probs, target)),
        "ece": calibration_statistic(*_confidence_and_hits(probs, target), bins),
    }


def _by_class(events: Tensor, target: Tensor, classes: int) -> list[int]:
    return torch.bincount(target[events].long(), minlength=classes).tolist()


def _all_by_class(target: Tensor, classes: int) -> list[int]:
    return torch.bincount(target.long(), minlength=classes).tolist()


def _balanced(right: Tensor, target: Tensor, classes: int, level: float) -> Interval:
    counts = zip(_by_class(right, target, classes), _all_by_class(target, classes), strict=True)
    hits, there = zip(*((hit, n) for hit, n in counts if n), strict=True)
    return balanced_interval(hits, there, level)


def _balanced_pair(
    first: Tensor, second: Tensor, target: Tensor, classes: int, level: float
) -> dict[str, Any]:
    alone = (
        _by_class(first & ~second, target, classes),
        _by_class(second & ~first, target, classes),
    )
    counts = zip(*alone, _all_by_class(target, classes), strict=True)
    ours, theirs, there = zip(*((b, c, n) for b, c, n in counts if n), strict=True)
    values = [(b - c) / n for b, c, n in zip(ours, theirs, there, strict=True)]
    ends = balanced_paired_interval(ours, theirs, there, level)
    return {"value": math.fsum(values) / len(values), "interval": ends}


def _apart(first: Tensor, second: Tensor) -> tuple[int, int]:
    return int((first & ~second).sum()), int((second & ~first).sum())


def _paired(first: Tensor, second: Tensor, level: float) -> dict[str, Any]:
    alone = _apart(first, second)
    value = (alone[0] - alone[1]) / len(first)
    return {"value": value, "interval": paired_interval(*alone, len(first), level)}


def _compared(
    first: Tensor, second: Tensor, differences: dict[str, Any], level: float
) -> dict[str, Any]:
    alone = _apart(first, second)
    p, (low, high) = mcnemar_p(*alone), differences["top1"]["interval"]
    decided = p < 1 - level and not low <= 0 <= high
    return {
        "images": len(first),
        "only_first": alone[0],
        "only_second": alone[1],
        "mcnemar_p": p,
        "differences": differences,
        "verdict": ("better" if alone[0] > alone[1] else "worse") if decided else "undecided",
    }


def _number(value: Tensor | float) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    return (logits.detach().double() / temperature).softmax(dim=1)


def _of_probabilities(
    logits: Tensor, target: Tensor, temperature: float, bins: int, confidence: float
) -> Numbers:
    """Return what a temperature changes, and is reported before and after it."""
    probs = _probabilities(logits, temperature)
    accuracy, coverage = accuracy_at_confidence(probs, target, confidence)
    scaled = logits.detach().double() / temperature
    return {
        "nll": _number(negative_log_likelihood(scaled, target)),
        "brier": _number(brier_score(probs, target)),
        "ece": _number(expected_calibration_error(probs, target, bins)),
        "accuracy_when_sure": _number(accuracy),
        "coverage_when_sure": _number(coverage),
    }


def _of_bins(logits: Tensor, target: Tensor, bins: int) -> Numbers:
    probs = _probabilities(logits)
    parts = brier_decomposition(probs, target, bins)
    return {
        "rmsce": _number(expected_calibration_error(probs, target, bins, "l2")),
        "mce": _number(expected_calibration_error(probs, target, bins, "max")),
        "classwise_ece": _number(classwise_calibration_error(probs, target, bins)),
        "adaptive_ece": _number(adaptive_calibration_error(probs, target, bins)),
        "smooth_ece": _number(smooth_calibration_error(probs, target)),
        "brier_reliability": _number(parts.reliability),
        "brier_resolution": _number(parts.resolution),
        "brier_uncertainty": _number(parts.uncertainty),
        "brier_within": _number(parts.within),
    }


def _of_order(logits: Tensor, target: Tensor) -> Numbers:
    correct = logits.argmax(dim=1) == target
    # As log-odds: probabilities close to one would be rounded into ties.
    odds = log_odds(logits)
    confidence = odds.amax(dim=1)
    return {
        "mrr": _number(mean_reciprocal_rank(logits, target)),
        "auroc": _number(auroc(odds, target)),
        "error_auroc": _number(auroc(confidence, correct.long())),
        "aurc": _number(area_under_risk_coverage(confidence, correct)),
        "excess_aurc": _number(excess_area_under_risk_coverage(confidence, correct)),
    }


def _after_scaling(
    logits: Tensor,
    target: Tensor,
    plain: Mapping[str, float | str | None],
    bins: int,
    confidence: float,
    validation: tuple[Tensor, Tensor] | None,
) -> Numbers:
    if validation is None:
        absent = ("temperature_star", "temperature_status", *(f"{k}_after_scaling" for k in plain))
        return dict.fromkeys(absent)
    _check_validation(validation, logits.shape[1])
    fit = fit_temperature(*validation)
    scaled = dict(plain)
    if fit.temperature is not None:
        scaled = _of_probabilities(logits, target, fit.temperature, bins, confidence)
    return _scaled(fit.temperature, fit.status, scaled)


def _scaled(temperature: float | None, status: str, scaled: Numbers) -> Numbers:
    return {
        "temperature_star": temperature,
        "temperature_status": status,
        **{f"{key}_after_scaling": value for key, value in scaled.items()},
    }


def _fidelity(logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Numbers:
    check_scores(teacher_logits, "teacher_logits")
    check_finite(teacher_logits, "teacher_logits")
    wrong = agreement_where_teacher_wrong(logits, teacher_logits, target)
    functions = (
        agreement,
        kl_from_teacher,
        kl_to_teacher,
        jensen_shannon,
        total_variation,
        centred_logit_mse,
        entropy_gap,
        confidence_slope,
    )
    of_pair = {f.__name__: _number(f(logits, teacher_logits)) for f in functions}
    overlap = topk_overlap(logits, teacher_logits, min(5, logits.shape[1] - 1))
    return {
        **of_pair,
        "agreement_where_teacher_wrong": _number(wrong),
        "topk_overlap": _number(overlap),
    }


def _check_validation(validation: tuple[Tensor, Tensor], classes: int) -> None:
    check_scores(validation[0], "validation logits")
    if validation[0].shape[1] != classes:
        raise ValueError(
            f"validation logits have {validation[0].shape[1]} classes, but logits have {classes}."
        )
