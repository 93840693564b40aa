"""The bounded losses against their formulas and limits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.losses import (
    crammer_singer,
    cross_entropy,
    generalized_cross_entropy,
    ramp_hinge,
    symmetric_cross_entropy,
)
from tests.losses.loss_cases import (
    assert_close,
    batches,
    checks,
    gradient,
    log_softmax,
    random_batch,
    row_by_row,
    softmax,
)


@checks
@given(batches(), st.floats(0.05, 1))
def test_generalized_cross_entropy_is_its_formula(batch, q):
    expected = row_by_row(lambda s, y: (1 - softmax(s)[y] ** q) / q, batch.student, batch.target)
    actual = generalized_cross_entropy(batch.student, batch.target, q)
    assert_close(actual, expected)
    assert (actual >= 0).all()
    assert (actual <= 1 / q).all()


@checks
@given(batches())
def test_generalized_cross_entropy_tends_to_cross_entropy(batch):
    expected = cross_entropy(batch.student, batch.target)
    actual = generalized_cross_entropy(batch.student, batch.target, 1e-9)
    assert_close(actual, expected, rtol=1e-6)
    assert_close(
        gradient(generalized_cross_entropy, batch.student, batch.target, q=1e-9),
        gradient(cross_entropy, batch.student, batch.target),
        atol=1e-6,
    )


@checks
@given(batches(), st.floats(0, 2), st.floats(0, 2))
def test_symmetric_cross_entropy_is_its_formula(batch, alpha, beta):
    def formula(s, y):
        log_label = [0.0 if k == y else math.log(1e-4) for k in range(len(s))]
        reverse = -math.fsum(p * x for p, x in zip(softmax(s), log_label, strict=True))
        return -alpha * log_softmax(s)[y] + beta * reverse

    expected = row_by_row(formula, batch.student, batch.target)
    assert_close(symmetric_cross_entropy(batch.student, batch.target, alpha, beta), expected)


@checks
@given(batches(), st.floats(-9, 0))
def test_ramp_hinge_is_its_formula(batch, a):
    def formula(s, y):
        margin = s[y] - max(x for k, x in enumerate(s) if k != y)
        return min(1 - a, max(0.0, 1 - margin))

    expected = row_by_row(formula, batch.student, batch.target)
    assert_close(ramp_hinge(batch.student, batch.target, a), expected)


@checks
@given(batches())
def test_a_long_ramp_is_crammer_singer(batch):
    expected = crammer_singer(batch.student, batch.target)
    assert_close(ramp_hinge(batch.student, batch.target, a=-1e3), expected)


def test_the_ramp_pulls_only_between_its_ends():
    margins = torch.tensor([-5.0, -1.5, -0.5, 0.5, 1.5])
    student = torch.stack([margins, torch.zeros(5)], dim=1)
    pull = gradient(ramp_hinge, student, torch.zeros(5, dtype=torch.long))
    assert_close(pull[:, 0], torch.tensor([0.0, 0.0, -1.0, -1.0, 0.0]))


@checks
@given(batches(rows=(2, 4)), st.floats(0, 1), st.floats(-30, 30))
def test_linear_in_mixed_labels_and_blind_to_shifts(batch, share, shift):
    eye = torch.eye(batch.classes, dtype=torch.float64)
    a, b = batch.target, batch.target.roll(1)
    mixed = share * eye[a] + (1 - share) * eye[b]
    for loss in (generalized_cross_entropy, symmetric_cross_entropy):
        expected = share * loss(batch.student, a) + (1 - share) * loss(batch.student, b)
        assert_close(loss(batch.student + shift, mixed), expected)
    assert_close(ramp_hinge(batch.student + shift, a), ramp_hinge(batch.student, a))


def test_gradients():
    s, _, y = random_batch()
    s.requires_grad_()
    mixed = torch.softmax(torch.randn(6, 7, dtype=torch.float64), 1)
    for loss in (generalized_cross_entropy, symmetric_cross_entropy):
        assert torch.autograd.gradcheck(loss, (s, y))
        assert torch.autograd.gradcheck(loss, (s, mixed))
    assert torch.autograd.gradcheck(ramp_hinge, (s, y))


def test_a_hopeless_example_is_bounded_and_without_pull():
    student = torch.tensor([[-1e4, 1e4]])
    label = torch.tensor([0])
    assert_close(generalized_cross_entropy(student, label, 0.5), torch.tensor([2.0]))
    assert (gradient(generalized_cross_entropy, student, label) == 0).all()


@pytest.mark.parametrize("q", [0.0, -1.0, 1.1, math.nan])
def test_q_out_of_range_is_refused(q):
    s, _, y = random_batch()
    with pytest.raises(ValueError, match="q must be in"):
        generalized_cross_entropy(s, y, q)


def test_a_positive_ramp_is_refused():
    s, _, y = random_batch()
    with pytest.raises(ValueError, match="a must be at most 0"):
        ramp_hinge(s, y, a=0.5)
