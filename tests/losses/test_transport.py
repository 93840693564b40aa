"""Transport between predictions, against Sinkhorn's iteration in loops and exact distances."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.losses import class_costs, normalized_kd, wasserstein_kd
from tests.losses.loss_cases import (
    assert_close,
    batches,
    checks,
    gradient,
    log_softmax,
    random_batch,
    row_by_row,
    softmax,
    temperatures,
)


def random_costs(classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return class_costs(torch.randn(classes, 4, generator=generator, dtype=torch.float64))


def without(x, y):
    return [v for k, v in enumerate(x) if k != y]


def sinkhorn(a, b, cost, regularization, iterations):
    """The cost of a flow from a to b whose other ends are left out of the matrix altogether."""
    kernel = [[math.exp(-c / regularization) for c in row] for row in cost]
    u = [1.0] * len(a)
    for _ in range(iterations):
        v = [b[j] / math.fsum(kernel[i][j] * u[i] for i in range(len(a))) for j in range(len(b))]
        u = [a[i] / math.fsum(kernel[i][j] * v[j] for j in range(len(b))) for i in range(len(a))]
    pairs = [(i, j) for i in range(len(a)) for j in range(len(b))]
    return math.fsum(u[i] * kernel[i][j] * v[j] * cost[i][j] for i, j in pairs)


@checks
@given(batches(classes=(3, 6)), temperatures, st.integers(1, 12), st.floats(0.05, 1.0))
def test_wasserstein_kd_is_its_formula(batch, t, iterations, regularization):
    cost = random_costs(batch.classes)

    def formula(s, z, y):
        rows = without(cost.tolist(), y)
        sides = softmax(without(s, y), t), softmax(without(z, y), t)
        moved = sinkhorn(*sides, [without(row, y) for row in rows], regularization, iterations)
        return -softmax(z)[y] * log_softmax(s)[y] + 3.0 * moved

    actual = wasserstein_kd(*batch, cost, 3.0, regularization, iterations, t)
    assert_close(actual, row_by_row(formula, *batch), rtol=1e-7, atol=1e-8)
    assert (actual >= 0).all()


@checks
@given(batches(classes=(3, 6)), temperatures)
def test_without_transport_it_is_normalized_kd_without_the_others(batch, t):
    actual = wasserstein_kd(*batch, random_costs(batch.classes), gamma=0.0, temperature=t)
    assert_close(actual, normalized_kd(*batch, gamma=0.0))


def moved(s, z, y, cost, **options):
    plain = wasserstein_kd(s, z, y, cost, gamma=0.0)
    return wasserstein_kd(s, z, y, cost, gamma=1.0, **options) - plain


def test_equal_costs_without_entropy_give_the_total_variation():
    s, z, y = random_batch()
    cost = 1 - torch.eye(7, dtype=torch.float64)
    p, q = (torch.softmax(x.scatter(1, y.unsqueeze(1), -torch.inf), 1) for x in (s, z))
    options = {"regularization": 0.02, "iterations": 3000}
    assert_close(moved(s, z, y, cost, **options), (p - q).abs().sum(1) / 2, rtol=1e-3, atol=1e-3)


def test_costs_along_a_line_without_entropy_give_the_area_between_cumulative_shares():
    s, z, _ = random_batch()
    y = torch.zeros(6, dtype=torch.long)
    place = torch.arange(7, dtype=torch.float64)
    cost = (place - place.unsqueeze(1)).abs() / 7
    p, q = (torch.softmax(x[:, 1:], 1).cumsum(1) for x in (s, z))
    options = {"regularization": 0.01, "iterations": 5000}
    assert_close(moved(s, z, y, cost, **options), (p - q).abs().sum(1) / 7, rtol=1e-2, atol=1e-3)


def test_a_mistake_costs_less_between_classes_that_are_alike():
    prototypes = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.9, 0.1]])
    teacher, y = torch.tensor([[0.0, 9.0, 0.0, 0.0]]), torch.tensor([3])
    cost = torch.zeros(4, 4)
    cost[:3, :3] = class_costs(prototypes)
    alike, unlike = torch.tensor([[0.0, 0.0, 9.0, 0.0]]), torch.tensor([[9.0, 0.0, 0.0, 0.0]])
    assert moved(alike, teacher, y, cost) < moved(unlike, teacher, y, cost) / 10


@checks
@given(batches(classes=(3, 6)), st.floats(-50, 50), temperatures)
def test_shifts_of_either_side_change_nothing(batch, shift, t):
    s, z, y = batch
    cost = random_costs(batch.classes)
    expected = wasserstein_kd(s, z, y, cost, temperature=t)
    for pair in ((s + shift, z), (s, z - shift)):
        assert_close(wasserstein_kd(*pair, y, cost, temperature=t), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (6, 1)])
def test_gradients_in_student_and_temperature(shape):
    s, z, y = random_batch()
    t = torch.linspace(0.7, 3.0, max(1, math.prod(shape)), dtype=torch.float64).reshape(shape)
    cost = random_costs(7)
    assert torch.autograd.gradcheck(
        lambda a, b: wasserstein_kd(a, z, y, cost, gamma=2.0, temperature=b),
        (s.requires_grad_(), t.requires_grad_()),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("t", [0.05, 1.0, 1000.0])
def test_values_and_gradients_are_finite_for_hard_logits_and_costs(dtype, t):
    generator = torch.Generator().manual_seed(0)
    wide = (1e4 * torch.randn(4, 5, generator=generator)).clamp(-1e4, 1e4)
    constant, y = torch.full((4, 5), 3.7), torch.tensor([0, 1, 0, 4])
    costs = random_costs(5).float(), 1e6 * (1 - torch.eye(5)), torch.zeros(5, 5)
    pairs = (wide, wide.flip(1)), (constant, -constant), (wide, constant), (wide, wide)
    for student, teacher in pairs:
        for cost in costs:
            leaf = student.to(dtype).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                loss = wasserstein_kd(leaf, teacher.to(dtype), y, cost, 1e-3, temperature=t)
            loss.mean().backward()
            assert loss.dtype == torch.float32
            assert loss.isfinite().all()
            assert leaf.grad.isfinite().all()


def test_float32_keeps_three_digits():
    s, z, y = random_batch(classes=100)
    exact = wasserstein_kd(s, z, y, random_costs(100), temperature=8.0)
    single = wasserstein_kd(s.float(), z.float(), y, random_costs(100).float(), temperature=8.0)
    assert_close(single.double(), exact, rtol=1e-3, atol=0)


def test_nothing_but_the_student_gets_a_gradient_and_nothing_is_read():
    s, z, y = random_batch()
    prototypes = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    for x in (s, z):
        x.requires_grad_()
    with torch.inference_mode():
        frozen = z.clone()
    wasserstein_kd(s, frozen, y, class_costs(prototypes)).sum().backward()
    assert s.grad.isfinite().all()
    assert z.grad is None
    assert prototypes.grad is None
    cost = class_costs(prototypes.to("meta"))
    assert wasserstein_kd(*(x.to("meta") for x in (s, z, y)), cost).shape == (6,)


def test_an_example_does_not_depend_on_its_batch():
    s, z, y = random_batch()
    together = wasserstein_kd(s, z, y, random_costs(7))
    for i in range(6):
        one = slice(i, i + 1)
        assert_close(wasserstein_kd(s[one], z[one], y[one], random_costs(7)), together[one])


# Costs


@checks
@given(st.integers(0, 10**6), st.floats(0.1, 9.0))
def test_class_costs_are_their_formula(seed, sharpness):
    prototypes = torch.from_numpy(np.random.default_rng(seed).normal(size=(5, 3)))
    expected = [
        [1 - math.exp(-sharpness * (1 - np.dot(a, b) / math.sqrt(np.dot(a, a) * np.dot(b, b))))
         for b in prototypes.numpy()] for a in prototypes.numpy()
    ]  # fmt: skip
    costs = class_costs(prototypes, sharpness)
    assert_close(costs, torch.tensor(expected, dtype=torch.float64))
    assert (costs >= 0).all()
    assert_close(class_costs(7 * prototypes, sharpness), costs)


def test_what_does_not_fit_is_refused():
    s, z, y = random_batch()
    cost = random_costs(7)
    for options, message in (
        ({"cost": cost[:6, :6]}, r"shape \[7, 7\], got torch.float64 of shape \[6, 6\]"),
        ({"cost": cost > 1}, "floating-point"),
        ({"gamma": -1.0}, "gamma must be finite"),
        ({"regularization": 0.0}, "regularization must be positive"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            wasserstein_kd(s, z, y, **{"cost": cost, **options})
    with pytest.raises(ValueError, match="with two classes there is only one"):
        wasserstein_kd(s[:, :2], z[:, :2], y % 2, cost[:2, :2])
    with pytest.raises(ValueError, match=r"shape \[K, D\]"):
        class_costs(torch.zeros(3))
    with pytest.raises(ValueError, match="sharpness must be positive"):
        class_costs(torch.zeros(3, 2), 0.0)


def test_gradients_point_from_dear_classes_to_the_teachers():
    teacher, y = torch.tensor([[0.0, 0.0, 9.0]]), torch.tensor([0])
    cost = 1 - torch.eye(3)
    slope = gradient(wasserstein_kd, torch.zeros(1, 3), teacher, y, cost=cost)
    assert slope[0, 1] > 0 > slope[0, 2]
