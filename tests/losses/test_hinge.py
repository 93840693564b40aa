"""The hinge losses against their formulas, kinks and reductions."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.losses import (
    crammer_singer,
    epsilon_insensitive_hinge,
    one_vs_rest_hinge,
    pairwise_soft_hinge,
    product_hinge,
    soft_hinge,
    squared_soft_hinge,
    weighted_sign_hinge,
    weston_watkins,
)
from tests.losses.loss_cases import (
    assert_close,
    batches,
    checks,
    gradient,
    random_batch,
    row_by_row,
    softmax,
    temperatures,
)

SIGNED = [
    soft_hinge,
    squared_soft_hinge,
    weighted_sign_hinge,
    product_hinge,
    epsilon_insensitive_hinge,
]
WITH_LABELS = [one_vs_rest_hinge, crammer_singer, weston_watkins]
conventions = st.sampled_from(["centred", "signed"])


def relu(x):
    return max(x, 0.0)


def sign(x):
    return (x > 0) - (x < 0)


def signed_targets(z, convention, temperature=1.0):
    k = len(z)
    if max(z) == min(z) and convention == "centred":
        return [0.0] * k  # without the rounding of K·(1/K) − 1, whose sign would count
    if convention == "centred":
        return [(k * p - 1) / (k - 1) for p in softmax(z, temperature)]
    return [2 * p - 1 for p in softmax(z, temperature)]


TERMS = {
    soft_hinge: lambda s, t: relu(abs(t) - sign(t) * s),
    squared_soft_hinge: lambda s, t: (
        (1 + t) / 2 * relu(1 - s) ** 2 + (1 - t) / 2 * relu(1 + s) ** 2
    ),
    weighted_sign_hinge: lambda s, t: abs(t) * relu(1 - sign(t) * s),
    product_hinge: lambda s, t: relu(1 - t * s),
    epsilon_insensitive_hinge: lambda s, t: abs(s - t),
}


def sure_teacher(batch):
    """Logits whose softmax is exactly one-hot."""
    return 2000.0 * torch.eye(batch.classes, dtype=torch.float64)[batch.target]


@pytest.mark.parametrize("loss", SIGNED)
@checks
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 4),
    k=st.integers(2, 6),
    t=temperatures,
    convention=conventions,
)
def test_soft_hinges_are_their_formulas(loss, seed, rows, k, t, convention):
    s, z, _ = random_batch(rows, k, seed)

    def formula(s, z):
        targets = signed_targets(z, convention, t)
        return math.fsum(TERMS[loss](a, b) for a, b in zip(s, targets, strict=True))

    assert_close(loss(s, z, target=convention, temperature=t), row_by_row(formula, s, z))


@checks
@given(batches(), st.floats(0, 3), conventions)
def test_epsilon_frees_a_zone_around_the_target(batch, epsilon, convention):
    def formula(s, z):
        targets = signed_targets(z, convention)
        return math.fsum(relu(abs(a - b) - epsilon) for a, b in zip(s, targets, strict=True))

    actual = epsilon_insensitive_hinge(batch.student, batch.teacher, epsilon, convention)
    assert_close(actual, row_by_row(formula, batch.student, batch.teacher))


@pytest.mark.parametrize("loss", SIGNED)
@checks
@given(seed=st.integers(0, 10**6), t=temperatures)
def test_both_conventions_agree_for_two_classes(loss, seed, t):
    s, z, _ = random_batch(classes=2, seed=seed)
    assert_close(
        loss(s, z, target="centred", temperature=t), loss(s, z, target="signed", temperature=t)
    )


@pytest.mark.parametrize("loss", [soft_hinge, weighted_sign_hinge, product_hinge])
@pytest.mark.parametrize("convention", ["signed"])
@checks
@given(batch=batches())
def test_with_a_sure_teacher_they_are_the_one_vs_rest_hinge(loss, convention, batch):
    expected = one_vs_rest_hinge(batch.student, batch.target)
    assert_close(loss(batch.student, sure_teacher(batch), target=convention), expected)


@checks
@given(batches())
def test_the_squared_hinge_with_a_sure_teacher_is_the_squared_one_vs_rest(batch):
    def formula(s, y):
        return math.fsum(relu(1 - (2 * (k == y) - 1) * x) ** 2 for k, x in enumerate(s))

    expected = row_by_row(formula, batch.student, batch.target)
    assert_close(squared_soft_hinge(batch.student, sure_teacher(batch), "signed"), expected)


@checks
@given(seed=st.integers(0, 10**6), convention=conventions, t=temperatures)
def test_the_squared_hinge_is_least_at_the_signed_target(seed, convention, t):
    _, z, _ = random_batch(seed=seed)
    rows = [signed_targets(row, convention, t) for row in z.tolist()]
    best = torch.tensor(rows, dtype=torch.float64)
    options = {"target": convention, "temperature": t}
    assert_close(gradient(squared_soft_hinge, best, z, **options), torch.zeros_like(best))
    nearby = best + 0.1 * torch.randn_like(best)
    assert (squared_soft_hinge(nearby, z, **options) > squared_soft_hinge(best, z, **options)).all()


@checks
@given(seed=st.integers(0, 10**6), convention=conventions, surplus=st.floats(1e-9, 3))
def test_the_soft_hinge_is_zero_once_the_margin_is_met(seed, convention, surplus):
    _, z, _ = random_batch(seed=seed)
    t = torch.tensor([signed_targets(row, convention) for row in z.tolist()], dtype=torch.float64)
    met = t + surplus * t.sign()
    assert torch.equal(soft_hinge(met, z, convention), torch.zeros(6, dtype=torch.float64))
    assert (soft_hinge(t - surplus * t.sign(), z, convention) >= 7 * surplus * 0.99).all()


def test_the_product_hinge_asks_an_unsure_teacher_for_a_wider_margin():
    z = torch.tensor([[0.5, 0.0]], dtype=torch.float64)
    t = math.tanh(0.25)  # 2·sigmoid(½) − 1
    for factor, expected in ((1.0001, 0.0), (0.9, 2 * 0.1)):
        s = torch.tensor([[factor / t, -factor / t]], dtype=torch.float64)
        assert_close(product_hinge(s, z), torch.tensor([expected], dtype=torch.float64))


@pytest.mark.parametrize("classes", [*range(2, 130), 1000])  # K·(1/K) rounds to 1 for most K only
def test_a_teacher_without_opinion_has_no_sign(classes):
    s, z = 5 * torch.randn(4, classes), torch.full((4, classes), 1.3)
    assert torch.equal(soft_hinge(s, z), torch.zeros(4))
    assert torch.equal(weighted_sign_hinge(s, z), torch.zeros(4))


@pytest.mark.parametrize("loss", [soft_hinge, epsilon_insensitive_hinge])
def test_no_gradient_at_a_kink(loss):
    z = torch.tensor([[9.0, 9.0, 9.0]])  # centred target exactly 0
    assert torch.equal(gradient(loss, torch.zeros(1, 3), z), torch.zeros(1, 3))


# Pairs


@checks
@given(batches(classes=(2, 7)), st.floats(0, 4), temperatures)
def test_pairwise_is_the_sum_over_pairs(batch, margin, t):
    p = torch.softmax(batch.teacher / t, 1)  # as computed, since its ties decide which pairs count

    def formula(s, p):
        pairs = [(i, j) for i in range(len(s)) for j in range(len(s)) if p[i] > p[j]]
        return math.fsum(relu(margin * (p[i] - p[j]) - (s[i] - s[j])) for i, j in pairs)

    actual = pairwise_soft_hinge(batch.student, batch.teacher, margin, t)
    assert_close(actual, row_by_row(formula, batch.student, p))
    assert_close(
        pairwise_soft_hinge(batch.student.float(), batch.teacher.float(), margin, t),
        row_by_row(formula, batch.student.float(), torch.softmax(batch.teacher.float() / t, 1)),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@checks
@given(
    seed=st.integers(0, 10**6), k=st.integers(2, 9), sharpness=st.sampled_from([0.0, 1.0, 500.0])
)
def test_pairwise_gradient_counts_pairs_among_ties(dtype, seed, k, sharpness):
    generator = torch.Generator().manual_seed(seed)
    s = (torch.randint(-2, 3, (3, k), generator=generator) / 4).to(dtype)
    z = sharpness * torch.randint(-1, 2, (3, k), generator=generator).to(dtype)
    p = torch.softmax(z, 1)
    gain = p - s
    expected = torch.zeros_like(s)
    for n in range(3):
        for i in range(k):
            for j in range(k):
                if p[n, i] > p[n, j] and gain[n, i] > gain[n, j]:
                    expected[n, i] -= 1
                    expected[n, j] += 1
    assert torch.equal(gradient(pairwise_soft_hinge, s, z), expected)


@checks
@given(batches())
def test_pairwise_with_a_sure_teacher_is_weston_watkins(batch):
    actual = pairwise_soft_hinge(batch.student, sure_teacher(batch))
    assert_close(actual, weston_watkins(batch.student, batch.target))


@checks
@given(batches(), st.floats(-30, 30), st.floats(0, 3))
def test_pairwise_is_blind_to_shifts(batch, shift, margin):
    actual = pairwise_soft_hinge(batch.student + shift, batch.teacher, margin)
    assert_close(actual, pairwise_soft_hinge(batch.student, batch.teacher, margin))


@checks
@given(batches(), st.floats(0, 3))
def test_pairwise_is_zero_where_the_student_has_the_margins(batch, margin):
    enough = (margin + 1e-9) * torch.softmax(batch.teacher, 1)
    zero = torch.zeros(len(enough), dtype=torch.float64)
    assert_close(pairwise_soft_hinge(enough, batch.teacher, margin), zero, atol=1e-12)


def test_pairwise_keeps_small_violations_beside_large_gains():
    # Two far groups of classes, in the teacher's order but for one pair that misses by ¼.
    s = torch.tensor([[1e4, 1e4 - 0.25, -1e4]])
    z = torch.tensor([[-1.0, 0.0, -900.0]])
    p = torch.softmax(z, 1)[0]
    assert_close(pairwise_soft_hinge(s, z), (p[1] - p[0] + 0.25).unsqueeze(0), rtol=1e-2)


def test_pairwise_sums_nearly_equal_gains_without_loss():
    s, z = torch.full((1, 1000), 9_999.25), torch.zeros(1, 1000)
    s[0, 0], z[0, 0] = 9_999.0, 5.0
    assert_close(pairwise_soft_hinge(s, z, margin=0.0), torch.tensor([999 * 0.25]), atol=0)


MEASURE_PEAK = """
import re, torch
from pathlib import Path
from distill.losses import pairwise_soft_hinge

def peak():  # of this process alone: getrusage would inherit the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
student = torch.randn(1024, 1000, requires_grad=True)
teacher = torch.randn(1024, 1000)
before = peak()
pairwise_soft_hinge(student, teacher).sum().backward()
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_pairwise_fits_a_gigabyte():
    run = subprocess.run(
        [sys.executable, "-c", MEASURE_PEAK], capture_output=True, text=True, check=True
    )
    kibibytes = int(run.stdout)
    assert 4_000 < kibibytes < 1_000_000


# Labels


@checks
@given(batches())
def test_label_hinges_are_their_formulas(batch):
    def one_vs_rest(s, y):
        return math.fsum(relu(1 - (2 * (k == y) - 1) * x) for k, x in enumerate(s))

    def strongest(s, y):
        return relu(1 + max(x for k, x in enumerate(s) if k != y) - s[y])

    def each(s, y):
        return math.fsum(relu(1 + x - s[y]) for k, x in enumerate(s) if k != y)

    formulas = {
        one_vs_rest_hinge: one_vs_rest,
        crammer_singer: strongest,
        weston_watkins: each,
    }
    for loss, formula in formulas.items():
        expected = row_by_row(formula, batch.student, batch.target)
        assert_close(loss(batch.student, batch.target), expected)


@checks
@given(batches(), st.floats(-50, 50))
def test_multiclass_hinges_are_blind_to_shifts(batch, shift):
    for loss in (crammer_singer, weston_watkins):
        actual = loss(batch.student + shift, batch.target)
        assert_close(actual, loss(batch.student, batch.target))


@checks
@given(batches(classes=(2, 2)))
def test_multiclass_hinges_agree_for_two_classes(batch):
    expected = weston_watkins(batch.student, batch.target)
    assert_close(crammer_singer(batch.student, batch.target), expected)


@checks
@given(batches())
def test_label_hinges_are_zero_beyond_their_margins(batch):
    eye = torch.eye(batch.classes, dtype=torch.float64)[batch.target]
    beyond = 2.5 * eye - 1.25
    zero = torch.zeros(len(beyond), dtype=torch.float64)
    for loss in WITH_LABELS:
        assert torch.equal(loss(beyond, batch.target), zero)
        assert (gradient(loss, beyond, batch.target) == 0).all()
        assert (loss(-beyond, batch.target) > 2).all()


def test_gradients():
    s, z, y = random_batch()
    s.requires_grad_()
    t = torch.full((6, 1), 1.7, dtype=torch.float64, requires_grad=True)
    for loss in [*SIGNED, pairwise_soft_hinge]:
        assert torch.autograd.gradcheck(lambda a, b: loss(a, z, temperature=b), (s, t))  # noqa: B023
        scalar = t[0, 0].detach().clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda b: loss(s.detach(), z, temperature=b), (scalar,))  # noqa: B023
    for loss in WITH_LABELS:
        assert torch.autograd.gradcheck(loss, (s, y))


# What is refused


@pytest.mark.parametrize("loss", SIGNED)
def test_other_conventions_are_refused(loss):
    s, z, _ = random_batch()
    with pytest.raises(ValueError, match='"centred" or "signed"'):
        loss(s, z, target="centered")


def test_options_out_of_range_are_refused():
    s, z, _ = random_batch()
    with pytest.raises(ValueError, match="epsilon"):
        epsilon_insensitive_hinge(s, z, epsilon=-0.1)
    with pytest.raises(ValueError, match="margin"):
        pairwise_soft_hinge(s, z, margin=-1.0)


@pytest.mark.parametrize("loss", [crammer_singer, weston_watkins])
def test_one_class_is_refused(loss):
    with pytest.raises(ValueError, match="at least 2 classes"):
        loss(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long))
