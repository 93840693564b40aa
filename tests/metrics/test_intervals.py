"""Intervals and tests: against scipy, exact enumeration, and how often they hold the truth."""

import doctest
import importlib
import math
from itertools import product

import pytest
import torch
from scipy.stats import binom, binomtest

from distill.metrics import (
    balanced_accuracy,
    balanced_interval,
    balanced_paired_interval,
    bootstrap,
    bootstrap_interval,
    calibration_statistic,
    evaluate,
    expected_calibration_error,
    mcnemar_p,
    mean_statistic,
    paired_interval,
    uncertainty,
    wilson_interval,
)


@pytest.mark.parametrize(("hits", "trials"), [(0, 1), (1, 1), (0, 2), (2, 2), (3, 7), (780, 800)])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_wilson_is_that_of_scipy(hits, trials, level):
    expected = binomtest(hits, trials).proportion_ci(level, method="wilson")
    assert wilson_interval(hits, trials, level) == pytest.approx(expected, abs=1e-12)


def test_wilson_holds_the_truth_about_as_often_as_it_says():
    for truth in (0.5, 0.9, 0.97):
        held = sum(
            binom.pmf(hits, 200, truth)
            for hits in range(201)
            if wilson_interval(hits, 200).low <= truth <= wilson_interval(hits, 200).high
        )
        assert 0.93 < held < 0.98


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (1, 7), (12, 12), (30, 11), (1200, 1100)])
def test_mcnemar_is_a_binomial_test_of_who_is_right_alone(b, c):
    expected = binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar_p(b, c) == mcnemar_p(c, b) == pytest.approx(expected, rel=1e-9)


def test_a_paired_interval_holds_the_truth_about_as_often_as_it_says():
    trials, only_first, only_second = 40, 0.15, 0.05
    held = total = 0.0
    for b, c in product(range(trials + 1), repeat=2):
        if b + c > trials:
            continue
        ways = math.comb(trials, b) * math.comb(trials - b, c)
        both = (1 - only_first - only_second) ** (trials - b - c)
        chance = ways * only_first**b * only_second**c * both
        low, high = paired_interval(b, c, trials)
        total += chance
        held += chance * (low <= only_first - only_second <= high)
    assert total == pytest.approx(1)
    assert 0.93 < held < 0.98


def test_a_paired_interval_turns_with_its_sides_and_has_a_width_where_nothing_differs():
    low, high = paired_interval(9, 2, 100)
    assert paired_interval(2, 9, 100) == pytest.approx((-high, -low))
    low, high = paired_interval(0, 0, 100)
    assert low == -high < 0
    assert paired_interval(2, 0, 2).high == 1.0


@pytest.mark.parametrize(
    ("classes", "count", "truth"), [(10, 80, 0.97), (3, 30, 0.8), (10, 10, 0.9)]
)
def test_a_balanced_interval_holds_the_truth_about_as_often_as_it_says(classes, count, truth):
    generator = torch.Generator().manual_seed(classes * count)
    hits = (torch.rand(600, classes, count, generator=generator) < truth).sum(2).tolist()
    ends = [balanced_interval(one, [count] * classes) for one in hits]
    held = sum(low <= truth <= high for low, high in ends) / 600
    assert 0.905 < held < 0.985


def test_a_balanced_difference_holds_the_truth_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(600, 5, 60, generator=generator)
    ours, theirs = (drawn < 0.1).sum(2).tolist(), (drawn > 0.95).sum(2).tolist()
    ends = [balanced_paired_interval(b, c, [60] * 5) for b, c in zip(ours, theirs, strict=True)]
    held = sum(low <= 0.1 - 0.05 <= high for low, high in ends) / 600
    assert 0.92 < held < 0.985


def test_of_one_class_a_balanced_interval_is_the_plain_one_about_the_estimate():
    low, high = balanced_interval([70], [100])
    one = wilson_interval(70, 100)
    assert (low + high) / 2 == pytest.approx(0.7)
    assert high - low == pytest.approx(one.high - one.low, rel=0.03)
    low, high = balanced_paired_interval([9], [2], [100])
    one = paired_interval(9, 2, 100)
    assert (low + high) / 2 == pytest.approx(0.07)
    assert high - low == pytest.approx(one.high - one.low, rel=0.02)


def test_rare_classes_make_a_balanced_interval_wide_and_perfect_ones_leave_it_a_width():
    even, rare = balanced_interval([95, 95], [100, 100]), balanced_interval([186, 4], [195, 5])
    assert rare.high - rare.low > 2 * (even.high - even.low)
    assert balanced_interval([5] * 4, [5] * 4).low < 0.97
    assert balanced_interval([5] * 4, [5] * 4).high == 1


def test_resampled_values_are_those_of_the_data_sets_they_stand_for():
    values = torch.arange(7).double()
    seen = []

    def statistic(weights):
        assert weights.sum(dim=1).tolist() == [7.0] * len(weights)
        seen.append(weights)
        return mean_statistic(values)(weights)

    found = bootstrap({"mean": statistic}, 7, resamples=50, seed=3)["mean"]
    again = bootstrap({"mean": mean_statistic(values)}, 7, resamples=50, seed=3)["mean"]
    other = bootstrap({"mean": mean_statistic(values)}, 7, resamples=50, seed=4)["mean"]
    assert torch.equal(found, again)
    assert not torch.equal(found, other)
    counts = torch.cat(seen).long()
    drawn = [values.repeat_interleave(row).mean().item() for row in counts]
    assert found.tolist() == pytest.approx(drawn)


def test_a_resampled_calibration_error_is_that_of_the_resampled_examples():
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(60, 4, generator=generator).double().mul(2).softmax(1)
    target = torch.randint(0, 4, (60,), generator=generator)
    confidence, answers = probs.max(1)
    statistic = calibration_statistic(confidence, answers == target, bins=7)
    rows = torch.randint(0, 60, (60,), generator=generator)
    weights = torch.bincount(rows, minlength=60)[None]
    expected = expected_calibration_error(probs[rows], target[rows], 7)
    assert statistic(weights.double()).item() == pytest.approx(expected.item())


def test_a_bootstrap_of_a_mean_is_the_normal_interval_of_many_examples():
    values = torch.rand(4000, generator=torch.Generator().manual_seed(1)).double()
    drawn = bootstrap({"mean": mean_statistic(values)}, 4000)["mean"]
    low, high = bootstrap_interval(values.mean().item(), drawn, 4000)
    half = 1.96 * values.std().item() / math.sqrt(4000)
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    assert (high + low) / 2 == pytest.approx(values.mean().item(), abs=half / 5)


def test_a_bootstrap_holds_the_truth_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(2)
    held = 0
    for seed in range(200):
        values = -torch.rand(50, generator=generator).double().log()  # of mean 1, and skewed
        drawn = bootstrap({"mean": mean_statistic(values)}, 50, resamples=400, seed=seed)["mean"]
        low, high = bootstrap_interval(values.mean().item(), drawn, 50)
        held += low <= 1 <= high
    assert 0.88 < held / 200 < 0.98


def models(count=300, classes=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, classes, (count,), generator=generator)
    truth = torch.nn.functional.one_hot(target, classes)
    return {
        name: torch.randn(count, classes, generator=generator) + skill * truth
        for name, skill in (("student", 2.5), ("baseline", 1.0), ("teacher", 2.6))
    }, target


def test_every_number_lies_in_its_interval():
    logits, target = models()
    intervals, _ = uncertainty(logits, target)
    for name, scores in logits.items():
        numbers = evaluate(scores, target)
        numbers["balanced_accuracy"] = balanced_accuracy(scores.argmax(1), target, 6).item()
        for key, (low, high) in intervals[name].items():
            assert low < numbers[key] <= high, (name, key)


def test_differences_are_those_of_the_numbers_and_turn_with_the_sides():
    logits, target = models()
    _, against = uncertainty(logits, target, ["baseline", "teacher"])
    turned = {name: logits[name] for name in ("baseline", "student")}
    _, back = uncertainty(turned, target, ["student"])
    one, other = evaluate(logits["student"], target), evaluate(logits["baseline"], target)
    found = against["baseline"]
    for key in ("top1", "top5", "nll", "brier", "ece"):
        difference = found["differences"][key]
        assert difference["value"] == pytest.approx(one[key] - other[key])
        assert back["student"]["differences"][key]["value"] == pytest.approx(-difference["value"])
        low, high = difference["interval"]
        assert low < difference["value"] < high
    assert (found["only_first"] - found["only_second"]) / 300 == pytest.approx(
        one["top1"] - other["top1"]
    )
    assert (found["verdict"], back["student"]["verdict"]) == ("better", "worse")
    assert against["teacher"]["verdict"] == "undecided"
    assert found["images"] == 300


def test_the_same_model_cannot_be_told_from_itself():
    logits, target = models(count=40)
    _, against = uncertainty({"a": logits["student"], "b": logits["student"]}, target, ["b"])
    assert against["b"]["verdict"] == "undecided"
    assert against["b"]["mcnemar_p"] == 1
    assert against["b"]["differences"]["nll"]["interval"] == (0, 0)  # it is the same model
    low, high = against["b"]["differences"]["top1"]["interval"]
    assert low < 0 < high


def test_a_test_of_two_models_alike_is_rarely_wrong():
    wrong = 0
    for seed in range(150):
        generator = torch.Generator().manual_seed(seed)
        target = torch.randint(0, 2, (60,), generator=generator)
        truth = torch.nn.functional.one_hot(target, 2)
        logits = {n: torch.randn(60, 2, generator=generator) + truth for n in "ab"}
        wrong += uncertainty(logits, target, "b", resamples=2)[1]["b"]["verdict"] != "undecided"
    assert wrong / 150 < 0.06


@pytest.mark.parametrize("count", [1, 2])
def test_few_and_perfect_examples_have_wide_intervals_and_never_false_certainty(count):
    logits = 9 * torch.eye(3)[:count]
    target = torch.arange(count)
    intervals, against = uncertainty({"a": logits, "b": -logits}, target, ["b"])
    for name in ("top1", "balanced_accuracy"):
        low, high = intervals["a"][name]
        assert low < 0.6
        assert high == 1
    assert against["b"]["verdict"] == "undecided"
    assert (intervals["a"]["nll"] is None) == (count == 1)
    assert "top5" not in intervals["a"]  # of three classes


def test_the_order_of_models_changes_no_interval():
    logits, target = models(count=50)
    forward, _ = uncertainty(logits, target)
    backward, _ = uncertainty(dict(reversed(logits.items())), target)
    assert forward == backward


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson_interval(3, 2), "0 … 2, not 3"),
        (lambda: wilson_interval(0, 0), "trials must be an integer of at least 1"),
        (lambda: wilson_interval(1, 2, level=1.0), "level must lie between 0 and 1"),
        (lambda: paired_interval(2, 1, 2), r"2 \+ 1 of 2 trials"),
        (lambda: mcnemar_p(-1, 2), "only_first must be an integer of at least 0"),
        (lambda: balanced_interval([], []), "number of classes"),
        (lambda: balanced_interval([3], [2]), "0 … 2, not 3"),
        (lambda: balanced_paired_interval([2], [1], [2]), r"2 \+ 1 of 2 trials"),
        (lambda: bootstrap({}, 0), "examples must be an integer"),
        (lambda: bootstrap_interval(0.0, torch.zeros(3), 3, 0.0), "level"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_examples_in_the_docstrings_run():
    for name in ("distill.metrics.intervals", "distill.metrics.evaluate"):
        result = doctest.testmod(importlib.import_module(name))
        assert result.attempted > 0
        assert result.failed == 0
