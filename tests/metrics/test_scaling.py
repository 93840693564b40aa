"""Fitted temperatures against closed cases, a plain search, and the condition of optimality."""

import doctest
import importlib
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from distill.metrics import Scaling, fit_temperature, negative_log_likelihood


def labelled(rows=400, classes=5, seed=0):
    """Logits whose labels are drawn from their own softmax, so that T* is about 1."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)


def condition(logits, target, temperature):
    """mean(Σ p s − s_y), term by term in numpy."""
    s = logits.double().numpy()
    scaled = s / temperature
    p = np.exp(scaled - scaled.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return float(np.mean((p * s).sum(1) - s[np.arange(len(s)), target.numpy()]))


def largest_spread(logits):
    return float((logits.amax(1) - logits.amin(1)).max())


@pytest.mark.parametrize("scale", [0.01, 0.1, 0.5, 1.0, 3.0, 20.0, 100.0, 1000.0])
def test_scaling_the_logits_scales_the_temperature(scale):
    logits, target = labelled()
    one = fit_temperature(logits, target)
    fit = fit_temperature(scale * logits, target)
    assert one.status == fit.status == "ok"
    assert fit.temperature == pytest.approx(scale * one.temperature, rel=1e-10)
    assert fit.nll_after == pytest.approx(one.nll_after, abs=1e-12)
    assert abs(condition(scale * logits, target, fit.temperature)) < 1e-8
    assert fit.nll_after <= fit.nll_before


@pytest.mark.parametrize("wanted", [0.01, 0.03, 1.0, 30.0, 1000.0])
def test_two_classes_have_a_closed_answer(wanted):
    # One score difference d and a share q of right labels: σ(d/T) = q.
    difference = wanted * math.log(3)
    logits = torch.tensor([[difference, 0.0]] * 4, dtype=torch.float64)
    fit = fit_temperature(logits, torch.tensor([0, 0, 0, 1]))
    assert fit.status == "ok"
    assert fit.temperature == pytest.approx(wanted, rel=1e-12)
    assert fit.nll_after == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


@pytest.mark.parametrize("wanted", [0.01, 1000.0])
def test_extreme_temperatures_of_logits_of_ordinary_size(wanted):
    # Unit-scale logits and a share of mistakes such that T* is far from the scale of the logits.
    if wanted < 1:
        # Margins of 1 that are right and one of 0.02 that is wrong half the time, a bit more right.
        share = 1 / (1 + math.exp(-0.02 / wanted))
        rights = round(share * 10_000)
        margins = torch.full((10_000,), 0.02, dtype=torch.float64)
        wanted = 0.02 / math.log(rights / (10_000 - rights))
        margins = torch.cat([margins, torch.ones(500, dtype=torch.float64)])
    else:
        share = 1 / (1 + math.exp(-1 / wanted))
        rights = round(share * 10_000)
        margins = torch.ones(10_000, dtype=torch.float64)
        wanted = 1 / math.log(rights / (10_000 - rights))
    target = (torch.arange(len(margins)) >= rights).long()
    target[10_000:] = 0
    logits = torch.stack([margins, torch.zeros_like(margins)], dim=1)
    fit = fit_temperature(logits, target)
    assert fit.temperature == pytest.approx(wanted, rel=1e-8)
    assert abs(condition(logits, target, fit.temperature)) < 1e-8


@settings(deadline=None)
@given(st.data())
def test_status_and_optimality_of_any_logits(data):
    rows, classes = data.draw(st.integers(1, 12)), data.draw(st.integers(2, 4))
    score = st.integers(-4, 4) | st.floats(-50, 50, allow_subnormal=False)
    row = st.lists(score, min_size=classes, max_size=classes)
    logits = torch.tensor(
        data.draw(st.lists(row, min_size=rows, max_size=rows)), dtype=torch.float64
    )
    label = st.integers(0, classes - 1)
    target = torch.tensor(data.draw(st.lists(label, min_size=rows, max_size=rows)))
    own = logits.gather(1, target[:, None]).squeeze(1)
    flat = float((logits.mean(1) - own).mean())
    spread = largest_spread(logits)
    assume(spread == 0 or abs(flat) > 1e-9 * spread or flat == 0)
    fit = fit_temperature(logits, target)
    if flat >= 0:
        assert fit.status == "infinite"
    elif bool((own == logits.amax(1)).all()):
        assert fit.status == "zero"
    else:
        assert fit.status == "ok"
    if fit.status == "ok":
        assert abs(condition(logits, target, fit.temperature)) <= 1e-8 * max(1, spread)
        assert fit.nll_after <= fit.nll_before + 1e-12
        for factor in (0.9, 1.1):
            near = negative_log_likelihood(logits / (factor * fit.temperature), target)
            assert fit.nll_after <= float(near) + 1e-12
    else:
        assert fit.temperature is None
        assert fit.nll_after == fit.nll_before


def test_agrees_with_a_plain_search():
    logits, target = labelled(seed=3)
    logits = logits * 2.5
    candidates = np.linspace(1.5, 4, 251)
    values = [float(negative_log_likelihood(logits / t, target)) for t in candidates]
    fit = fit_temperature(logits, target)
    assert fit.temperature == pytest.approx(candidates[int(np.argmin(values))], abs=0.01)
    assert fit.nll_after <= min(values)


@pytest.mark.parametrize("constant", [0.0, 0.1, -7.3, 1e6])
def test_constant_logits_are_infinite(constant):
    logits = torch.full((7, 3), constant, dtype=torch.float64)
    logits += torch.arange(7)[:, None] / 3
    fit = fit_temperature(logits, torch.arange(7) % 3)
    assert (fit.temperature, fit.status) == (None, "infinite")
    assert fit.nll_before == fit.nll_after == pytest.approx(math.log(3))


def test_scores_against_the_labels_are_infinite():
    logits, target = torch.eye(4), torch.arange(4)
    fit = fit_temperature(-logits, target)
    assert (fit.temperature, fit.status, fit.nll_before) == (None, "infinite", fit.nll_after)


def test_scores_that_know_nothing_are_infinite():
    row = torch.tensor([0.1, 0.7, -0.3], dtype=torch.float64)
    fit = fit_temperature(row.repeat(3, 1), torch.arange(3))
    assert (fit.temperature, fit.status) == (None, "infinite")


def test_perfect_accuracy_is_zero():
    logits, _ = labelled()
    fit = fit_temperature(logits, logits.argmax(1))
    assert (fit.temperature, fit.status) == (None, "zero")
    assert fit.nll_after == fit.nll_before > 0


def test_one_narrow_mistake_is_still_a_temperature():
    logits = 10 * torch.eye(4, dtype=torch.float64).repeat(5, 1)
    target = logits.argmax(1)
    logits[0, 1] = 10 + 1e-6
    fit = fit_temperature(logits, target)
    assert fit.status == "ok"
    assert abs(condition(logits, target, fit.temperature)) < 1e-8
    assert fit.temperature < 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_shift_of_a_row_order_and_precision_change_nothing(dtype):
    logits, target = labelled()
    logits = logits.to(dtype)
    expected = fit_temperature(logits.double(), target).temperature
    shift = torch.arange(len(logits))[:, None]
    for same in (logits, logits.double() + shift, logits.requires_grad_()):
        assert fit_temperature(same, target).temperature == pytest.approx(expected, rel=1e-10)
    back = fit_temperature(logits.flip(0), target.flip(0)).temperature
    assert back == pytest.approx(expected, rel=1e-10)


def test_the_result_is_frozen_and_plain():
    fit = fit_temperature(*labelled())
    assert isinstance(fit, Scaling)
    assert {type(x) for x in (fit.temperature, fit.nll_before, fit.nll_after)} == {float}
    with pytest.raises(AttributeError):
        fit.temperature = 2.0


def test_mistakes_are_explained():
    logits, target = labelled(rows=5)
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 5 rows"):
        fit_temperature(logits.index_fill(0, torch.tensor([2]), math.nan), target)
    with pytest.raises(ValueError, match="empty"):
        fit_temperature(logits[:0], target[:0])
    with pytest.raises(ValueError, match=r"target must have shape \[5\]"):
        fit_temperature(logits, target[:4])
    with pytest.raises(ValueError, match="0 … 4"):
        fit_temperature(logits, target + 5)


def test_examples_in_the_documentation_run():
    result = doctest.testmod(importlib.import_module("distill.metrics.scaling"))
    assert result.attempted > 0
    assert result.failed == 0
