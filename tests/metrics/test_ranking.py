"""Rank metrics against counting by hand."""

import doctest
import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.metrics import (
    MeanReciprocalRank,
    TopKAccuracy,
    mean_reciprocal_rank,
    topk_accuracy,
)


@st.composite
def scored(draw):
    rows, classes = draw(st.integers(1, 20)), draw(st.integers(2, 6))
    score = st.integers(-3, 3) | st.floats(-1e6, 1e6)
    row = st.lists(score, min_size=classes, max_size=classes)
    table = draw(st.lists(row, min_size=rows, max_size=rows))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows))
    return torch.tensor(table, dtype=torch.float64), torch.tensor(labels)


def ranks(logits, target):
    rows = zip(logits.tolist(), target.tolist(), strict=True)
    return [sum(score >= row[y] for score in row) for row, y in rows]


@settings(deadline=None)
@given(data=scored())
def test_rank_metrics_are_the_formulas(data):
    expected = ranks(*data)
    count = len(expected)
    value = mean_reciprocal_rank(*data)
    assert value.dtype == torch.float64
    assert value.shape == ()
    assert float(value) == pytest.approx(math.fsum(1 / r for r in expected) / count, abs=1e-12)
    for k in range(1, data[0].shape[1] + 1):
        hits = sum(r <= k for r in expected) / count
        assert float(topk_accuracy(*data, k)) == pytest.approx(hits, abs=1e-12)


@settings(deadline=None)
@given(data=scored())
def test_accuracy_grows_with_k_to_one_and_bounds_mrr(data):
    accuracies = [float(topk_accuracy(*data, k)) for k in range(1, data[0].shape[1] + 1)]
    assert accuracies == sorted(accuracies)
    assert accuracies[-1] == 1
    mrr = float(mean_reciprocal_rank(*data))
    assert accuracies[0] - 1e-12 <= mrr <= accuracies[0] + (1 - accuracies[0]) / 2 + 1e-12


def test_monotone_maps_and_shifts_of_a_row_change_nothing():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(100, 8, generator=generator, dtype=torch.float64)
    target = torch.randint(8, (100,), generator=generator)
    for other in (logits * 7, logits.exp(), logits.softmax(1), logits + torch.arange(100)[:, None]):
        assert torch.equal(
            mean_reciprocal_rank(other, target), mean_reciprocal_rank(logits, target)
        )
        assert torch.equal(topk_accuracy(other, target, 3), topk_accuracy(logits, target, 3))


def test_without_ties_top_k_is_membership_in_topk():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(500, 10, generator=generator, dtype=torch.float64)
    target = torch.randint(10, (500,), generator=generator)
    for k in (1, 3, 5):
        named = (logits.topk(k).indices == target[:, None]).any(1).double().mean()
        assert float(topk_accuracy(logits, target, k)) == pytest.approx(float(named), abs=1e-12)


@pytest.mark.parametrize("constant", [0.0, 3.5, math.nan])
def test_constant_or_diverged_scores_earn_nothing(constant):
    logits, target = torch.full((6, 4), constant), torch.arange(6) % 4
    for k in (1, 2, 3):
        assert float(topk_accuracy(logits, target, k)) == 0
    assert float(mean_reciprocal_rank(logits, target)) == 0.25


def test_splits_agree_with_the_function():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(1000, 6, generator=generator, dtype=torch.float64)
    target = torch.randint(6, (1000,), generator=generator)
    for size in (1, 7, 1000):
        mrr, top = MeanReciprocalRank(), TopKAccuracy(2)
        for part in torch.arange(1000).flip(0).split(size):
            mrr.update(logits[part], target[part])
            top.update(logits[part], target[part])
        assert float(mrr.compute()) == pytest.approx(
            float(mean_reciprocal_rank(logits, target)), abs=1e-12
        )
        assert float(top.compute()) == pytest.approx(
            float(topk_accuracy(logits, target, 2)), abs=1e-12
        )


def test_mistakes_are_explained():
    logits, target = torch.eye(3), torch.arange(3)
    with pytest.raises(ValueError, match="must not exceed the 3 classes, but is 4"):
        topk_accuracy(logits, target, 4)
    with pytest.raises(ValueError, match="must not exceed the 3 classes"):
        TopKAccuracy(4).update(logits, target)
    for k in (0, 1.0):
        with pytest.raises(ValueError, match="k must be an integer of at least 1"):
            topk_accuracy(logits, target, k)
    with pytest.raises(ValueError, match="k must be"):
        TopKAccuracy(0)
    with pytest.raises(ValueError, match="logits is empty"):
        mean_reciprocal_rank(logits[:0], target[:0])
    with pytest.raises(ValueError, match=r"target must have shape \[3\]"):
        MeanReciprocalRank().update(logits, target[:2])
    with pytest.raises(ValueError, match="0 … 2"):
        mean_reciprocal_rank(logits, target + 1)


def test_examples_in_the_documentation_run():
    result = doctest.testmod(importlib.import_module("distill.metrics.ranking"))
    assert result.attempted > 0
    assert result.failed == 0
