"""Teachers tempered alone and weighted examples, against formulas, limits and identities."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.losses import (
    cross_entropy,
    entropy_weighted_kl,
    kl_divergence,
    transformed_teacher,
    weighted_transformed_teacher,
)
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

ALL = [transformed_teacher, weighted_transformed_teacher, entropy_weighted_kl]


def untempered_kl(s, z, t):
    return kl(softmax(z, t), log_softmax(z, t), log_softmax(s))


def power_sum(z, t):
    return math.fsum(p ** (1 / t) for p in softmax(z))


def entropy(z, t=1.0):
    return -math.fsum(p * q for p, q in zip(softmax(z, t), log_softmax(z, t), strict=True))


# Transformed teacher


@checks
@given(batches(), temperatures)
def test_transformed_teacher_is_its_formula(batch, t):
    s, z, _ = batch
    actual = transformed_teacher(s, z, t)
    assert_close(actual, row_by_row(lambda a, b: untempered_kl(a, b, t), s, z))
    assert (actual >= 0).all()


@checks
@given(batches(), temperatures)
def test_transformed_teacher_raises_probabilities_to_a_power(batch, t):
    s, z, _ = batch
    powers = torch.softmax(z, 1) ** (1 / t)
    target = powers / powers.sum(1, keepdim=True)
    assert_close(gradient(transformed_teacher, s, z, temperature=t), torch.softmax(s, 1) - target)


@checks
@given(batches(), st.floats(1.1, 20.0))
def test_transformed_teacher_is_kl_less_a_renyi_entropy_of_the_student(batch, t):
    """Equation 15 of the paper."""

    def formula(s, z):
        both_tempered = kl(softmax(z, t), log_softmax(z, t), log_softmax(s, t))
        renyi = math.log(power_sum(s, t)) / (1 - 1 / t)
        return t * both_tempered - (t - 1) * renyi + (t - 1) * entropy(z, t)

    s, z, _ = batch
    assert_close(transformed_teacher(s, z, t), row_by_row(formula, s, z), rtol=1e-7, atol=1e-8)


@checks
@given(batches())
def test_both_transformed_teachers_are_kl_at_temperature_one(batch):
    s, z, _ = batch
    assert_close(transformed_teacher(s, z), kl_divergence(s, z))
    assert_close(weighted_transformed_teacher(s, z), kl_divergence(s, z))


@checks
@given(batches(), temperatures)
def test_a_sure_teacher_makes_both_a_cross_entropy_with_weight_one(batch, t):
    sure = 5000.0 * torch.eye(batch.classes, dtype=torch.float64)[batch.target]
    expected = cross_entropy(batch.student, batch.target)
    assert_close(transformed_teacher(batch.student, sure, t), expected)
    assert_close(weighted_transformed_teacher(batch.student, sure, t), expected)
    weightless = torch.zeros_like(expected)
    assert_close(entropy_weighted_kl(batch.student, sure, temperature=t), weightless)


def test_transformed_teacher_keeps_its_digits_in_float32():
    generator = torch.Generator().manual_seed(0)
    teacher = 2 * torch.randn(64, 100, generator=generator)
    for t in (2.0, 10.0, 100.0):
        student = teacher / t + 1e-3 * torch.randn(64, 100, generator=generator)
        exact = transformed_teacher(student.double(), teacher.double(), t)
        assert_close(transformed_teacher(student, teacher, t).double(), exact, rtol=1e-3, atol=0)


# Weights


@checks
@given(batches(), temperatures)
def test_weighted_transformed_teacher_is_its_formula(batch, t):
    s, z, _ = batch
    expected = row_by_row(lambda a, b: power_sum(b, t) * untempered_kl(a, b, t), s, z)
    assert_close(weighted_transformed_teacher(s, z, t), expected)


def test_an_unsure_teacher_has_the_largest_power_sum():
    s, z, _ = random_batch(classes=10)
    unsure = torch.zeros_like(z)
    ratio = weighted_transformed_teacher(s, unsure, 4.0) / transformed_teacher(s, unsure, 4.0)
    assert_close(ratio, torch.full((6,), 10**0.75, dtype=torch.float64))
    ratio = weighted_transformed_teacher(s, z, 4.0) / transformed_teacher(s, z, 4.0)
    assert ((ratio > 1) & (ratio < 10**0.75)).all()


def test_teachers_as_sure_as_each_other_have_equal_weights():
    s, z, _ = random_batch()
    turned = torch.stack([z[0].roll(i) for i in range(6)])
    for weighted, plain in (
        (weighted_transformed_teacher, transformed_teacher),
        (entropy_weighted_kl, kl_divergence),
    ):
        ratio = weighted(s, turned, temperature=3.0) / plain(s, turned, temperature=3.0)
        assert_close(ratio, ratio[:1].expand(6))


@checks
@given(batches(), temperatures, temperatures)
def test_entropy_weighted_kl_is_its_formula(batch, t, tau):
    def formula(s, z):
        divergence = kl(softmax(z, t), log_softmax(z, t), log_softmax(s, t))
        return entropy(z, tau) / math.log(len(z)) * t * t * divergence

    s, z, _ = batch
    assert_close(entropy_weighted_kl(s, z, tau, t), row_by_row(formula, s, z))


@checks
@given(batches(), temperatures)
def test_entropy_weighted_kl_is_kl_where_no_teacher_is_sure(batch, t):
    s, z, _ = batch
    expected = kl_divergence(s, z, t)
    assert_close(entropy_weighted_kl(s, z, 1e6, t), expected, rtol=1e-6, atol=1e-9)
    assert (entropy_weighted_kl(s, z, temperature=t) <= expected * (1 + 1e-12)).all()


@checks
@given(batches(classes=(2, 6)), temperatures)
def test_weights_are_the_teachers_alone(batch, t):
    s, z, _ = batch
    moved = s + torch.randn_like(s)
    for weighted, plain in (
        (weighted_transformed_teacher, transformed_teacher),
        (entropy_weighted_kl, kl_divergence),
    ):
        left = weighted(s, z, temperature=t) * plain(moved, z, temperature=t)
        assert_close(left, weighted(moved, z, temperature=t) * plain(s, z, temperature=t))


# All


@checks
@given(batches(), st.floats(-50, 50), temperatures)
def test_shifts_of_either_side_change_nothing(batch, shift, t):
    s, z, _ = batch
    for loss in ALL:
        expected = loss(s, z, temperature=t)
        assert_close(loss(s + shift, z, temperature=t), expected, rtol=1e-6, atol=1e-6 * t * t)
        assert_close(loss(s, z - shift, temperature=t), expected, rtol=1e-6, atol=1e-6 * t * t)


@checks
@given(batches(), temperatures)
def test_zero_with_zero_gradient_at_the_teachers_answer(batch, t):
    _, z, _ = batch
    for loss, answer in ((transformed_teacher, z / t), (weighted_transformed_teacher, z / t),
                         (entropy_weighted_kl, z)):  # fmt: skip
        assert_close(loss(answer, z, temperature=t), torch.zeros(len(z)), atol=1e-12)
        slope = gradient(loss, answer, z, temperature=t)
        assert_close(slope, torch.zeros_like(z), atol=1e-12)


@pytest.mark.parametrize("shape", [(), (6, 1)])
@pytest.mark.parametrize("loss", ALL)
def test_gradients_in_student_and_temperature(loss, shape):
    s, z, _ = random_batch()
    t = torch.linspace(0.7, 3.0, max(1, math.prod(shape)), dtype=torch.float64).reshape(shape)
    assert torch.autograd.gradcheck(
        lambda a, b: loss(a, z, temperature=b), (s.requires_grad_(), t.requires_grad_())
    )


@pytest.mark.parametrize("loss", ALL)
def test_impossible_temperatures_are_refused(loss):
    s, z, _ = random_batch()
    with pytest.raises(ValueError, match="temperature must be positive"):
        loss(s, z, temperature=-1.0)


def test_entropy_weighted_kl_refuses_one_class_and_an_impossible_entropy_temperature():
    s, z, _ = random_batch(classes=1)
    with pytest.raises(ValueError, match="at least 2 classes"):
        entropy_weighted_kl(s, z)
    with pytest.raises(ValueError, match="entropy_temperature must be positive"):
        entropy_weighted_kl(*random_batch()[:2], entropy_temperature=0.0)
