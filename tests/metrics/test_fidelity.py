"""Fidelity metrics against plain Python, and the laws they obey."""

import doctest
import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.metrics import (
    Agreement,
    KLFromTeacher,
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

TEMPERED = (kl_from_teacher, kl_to_teacher, jensen_shannon, total_variation, entropy_gap)
ALL = (*TEMPERED, agreement, centred_logit_mse, confidence_slope)


@st.composite
def pairs(draw):
    rows, classes = draw(st.integers(1, 12)), draw(st.integers(2, 6))
    score = st.integers(-3, 3) | st.floats(-30, 30)
    row = st.lists(score, min_size=classes, max_size=classes)
    table = st.lists(row, min_size=rows, max_size=rows)
    return tuple(torch.tensor(draw(table), dtype=torch.float64) for _ in range(2))


def random_pair(rows=200, classes=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    s, z = torch.randn(2, rows, classes, generator=generator, dtype=torch.float64) * 3
    return s, z


def softmax(row, temperature=1.0):
    top = max(row)
    weights = [math.exp((x - top) / temperature) for x in row]
    return [w / math.fsum(weights) for w in weights]


def kl(p, q):
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def entropy(p):
    return -math.fsum(a * math.log(a) for a in p if a > 0)


def js(p, q):
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return (kl(p, m) + kl(q, m)) / 2


REFERENCES = {
    kl_from_teacher: lambda p, q: kl(q, p),
    kl_to_teacher: kl,
    jensen_shannon: js,
    total_variation: lambda p, q: math.fsum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
    entropy_gap: lambda p, q: entropy(p) - entropy(q),
}


@pytest.mark.parametrize("function", TEMPERED)
@settings(deadline=None)
@given(pair=pairs(), temperature=st.sampled_from([0.5, 1.0, 4.0, 100.0]))
def test_divergences_are_the_formulas(function, pair, temperature):
    rows = zip(*(x.tolist() for x in pair), strict=True)
    values = [
        REFERENCES[function](softmax(s, temperature), softmax(z, temperature)) for s, z in rows
    ]
    value = function(*pair, temperature=temperature)
    assert value.dtype == torch.float64
    assert value.shape == ()
    assert float(value) == pytest.approx(math.fsum(values) / len(values), rel=1e-11, abs=1e-12)


@settings(deadline=None)
@given(pair=pairs())
def test_agreement_mse_and_overlap_are_the_formulas(pair):
    same, squares, overlaps = [], [], []
    k = min(3, pair[0].shape[1])
    for s, z in zip(*(x.tolist() for x in pair), strict=True):
        same.append(s.index(max(s)) == z.index(max(z)))
        a, b = math.fsum(s) / len(s), math.fsum(z) / len(z)
        squares.append(
            math.fsum(((x - a) - (y - b)) ** 2 for x, y in zip(s, z, strict=True)) / len(s)
        )
        first = [set(sorted(range(len(x)), key=lambda c, x=x: (-x[c], c))[:k]) for x in (s, z)]
        overlaps.append(len(first[0] & first[1]) / k)
    count = len(same)
    assert float(agreement(*pair)) == pytest.approx(sum(same) / count, abs=1e-12)
    assert float(centred_logit_mse(*pair)) == pytest.approx(math.fsum(squares) / count, rel=1e-11)
    assert float(topk_overlap(*pair, k=k)) == pytest.approx(math.fsum(overlaps) / count, abs=1e-12)
    assert float(topk_overlap(*pair, k=pair[0].shape[1])) == 1


def test_agreement_where_the_teacher_is_wrong():
    s, z = random_pair()
    target = torch.arange(200) % 7
    wrong = [i for i in range(200) if z[i].argmax() != target[i]]
    repeated = sum(bool(s[i].argmax() == z[i].argmax()) for i in wrong)
    value = float(agreement_where_teacher_wrong(s, z, target))
    assert value == pytest.approx(repeated / len(wrong), abs=1e-12)
    assert float(agreement_where_teacher_wrong(z, z, target)) == 1
    assert math.isnan(float(agreement_where_teacher_wrong(s, z, z.argmax(1))))


def test_confidence_slope_is_least_squares_on_log_odds():
    s, z = random_pair()

    def log_odds(logits):
        tops = [max(softmax(row)) for row in logits.tolist()]
        return [math.log(p / (1 - p)) for p in tops]

    a, b = log_odds(s), log_odds(z)
    mean_a, mean_b = math.fsum(a) / len(a), math.fsum(b) / len(b)
    covariance = math.fsum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    expected = covariance / math.fsum((y - mean_b) ** 2 for y in b)
    assert float(confidence_slope(s, z)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
def test_confidence_slope_of_two_classes_is_the_scale(scale):
    z = random_pair(classes=2)[1]
    assert float(confidence_slope(scale * z, z)) == pytest.approx(scale, abs=1e-12)


def test_confidence_slope_survives_saturation_and_names_the_undefined():
    z = torch.tensor([[100.0, 0.0], [0.0, 200.0], [300.0, 0.0]])
    assert float(confidence_slope(2 * z, z)) == pytest.approx(2)
    for flat in (torch.zeros(3, 2), torch.tensor([[0.1, 0.7]] * 3)):
        assert math.isnan(float(confidence_slope(z, flat)))


@settings(deadline=None)
@given(pair=pairs())
def test_bounds_and_inequalities(pair):
    tv, forward = float(total_variation(*pair)), float(kl_from_teacher(*pair))
    assert 0 <= tv <= 1 + 1e-12
    assert 0 <= float(jensen_shannon(*pair)) <= math.log(2) + 1e-12
    assert float(kl_to_teacher(*pair)) >= 0
    assert 2 * tv**2 <= forward + 1e-12  # Pinsker, and Jensen over the examples
    assert abs(float(entropy_gap(*pair))) <= math.log(pair[0].shape[1]) + 1e-12


@pytest.mark.parametrize("function", [*TEMPERED, centred_logit_mse])
@settings(deadline=None)
@given(pair=pairs(), shift=st.floats(-50, 50))
def test_zero_at_equality_up_to_a_shift_of_each_row(function, pair, shift):
    s = pair[0]
    shifted = s + shift * torch.arange(1, len(s) + 1)[:, None]
    assert float(function(s, s)) == pytest.approx(0, abs=1e-15)
    assert float(function(shifted, s)) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("function", [jensen_shannon, total_variation, centred_logit_mse])
def test_symmetric(function):
    s, z = random_pair()
    assert float(function(s, z)) == pytest.approx(float(function(z, s)), abs=1e-12)


def test_directions_mirror_each_other():
    s, z = random_pair()
    assert torch.equal(kl_from_teacher(s, z, 2.0), kl_to_teacher(z, s, 2.0))
    assert float(entropy_gap(s, z)) == pytest.approx(-float(entropy_gap(z, s)), abs=1e-12)


def test_hot_divergence_tends_to_the_centred_mse():
    s, z = random_pair()
    hot = 1e3
    limit = float(centred_logit_mse(s, z)) / 2
    assert hot**2 * float(kl_from_teacher(s, z, hot)) == pytest.approx(limit, rel=1e-2)


def test_zero_probabilities_are_no_nan_and_nan_stays_visible():
    masked = torch.tensor([[0.0, 1.0, -math.inf]])
    open_ = torch.tensor([[0.0, 1.0, 2.0]])
    assert float(kl_from_teacher(masked, masked)) == 0
    assert float(kl_from_teacher(open_, masked)) > 0
    assert float(kl_from_teacher(masked, open_)) == math.inf
    assert 0 < float(jensen_shannon(masked, open_)) < math.log(2)
    for function in TEMPERED:
        assert math.isnan(float(function(open_ * math.nan, open_)))


@pytest.mark.parametrize("function", [*ALL, topk_overlap])
def test_order_blocks_and_precision_do_not_show(function, monkeypatch):
    s, z = (x.float() for x in random_pair())
    expected = float(function(s, z))
    monkeypatch.setattr("distill.metrics._shared.BLOCK_ELEMENTS", 20)
    assert float(function(s.flip(0), z.flip(0))) == pytest.approx(expected, abs=1e-12)
    assert float(function(s.double(), z.double())) == pytest.approx(expected, abs=1e-12)
    assert not function(s.requires_grad_(), z).requires_grad


@pytest.mark.parametrize("size", [1, 9, 200])
def test_metrics_equal_the_functions_for_any_split(size):
    s, z = random_pair()
    same, divergence = Agreement(), KLFromTeacher(temperature=4.0)
    for part in torch.arange(200).flip(0).split(size):
        same.update(s[part], z[part])
        divergence.update(s[part], z[part])
    assert float(same.compute()) == pytest.approx(float(agreement(s, z)), abs=1e-12)
    expected = float(kl_from_teacher(s, z, 4.0))
    assert float(divergence.compute()) == pytest.approx(expected, abs=1e-12)


def test_mistakes_are_explained():
    s, z = random_pair(rows=3, classes=4)
    with pytest.raises(ValueError, match="same shape"):
        agreement(s, z[:, :3])
    with pytest.raises(ValueError, match="teacher_logits must be floating point"):
        total_variation(s, z.long())
    with pytest.raises(ValueError, match="student_logits is empty"):
        centred_logit_mse(s[:0], z[:0])
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature must be positive"):
            kl_from_teacher(s, z, temperature)
        with pytest.raises(ValueError, match="temperature must be positive"):
            KLFromTeacher(temperature)
    with pytest.raises(ValueError, match="must not exceed the 4 classes, but is 5"):
        topk_overlap(s, z)
    with pytest.raises(ValueError, match="k must be an integer"):
        topk_overlap(s, z, k=0)
    with pytest.raises(ValueError, match="0 … 3"):
        agreement_where_teacher_wrong(s, z, torch.tensor([0, 1, 4]))
    with pytest.raises(ValueError, match="same shape"):
        Agreement().update(s, z[:2])


def test_examples_in_the_documentation_run():
    result = doctest.testmod(importlib.import_module("distill.metrics.fidelity"))
    assert result.attempted > 0
    assert result.failed == 0


def test_two_temperatures_in_a_collection_stay_apart_after_a_batch_without_divergence():
    from torchmetrics import MetricCollection

    collection = MetricCollection({"cold": KLFromTeacher(1.0), "warm": KLFromTeacher(4.0)})
    logits = torch.eye(4)
    collection.update(logits, logits)
    collection.update(logits, 3 * logits)
    found = collection.compute()
    both = torch.cat([logits, logits]), torch.cat([logits, 3 * logits])
    for name, temperature in (("cold", 1.0), ("warm", 4.0)):
        expected = kl_from_teacher(*both, temperature)
        torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=0)
