"""Calibration metrics against references written from the formulas, and against theory."""

import doctest
import importlib
import math
import os
import socket
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import multiprocessing

from distill.metrics import (
    AdaptiveCalibrationError,
    Agreement,
    BrierScore,
    CalibrationError,
    ClasswiseCalibrationError,
    KLFromTeacher,
    MeanReciprocalRank,
    NegativeLogLikelihood,
    SmoothCalibrationError,
    TopKAccuracy,
    adaptive_calibration_error,
    agreement,
    brier_score,
    classwise_calibration_error,
    expected_calibration_error,
    kl_from_teacher,
    mean_reciprocal_rank,
    negative_log_likelihood,
    smooth_calibration_error,
    topk_accuracy,
)

EXACT = {"abs": 1e-12, "rel": 0}
FUNCTIONS = (
    expected_calibration_error,
    classwise_calibration_error,
    adaptive_calibration_error,
    smooth_calibration_error,
    brier_score,
)


@st.composite
def predictions(draw, most=25):
    """Probabilities with many ties, zeros and ones, and labels."""
    rows, classes = draw(st.integers(1, most)), draw(st.integers(2, 4))
    weights = st.lists(st.integers(0, 5), min_size=classes, max_size=classes)
    table = draw(st.lists(weights.filter(any), min_size=rows, max_size=rows))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows))
    counts = torch.tensor(table, dtype=torch.float64)
    return counts / counts.sum(dim=1, keepdim=True), torch.tensor(labels)


def sample(rows, classes, seed=0, sharpness=2.0, truth=1.0):
    """Logits whose labels are drawn from softmax(truth · logits)."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    target = torch.multinomial((truth * logits).softmax(1), 1, generator=generator).squeeze(1)
    return logits, target


def top_labels(probs, target):
    rows = [(max(row), row.index(max(row))) for row in probs.tolist()]
    return [(c, float(k == y)) for (c, k), y in zip(rows, target.tolist(), strict=True)]


def bin_of(value, bins):
    inside = [b for b in range(bins) if b / bins <= value and (value < (b + 1) / bins)]
    return inside[0] if inside else bins - 1


def binned_gaps(pairs, bins):
    """(share, |accuracy − confidence|) of every bin that is not empty."""
    gaps = []
    for b in range(bins):
        inside = [(c, hit) for c, hit in pairs if bin_of(c, bins) == b]
        if inside:
            accuracy = math.fsum(hit for _, hit in inside) / len(inside)
            confidence = math.fsum(c for c, _ in inside) / len(inside)
            gaps.append((len(inside) / len(pairs), abs(accuracy - confidence)))
    return gaps


def reference_error(pairs, bins, norm="l1"):
    gaps = binned_gaps(pairs, bins)
    if norm == "max":
        return max(gap for _, gap in gaps)
    if norm == "l2":
        return math.sqrt(math.fsum(share * gap**2 for share, gap in gaps))
    return math.fsum(share * gap for share, gap in gaps)


def reference_classwise(probs, target, bins):
    per_class = []
    for k in range(probs.shape[1]):
        pairs = [
            (row[k], float(y == k)) for row, y in zip(probs.tolist(), target.tolist(), strict=True)
        ]
        per_class.append(reference_error(pairs, bins))
    return math.fsum(per_class) / probs.shape[1]


def reference_adaptive(pairs, bins):
    groups = {}
    for confidence, hit in pairs:
        groups.setdefault(confidence, []).append(hit)
    total, inside, running, cut = 0.0, [], 0, 1
    for confidence in sorted(groups):
        inside += [hit - confidence for hit in groups[confidence]]
        running += len(groups[confidence])
        if running >= Fraction(cut * len(pairs), bins):
            total += abs(math.fsum(inside)) / len(pairs)
            inside = []
            while running >= Fraction(cut * len(pairs), bins):
                cut += 1
    assert not inside
    return total


def reference_smooth_at(pairs, width, nodes):
    """∫ |Σ K(t, c)(hit − c)| / N dt with the kernel as a sum of mirror images."""
    t = (np.arange(nodes) + 0.5) / nodes
    confidence, hit = np.array(pairs).T
    residual = np.zeros(nodes)
    for turn in range(-3, 4):
        for images in (confidence + 2 * turn, -confidence + 2 * turn):
            bells = np.exp(-0.5 * ((t[:, None] - images) / width) ** 2)
            residual += bells @ (hit - confidence) / (width * math.sqrt(2 * math.pi))
    return np.abs(residual).mean() / len(pairs)


def reference_smooth(pairs, nodes=4000):
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        if reference_smooth_at(pairs, middle, nodes) < middle:
            high = middle
        else:
            low = middle
    return high


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@settings(deadline=None)
@given(data=predictions(), bins=st.integers(1, 40))
def test_binned_error_is_the_formula(norm, data, bins):
    value = expected_calibration_error(*data, bins=bins, norm=norm)
    assert value.dtype == torch.float64
    assert value.shape == ()
    assert float(value) == pytest.approx(reference_error(top_labels(*data), bins, norm), **EXACT)


@settings(deadline=None)
@given(data=predictions(), bins=st.integers(1, 40))
def test_classwise_error_is_the_formula(data, bins):
    value = float(classwise_calibration_error(*data, bins=bins))
    assert value == pytest.approx(reference_classwise(*data, bins), **EXACT)


@settings(deadline=None)
@given(data=predictions(), bins=st.integers(1, 60))
def test_adaptive_error_is_the_formula(data, bins):
    value = float(adaptive_calibration_error(*data, bins=bins))
    assert value == pytest.approx(reference_adaptive(top_labels(*data), bins), **EXACT)


@settings(max_examples=15, deadline=None)
@given(data=predictions(most=8))
def test_smooth_error_is_the_formula(data):
    expected = reference_smooth(top_labels(*data))
    if expected > 2e-3:  # below that the reference's own grid is too coarse
        assert float(smooth_calibration_error(*data)) == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("truth", [0.3, 1.0, 3.0])
def test_smooth_error_of_many_samples_is_the_formula(truth):
    logits, target = sample(150, 4, truth=truth)
    probs = logits.softmax(1)
    expected = reference_smooth(top_labels(probs, target), nodes=1000)
    assert float(smooth_calibration_error(probs, target)) == pytest.approx(expected, rel=1e-4)


@settings(deadline=None)
@given(data=predictions())
def test_brier_is_the_formula(data):
    probs, target = data
    rows = zip(probs.tolist(), target.tolist(), strict=True)
    expected = math.fsum((p - (k == y)) ** 2 for row, y in rows for k, p in enumerate(row))
    assert float(brier_score(probs, target)) == pytest.approx(expected / len(probs), **EXACT)


def test_nll_is_the_formula():
    logits, target = sample(50, 7, sharpness=5.0)
    surprise = [
        math.log(math.fsum(math.exp(x) for x in row)) - row[y]
        for row, y in zip(logits.tolist(), target.tolist(), strict=True)
    ]
    expected = math.fsum(surprise) / len(surprise)
    assert float(negative_log_likelihood(logits, target)) == pytest.approx(expected, **EXACT)


@settings(deadline=None)
@given(data=predictions(), bins=st.integers(1, 30))
def test_the_chain_of_inequalities(data, bins):
    pairs = top_labels(*data)
    overall = abs(math.fsum(hit - c for c, hit in pairs)) / len(pairs)
    ece, rmsce, mce = (
        float(expected_calibration_error(*data, bins=bins, norm=norm))
        for norm in ("l1", "l2", "max")
    )
    slack = 1e-12
    assert overall <= ece + slack
    assert ece <= rmsce + slack
    assert rmsce <= mce + slack
    assert mce <= 1 + slack
    assert overall <= float(adaptive_calibration_error(*data, bins=bins)) + slack
    # The floor of the search: there the value may lie that much below the fixed point.
    assert overall <= float(smooth_calibration_error(*data)) + 1e-9
    assert float(expected_calibration_error(*data, bins=1)) == pytest.approx(overall, abs=slack)
    assert float(adaptive_calibration_error(*data, bins=1)) == pytest.approx(overall, abs=slack)


@pytest.mark.parametrize("bins", [3, 7, 10, 15, 49, 100])
def test_every_edge_opens_its_own_bin(bins):
    # Just below b/bins and exactly b/bins must part: with one right and one wrong answer their
    # gaps have opposite signs and would cancel within one bin.
    for b in range(bins // 2 + 1, bins):
        edge = b / bins
        below = math.nextafter(edge, 0)
        probs = torch.tensor([[below, 1 - below], [edge, 1 - edge]], dtype=torch.float64)
        target = torch.tensor([0, 1])
        expected = (abs(1 - below) + edge) / 2
        assert float(expected_calibration_error(probs, target, bins)) == pytest.approx(
            expected, **EXACT
        )


def test_confidence_one_shares_the_last_bin():
    probs = torch.tensor([[1.0, 0.0], [0.95, 0.05]], dtype=torch.float64)
    target = torch.tensor([1, 0])
    expected = abs(-1.0 + 0.05) / 2
    assert float(expected_calibration_error(probs, target, 10)) == pytest.approx(expected, **EXACT)
    # One class against the rest: class 0 has {1.0, 0.95} and class 1 {0.0, 0.05} in one bin each.
    assert float(classwise_calibration_error(probs, target, 10)) == pytest.approx(expected, **EXACT)


def test_float32_softmax_that_rounds_above_one_is_certain():
    above = torch.tensor([[1.0000001, 0.0]])
    assert float(above.max()) > 1
    assert float(expected_calibration_error(above, torch.tensor([1]))) == 1.0


@pytest.mark.parametrize("function", FUNCTIONS)
def test_certain_and_right_is_zero(function):
    assert float(function(torch.eye(4), torch.arange(4))) == 0


def test_certain_and_wrong_is_the_worst():
    probs, target = torch.eye(4), torch.arange(4).roll(1)
    assert float(brier_score(probs, target)) == 2
    for function in (adaptive_calibration_error, smooth_calibration_error):
        assert float(function(probs, target)) == pytest.approx(1.0, abs=1e-9)
    for norm in ("l1", "l2", "max"):
        assert float(expected_calibration_error(probs, target, norm=norm)) == 1


@pytest.mark.parametrize(("confidence", "hit"), [(0.999, 1), (0.97, 1), (0.75, 1), (0.3, 0)])
def test_smooth_error_of_one_point_is_its_gap(confidence, hit):
    # The kernel integrates to one, so smECE(σ) is the gap whatever σ is.
    rest = (1 - confidence) / 3
    probs = torch.tensor([[confidence, rest, rest, rest]], dtype=torch.float64)
    value = float(smooth_calibration_error(probs, torch.tensor([1 - hit])))
    assert value == pytest.approx(abs(hit - confidence), abs=1e-9)


def test_smooth_error_below_its_narrowest_width_is_a_lower_bound_close_by():
    probs = torch.tensor([[1 - 1e-6, 1e-6]] * 3, dtype=torch.float64)
    value = float(smooth_calibration_error(probs, torch.zeros(3, dtype=torch.long)))
    assert value == pytest.approx(1e-6, rel=1e-6)


def test_smooth_error_needs_no_bins_where_they_flip():
    # Two points that straddle an edge: ECE jumps from 0 to nearly ½, the smooth error does not.
    target = torch.tensor([0, 1])
    apart = torch.tensor([[0.5 + 1e-9, 0.5 - 1e-9], [0.6, 0.4]], dtype=torch.float64)
    moved = apart + torch.tensor([[1e-6, -1e-6], [0.0, 0.0]], dtype=torch.float64)
    difference = smooth_calibration_error(apart, target) - smooth_calibration_error(moved, target)
    assert abs(float(difference)) < 1e-5


def test_calibrated_labels_have_small_errors():
    logits, target = sample(20_000, 5)
    probs = logits.softmax(1)
    noise = 15 / math.sqrt(len(probs))
    for function in FUNCTIONS[:4]:
        assert float(function(probs, target)) < noise


def test_adaptive_bins_hold_equally_many():
    probs = torch.tensor([0.6, 0.7, 0.8, 0.9], dtype=torch.float64)
    probs = torch.stack([probs, 1 - probs], dim=1)
    target = torch.tensor([0, 1, 0, 1])
    expected = (abs(0.4 - 0.7) + abs(0.2 - 0.9)) / 4
    assert float(adaptive_calibration_error(probs, target, 2)) == pytest.approx(expected, **EXACT)


def test_adaptive_never_splits_ties():
    probs = torch.tensor([[0.75, 0.25]] * 6, dtype=torch.float64)
    target = torch.tensor([0, 1, 0, 0, 1, 0])
    for bins in (1, 2, 3, 5, 100):
        value = float(adaptive_calibration_error(probs, target, bins))
        assert value == pytest.approx(abs(4 / 6 - 0.75), **EXACT)


def metric_cases(classes):
    """Metric, the function it must equal (None where a grid stands between), and its input."""
    return {
        "ece": (CalibrationError(classes), expected_calibration_error, "probs"),
        "rmsce": (
            CalibrationError(classes, bins=7, norm="l2"),
            lambda p, y: expected_calibration_error(p, y, 7, "l2"),
            "probs",
        ),
        "mce": (
            CalibrationError(classes, norm="max"),
            lambda p, y: expected_calibration_error(p, y, norm="max"),
            "probs",
        ),
        "classwise": (ClasswiseCalibrationError(classes), classwise_calibration_error, "probs"),
        "brier": (BrierScore(classes), brier_score, "probs"),
        "nll": (NegativeLogLikelihood(classes), negative_log_likelihood, "logits"),
        "adaptive": (AdaptiveCalibrationError(classes), None, "probs"),
        "smooth": (SmoothCalibrationError(classes), None, "probs"),
        "mrr": (MeanReciprocalRank(), mean_reciprocal_rank, "logits"),
        "top2": (TopKAccuracy(2), lambda s, y: topk_accuracy(s, y, 2), "logits"),
        "agreement": (Agreement(), agreement, "pair"),
        "kl": (KLFromTeacher(3.0), lambda s, z: kl_from_teacher(s, z, 3.0), "pair"),
    }


def inputs(kind, logits, target):
    second = logits.sin() * 2 if kind == "pair" else target
    return (logits.softmax(1) if kind == "probs" else logits), second


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("name", metric_cases(2))
def test_any_split_in_any_order_gives_the_same(name, classes):
    logits, target = sample(1200, classes)
    whole, function, kind = metric_cases(classes)[name]
    whole.update(*inputs(kind, logits, target))
    expected = float(whole.compute())
    if function is not None:
        assert expected == pytest.approx(float(function(*inputs(kind, logits, target))), **EXACT)
    for seed, sizes in enumerate(([1, 999, 200], [400] * 3, [37] * 32 + [16])):
        order = torch.randperm(1200, generator=torch.Generator().manual_seed(seed))
        metric = metric_cases(classes)[name][0]
        for part in order.split(sizes):
            metric.update(*inputs(kind, logits[part], target[part]))
        assert float(metric.compute()) == pytest.approx(expected, **EXACT)


@pytest.mark.parametrize("function", FUNCTIONS)
@given(data=predictions(), random=st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_functions_do_not_see_the_order(function, data, random):
    probs, target = data
    order = list(range(len(probs)))
    random.shuffle(order)
    shuffled = function(probs[order], target[order])
    assert float(shuffled) == pytest.approx(float(function(probs, target)), **EXACT)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_do_not_see_the_names_of_classes_or_copies(function):
    logits, target = sample(200, 5)
    probs = logits.softmax(1)
    expected = float(function(probs, target))
    names = torch.tensor([3, 0, 4, 1, 2])
    assert float(function(probs[:, names], names.argsort()[target])) == pytest.approx(
        expected, **EXACT
    )
    assert float(function(probs.repeat(3, 1), target.repeat(3))) == pytest.approx(expected, **EXACT)


@pytest.mark.parametrize("bins", [1, 4, 15, 500])
@pytest.mark.parametrize("cells", [20, 200, 65_536])
def test_adaptive_grid_stays_within_its_bound(cells, bins):
    bounds = []
    for seed in range(20):
        logits, target = sample(400, 4, seed=seed, truth=0.4)
        probs = logits.softmax(1)
        metric = AdaptiveCalibrationError(4, bins=bins, cells=cells)
        metric.update(probs, target)
        exact = float(adaptive_calibration_error(probs, target, bins))
        bounds.append(float(metric.error_bound()))
        assert abs(float(metric.compute()) - exact) <= bounds[-1] + 1e-12
    if cells == 65_536:
        assert max(bounds) <= 2 * 5 * 2 / 400 + (0.1 if bins == 500 else 0)
    if bins == 1:
        assert max(bounds) == 0


@settings(deadline=None)
@given(data=predictions(), bins=st.integers(1, 30), cells=st.integers(1, 50))
def test_adaptive_grid_stays_within_its_bound_under_ties(data, bins, cells):
    metric = AdaptiveCalibrationError(data[0].shape[1], bins=bins, cells=cells)
    metric.update(*data)
    exact = float(adaptive_calibration_error(*data, bins=bins))
    assert abs(float(metric.compute()) - exact) <= float(metric.error_bound()) + 1e-12


@settings(deadline=None)
@given(data=predictions(), bins=st.integers(1, 30))
def test_adaptive_grid_is_exact_where_cells_hold_single_confidences(data, bins):
    # Confidences are fractions with denominators up to 20, at least 1/400 apart.
    metric = AdaptiveCalibrationError(data[0].shape[1], bins=bins)
    metric.update(*data)
    exact = float(adaptive_calibration_error(*data, bins=bins))
    assert float(metric.compute()) == pytest.approx(exact, **EXACT)


def test_adaptive_bound_counts_a_moved_example_twice():
    # Ends of bins: 0.10 0.20 | 0.21 0.90 exactly, 0.10 0.20 0.21 | 0.90 on ten cells.
    confidence = torch.tensor([0.10, 0.20, 0.21, 0.90], dtype=torch.float64)[:, None]
    probs = torch.cat([confidence, ((1 - confidence) / 19).expand(-1, 19)], dim=1)
    target = torch.tensor([0, 0, 0, 1])
    metric = AdaptiveCalibrationError(20, bins=2, cells=10)
    metric.update(probs, target)
    exact = float(adaptive_calibration_error(probs, target, 2))
    assert exact == pytest.approx((0.9 + 0.8 + abs(0.79 - 0.9)) / 4, **EXACT)
    assert float(metric.compute()) == pytest.approx((0.9 + 0.8 + 0.79 + 0.9) / 4, **EXACT)
    assert float(metric.error_bound()) == pytest.approx(2 / 4, **EXACT)


def test_adaptive_bound_is_small_for_a_saturated_model():
    logits, target = sample(5000, 5, sharpness=16.0)
    metric = AdaptiveCalibrationError(5)
    metric.update(logits.softmax(1), target)
    exact = float(adaptive_calibration_error(logits.softmax(1), target))
    assert abs(float(metric.compute()) - exact) <= float(metric.error_bound()) < 5e-3


@pytest.mark.parametrize("cells", [50, 1000, 65_536])
@pytest.mark.parametrize("truth", [0.3, 1.0, 2.0])
def test_smooth_grid_stays_within_its_bound(cells, truth):
    for seed in range(3):
        logits, target = sample(2000, 4, seed=seed, truth=truth)
        probs = logits.softmax(1)
        metric = SmoothCalibrationError(4, cells=cells)
        metric.update(probs, target)
        value, exact = float(metric.compute()), float(smooth_calibration_error(probs, target))
        assert abs(value - exact) <= 0.4 / (cells * max(value, exact)) + 1e-9
        if cells == 65_536:
            assert value == pytest.approx(exact, abs=1e-5)


def test_state_keeps_its_size_and_precision():
    for metric, _, kind in metric_cases(3).values():
        shapes = {name: getattr(metric, name).shape for name in metric._defaults}
        for rows in (10, 1000):
            metric.update(*inputs(kind, *sample(rows, 3)))
        assert {name: getattr(metric, name).shape for name in metric._defaults} == shapes
        assert all(getattr(metric, name).dtype == torch.float64 for name in metric._defaults)


@pytest.mark.parametrize("name", metric_cases(3))
def test_metric_forward_reset_and_inference_mode(name):
    metric, _, kind = metric_cases(3)[name]
    first, second = sample(40, 3, seed=1), sample(60, 3, seed=2)
    alone = metric(*inputs(kind, *first))
    metric(*inputs(kind, *second))
    both = float(metric.compute())
    metric.reset()
    with torch.inference_mode():
        metric.reset()
        metric.update(*inputs(kind, *first))
    assert float(metric.compute()) == pytest.approx(float(alone), **EXACT)
    metric.update(*inputs(kind, *second))
    assert float(metric.compute()) == pytest.approx(both, **EXACT)


@pytest.mark.parametrize("name", metric_cases(3))
def test_metric_of_nothing_is_nan(name):
    metric = metric_cases(3)[name][0]
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert math.isnan(float(metric.compute()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision_is_widened_exactly(dtype):
    logits, target = sample(300, 40)
    probs = logits.softmax(1).to(dtype)
    for function in FUNCTIONS:
        value = function(probs, target)
        assert value.dtype == torch.float64
        assert float(value) == pytest.approx(float(function(probs.double(), target)), **EXACT)


def test_blocks_of_rows_do_not_show(monkeypatch):
    logits, target = sample(257, 6)
    before = [float(f(logits.softmax(1), target)) for f in FUNCTIONS]
    monkeypatch.setattr("distill.metrics._shared.BLOCK_ELEMENTS", 13)
    after = [float(f(logits.softmax(1), target)) for f in FUNCTIONS]
    assert after == pytest.approx(before, **EXACT)


def test_gradients_and_inputs_are_left_alone():
    logits, target = sample(20, 3)
    probs = logits.softmax(1).requires_grad_()
    before = probs.detach().clone()
    for function in FUNCTIONS:
        assert not function(probs, target).requires_grad
    assert torch.equal(probs.detach(), before)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("probs", "target", "words"),
    [
        (torch.eye(3)[0], torch.zeros(1, dtype=torch.long), r"shape \[N, K\]"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), "empty"),
        (torch.ones(2, 1), torch.zeros(2, dtype=torch.long), "at least two classes"),
        (torch.eye(3), torch.zeros(2, dtype=torch.long), r"target must have shape \[3\]"),
        (torch.eye(3), torch.zeros(3, 1, dtype=torch.long), r"target must have shape \[3\]"),
        (torch.eye(3), torch.zeros(3), "integer"),
        (torch.eye(3), torch.tensor([0, 1, 3]), r"0 … 2 for 3 classes"),
        (torch.eye(3), torch.tensor([0, -1, 2]), "not in -1"),
        (torch.eye(3).long(), torch.arange(3), "floating point"),
        (torch.eye(3) * 2, torch.arange(3), "softmax"),
        (torch.eye(3) * torch.nan, torch.arange(3), "softmax"),
        (torch.tensor([[1.5, -0.5]]), torch.tensor([0]), "softmax"),
    ],
)
def test_wrong_inputs_are_explained(function, probs, target, words):
    with pytest.raises(ValueError, match=words):
        function(probs, target)


@pytest.mark.parametrize("bins", [0, -3, 2.5, True])
def test_wrong_bins_are_explained(bins):
    for function in FUNCTIONS[:3]:
        with pytest.raises(ValueError, match="bins must be an integer of at least 1"):
            function(torch.eye(2), torch.arange(2), bins)
    for metric in (CalibrationError, ClasswiseCalibrationError, AdaptiveCalibrationError):
        with pytest.raises(ValueError, match="bins must be"):
            metric(2, bins=bins)


def test_wrong_metric_arguments_are_explained():
    with pytest.raises(ValueError, match="norm must be one of l1, l2, max, not 'l3'"):
        expected_calibration_error(torch.eye(2), torch.arange(2), norm="l3")
    with pytest.raises(ValueError, match="norm must be"):
        CalibrationError(2, norm="L1")
    with pytest.raises(ValueError, match="num_classes must be"):
        BrierScore(1)
    with pytest.raises(ValueError, match="cells must be"):
        SmoothCalibrationError(2, cells=0)
    with pytest.raises(ValueError, match="2 classes, but num_classes=3"):
        NegativeLogLikelihood(3).update(torch.eye(2), torch.arange(2))
    with pytest.raises(ValueError, match="2 classes, but num_classes=3"):
        CalibrationError(3).update(torch.eye(2), torch.arange(2))


def on_one_rank(rank, port, logits, target, expected):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    mine = slice(0, 300) if rank == 0 else slice(300, None)
    for name, (metric, _, kind) in metric_cases(4).items():
        metric.update(*inputs(kind, logits[mine], target[mine]))
        assert abs(float(metric.compute()) - expected[name]) <= 1e-12, name
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one():
    logits, target = sample(1000, 4)
    expected = {}
    for name, (metric, _, kind) in metric_cases(4).items():
        metric.update(*inputs(kind, logits, target))
        expected[name] = float(metric.compute())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(on_one_rank, (port, logits, target, expected), nprocs=2)


def test_examples_in_the_documentation_run():
    result = doctest.testmod(importlib.import_module("distill.metrics.calibration"))
    assert result.attempted > 0
    assert result.failed == 0
