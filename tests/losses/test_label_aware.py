"""The losses that treat the label apart, against formulas and against decoupled distillation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.losses import cross_entropy, decoupled, normalized_kd, refined_kd
from tests.losses.loss_cases import (
    assert_close,
    batches,
    checks,
    gradient,
    kl,
    log_softmax,
    random_batch,
    row_by_row,
    softmax,
    temperatures,
)

three_classes = batches(classes=(3, 6))


def others(x, y):
    return [v for k, v in enumerate(x) if k != y]


def ranked_first(batch):
    """The batch with the labels that the teacher ranks first."""
    return batch._replace(target=batch.teacher.argmax(1))


# Normalised


@checks
@given(three_classes, temperatures, st.floats(0, 5))
def test_normalized_kd_is_its_formula(batch, t, gamma):
    def formula(s, z, y):
        shares = softmax(others(z, y), t)
        cross = math.fsum(p * q for p, q in zip(shares, log_softmax(others(s, y), t), strict=True))
        return -softmax(z)[y] * log_softmax(s)[y] - gamma * t * t * cross

    assert_close(normalized_kd(*batch, gamma, t), row_by_row(formula, *batch))


@checks
@given(three_classes, temperatures)
def test_normalized_kd_without_the_others_is_a_weighted_cross_entropy(batch, t):
    weight = torch.softmax(batch.teacher, 1)[torch.arange(len(batch.target)), batch.target]
    expected = weight * cross_entropy(batch.student, batch.target)
    assert_close(normalized_kd(*batch, gamma=0.0, temperature=t), expected)


@checks
@given(three_classes, temperatures)
def test_the_others_of_normalized_kd_have_the_gradient_of_decoupled(batch, t):
    s, z, y = batch
    both = gradient(normalized_kd, s, z, y, gamma=2.0, temperature=t)
    label = gradient(normalized_kd, s, z, y, gamma=0.0, temperature=t)
    expected = gradient(decoupled, s, z, y, alpha=0.0, beta=2.0, temperature=t)
    assert_close(both - label, expected)


@checks
@given(three_classes, st.floats(-50, 50), temperatures)
def test_shifts_of_the_student_change_nothing(batch, shift, t):
    s, z, y = batch
    for loss in (normalized_kd, refined_kd):
        expected = loss(s, z, y, temperature=t)
        assert_close(loss(s + shift, z, y, temperature=t), expected, rtol=1e-6, atol=1e-6 * t * t)
        assert_close(gradient(loss, s, z, y, temperature=t).sum(1), torch.zeros(len(s)), atol=1e-7)


# Refined


@checks
@given(three_classes, temperatures, st.floats(0, 2), st.floats(0, 9), temperatures)
def test_refined_kd_is_its_formula(batch, t, alpha, beta, tau):
    def formula(s, z, y):
        p, q = max(softmax(z, tau)), softmax(s, tau)[y]
        rest = (
            math.fsum(others(softmax(s, tau), y)),
            math.fsum(others(softmax(z, tau), z.index(max(z)))),
        )
        confidence = p * math.log(p / q)
        if rest[1] > 0:
            confidence += rest[1] * math.log(rest[1] / rest[0])
        below = [k for k in range(len(z)) if z[k] < z[y]]
        low = [z[k] for k in below], [s[k] for k in below]
        shares = 0.0
        if below:
            shares = kl(softmax(low[0], t), log_softmax(low[0], t), log_softmax(low[1], t))
        return alpha * tau * tau * confidence + beta * t * t * shares

    actual = refined_kd(*batch, alpha, beta, tau, t)
    assert_close(actual, row_by_row(formula, *batch), rtol=1e-7, atol=1e-8)
    assert (actual >= 0).all()


@checks
@given(st.integers(0, 10**6), temperatures)
def test_refined_kd_under_a_teacher_that_is_right_is_decoupled(seed, t):
    batch = ranked_first(random_batch(seed=seed))
    expected = decoupled(*batch, 0.7, 3.0, t)
    assert_close(refined_kd(*batch, 0.7, 3.0, t, t), expected)


def test_refined_kd_teaches_nothing_of_the_classes_that_the_teacher_wrongly_prefers():
    s, z, _ = random_batch()
    last = z.argmin(1)
    assert torch.equal(refined_kd(s, z, last, alpha=0.0), torch.zeros(6, dtype=s.dtype))
    assert (gradient(refined_kd, s, z, last, alpha=0.0) == 0).all()
    middle = z.argsort(1)[:, 3]
    moved = s + 5.0 * (z > z.gather(1, middle.unsqueeze(1)))
    assert_close(refined_kd(moved, z, middle, alpha=0.0), refined_kd(s, z, middle, alpha=0.0))
    assert (refined_kd(s, z, middle, alpha=0.0) > 0).all()


def test_refined_kd_masks_what_ties_with_the_label():
    z = torch.tensor([[2.0, 2.0, 1.0, 0.0]])
    s = torch.tensor([[0.0, 5.0, 1.0, 0.0]])
    assert_close(refined_kd(s, z, torch.tensor([0]), alpha=0.0), torch.zeros(1), atol=1e-7)


@checks
@given(st.integers(0, 10**6), temperatures)
def test_refined_kd_is_zero_with_zero_gradient_where_the_student_agrees_with_a_right_teacher(
    seed, t
):
    z, y = ranked_first(random_batch(seed=seed))[1:]
    assert_close(refined_kd(z, z, y, temperature=t), torch.zeros(6), atol=1e-12)
    assert_close(gradient(refined_kd, z, z, y, temperature=t), torch.zeros_like(z), atol=1e-12)


# Both


@pytest.mark.parametrize("shape", [(), (6, 1)])
@pytest.mark.parametrize("loss", [normalized_kd, refined_kd])
def test_gradients_in_student_and_temperature(loss, shape):
    s, z, y = random_batch()
    t = torch.linspace(0.7, 3.0, max(1, math.prod(shape)), dtype=torch.float64).reshape(shape)
    assert torch.autograd.gradcheck(
        lambda a, b: loss(a, z, y, temperature=b), (s.requires_grad_(), t.requires_grad_())
    )


@pytest.mark.parametrize("loss", [normalized_kd, refined_kd])
def test_two_classes_and_bad_options_are_refused(loss):
    s, z, y = random_batch(classes=2)
    with pytest.raises(ValueError, match="with two classes there is only one"):
        loss(s, z, y)
    s, z, y = random_batch()
    with pytest.raises(ValueError, match="temperature must be positive"):
        loss(s, z, y, temperature=0.0)
    option = "gamma" if loss is normalized_kd else "beta"
    with pytest.raises(ValueError, match=f"{option} must be finite"):
        loss(s, z, y, **{option: -1.0})


def test_a_bad_confidence_temperature_is_refused():
    with pytest.raises(ValueError, match="confidence_temperature must be positive"):
        refined_kd(*random_batch(), confidence_temperature=0.0)
