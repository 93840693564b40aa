"""The losses for unequal classes against their formulas."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.losses import (
    class_balanced_cross_entropy,
    class_balanced_weights,
    crammer_singer,
    cross_entropy,
    ldam,
    logit_adjusted_cross_entropy,
)
from tests.losses.loss_cases import (
    assert_close,
    batches,
    checks,
    log_softmax,
    random_batch,
    row_by_row,
)

counts_of_classes = st.lists(st.integers(1, 10**6), min_size=2, max_size=8)
betas = st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.9999, 1 - 1e-9])
WITH_COUNTS = [class_balanced_cross_entropy, ldam, logit_adjusted_cross_entropy]


@checks
@given(counts_of_classes, betas)
def test_weights_are_the_inverse_effective_numbers(counts, beta):
    def effective_number(n):  # (1 − βⁿ)/(1 − β) without cancellation near β = 1
        return -math.expm1(n * math.log(beta)) / (1 - beta) if beta else 1.0

    inverse = [1 / effective_number(n) for n in counts]
    expected = torch.tensor(inverse, dtype=torch.float64) * len(counts) / math.fsum(inverse)
    assert_close(class_balanced_weights(torch.tensor(counts).double(), beta), expected, rtol=1e-6)
    assert_close(class_balanced_weights(counts, beta), expected, rtol=1e-5)


@checks
@given(counts_of_classes, betas)
def test_weights_sum_to_the_classes_and_never_rise_with_the_count(counts, beta):
    weights = class_balanced_weights(sorted(counts), beta)
    assert weights.sum().item() == pytest.approx(len(counts), rel=1e-5)
    assert (weights.diff() <= 1e-6).all()


def test_weights_at_both_ends_of_beta():
    counts = [1, 10, 400]
    assert_close(class_balanced_weights(counts, 0.0), torch.ones(3))
    inverse = 1 / torch.tensor(counts, dtype=torch.float64)
    near_one = class_balanced_weights(counts, 1 - 1e-10)
    assert_close(near_one, 3 * inverse / inverse.sum(), rtol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.99])
def test_an_empty_class_gets_weight_zero_and_a_warning(beta):
    with pytest.warns(UserWarning, match="1 of 3 classes have no training examples"):
        weights = class_balanced_weights([5, 0, 20], beta)
    assert weights[1] == 0
    assert weights.sum().item() == pytest.approx(3)
    assert_close(weights[[0, 2]], 1.5 * class_balanced_weights([5, 20], beta), rtol=1e-6)


@checks
@given(batches(), st.data(), betas)
def test_class_balanced_cross_entropy_is_the_weighted_one(batch, data, beta):
    k = batch.classes
    counts = data.draw(st.lists(st.integers(1, 1000), min_size=k, max_size=k))
    weights = class_balanced_weights(torch.tensor(counts).double(), beta)
    expected = weights[batch.target] * cross_entropy(batch.student, batch.target)
    actual = class_balanced_cross_entropy(batch.student, batch.target, counts, beta)
    assert_close(actual, expected)
    # An example's loss does not depend on its company: a batch of one keeps its weight.
    alone = class_balanced_cross_entropy(batch.student[:1], batch.target[:1], counts, beta)
    assert_close(alone, expected[:1])


@checks
@given(batches(rows=(2, 4)), st.floats(0, 1))
def test_losses_are_linear_in_mixed_labels(batch, share):
    counts = list(range(3, 3 + batch.classes))
    eye = torch.eye(batch.classes, dtype=torch.float64)
    a, b = batch.target, batch.target.roll(1)
    mixed = share * eye[a] + (1 - share) * eye[b]
    for loss in (class_balanced_cross_entropy, logit_adjusted_cross_entropy):
        one, other = (loss(batch.student, y, counts) for y in (a, b))
        assert_close(loss(batch.student, mixed, counts), share * one + (1 - share) * other)


@checks
@given(batches(), st.data(), st.floats(0, 2), st.floats(0.1, 40))
def test_ldam_is_its_formula(batch, data, max_margin, scale):
    k = batch.classes
    counts = data.draw(st.lists(st.integers(1, 1000), min_size=k, max_size=k))
    raw = [n**-0.25 for n in counts]
    margins = [max_margin * r / max(raw) for r in raw]

    def soft(s, y):
        moved = [scale * (x - margins[y] * (k == y)) for k, x in enumerate(s)]
        return -log_softmax(moved)[y]

    def hard(s, y):
        return max(0.0, max(x for k, x in enumerate(s) if k != y) - s[y] + margins[y])

    options = {"class_counts": counts, "max_margin": max_margin}
    for formula, chosen in ((soft, {"scale": scale}), (hard, {"hinge": True})):
        actual = ldam(batch.student, batch.target, **options, **chosen)
        assert_close(actual, row_by_row(formula, batch.student, batch.target))


@checks
@given(batches())
def test_ldam_reduces_to_known_losses(batch):
    s, y, counts = batch.student, batch.target, [7] * batch.classes
    assert_close(ldam(s, y, counts, max_margin=0.0, scale=1.0), cross_entropy(s, y))
    assert_close(ldam(s, y, counts, max_margin=1.0, hinge=True), crammer_singer(s, y))


def test_the_rarest_class_has_the_largest_margin_of_ldam():
    level = torch.zeros(3, 3)
    actual = ldam(level, torch.arange(3), [16, 256, 65536], max_margin=0.8, hinge=True)
    assert_close(actual, torch.tensor([0.8, 0.4, 0.1]), rtol=1e-6)


@checks
@given(batches(), st.data(), st.floats(-1, 2))
def test_logit_adjustment_is_its_formula(batch, data, tau):
    k = batch.classes
    counts = data.draw(st.lists(st.integers(1, 1000), min_size=k, max_size=k))

    def formula(s, y):
        prior = [n / sum(counts) for n in counts]
        return -log_softmax([x + tau * math.log(p) for x, p in zip(s, prior, strict=True)])[y]

    actual = logit_adjusted_cross_entropy(batch.student, batch.target, counts, tau)
    assert_close(actual, row_by_row(formula, batch.student, batch.target))


@checks
@given(batches(), st.floats(-20, 20))
def test_logit_adjustment_without_imbalance_is_cross_entropy(batch, shift):
    s, y, k = batch.student, batch.target, batch.classes
    expected = cross_entropy(s, y)
    assert_close(logit_adjusted_cross_entropy(s, y, [3] * k, tau=1.7), expected)
    assert_close(logit_adjusted_cross_entropy(s, y, range(1, k + 1), tau=0.0), expected)
    uneven = [1 + 5 * i for i in range(k)]
    assert_close(
        logit_adjusted_cross_entropy(s + shift, y, uneven),
        logit_adjusted_cross_entropy(s, y, uneven),
    )


@pytest.mark.filterwarnings("ignore:1 of 3 classes")
def test_an_empty_class_counts_like_the_rarest():
    s, _, _ = random_batch(3, 3)
    y = torch.arange(3)
    for loss in (ldam, logit_adjusted_cross_entropy):
        assert_close(loss(s, y, [9, 0, 4]), loss(s, y, [9, 4, 4]))


def test_gradients():
    s, _, y = random_batch()
    s.requires_grad_()
    counts = [5, 4, 3, 2, 90, 8, 7]
    for loss in WITH_COUNTS:
        assert torch.autograd.gradcheck(lambda a: loss(a, y, counts), (s,))  # noqa: B023
    assert torch.autograd.gradcheck(lambda a: ldam(a, y, counts, hinge=True), (s,))


@pytest.mark.parametrize("loss", WITH_COUNTS)
@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ([1, 2], "one count per class, 7, got 2"),
        ([1, 2, 3, 4, 5, 6, -1], "finite and ≥ 0"),
        ([1, 2, 3, 4, 5, 6, math.nan], "finite and ≥ 0"),
        ([0] * 7, "at least one class"),
        (torch.ones(7, 1), r"shape \[K\]"),
    ],
)
def test_impossible_counts_are_refused(loss, counts, reason):
    s, _, y = random_batch()
    with pytest.raises(ValueError, match=reason):
        loss(s, y, counts)


def test_options_out_of_range_are_refused():
    s, _, y = random_batch()
    counts = [1] * 7
    for beta in (-0.1, 1.0):
        with pytest.raises(ValueError, match="beta"):
            class_balanced_weights(counts, beta)
        with pytest.raises(ValueError, match="beta"):
            class_balanced_cross_entropy(s, y, counts, beta)
    with pytest.raises(ValueError, match="max_margin"):
        ldam(s, y, counts, max_margin=-0.5)
    with pytest.raises(ValueError, match="scale"):
        ldam(s, y, counts, scale=0.0)
    with pytest.raises(ValueError, match="tau"):
        logit_adjusted_cross_entropy(s, y, counts, tau=math.inf)
