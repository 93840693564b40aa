"""Decisions by cost against the definitions, in whole numbers where the probabilities allow it."""

import doctest
import importlib
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.metrics import _shared, decisions
from distill.metrics.decisions import anticipated_cost, cost_optimal_decision, expected_cost

PARTS = 16  # probabilities are whole sixteenths, exact in every floating type


@st.composite
def problems(draw, most_classes=4):
    """Probabilities in sixteenths, and costs in whole numbers for the classes and more actions."""
    classes = draw(st.integers(2, most_classes))
    actions = classes + draw(st.integers(0, 2))
    cut = st.integers(0, PARTS)
    rows = [
        sorted(cuts)
        for cuts in draw(
            st.lists(st.lists(cut, min_size=classes - 1, max_size=classes - 1), min_size=1)
        )
    ]
    parts = [[b - a for a, b in zip([0, *cuts], [*cuts, PARTS], strict=True)] for cuts in rows]
    row = st.lists(st.integers(-9, 9), min_size=actions, max_size=actions)
    costs = draw(st.lists(row, min_size=classes, max_size=classes))
    return parts, costs


def tensors(parts, costs):
    return torch.tensor(parts, dtype=torch.float64) / PARTS, torch.tensor(costs).double()


def labelled(parts, decision):
    """Sixteen examples for each row, whose labels have exactly the row's frequencies."""
    target = [k for row in parts for k, count in enumerate(row) for _ in range(count)]
    return decision.repeat_interleave(PARTS), torch.tensor(target)


@settings(deadline=None)
@given(problems())
def test_the_decision_is_the_first_of_the_cheapest(problem):
    parts, costs = problem
    decision = cost_optimal_decision(*tensors(*problem))
    for row, chosen in zip(parts, decision.tolist(), strict=True):
        expected = [
            sum(p * c for p, c in zip(row, column, strict=True))
            for column in zip(*costs, strict=True)
        ]
        assert chosen == expected.index(min(expected))


@settings(deadline=None)
@given(problems())
def test_on_calibrated_data_the_cost_is_as_anticipated_and_never_above_the_argmax(problem):
    parts, _ = problem
    probs, costs = tensors(*problem)
    decision = cost_optimal_decision(probs, costs)
    realised = expected_cost(*labelled(parts, decision), costs)
    assert float(realised) == pytest.approx(float(anticipated_cost(probs, decision, costs)))
    for other in (probs.argmax(1), torch.full_like(decision, costs.shape[1] - 1)):
        assert float(realised) <= float(expected_cost(*labelled(parts, other), costs)) + 1e-12


@settings(deadline=None)
@given(problems(), st.data())
def test_costs_are_their_definition(problem, data):
    parts, costs = problem
    action = st.integers(0, len(costs[0]) - 1)
    chosen = data.draw(st.lists(action, min_size=len(parts), max_size=len(parts)))
    probs, matrix = tensors(*problem)
    decision = torch.tensor(chosen)
    total = sum(
        Fraction(count, PARTS) * costs[k][d]
        for row, d in zip(parts, chosen, strict=True)
        for k, count in enumerate(row)
    )
    mean = pytest.approx(float(total / len(parts)), abs=1e-12)
    assert float(anticipated_cost(probs, decision, matrix)) == mean
    assert float(expected_cost(*labelled(parts, decision), matrix)) == mean


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_costs_of_zero_and_one_give_the_argmax(classes, dtype):
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randint(-3, 3, (300, classes), generator=generator).to(dtype)
    logits += 1e-12 * torch.randn(300, classes, generator=generator).to(dtype)
    probs = logits.softmax(1)
    for costs in (1 - torch.eye(classes), 1 - torch.eye(classes, dtype=torch.long)):
        assert torch.equal(cost_optimal_decision(probs, costs), probs.argmax(1))


def test_two_classes_have_the_known_threshold():
    # Decide 1 where p₁·miss > p₀·alarm, so from p₁ = alarm / (alarm + miss).
    miss, alarm = 9.0, 1.0
    positive = torch.tensor([0.05, 0.0999, 0.1001, 0.5], dtype=torch.float64)
    probs = torch.stack([1 - positive, positive], dim=1)
    costs = torch.tensor([[0.0, alarm], [miss, 0.0]])
    assert cost_optimal_decision(probs, costs).tolist() == [0, 0, 1, 1]


def test_abstaining_is_chow_s_rule():
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(500, 5, generator=generator).softmax(1)
    costs = torch.cat([1 - torch.eye(5), torch.full((5, 1), 0.6)], dim=1)
    confidence, argmax = probs.max(1)
    expected = torch.where(confidence >= 0.4, argmax, 5)
    assert torch.equal(cost_optimal_decision(probs, costs), expected)
    assert {5} < set(expected.tolist())


def test_equal_columns_and_constants_of_a_row():
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(100, 3, generator=generator, dtype=torch.float64).softmax(1)
    costs = torch.randn(3, 3, generator=generator)
    first = cost_optimal_decision(probs, costs)
    assert torch.equal(first, cost_optimal_decision(probs, torch.cat([costs, costs], dim=1)))
    shifted = costs.double() + torch.tensor([[5.0], [-3.0], [0.5]])
    assert torch.equal(first, cost_optimal_decision(probs, shifted))
    huge = torch.tensor([[-1.7e308, 1.7e308], [1.7e308, -1.7e308]], dtype=torch.float64)
    assert cost_optimal_decision(torch.tensor([[0.6, 0.4]]), huge).tolist() == [0]


def test_blocks_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(50, 3, generator=generator).softmax(1)
    costs = torch.rand(3, 4, generator=generator)
    whole = cost_optimal_decision(probs, costs)
    for elements in (1, 40):
        monkeypatch.setattr(decisions, "BLOCK_ELEMENTS", elements)
        monkeypatch.setattr(_shared, "BLOCK_ELEMENTS", elements)
        assert torch.equal(cost_optimal_decision(probs, costs), whole)


def test_values_are_float64_without_gradient():
    probs = torch.tensor([[0.5, 0.5]], requires_grad=True)
    costs, decision = torch.eye(2, requires_grad=True), torch.tensor([1], dtype=torch.int32)
    for value in (
        anticipated_cost(probs, decision, costs),
        expected_cost(decision, torch.tensor([1], dtype=torch.uint8), costs),
    ):
        assert value.dtype == torch.float64
        assert not value.requires_grad
    assert cost_optimal_decision(probs, costs).dtype == torch.long


def test_mistakes_are_explained():
    probs, costs = torch.tensor([[0.5, 0.5]]), torch.eye(2)
    decision = target = torch.tensor([1])
    for wrong, words in [
        (costs[0], r"costs must have shape \[K, D\] with D ≥ K ≥ 2, not \[2\]"),
        (torch.zeros(3, 2), r"D ≥ K ≥ 2, not \[3, 2\]"),
        (torch.eye(3), r"costs of shape \[3, 3\] need 2 rows"),
        (costs * math.inf, "finite real"),
        (costs * 1j, "finite real"),
    ]:
        with pytest.raises(ValueError, match=words):
            cost_optimal_decision(probs, wrong)
        with pytest.raises(ValueError, match=words):
            anticipated_cost(probs, decision, wrong)
    for wrong, words in [
        (decision[None], r"decision must have shape \[(N|1)\], not \[1, 1\]"),
        (decision.float(), "integers, not torch.float32"),
        (decision + 1, "decision must lie in 0 … 1 for 2 columns of costs, not in 2 … 2"),
        (decision - 2, "not in -1 … -1"),
    ]:
        with pytest.raises(ValueError, match=words):
            anticipated_cost(probs, wrong, costs)
        with pytest.raises(ValueError, match=words):
            expected_cost(wrong, target, costs)
    with pytest.raises(ValueError, match=r"decision must have shape \[1\], not \[2\]"):
        anticipated_cost(probs, decision.repeat(2), costs)
    with pytest.raises(ValueError, match=r"target must have shape \[2\]"):
        expected_cost(decision.repeat(2), target, costs)
    with pytest.raises(ValueError, match="target must lie in 0 … 1"):
        expected_cost(decision, target + 1, costs)
    with pytest.raises(ValueError, match="decision is empty"):
        expected_cost(decision[:0], target[:0], costs)
    with pytest.raises(ValueError, match="probs is empty"):
        cost_optimal_decision(probs[:0], costs)
    with pytest.raises(ValueError, match="probs must hold probabilities"):
        cost_optimal_decision(5 * probs, costs)


def test_examples_in_the_documentation_run():
    result = doctest.testmod(importlib.import_module("distill.metrics.decisions"))
    assert result.attempted > 0
    assert result.failed == 0
