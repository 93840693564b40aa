"""The top-k losses against sums over every set of k classes."""

import math
from fractions import Fraction
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.losses import crammer_singer, cross_entropy, hard_topk_hinge, smooth_topk
from tests.losses.loss_cases import (
    assert_close,
    batches,
    checks,
    gradient,
    random_batch,
    row_by_row,
)


def log_sum_exp(values):
    peak = max(values)
    return peak + math.log(math.fsum(math.exp(v - peak) for v in values))


def brute_force(s, y, k, tau, alpha):
    sets = list(combinations(range(len(s)), k))
    means = {chosen: math.fsum(s[j] for j in chosen) / k for chosen in sets}
    every = [(means[c] + alpha * (y not in c)) / tau for c in sets]
    right = [means[c] / tau for c in sets if y in c]
    return tau * (log_sum_exp(every) - log_sum_exp(right))


@checks
@given(batches(classes=(2, 8)), st.data(), st.floats(0.05, 10), st.floats(0, 3))
def test_smooth_topk_is_the_sum_over_sets(batch, data, tau, alpha):
    k = data.draw(st.integers(1, batch.classes - 1))
    expected = row_by_row(
        lambda s, y: brute_force(s, y, k, tau, alpha), batch.student, batch.target
    )
    assert_close(smooth_topk(batch.student, batch.target, k, tau, alpha), expected)


@pytest.mark.parametrize("k", [1, 3, 12, 30])
def test_smooth_topk_of_many_classes_in_exact_arithmetic(k):
    s, _, y = random_batch(rows=2, classes=40, scale=6.0)

    def formula(s, y):
        peak = max(s)
        weights = [Fraction(math.exp((x - peak) / k)) for x in s]
        e = [Fraction(1)] + [Fraction(0)] * k
        for j, w in enumerate(weights):
            if j != y:
                for degree in range(k, 0, -1):
                    e[degree] += w * e[degree - 1]
        wrong = Fraction(math.exp(1.0)) * e[k] / (weights[y] * e[k - 1])
        return math.log1p(wrong)

    assert_close(smooth_topk(s, y, k), row_by_row(formula, s, y))


@checks
@given(batches())
def test_one_guess_without_margin_is_cross_entropy(batch):
    expected = cross_entropy(batch.student, batch.target)
    assert_close(smooth_topk(batch.student, batch.target, k=1, tau=1.0, alpha=0.0), expected)


@checks
@given(batches(classes=(3, 7)), st.integers(1, 2), st.floats(0, 2))
def test_smooth_topk_tends_to_the_hard_one(batch, k, alpha):
    hard = hard_topk_hinge(batch.student, batch.target, k, alpha)
    tau = 1e-3
    gap = (smooth_topk(batch.student, batch.target, k, tau, alpha) - hard).abs()
    sets = math.comb(batch.classes, k)
    assert (gap <= tau * math.log(sets) + 1e-9).all()


@checks
@given(batches(classes=(2, 7)), st.data(), st.floats(0, 3))
def test_hard_topk_is_its_formula(batch, data, alpha):
    k = data.draw(st.integers(1, batch.classes - 1))

    def formula(s, y):
        others = sorted((x for j, x in enumerate(s) if j != y), reverse=True)
        return max(0.0, alpha + (others[k - 1] - s[y]) / k)

    expected = row_by_row(formula, batch.student, batch.target)
    assert_close(hard_topk_hinge(batch.student, batch.target, k, alpha), expected)


@checks
@given(batches())
def test_hard_top_one_is_crammer_singer(batch):
    expected = crammer_singer(batch.student, batch.target)
    assert_close(hard_topk_hinge(batch.student, batch.target, k=1), expected)


@checks
@given(batches(classes=(4, 7)), st.floats(-40, 40), st.integers(1, 3))
def test_blind_to_shifts_and_forgiving_with_more_guesses(batch, shift, k):
    s, y = batch.student, batch.target
    for loss in (smooth_topk, hard_topk_hinge):
        assert_close(loss(s + shift, y, k=k), loss(s, y, k=k))
    within = s.topk(k + 1, dim=1).values[:, k] < s[torch.arange(len(s)), y] - k
    assert (hard_topk_hinge(s, y, k=k)[within] == 0).all()


@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_gradients(k):
    s, _, y = random_batch()
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda a: smooth_topk(a, y, k=k, tau=0.7), (s,))
    assert torch.autograd.gradcheck(lambda a: hard_topk_hinge(a, y, k=k), (s,))


def test_smooth_gradients_at_ties():
    level = torch.zeros(2, 6, dtype=torch.float64)
    pull = gradient(smooth_topk, level, torch.tensor([0, 5]), k=3)
    assert_close(pull[0, 1:], pull[0, 1].expand(5))
    assert_close(pull.sum(1), torch.zeros(2))
    assert (pull[0, 0], pull[1, 5]) < (0, 0)


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_smooth_topk_in_float32_keeps_its_digits(k, scale):
    generator = torch.Generator().manual_seed(k)
    student = scale * torch.randn(16, 1000, generator=generator)
    target = torch.randint(1000, (16,), generator=generator)
    exact = smooth_topk(student.double(), target, k)
    assert_close(smooth_topk(student, target, k).double(), exact, rtol=1e-5, atol=1e-5)
    assert_close(
        gradient(smooth_topk, student, target, k=k).double(),
        gradient(smooth_topk, student.double(), target, k=k),
        rtol=1e-3,
        atol=1e-6,
    )


@pytest.mark.parametrize("k", [1, 5, 10, 11, 40])
@pytest.mark.parametrize("near", [0, 1, 3, 30])
def test_smooth_gradient_in_float32_beside_few_strong_rivals(k, near):
    # k rivals lead together, `near` more are as strong, the rest far behind: the gradient there is
    # the hardest to get by division.
    student = torch.full((2, 100), -8.0 * k)
    student[:, : k + near] = torch.linspace(0, 1e-2, k + near)
    target = torch.tensor([99, 0])
    exact = gradient(smooth_topk, student.double(), target, k=k)
    actual = gradient(smooth_topk, student, target, k=k)
    assert_close(actual.double(), exact, rtol=0, atol=2e-5)


def test_smooth_topk_of_very_many_classes_and_guesses():
    student, target = torch.zeros(2, 50_000), torch.tensor([0, 7])
    for k in (5, 12, 20):
        right = Fraction(k, 50_000)
        expected = math.log1p(math.e * float((1 - right) / right))
        assert_close(smooth_topk(student, target, k), torch.full((2,), expected), rtol=1e-5)


@pytest.mark.parametrize("loss", [smooth_topk, hard_topk_hinge])
@pytest.mark.parametrize("k", [0, 7, -1, 2.0])
def test_k_out_of_range_is_refused(loss, k):
    s, _, y = random_batch()
    with pytest.raises(ValueError, match="k must be a whole number from 1 to K − 1 = 6"):
        loss(s, y, k=k)


def test_options_out_of_range_are_refused():
    s, _, y = random_batch()
    with pytest.raises(ValueError, match="tau"):
        smooth_topk(s, y, tau=0.0)
    with pytest.raises(ValueError, match="alpha"):
        hard_topk_hinge(s, y, alpha=math.nan)
