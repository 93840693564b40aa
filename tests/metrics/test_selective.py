"""Selective prediction against the definitions, term by term, and over all orders of ties."""

import doctest
import importlib
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.metrics.selective import (
    accuracy_at_confidence,
    area_under_risk_coverage,
    coverage_at_risk,
    excess_area_under_risk_coverage,
    risk_coverage,
)


@st.composite
def rankings(draw, most=12, levels=5):
    """Confidences from a few levels, so that ties are common, and what was right."""
    rows = draw(st.integers(1, most))
    level = st.integers(0, levels - 1).map(lambda k: k / levels)
    confidence = draw(st.lists(level, min_size=rows, max_size=rows))
    correct = draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    return torch.tensor(confidence, dtype=torch.float64), torch.tensor(correct)


def area_of_order(correct):
    errors = 0
    risks = []
    for n, right in enumerate(correct, start=1):
        errors += not right
        risks.append(errors / n)
    return sum(risks) / len(risks)


def area_by_definition(confidence, correct):
    """The mean area over every order of the examples that never puts a less sure one first."""
    pairs = list(zip(confidence.tolist(), correct.tolist(), strict=True))
    areas = [
        area_of_order([right for _, right in order])
        for order in itertools.permutations(pairs)
        if all(a[0] >= b[0] for a, b in itertools.pairwise(order))
    ]
    return sum(areas) / len(areas)


@settings(deadline=None)
@given(rankings())
def test_the_curve_is_its_definition(ranking):
    confidence, correct = ranking
    curve = risk_coverage(confidence, correct)
    assert curve.threshold.tolist() == sorted(set(confidence.tolist()), reverse=True)
    points = zip(curve.threshold, curve.coverage, curve.risk, strict=True)
    for threshold, coverage, risk in points:
        accepted = confidence >= threshold
        assert float(coverage) == int(accepted.sum()) / len(confidence)
        assert float(risk) == int((~correct[accepted]).sum()) / int(accepted.sum())
    assert float(curve.coverage[-1]) == 1
    assert float(curve.risk[-1]) == pytest.approx(1 - float(correct.double().mean()))


@settings(deadline=None, max_examples=60)
@given(rankings(most=6, levels=3))
def test_the_area_is_the_mean_over_the_orders_of_ties(ranking):
    area = float(area_under_risk_coverage(*ranking))
    assert area == pytest.approx(area_by_definition(*ranking), abs=1e-13)


@settings(deadline=None)
@given(rankings(most=7))
def test_the_excess_is_over_the_best_of_all_rankings(ranking):
    confidence, correct = ranking
    best = min(map(area_of_order, set(itertools.permutations(correct.tolist()))))
    excess = float(excess_area_under_risk_coverage(confidence, correct))
    assert excess == pytest.approx(float(area_under_risk_coverage(*ranking)) - best, abs=1e-13)
    assert 0 <= excess <= float(area_under_risk_coverage(*ranking)) <= 1
    perfect = excess_area_under_risk_coverage(correct.double(), correct)
    assert float(perfect) == 0


@given(rankings(), st.randoms(use_true_random=False))
def test_no_value_depends_on_the_order(ranking, random):
    confidence, correct = ranking
    order = list(range(len(confidence)))
    random.shuffle(order)
    shuffled = confidence[order], correct[order]
    assert area_under_risk_coverage(*shuffled) == area_under_risk_coverage(*ranking)
    assert excess_area_under_risk_coverage(*shuffled) == excess_area_under_risk_coverage(*ranking)
    assert torch.equal(risk_coverage(*shuffled).risk, risk_coverage(*ranking).risk)


@given(rankings())
def test_only_the_ranking_counts(ranking):
    confidence, correct = ranking
    assert area_under_risk_coverage(confidence.logit(), correct) == area_under_risk_coverage(
        confidence, correct
    )


@given(rankings(), st.integers(0, 10).map(lambda k: k / 10))
def test_coverage_at_risk_is_the_last_point_within(ranking, risk):
    confidence, correct = ranking
    within = [0.0]
    for threshold in confidence.unique():
        accepted = confidence >= threshold
        if int((~correct[accepted]).sum()) * 10 <= round(10 * risk) * int(accepted.sum()):
            within.append(int(accepted.sum()) / len(confidence))
    assert float(coverage_at_risk(confidence, correct, risk)) == max(within)


def test_all_ties_give_the_error_rate_and_two_examples_by_hand():
    correct = torch.tensor([1, 0, 1, 1, 0])
    assert float(area_under_risk_coverage(torch.ones(5), correct)) == pytest.approx(0.4)
    confidence = torch.tensor([0.9, 0.1])
    assert float(area_under_risk_coverage(confidence, torch.tensor([1, 0]))) == 0.25
    assert float(area_under_risk_coverage(confidence, torch.tensor([0, 1]))) == 0.75
    assert float(excess_area_under_risk_coverage(confidence, torch.tensor([0, 1]))) == 0.5
    assert float(excess_area_under_risk_coverage(confidence, torch.tensor([0, 0]))) == 0


def test_the_best_area_tends_to_the_published_limit():
    rows, error_rate = 200_000, 0.2
    correct = torch.arange(rows) >= error_rate * rows
    best = area_under_risk_coverage(correct.double(), correct)
    # Both groups are tied inside; the optimum is the same with or without ties.
    limit = error_rate + (1 - error_rate) * math.log(1 - error_rate)
    assert float(best) == pytest.approx(limit, abs=1e-5)


def test_accuracy_at_confidence():
    probs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.5, 0.5]])
    target = torch.tensor([0, 0, 0, 0])
    for threshold, accuracy, coverage in [
        (0.0, 3 / 4, 1.0),
        (0.5, 3 / 4, 1.0),
        (0.6, 2 / 3, 0.75),
        (0.8, 1 / 2, 0.5),
        (0.9, 1.0, 0.25),
    ]:
        got = accuracy_at_confidence(probs, target, threshold)
        assert tuple(map(float, got)) == pytest.approx((accuracy, coverage))
        assert {value.dtype for value in got} == {torch.float64}
    accuracy, coverage = accuracy_at_confidence(probs, target, 0.95)
    assert math.isnan(accuracy)
    assert coverage == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_threshold_is_reached_in_every_precision(dtype):
    probs = torch.tensor([[0.9, 0.1]], dtype=torch.float64).to(dtype)
    accuracy, coverage = accuracy_at_confidence(probs, torch.tensor([0]), 0.9)
    assert (float(accuracy), float(coverage)) == (1, 1)


def test_accuracy_at_confidence_agrees_with_the_curve():
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(200, 4, generator=generator).softmax(1)
    target = torch.randint(4, (200,), generator=generator)
    confidence, prediction = probs.max(1)
    curve = risk_coverage(confidence, prediction == target)
    for place in (0, 40, len(curve.risk) - 1):
        accuracy, coverage = accuracy_at_confidence(probs, target, float(curve.threshold[place]))
        assert float(accuracy) == pytest.approx(1 - float(curve.risk[place]))
        assert coverage == curve.coverage[place]


def test_any_kind_of_input_gives_float64_without_gradient():
    correct = torch.tensor([True, False, True])
    confidence = torch.tensor([0.5, 0.25, math.inf], requires_grad=True)
    for same in (correct, correct.int(), correct.float()):
        curve = risk_coverage(confidence, same)
        for values in (curve.coverage, curve.risk, curve.threshold):
            assert values.dtype == torch.float64
            assert not values.requires_grad
        assert curve.threshold[0] == math.inf
    zeros = torch.tensor([0.0, -0.0, 0.0])
    assert len(risk_coverage(zeros, correct).risk) == 1
    with pytest.raises(AttributeError):
        curve.risk = confidence


def test_mistakes_are_explained():
    confidence, correct = torch.tensor([0.5, 0.7]), torch.tensor([1, 0])
    for wrong, words in [
        ((confidence[:0], correct[:0]), "empty"),
        ((confidence[None], correct), r"shape \[N\], not torch.float32 of shape \[1, 2\]"),
        ((correct, correct), "floating point"),
        ((confidence, correct[:1]), r"correct must have shape \[2\], not \[1\]"),
        ((confidence, correct + 1), "true or false"),
        ((confidence * math.nan, correct), "NaN in 2 places"),
    ]:
        for function in (risk_coverage, area_under_risk_coverage, excess_area_under_risk_coverage):
            with pytest.raises(ValueError, match=words):
                function(*wrong)
    for risk in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="risk must lie in 0 … 1"):
            coverage_at_risk(confidence, correct, risk)
        with pytest.raises(ValueError, match="threshold must lie in 0 … 1"):
            accuracy_at_confidence(torch.tensor([[0.5, 0.5]]), torch.tensor([0]), risk)
    with pytest.raises(ValueError, match="probs must hold probabilities"):
        accuracy_at_confidence(torch.tensor([[5.0, 0.5]]), torch.tensor([0]), 0.5)


def test_examples_in_the_documentation_run():
    result = doctest.testmod(importlib.import_module("distill.metrics.selective"))
    assert result.attempted > 0
    assert result.failed == 0
