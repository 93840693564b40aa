"""Reliability counts and the parts of the Brier score against counting by hand and sklearn."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss

from distill.metrics import (
    BrierScore,
    CalibrationError,
    ClasswiseCalibrationError,
    DecomposedBrierScore,
    brier_decomposition,
    brier_score,
    class_reliability,
    classwise_calibration_error,
    expected_calibration_error,
    reliability,
)
from tests.metrics.test_calibration import EXACT, bin_of, predictions, sample, top_labels

BINS = st.integers(1, 40)


def counted(pairs, bins):
    """(count, right, confidence) of every bin, from (confidence, hit) pairs."""
    inside = [[pair for pair in pairs if bin_of(pair[0], bins) == b] for b in range(bins)]
    return [
        (float(len(pairs)), sum(hit for _, hit in pairs), math.fsum(c for c, _ in pairs))
        for pairs in inside
    ]


def class_pairs(probs, target, k):
    rows = zip(probs.tolist(), target.tolist(), strict=True)
    return [(row[k], float(y == k)) for row, y in rows]


def columns(diagram):
    return torch.stack([diagram.count, diagram.correct, diagram.confidence], dim=-1)


def assert_same(diagram, other):
    assert torch.equal(diagram.edges, other.edges)
    assert torch.allclose(columns(diagram), columns(other), rtol=0, atol=1e-12)


def reference_parts(pairs, bins):
    """Reliability, resolution, uncertainty and within of one class, from their definitions."""
    total, base = len(pairs), math.fsum(o for _, o in pairs) / len(pairs)
    parts = [0.0, 0.0, base * (1 - base), 0.0]
    for b in range(bins):
        inside = [(f, o) for f, o in pairs if bin_of(f, bins) == b]
        if inside:
            forecast = math.fsum(f for f, _ in inside) / len(inside)
            frequency = math.fsum(o for _, o in inside) / len(inside)
            parts[0] += len(inside) / total * (forecast - frequency) ** 2
            parts[1] += len(inside) / total * (frequency - base) ** 2
            variance = math.fsum((f - forecast) ** 2 for f, _ in inside)
            covariance = math.fsum((f - forecast) * (o - frequency) for f, o in inside)
            parts[3] += (variance - 2 * covariance) / total
    return parts


@settings(deadline=None)
@given(data=predictions(), bins=BINS)
def test_reliability_counts_by_hand(data, bins):
    diagram = reliability(*data, bins=bins)
    assert diagram.edges.tolist() == [b / bins for b in range(bins + 1)]
    expected = torch.tensor(counted(top_labels(*data), bins), dtype=torch.float64)
    assert torch.allclose(columns(diagram), expected, rtol=0, atol=1e-12)
    assert diagram.count.dtype == torch.float64
    assert float(diagram.count.sum()) == len(data[0])


@settings(deadline=None)
@given(data=predictions(), bins=BINS)
def test_class_reliability_counts_by_hand(data, bins):
    diagram = class_reliability(*data, bins=bins)
    classes = range(data[0].shape[1])
    expected = [counted(class_pairs(*data, k), bins) for k in classes]
    expected = torch.tensor(expected, dtype=torch.float64)
    assert torch.allclose(columns(diagram), expected, rtol=0, atol=1e-12)


@settings(deadline=None)
@given(data=predictions(), bins=BINS)
def test_diagrams_give_the_errors_they_belong_to(data, bins):
    for diagram, function in (
        (reliability(*data, bins=bins), expected_calibration_error),
        (class_reliability(*data, bins=bins), classwise_calibration_error),
    ):
        gap = (diagram.accuracy - diagram.mean_confidence).abs() * diagram.count
        classes = max(1, diagram.count[..., 0].numel())
        error = float(gap.nansum()) / (len(data[0]) * classes)
        assert error == pytest.approx(float(function(*data, bins=bins)), **EXACT)


def test_ratios_of_an_empty_bin_are_nan():
    diagram = reliability(torch.tensor([[0.75, 0.25]]), torch.tensor([0]), bins=4)
    assert diagram.accuracy.isnan().tolist() == [True, True, True, False]
    assert diagram.mean_confidence.isnan().tolist() == [True, True, True, False]
    assert float(diagram.accuracy[3]) == 1
    assert float(diagram.mean_confidence[3]) == 0.75


@pytest.mark.parametrize("bins", [3, 7, 10, 15, 49, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_edge_opens_its_own_bin_of_a_class(bins, dtype):
    # Around each edge as near as the type can tell, of which the second may equal the edge.
    edges = torch.arange(1, bins + 1, dtype=torch.float64) / bins
    near = edges.to(dtype)
    down = torch.nextafter(near, torch.zeros_like(near))
    up = torch.nextafter(near, torch.ones_like(near))
    for values in (down, near, up):
        probs = torch.stack([values, (1 - values.double()).to(dtype)], dim=1)
        expected = [bin_of(value, bins) for value in values.double().tolist()]
        count = class_reliability(probs, torch.zeros(bins, dtype=torch.long), bins).count[0]
        assert count.tolist() == [expected.count(b) for b in range(bins)]


def test_metrics_give_the_diagrams_of_the_functions():
    logits, target = sample(500, 4)
    probs = logits.softmax(1)
    for metric, function in (
        (CalibrationError(4, bins=9), reliability),
        (ClasswiseCalibrationError(4, bins=9), class_reliability),
    ):
        for part in torch.randperm(500).split([1, 99, 400]):
            metric.update(probs[part], target[part])
        diagram = metric.reliability()
        assert_same(diagram, function(probs, target, 9))
        before = diagram.count.clone()
        metric.update(probs, target)
        assert torch.equal(diagram.count, before)


@settings(deadline=None)
@given(data=predictions(), bins=BINS)
def test_brier_parts_are_the_formulas(data, bins):
    classes = range(data[0].shape[1])
    per_class = [reference_parts(class_pairs(*data, k), bins) for k in classes]
    expected = [math.fsum(part) for part in zip(*per_class, strict=True)]
    parts = brier_decomposition(*data, bins=bins)
    assert [float(part) for part in parts] == pytest.approx(expected, **EXACT)
    assert float(parts.brier) == pytest.approx(float(brier_score(*data)), **EXACT)
    assert min(parts[:3]) >= 0


@pytest.mark.parametrize("classes", [2, 10])
def test_brier_is_sklearn_s(classes):
    logits, target = sample(300, classes)
    probs = logits.softmax(1)
    # Class by class: sklearn's own score of many classes came late and is scaled by half.
    expected = sum(
        brier_score_loss((target == k).numpy(), probs[:, k].numpy()) for k in range(classes)
    )
    assert float(brier_score(probs, target)) == pytest.approx(expected, **EXACT)
    assert float(brier_decomposition(probs, target).brier) == pytest.approx(expected, **EXACT)


@settings(deadline=None)
@given(data=predictions())
def test_nothing_varies_within_bins_of_equal_forecasts(data):
    # The forecasts are fractions with denominators up to 20, at least 1/400 apart.
    parts = brier_decomposition(*data, bins=1000)
    assert float(parts.within) == pytest.approx(0, abs=1e-12)


def test_brier_parts_of_forecasts_known_in_advance():
    target = torch.tensor([0, 0, 0, 1])
    sure = brier_decomposition(torch.eye(2)[target], target)
    assert [float(part) for part in sure] == [0, 2 * 3 / 16, 2 * 3 / 16, 0]
    base = brier_decomposition(torch.tensor([[0.75, 0.25]]).repeat(4, 1), target)
    assert [float(part) for part in base] == [0, 0, 2 * 3 / 16, 0]


def test_calibrated_forecasts_are_reliable_and_sharp_ones_resolve():
    logits, target = sample(20_000, 5)
    parts = brier_decomposition(logits.softmax(1), target)
    assert float(parts.reliability) < 5 * 15 / len(target)
    flat = brier_decomposition((0.3 * logits).softmax(1), target)
    assert float(flat.reliability) > 0.1
    assert float(flat.uncertainty) == pytest.approx(float(parts.uncertainty), **EXACT)


def test_brier_metric_is_the_function_and_the_score():
    logits, target = sample(700, 3)
    probs = logits.softmax(1)
    metric, score = DecomposedBrierScore(3, bins=6), BrierScore(3)
    for part in torch.randperm(700).split([3, 297, 400]):
        metric.update(probs[part], target[part])
        score.update(probs[part], target[part])
    parts, expected = metric.compute(), brier_decomposition(probs, target, 6)
    for name in parts._fields:
        value = getattr(parts, name)
        assert float(value) == pytest.approx(float(getattr(expected, name)), **EXACT)
    assert float(parts.brier) == pytest.approx(float(score.compute()), **EXACT)
    assert metric.sums.shape == (3, 3, 6)


def test_mistakes_are_explained():
    for function in (reliability, class_reliability, brier_decomposition):
        with pytest.raises(ValueError, match="bins must be an integer of at least 1"):
            function(torch.eye(2), torch.arange(2), 0)
        with pytest.raises(ValueError, match="softmax"):
            function(2 * torch.eye(2), torch.arange(2))
        with pytest.raises(ValueError, match="empty"):
            function(torch.eye(2)[:0], torch.arange(0))
    with pytest.raises(ValueError, match="bins must be"):
        DecomposedBrierScore(2, bins=0)
    with pytest.raises(ValueError, match="2 classes, but num_classes=3"):
        DecomposedBrierScore(3).update(torch.eye(2), torch.arange(2))
