"""Fitted scalings against closed cases, plain searches, and the condition of optimality."""

import doctest
import importlib
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from distill.metrics import _shared, negative_log_likelihood
from distill.metrics.scaling import (
    Scaling,
    VectorScaling,
    fit_temperature,
    fit_vector_scaling,
)


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
def test_labels_drawn_at_a_known_temperature_give_it_back(data):
    # T*·log(counts) has the softmax counts/total at T*, and the labels have just those shares.
    wanted = 10 ** data.draw(st.floats(-2, 3))
    classes = data.draw(st.integers(2, 6))
    count = st.lists(st.integers(1, 9), min_size=classes, max_size=classes)
    counts = torch.tensor(data.draw(st.lists(count, min_size=1, max_size=8)))
    assume(bool((counts != counts[:, :1]).any()))
    # A shift of a row is exact in float64 only as far as it is small beside the scores.
    shift = torch.tensor(data.draw(st.lists(st.floats(-9, 9), min_size=1))[0])
    logits = wanted * (counts.double().log() + shift)
    target = torch.cat([torch.arange(classes).repeat_interleave(row) for row in counts])
    logits = logits.repeat_interleave(counts.sum(1), dim=0)
    fit = fit_temperature(logits, target)
    assert fit.status == "ok"
    assert fit.temperature == pytest.approx(wanted, rel=1e-9)
    assert abs(condition(logits, target, fit.temperature)) < 1e-8
    assert fit.nll_after <= fit.nll_before + 1e-12


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
    spread = largest_spread(logits)
    flat = float((logits.mean(1) - own).mean()) if spread else 0.0  # a mean of equals is rounded
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


def test_one_example_never_has_a_temperature():
    for classes in (2, 3, 7):
        logits = torch.linspace(0, 1, classes, dtype=torch.float64)[None]
        for label in range(classes):
            fit = fit_temperature(logits, torch.tensor([label]))
            above = bool(logits[0, label] > logits.mean() + 1e-9)
            last = label == classes - 1
            assert fit.status == ("zero" if last else "ok" if above else "infinite")


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e-6, 1e6, 1e30, 1e300])
def test_huge_and_tiny_logits(scale):
    logits, target = labelled()
    one = fit_temperature(logits, target)
    fit = fit_temperature(scale * logits, target)
    assert (one.status, fit.status) == ("ok", "ok")
    assert fit.temperature == pytest.approx(scale * one.temperature, rel=1e-9)
    assert fit.nll_after == pytest.approx(one.nll_after, abs=1e-10)
    half = fit_vector_scaling(scale * logits, target)
    whole = fit_vector_scaling(logits, target)
    assert half.nll_after == pytest.approx(whole.nll_after, abs=1e-9)
    assert [scale * w for w in half.scale] == pytest.approx(whole.scale, rel=1e-5)
    assert half.bias == pytest.approx(whole.bias, abs=1e-5)


@pytest.mark.parametrize("exponent", [-4, 4])
def test_rows_of_very_different_size(exponent):
    logits, target = labelled()
    logits[::2] *= 10.0**exponent
    fit = fit_temperature(logits, target)
    if fit.status == "ok":
        assert abs(condition(logits, target, fit.temperature)) <= 1e-10 * largest_spread(logits)
    assert fit.nll_after <= fit.nll_before


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


@pytest.mark.slow
def test_fifty_thousand_rows_of_a_thousand_classes_in_bounded_memory():
    resource = pytest.importorskip("resource")
    rows, classes = 50_000, 1000
    generator = torch.Generator().manual_seed(0)
    logits = torch.empty(rows, classes, dtype=torch.float16)
    target = torch.empty(rows, dtype=torch.long)
    for block, labels in zip(logits.split(1000), target.split(1000), strict=True):
        scores = 2 * torch.randn(1000, classes, generator=generator)
        block.copy_(2 * scores)
        labels.copy_(torch.multinomial(scores.softmax(1), 1, generator=generator).squeeze(1))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    fit = fit_temperature(logits, target)
    assert fit.temperature == pytest.approx(2, rel=0.02)
    # The high-water mark in KiB: a copy of all logits in float64 alone would be 390 MiB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
    assert time.monotonic() - start < 300


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
    with pytest.raises(ValueError, match="differ by more than float64 holds"):
        fit_temperature(torch.tensor([[1.7e308, -1.7e308]], dtype=torch.float64), target[:1] * 0)


def test_applying_a_temperature():
    logits, target = labelled()
    fit = fit_temperature(logits, target)
    assert torch.equal(fit.apply(logits), logits / fit.temperature)
    assert float(negative_log_likelihood(fit.apply(logits), target)) == fit.nll_after
    half = torch.tensor([[1.0, 1.0009765625]], dtype=torch.float16)
    assert fit.apply(half).dtype == torch.float64
    assert fit.apply(half).argmax() == 1
    nothing = Scaling(None, "zero", 1.0, 1.0)
    assert torch.equal(nothing.apply(half), half.double())
    assert fit.apply(logits.requires_grad_()).requires_grad


def planted(rows=30_000, classes=4, seed=0):
    """Logits whose labels are drawn after a known scale and bias."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    scale = 0.4 + torch.rand(classes, generator=generator, dtype=torch.float64)
    bias = torch.randn(classes, generator=generator, dtype=torch.float64)
    bias -= bias.mean()
    probs = (scale * logits + bias).softmax(1)
    return logits, torch.multinomial(probs, 1, generator=generator).squeeze(1), scale, bias


def penalised(logits, target, ridge, scale, bias):
    """The loss as it is written down, with its gradient from autograd."""
    scale = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(bias, dtype=torch.float64, requires_grad=True)
    start = 1 / (fit_temperature(logits, target).temperature or 1.0)
    size = logits.square().mean().sqrt() if logits.any() else 1.0
    nll = negative_log_likelihood_sum(scale * logits + bias, target)
    loss = nll + ridge / 2 * (((scale - start) * size).square().sum() + bias.square().sum())
    loss.backward()
    return float(loss.detach()), scale.grad / size, bias.grad


def negative_log_likelihood_sum(logits, target):
    return torch.nn.functional.cross_entropy(logits, target, reduction="sum")


@pytest.mark.parametrize("ridge", [0.0, 1.0])
def test_a_planted_scale_and_bias_are_found(ridge):
    logits, target, scale, bias = planted()
    fit = fit_vector_scaling(logits, target, ridge)
    assert fit.status == "ok"
    assert torch.tensor(fit.scale).double() == pytest.approx(scale, abs=0.05)
    assert torch.tensor(fit.bias).double() == pytest.approx(bias, abs=0.08)
    assert sum(fit.bias) == pytest.approx(0, abs=1e-12)
    assert fit.nll_before == float(negative_log_likelihood(logits, target))
    after = float(negative_log_likelihood(fit.apply(logits), target))
    assert fit.nll_after == pytest.approx(after, abs=1e-12)
    truth = float(negative_log_likelihood(scale * logits + bias, target))
    assert fit.nll_after <= truth + 1e-4 * ridge < fit_temperature(logits, target).nll_after


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10_000),
    st.integers(1, 40),
    st.integers(2, 6),
    st.sampled_from([0.01, 1.0, 30.0]),
    st.sampled_from([0.03, 1.0, 20.0]),
)
def test_the_gradient_is_zero_and_no_temperature_is_better(seed, rows, classes, ridge, size):
    generator = torch.Generator().manual_seed(seed)
    logits = size * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, (rows,), generator=generator)
    fit = fit_vector_scaling(logits, target, ridge)
    loss, *gradients = penalised(logits, target, ridge, fit.scale, fit.bias)
    assert fit.status == "ok"
    for gradient in gradients:
        assert float(gradient.abs().max()) / rows < 1e-6
    start = fit_temperature(logits, target)
    assert loss / rows <= start.nll_after + 1e-12
    assert fit.nll_after <= start.nll_after + 1e-12
    assert fit.nll_after <= fit.nll_before + 1e-12


@pytest.mark.parametrize("ridge", [0.0, 1.0])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_agrees_with_a_search_without_gradients_of_ours(ridge, classes):
    minimize = pytest.importorskip("scipy.optimize").minimize
    logits, target = labelled(rows=150, classes=classes, seed=classes)
    start = 1 / fit_temperature(logits, target).temperature
    s, y = logits.numpy(), target.numpy()
    size = np.sqrt(np.mean(s**2))

    def loss(x):
        w, b = x.reshape(2, -1)
        z = w * s + b
        top = z.max(1)
        nll = np.log(np.exp(z - top[:, None]).sum(1)) + top - z[np.arange(len(z)), y]
        penalty = np.sum((size * (w - start)) ** 2) + np.sum(b**2)
        return nll.sum() + ridge / 2 * penalty

    first = np.repeat([start, 0.0], classes)
    best = minimize(loss, first, method="BFGS", options={"gtol": 1e-4})
    fit = fit_vector_scaling(logits, target, ridge)
    ours = loss(np.array([fit.scale, fit.bias]))
    assert best.fun - 1e-6 <= ours <= best.fun + 1e-9
    w, b = best.x.reshape(2, -1)
    expected = torch.tensor(w * s + b).softmax(1)
    assert torch.allclose(fit.apply(logits).softmax(1), expected, atol=1e-4)


def is_separable(logits, target):
    """Whether some change of scale and bias harms no example and helps one: a linear program."""
    linprog = pytest.importorskip("scipy.optimize").linprog
    classes = logits.shape[1]
    margins = []
    for s, y in zip(logits.tolist(), target.tolist(), strict=True):
        for k in set(range(classes)) - {y}:
            margin = [0.0] * (2 * classes)
            margin[y], margin[k], margin[classes + y], margin[classes + k] = s[y], -s[k], 1, -1
            margins.append(margin)
    a = np.array(margins)
    limits = [(-1, 1)] * (2 * classes)
    return -linprog(-a.sum(0), A_ub=-a, b_ub=np.zeros(len(a)), bounds=limits).fun > 1e-7


def test_without_a_ridge_separable_labels_are_unbounded():
    statuses = []
    for seed in range(60):
        classes = 2 + seed % 3
        logits, target = labelled(rows=8 + seed % 30, classes=classes, seed=seed)
        logits = logits.round() if seed % 4 == 0 else logits
        fit = fit_vector_scaling(logits, target, ridge=0)
        separable = is_separable(logits, target)
        assert fit.status == ("unbounded" if separable else "ok"), seed
        if separable:
            assert (fit.scale, fit.bias, fit.nll_after) == (None, None, fit.nll_before)
            assert torch.equal(fit.apply(logits), logits)
        statuses.append(separable)
        assert fit_vector_scaling(logits, target).status == "ok"
    assert 10 < sum(statuses) < 50


def test_one_class_on_its_own_is_enough_to_be_unbounded():
    logits, target = labelled(rows=2000, classes=4)
    logits[:, 0] = torch.where(target == 0, 3.0, -3.0) + 0.1 * logits[:, 0]
    assert fit_vector_scaling(logits, target, ridge=0).status == "unbounded"
    # One example on the wrong side, and there is a maximum again.
    logits[int((target != 0).nonzero()[0]), 0] = 4.0
    fit = fit_vector_scaling(logits, target, ridge=0)
    assert fit.status == "ok"
    _, *gradients = penalised(logits, target, 0, fit.scale, fit.bias)
    assert max(float(gradient.abs().max()) for gradient in gradients) / len(logits) < 1e-6


def test_a_class_without_labels_needs_the_ridge():
    logits, target = labelled(classes=4)
    target = target % 3
    assert fit_vector_scaling(logits, target, ridge=0).status == "unbounded"
    fit = fit_vector_scaling(logits, target)
    assert fit.status == "ok"
    assert fit.bias[3] < min(fit.bias[:3])


def test_constant_logits_learn_the_frequencies():
    fit = fit_vector_scaling(torch.zeros(8, 2), torch.tensor([0, 0, 0, 0, 0, 0, 1, 1]), ridge=0)
    assert fit.status == "ok"
    assert fit.apply(torch.zeros(2)).softmax(0).tolist() == pytest.approx([0.75, 0.25])
    assert fit.scale == [1.0, 1.0]


def test_a_large_ridge_is_the_temperature():
    logits, target, _, _ = planted(rows=500)
    fit = fit_vector_scaling(logits, target, ridge=1e9)
    temperature = fit_temperature(logits, target)
    assert fit.scale == pytest.approx([1 / temperature.temperature] * 4, rel=1e-6)
    assert fit.bias == pytest.approx([0] * 4, abs=1e-6)
    assert fit.nll_after == pytest.approx(temperature.nll_after, abs=1e-6)


def test_perfect_accuracy_stays_at_the_logits_as_they_are():
    logits, _ = labelled()
    fit = fit_vector_scaling(logits, logits.argmax(1), ridge=1e9)
    assert fit.scale == pytest.approx([1.0] * 5, rel=1e-6)
    assert fit_vector_scaling(logits, logits.argmax(1), ridge=0).status == "unbounded"


def test_blocks_precision_and_order_change_no_vector(monkeypatch):
    logits, target, _, _ = planted(rows=300)
    logits = logits.half()
    expected = fit_vector_scaling(logits.double(), target)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(_shared, "BLOCK_ELEMENTS", 100)
    for same in ((logits, target), (logits[order].float().requires_grad_(), target[order].int())):
        fit = fit_vector_scaling(*same)
        assert fit.scale == pytest.approx(expected.scale, abs=1e-6)
        assert fit.bias == pytest.approx(expected.bias, abs=1e-6)


def test_applying_a_vector():
    fit = VectorScaling([2.0, 1.0, 0.5], [1.0, 0.0, -1.0], "ok", 1.0, 0.9)
    assert fit.apply(torch.ones(3, dtype=torch.float16)).tolist() == [3.0, 1.0, -0.5]
    assert fit.apply(torch.ones(2, 4, 3)).shape == (2, 4, 3)
    assert fit.apply(torch.ones(1, 3)).dtype == torch.float64
    with pytest.raises(ValueError, match="logits have 4 classes, but 3 were fitted"):
        fit.apply(torch.ones(2, 4))
    with pytest.raises(AttributeError):
        fit.bias = None


def test_mistakes_in_a_vector_scaling_are_explained():
    logits, target = labelled(rows=5)
    for ridge in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="ridge must be at least 0 and finite"):
            fit_vector_scaling(logits, target, ridge)
    with pytest.raises(ValueError, match="NaN or infinity in 5 of 5 rows"):
        fit_vector_scaling(logits * math.nan, target)
    with pytest.raises(ValueError, match="empty"):
        fit_vector_scaling(logits[:0], target[:0])


def test_examples_in_the_documentation_run():
    result = doctest.testmod(importlib.import_module("distill.metrics.scaling"))
    assert result.attempted > 0
    assert result.failed == 0
