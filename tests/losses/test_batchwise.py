"""Losses on what a batch's predictions have in common, against formulas with whole matrices."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.losses import kl_divergence, multi_level_kd, streamlined_kd
from tests.losses.loss_cases import (
    assert_close,
    checks,
    gradient,
    kl,
    log_softmax,
    random_batch,
    softmax,
    temperatures,
)

BOTH = [multi_level_kd, streamlined_kd]
seeds = st.integers(0, 10**6)


def probabilities(logits, t):
    return np.array([softmax(row, t) for row in logits.tolist()])


def tempered_kl(s, z, t):
    rows = zip(s.tolist(), z.tolist(), strict=True)
    return np.array(
        [t * t * kl(softmax(b, t), log_softmax(b, t), log_softmax(a, t)) for a, b in rows]
    )


def multi_level_formula(s, z, beta, gamma, spread, t):
    total = np.zeros(len(s))
    for tau in (t * factor for factor in spread):
        p, q = probabilities(s, tau), probabilities(z, tau)
        examples = ((p @ p.T - q @ q.T) ** 2).sum(1)
        classes = ((p.T @ p - q.T @ q) ** 2).sum() / p.shape[1]
        total += tempered_kl(s, z, tau) + beta * examples + gamma * classes
    return torch.from_numpy(total)


def streamlined_formula(s, z, beta, regularization, t):
    units = [x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (s, z)]
    difference = (units[0] @ units[0].T - units[1] @ units[1].T) / s.shape[1]
    inverse = np.linalg.inv(np.cov(difference, rowvar=False) + regularization * np.eye(len(s)))
    angles = np.array([math.sqrt(row @ inverse @ row) for row in difference])
    return torch.from_numpy(tempered_kl(s, z, t) + beta * angles)


@checks
@given(seeds, st.integers(1, 5), st.integers(2, 6), temperatures)
def test_multi_level_kd_is_its_formula(seed, rows, classes, t):
    s, z, _ = random_batch(rows, classes, seed)
    expected = multi_level_formula(s, z, 1.5, 0.5, (0.5, 1.0, 2.0), t)
    assert_close(multi_level_kd(s, z, 1.5, 0.5, (0.5, 1.0, 2.0), t), expected)


@checks
@given(seeds, st.integers(2, 6), st.integers(2, 6), temperatures, st.floats(1e-3, 10.0))
def test_streamlined_kd_is_its_formula(seed, rows, classes, t, regularization):
    s, z, _ = random_batch(rows, classes, seed)
    expected = streamlined_formula(s, z, 1.5, regularization, t)
    assert_close(streamlined_kd(s, z, 1.5, regularization, t), expected, rtol=1e-7, atol=1e-8)


@checks
@given(seeds, temperatures)
def test_without_the_batch_they_are_kl(seed, t):
    s, z, _ = random_batch(seed=seed)
    alone = multi_level_kd(s, z, beta=0.0, gamma=0.0, spread=(1.0,), temperature=t)
    assert_close(alone, kl_divergence(s, z, t))
    summed = kl_divergence(s, z, t / 2) + kl_divergence(s, z, 2 * t)
    assert_close(multi_level_kd(s, z, 0.0, 0.0, (0.5, 2.0), t), summed)
    assert_close(streamlined_kd(s, z, beta=0.0, temperature=t), kl_divergence(s, z, t))


def test_the_papers_temperatures_surround_four():
    s, z, _ = random_batch()
    expected = multi_level_formula(s, z, 1.0, 1.0, (2, 3, 4, 5, 6), 1.0)
    assert_close(multi_level_kd(s, z, temperature=4.0), expected)


def test_little_whitening_leaves_lengths():
    s, z, _ = random_batch()
    difference = [torch.nn.functional.normalize(x) for x in (s, z)]
    rows = (difference[0] @ difference[0].T - difference[1] @ difference[1].T) / 7
    angles = streamlined_kd(s, z, regularization=1e8) - kl_divergence(s, z)
    assert_close(1e4 * angles, rows.norm(dim=1), rtol=1e-5, atol=1e-7)


@checks
@given(seeds, st.floats(-50, 50), temperatures)
def test_shifts_do_not_change_multi_level_kd(seed, shift, t):
    s, z, _ = random_batch(seed=seed)
    expected = multi_level_kd(s, z, temperature=t)
    assert_close(multi_level_kd(s + shift, z, temperature=t), expected, rtol=1e-6, atol=1e-6)


@checks
@given(seeds, st.floats(0.01, 100))
def test_lengths_do_not_change_the_angles_of_streamlined_kd(seed, scale):
    s, z, _ = random_batch(seed=seed)
    expected = streamlined_kd(s, z) - kl_divergence(s, z)
    assert_close(streamlined_kd(scale * s, z) - kl_divergence(scale * s, z), expected)


@checks
@given(seeds, st.integers(1, 5), temperatures)
def test_zero_with_zero_gradient_at_equality(seed, rows, t):
    z = random_batch(rows=rows, seed=seed).teacher
    for loss in BOTH:
        assert torch.equal(loss(z, z, temperature=t), torch.zeros(rows, dtype=z.dtype))
        assert_close(gradient(loss, z, z, temperature=t), torch.zeros_like(z), atol=1e-12)


def test_a_batch_of_one_has_no_angles():
    s, z, _ = random_batch(rows=1)
    assert_close(streamlined_kd(s, z), kl_divergence(s, z))


def test_logits_of_zero_have_no_angle_but_a_gradient():
    s, z, _ = random_batch()
    s[1] = 0
    assert gradient(streamlined_kd, s, z).abs().max() < 10


def test_multi_level_kd_needs_no_matrix_of_classes():
    s, z = torch.randn(2, 3, 200_000)
    assert multi_level_kd(s, z).isfinite().all()


def test_multi_level_kd_keeps_its_digits_next_to_equality_in_float32():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(16, 20, generator=generator)
    student = teacher + 1e-3 * torch.randn(16, 20, generator=generator)
    exact = multi_level_kd(student.double(), teacher.double())
    assert_close(multi_level_kd(student, teacher).double(), exact, rtol=1e-2, atol=0)


@pytest.mark.parametrize("shape", [(), (6, 1)])
@pytest.mark.parametrize("loss", BOTH)
def test_gradients_in_student_and_temperature(loss, shape):
    s, z, _ = random_batch()
    t = torch.linspace(0.7, 3.0, max(1, math.prod(shape)), dtype=torch.float64).reshape(shape)
    assert torch.autograd.gradcheck(
        lambda a, b: loss(a, z, temperature=b), (s.requires_grad_(), t.requires_grad_())
    )


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (multi_level_kd, {"beta": -1.0}, "beta must be finite"),
        (multi_level_kd, {"gamma": math.inf}, "gamma must be finite"),
        (multi_level_kd, {"spread": ()}, "at least one factor"),
        (multi_level_kd, {"spread": 1.0}, "spread must list at least one factor"),
        (multi_level_kd, {"spread": (1.0, 0.0)}, "spread must be positive"),
        (multi_level_kd, {"temperature": 0.0}, "temperature must be positive"),
        (streamlined_kd, {"beta": -1.0}, "beta must be finite"),
        (streamlined_kd, {"regularization": 0.0}, "regularization must be positive"),
        (streamlined_kd, {"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_bad_options_are_refused(loss, options, message):
    with pytest.raises(ValueError, match=message):
        loss(*random_batch()[:2], **options)
