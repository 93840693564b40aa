"""The soft-target losses against their formulas, limits and identities."""

import math

import numpy as np
import pytest
import torch
import torch.multiprocessing
from hypothesis import given
from hypothesis import strategies as st

from distill.losses import (
    cross_entropy,
    decoupled,
    dist,
    kl_divergence,
    logit_mse,
    reachable_confidence,
    soft_cross_entropy,
    standardized_kl,
    tempered_cross_entropy,
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

SHIFT_BLIND = [kl_divergence, soft_cross_entropy, logit_mse, dist]


def tempered_kl(s, z, t):
    return t * t * kl(softmax(z, t), log_softmax(z, t), log_softmax(s, t))


# Supervised


@checks
@given(batches(), st.floats(0, 1))
def test_cross_entropy_is_its_formula(batch, smoothing):
    def formula(s, y):
        q = [smoothing / len(s) + (1 - smoothing) * (k == y) for k in range(len(s))]
        return -math.fsum(a * b for a, b in zip(q, log_softmax(s), strict=True))

    expected = row_by_row(formula, batch.student, batch.target)
    assert_close(cross_entropy(batch.student, batch.target, smoothing), expected)
    one_hot = torch.eye(batch.classes, dtype=torch.float64)[batch.target]
    assert_close(cross_entropy(batch.student, one_hot, smoothing), expected)


@checks
@given(batches(), temperatures)
def test_tempered_cross_entropy_closes_the_free_energy_gap(batch, tau):
    def gap(s, y):
        free_energy_of_label = -s[y]
        minimum = -tau * math.log(math.fsum(math.exp(x / tau) for x in s))
        return free_energy_of_label - minimum

    expected = row_by_row(gap, batch.student, batch.target)
    assert_close(tempered_cross_entropy(batch.student, batch.target, tau), expected)


@checks
@given(batches())
def test_tempered_cross_entropy_between_perceptron_and_cross_entropy(batch):
    s, y = batch.student, batch.target
    assert_close(tempered_cross_entropy(s, y), cross_entropy(s, y))
    perceptron = s.amax(1) - s[torch.arange(len(s)), y]
    tau = 1e-4
    gap = tempered_cross_entropy(s, y, tau) - perceptron
    assert (gap >= -1e-12).all()
    assert (gap <= tau * math.log(batch.classes) + 1e-12).all()


@checks
@given(batches(rows=(2, 4)), st.floats(0, 1))
def test_supervised_losses_are_linear_in_mixed_labels(batch, share):
    eye = torch.eye(batch.classes, dtype=torch.float64)
    a, b = batch.target, batch.target.roll(1)
    mixed = share * eye[a] + (1 - share) * eye[b]
    for loss in (cross_entropy, tempered_cross_entropy):
        expected = share * loss(batch.student, a) + (1 - share) * loss(batch.student, b)
        assert_close(loss(batch.student, mixed), expected)


# Kullback–Leibler


@checks
@given(batches(), temperatures)
def test_kl_is_its_formula(batch, t):
    expected = row_by_row(lambda s, z: tempered_kl(s, z, t), batch.student, batch.teacher)
    actual = kl_divergence(batch.student, batch.teacher, t)
    assert_close(actual, expected)
    assert (actual >= 0).all()


@checks
@given(batches(bound=300.0), st.floats(0.05, 1.0))
def test_kl_is_its_formula_where_probabilities_underflow(batch, t):
    expected = row_by_row(lambda s, z: tempered_kl(s, z, t), batch.student, batch.teacher)
    assert_close(kl_divergence(batch.student, batch.teacher, t), expected)


@checks
@given(batches(), temperatures)
def test_kl_gradient_is_the_difference_of_probabilities(batch, t):
    actual = gradient(kl_divergence, batch.student, batch.teacher, temperature=t)
    for row, s, z in zip(actual, batch.student.tolist(), batch.teacher.tolist(), strict=True):
        expected = [t * (a - b) for a, b in zip(softmax(s, t), softmax(z, t), strict=True)]
        assert_close(row, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(), (6, 1)])
@pytest.mark.parametrize("loss", [kl_divergence, soft_cross_entropy, standardized_kl, dist])
def test_gradients_in_student_and_temperature(loss, shape):
    batch = random_batch()
    t = torch.linspace(0.7, 3.0, max(1, math.prod(shape)), dtype=torch.float64).reshape(shape)

    def function(s, temperature):
        return loss(s, batch.teacher, temperature=temperature)

    assert torch.autograd.gradcheck(
        function, (batch.student.requires_grad_(), t.requires_grad_()), check_batched_grad=False
    )
    assert torch.autograd.gradcheck(lambda x: function(batch.student.detach(), x), (t,))


def test_gradients_of_decoupled_tempered_and_mse():
    s, z, y = random_batch()
    s.requires_grad_()
    t = torch.full((6, 1), 1.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: decoupled(a, z, y, temperature=b), (s, t))
    assert torch.autograd.gradcheck(lambda a, b: tempered_cross_entropy(a, y, b), (s, t))
    assert torch.autograd.gradcheck(lambda a: logit_mse(a, z), (s,))
    assert torch.autograd.gradcheck(lambda a: logit_mse(a, z, centred=False), (s,))


@checks
@given(batches(), temperatures)
def test_a_temperature_tensor_is_that_temperature_in_each_row(batch, t):
    per_row = t + torch.arange(len(batch.student), dtype=torch.float64).unsqueeze(1)
    for loss in (kl_divergence, soft_cross_entropy):
        together = loss(batch.student, batch.teacher, per_row)
        for i, value in enumerate(together):
            alone = loss(batch.student[i : i + 1], batch.teacher[i : i + 1], per_row[i].item())
            assert_close(value.unsqueeze(0), alone)


@checks
@given(batches())
def test_kl_tends_to_the_centred_mse(batch):
    t = 1e5
    limit = logit_mse(batch.student, batch.teacher)
    assert_close(kl_divergence(batch.student, batch.teacher, t), limit, rtol=1e-3, atol=1e-6)
    actual = gradient(kl_divergence, batch.student, batch.teacher, temperature=t)
    expected = gradient(logit_mse, batch.student, batch.teacher)
    assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@checks
@given(batches(), temperatures)
def test_soft_cross_entropy_is_kl_plus_entropy(batch, t):
    def entropy(z):
        return -t * t * math.fsum(p * q for p, q in zip(softmax(z, t), log_softmax(z, t)))  # noqa: B905

    s, z = batch.student, batch.teacher
    expected = kl_divergence(s, z, t) + row_by_row(entropy, z)
    assert_close(soft_cross_entropy(s, z, t), expected)
    assert_close(
        gradient(soft_cross_entropy, s, z, temperature=t),
        gradient(kl_divergence, s, z, temperature=t),
    )


@pytest.mark.parametrize("classes", [10, 100, 1000])
@pytest.mark.parametrize("t", [1.0, 100.0, 1000.0])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_kl_keeps_three_digits_in_float32(classes, t, offset):
    generator = torch.Generator().manual_seed(classes)
    teacher = 2 * torch.randn(64, classes, generator=generator)
    student = teacher + 0.5 * torch.randn(64, classes, generator=generator) + offset
    exact = kl_divergence(student.double(), teacher.double(), t)
    assert_close(kl_divergence(student, teacher, t).double(), exact, rtol=1e-3, atol=0)


def test_kl_is_never_negative_next_to_equality():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(4096, 3, generator=generator)
    student = teacher + 1e-6 * torch.randn(4096, 3, generator=generator)
    for t in (1.0, 30.0, 1000.0):
        assert (kl_divergence(student, teacher, t) >= 0).all()


@checks
@given(batches(), st.floats(-50, 50), temperatures)
def test_shifts_of_either_side_change_nothing(batch, shift, t):
    s, z = batch.student, batch.teacher
    for loss in SHIFT_BLIND:
        options = {} if loss is logit_mse else {"temperature": t}
        expected = loss(s, z, **options)
        assert_close(loss(s + shift, z, **options), expected, rtol=1e-6, atol=1e-6 * t * t)
        assert_close(loss(s, z - shift, **options), expected, rtol=1e-6, atol=1e-6 * t * t)


@checks
@given(batches(classes=(3, 6), rows=(2, 4)), temperatures)
def test_zero_with_zero_gradient_at_equality(batch, t):
    z = torch.randn_like(batch.teacher)  # no constant row or column, where ρ is 0
    zero, flat = torch.zeros(len(z), dtype=z.dtype), torch.zeros_like(z)
    for loss in (kl_divergence, dist):
        assert torch.equal(loss(z, z, temperature=t), zero)
        assert_close(gradient(loss, z, z, temperature=t), flat, atol=1e-12)
    assert torch.equal(logit_mse(z, z), zero)
    assert torch.equal(logit_mse(z, z, centred=False), zero)
    assert torch.equal(decoupled(z, z, batch.target, temperature=t), zero)


@checks
@given(batches(), st.floats(-5, 5))
def test_logit_mse_is_its_formula(batch, shift):
    def raw(s, z):
        return math.fsum((a - b) ** 2 for a, b in zip(s, z, strict=True)) / (2 * len(s))

    def centred(s, z):
        gap = math.fsum(s) / len(s) - math.fsum(z) / len(z)
        return raw([a - gap for a in s], z)

    s, z = batch.student, batch.teacher
    assert_close(logit_mse(s, z), row_by_row(centred, s, z))
    assert_close(logit_mse(s, z, centred=False), row_by_row(raw, s, z))
    assert_close(
        logit_mse(z + shift, z, centred=False),
        torch.full((len(z),), shift**2 / 2, dtype=torch.float64),
    )


# Standardised


@pytest.mark.filterwarnings("ignore:standardised logits")
@checks
@given(batches(classes=(3, 6)), temperatures)
def test_standardized_kl_is_its_formula(batch, t):
    def standardise(x):
        mean = math.fsum(x) / len(x)
        variance = math.fsum((v - mean) ** 2 for v in x) / len(x)
        return [(v - mean) / math.sqrt(variance + 1e-6) for v in x]

    expected = row_by_row(
        lambda s, z: tempered_kl(standardise(s), standardise(z), t), batch.student, batch.teacher
    )
    assert_close(standardized_kl(batch.student, batch.teacher, t), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore:standardised logits")
@checks
@given(st.integers(0, 1000), st.floats(0.5, 4), st.floats(-9, 9))
def test_standardized_kl_ignores_scale_and_shift(seed, scale, shift):
    s, z, _ = random_batch(seed=seed)
    assert_close(standardized_kl(scale * s + shift, z), standardized_kl(s, z), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:standardised logits")
def test_standardized_kl_has_a_bounded_gradient_at_constant_rows():
    z = torch.randn(3, 20)
    steep = gradient(standardized_kl, torch.full((3, 20), 5.0), z)
    assert steep.isfinite().all()
    assert steep.abs().max() <= 1e3


@pytest.mark.parametrize("classes", [3, 10, 100])
@pytest.mark.parametrize("t", [0.5, 1.0, 2.0])
def test_reachable_confidence_is_what_one_class_above_equal_others_gets(classes, t):
    row = [1.0] + [0.0] * (classes - 1)
    mean, deviation = np.mean(row), np.std(row)
    best = max(softmax([(x - mean) / deviation for x in row], t))
    assert reachable_confidence(classes, t) == pytest.approx(best, rel=1e-12)


def test_standardized_kl_warns_of_a_low_confidence_only():
    s, z, _ = random_batch(classes=10)
    with pytest.warns(UserWarning, match="cannot reach a confidence of 0.9"):
        standardized_kl(s, z, 2.0)
    standardized_kl(s, z, 0.5)


# Decoupled


@checks
@given(batches(classes=(3, 6)), temperatures, st.floats(0, 2), st.floats(0, 9))
def test_decoupled_is_its_formula(batch, t, alpha, beta):
    def formula(s, z, y):
        p, q = softmax(z, t), softmax(s, t)
        rest_p, rest_q = (math.fsum(x[k] for k in range(len(x)) if k != y) for x in (p, q))
        b, c = [p[y], rest_p], [q[y], rest_q]
        target = math.fsum(m * math.log(m / n) for m, n in zip(b, c, strict=True) if m > 0)
        others = math.fsum(
            p[k] / rest_p * math.log(p[k] / rest_p / (q[k] / rest_q))
            for k in range(len(p))
            if k != y and p[k] > 0
        )
        return t * t * (alpha * target + beta * others)

    expected = row_by_row(formula, *batch)
    assert_close(decoupled(*batch, alpha, beta, t), expected, rtol=1e-7, atol=1e-8)


@checks
@given(batches(classes=(3, 6)), temperatures)
def test_kl_is_target_term_plus_weighted_rest(batch, t):
    p = torch.softmax(batch.teacher / t, 1)[torch.arange(len(batch.target)), batch.target]
    target = decoupled(*batch, alpha=1.0, beta=0.0, temperature=t)
    others = decoupled(*batch, alpha=0.0, beta=1.0, temperature=t)
    assert_close(target + (1 - p) * others, kl_divergence(*batch[:2], t))


@checks
@given(batches(classes=(3, 6)))
def test_target_term_of_a_sure_teacher_is_cross_entropy(batch):
    sure = 500.0 * torch.eye(batch.classes, dtype=torch.float64)[batch.target]
    actual = decoupled(batch.student, sure, batch.target, alpha=1.0, beta=0.0)
    assert_close(actual, cross_entropy(batch.student, batch.target))
    assert_close(kl_divergence(batch.student, sure), cross_entropy(batch.student, batch.target))


# DIST


def correlation(a, b):
    # Over their means: what is left of a constant is rounding, whatever its size.
    a, b = a / np.mean(a) - 1, b / np.mean(b) - 1
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    return float(a @ b) / math.prod(lengths) if min(lengths) > 1e-13 else 0.0


def dist_formula(s, z, beta, gamma, t):
    p = np.array([softmax(row, t) for row in s.tolist()])
    q = np.array([softmax(row, t) for row in z.tolist()])
    columns = np.mean([1 - correlation(p[:, j], q[:, j]) for j in range(p.shape[1])])
    column_term = gamma * columns if len(p) > 1 else 0.0
    rows = [beta * (1 - correlation(a, b)) + column_term for a, b in zip(p, q, strict=True)]
    return t * t * torch.tensor(rows, dtype=torch.float64)


@checks
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(2, 6), temperatures)
def test_dist_is_its_formula(seed, rows, classes, t):
    s, z, _ = random_batch(rows, classes, seed)
    expected = dist_formula(s, z, 1.5, 0.5, t)
    assert_close(dist(s, z, 1.5, 0.5, t), expected, rtol=1e-7, atol=1e-7)


def test_dist_counts_constant_rows_and_columns_as_uncorrelated():
    s, z, _ = random_batch()
    s[2], z[4] = 3.0, -1.0
    loss = dist(s, z, gamma=0.0)
    assert_close(loss[[2, 4]], torch.ones(2))
    assert (gradient(dist, s, z, gamma=0.0)[[2, 4]] == 0).all()
    same_rows = s[:1].expand_as(s)
    assert_close(dist(same_rows, z, beta=0.0), torch.ones(6))
    assert (gradient(dist, same_rows, z, beta=0.0) == 0).all()


def test_dist_of_one_example_has_no_column_term():
    s, z, _ = random_batch(rows=1)
    assert torch.equal(dist(s, z, beta=0.0), torch.zeros(1, dtype=torch.float64))


def test_dist_sees_the_columns_of_classes_too_rare_to_square():
    s, z, _ = random_batch(rows=8, classes=5)
    s[:, 4], z[:, 4] = s[:, 4] - 60, z[:, 4] - 60
    expected = dist_formula(s, z, 0.0, 1.0, 1.0)
    assert_close(dist(s.float(), z.float(), beta=0.0).double(), expected, rtol=1e-4, atol=1e-5)


def one_rank_of_dist(rank, world, address, sizes, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{address}", rank=rank, world_size=world
    )
    s, z, _ = random_batch(rows=sum(sizes))
    start = sum(sizes[:rank])
    mine = slice(start, start + sizes[rank])
    weight = torch.eye(7, dtype=torch.float64).requires_grad_()
    # Each rank's mean, brought to its share of the joined mean; DDP then averages over ranks.
    loss = (
        dist(s[mine] @ weight, z[mine], temperature=2.0).mean() * sizes[rank] * world / sum(sizes)
    )
    columns = dist(s[mine] @ weight, z[mine], beta=0.0, temperature=2.0).mean()
    in_columns, in_both = (
        torch.autograd.grad(x, weight, retain_graph=True)[0] for x in (columns, loss)
    )
    for gradient_of_rank in (in_columns, in_both):
        torch.distributed.all_reduce(gradient_of_rank)
        gradient_of_rank /= world
    torch.save((columns.detach(), in_columns, in_both), f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(4, 4), (5, 1)])
def test_dist_over_two_ranks_is_dist_of_the_joined_batch(tmp_path, sizes):
    arguments = (2, str(tmp_path / "meet"), sizes, str(tmp_path))
    torch.multiprocessing.spawn(one_rank_of_dist, arguments, nprocs=2)
    s, z, _ = random_batch(rows=sum(sizes))
    weight = torch.eye(7, dtype=torch.float64).requires_grad_()
    both = dist(s @ weight, z, temperature=2.0).mean()
    columns = dist(s @ weight, z, beta=0.0, temperature=2.0).mean()
    for rank in range(2):
        value, in_columns, in_both = torch.load(tmp_path / f"{rank}.pt")
        assert_close(value, columns.detach())
        assert_close(in_columns, torch.autograd.grad(columns, weight, retain_graph=True)[0])
        if sizes[0] == sizes[1]:
            assert_close(in_both, torch.autograd.grad(both, weight, retain_graph=True)[0])


# What is refused


@pytest.mark.parametrize("t", [0.0, -1.0, math.inf, math.nan])
def test_impossible_temperatures_are_refused(t):
    s, z, y = random_batch()
    for loss in (kl_divergence, soft_cross_entropy, standardized_kl, dist):
        with pytest.raises(ValueError, match="temperature must be positive"):
            loss(s, z, temperature=t)
    with pytest.raises(ValueError, match="temperature must be positive"):
        decoupled(s, z, y, temperature=t)
    with pytest.raises(ValueError, match="temperature must be positive"):
        tempered_cross_entropy(s, y, t)


@pytest.mark.parametrize("shape", [(1,), (6,), (3, 1), (6, 7), (1, 1)])
def test_temperature_tensors_of_other_shapes_are_refused(shape):
    s, z, _ = random_batch()
    with pytest.raises(ValueError, match=r"shape \[\] or \[6, 1\]"):
        kl_divergence(s, z, torch.ones(shape))


def test_two_classes_are_refused_where_nothing_is_left_to_learn():
    s, z, y = random_batch(classes=2)
    with pytest.raises(ValueError, match="two classes"):
        decoupled(s, z, y)
    with pytest.raises(ValueError, match="two classes"):
        standardized_kl(s, z)


def test_bad_smoothing_is_refused():
    s, _, y = random_batch()
    with pytest.raises(ValueError, match="label_smoothing"):
        cross_entropy(s, y, 1.5)
