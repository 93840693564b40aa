"""Relations among a batch's embeddings, against loops over pairs and triples."""

import doctest
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.losses import relational
from distill.losses.relational import (
    probabilistic_transfer,
    relational_angle,
    relational_distance,
    similarity_preserving,
)
from tests.losses.loss_cases import assert_close, checks, gradient

ALL = [relational_distance, relational_angle, probabilistic_transfer, similarity_preserving]
seeds, sizes = st.integers(0, 10**6), st.integers(1, 5)


def embeddings(rows=5, dimensions=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dimensions, generator=generator, dtype=torch.float64)


def pair(rows=5, seed=0):
    """Embeddings of different dimensions."""
    return embeddings(rows, 4, seed), embeddings(rows, 6, seed + 1)


def huber(x):
    return x * x / 2 if abs(x) <= 1 else abs(x) - 0.5


def length(x):
    return math.sqrt(math.fsum(v * v for v in x))


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def relative_distances(x):
    rows = range(len(x))
    distances = {(i, j): length(x[i] - x[j]) for i in rows for j in rows}
    mean = math.fsum(distances.values()) / max(len(x) * (len(x) - 1), 1)
    return {key: value / mean if mean else 0.0 for key, value in distances.items()}


def distance_formula(s, z):
    a, b, n = relative_distances(s), relative_distances(z), len(s)
    return [math.fsum(huber(a[i, j] - b[i, j]) for j in range(n)) / n for i in range(n)]


def cosine_at(x, i, j, k):
    first, second = x[j] - x[i], x[k] - x[i]
    lengths = length(first) * length(second)
    return dot(first, second) / lengths if lengths else 0.0


def angle_formula(s, z):
    n = len(s)
    pairs = list(itertools.product(range(n), range(n)))
    return [
        math.fsum(huber(cosine_at(s, i, j, k) - cosine_at(z, i, j, k)) for j, k in pairs) / n**2
        for i in range(n)
    ]


def neighbours(x, i):
    def affinity(j):
        return max((1 + dot(x[i], x[j]) / (length(x[i]) * length(x[j]))) / 2, 1e-7)

    weights = {j: affinity(j) for j in range(len(x)) if j != i}
    return {j: weight / math.fsum(weights.values()) for j, weight in weights.items()}


def neighbour_formula(s, z):
    values = []
    for i in range(len(s)):
        q, p = neighbours(s, i), neighbours(z, i)
        values.append(math.fsum(p[j] * math.log(p[j] / q[j]) for j in p))
    return values


def similarity_formula(s, z):
    def rows(x):
        products = [[dot(a, b) for b in x] for a in x]
        return [[v / length(row) for v in row] for row in products]

    return [
        math.fsum((a - b) ** 2 for a, b in zip(*both, strict=True)) / len(s)
        for both in zip(rows(s), rows(z), strict=True)
    ]


FORMULAS = {
    relational_distance: distance_formula,
    relational_angle: angle_formula,
    probabilistic_transfer: neighbour_formula,
    similarity_preserving: similarity_formula,
}


@pytest.mark.parametrize("loss", ALL)
@checks
@given(seed=seeds, rows=sizes)
def test_each_is_its_formula(loss, seed, rows):
    s, z = pair(rows, seed)
    expected = torch.tensor(FORMULAS[loss](s.numpy(), z.numpy()), dtype=torch.float64)
    assert_close(loss(s, z), expected)
    assert (loss(s, z) >= 0).all()


@checks
@given(seeds)
def test_means_over_examples_are_the_losses_of_a_batch(seed):
    s, z = pair(seed=seed)
    gram = [x @ x.T for x in (s, z)]
    gram = [g / g.norm(dim=1, keepdim=True) for g in gram]
    assert_close(similarity_preserving(s, z).mean(), (gram[0] - gram[1]).square().sum() / 25)
    distances = [torch.pdist(x) for x in (s, z)]
    difference = distances[0] / distances[0].mean() - distances[1] / distances[1].mean()
    both_ways = 2 * torch.nn.functional.huber_loss(difference, 0 * difference, reduction="sum")
    assert_close(relational_distance(s, z).mean(), both_ways / 25)


@pytest.mark.parametrize("loss", ALL)
@checks
@given(seed=seeds, scale=st.floats(0.01, 100))
def test_scales_and_rotations_change_nothing(loss, seed, scale):
    s, z = pair(seed=seed)
    rotation = torch.linalg.qr(embeddings(4, 4, seed + 2)).Q
    expected = loss(s, z)
    assert_close(loss(scale * s @ rotation, z), expected)
    assert_close(loss(s, scale * z), expected)


@pytest.mark.parametrize("loss", [relational_distance, relational_angle])
def test_shifts_do_not_change_distances_and_angles(loss):
    s, z = pair()
    assert_close(loss(s + 9.0, z - 5.0), loss(s, z))


@pytest.mark.parametrize("loss", ALL)
def test_zero_with_zero_gradient_at_equality(loss):
    z = embeddings()
    assert_close(loss(z, z), torch.zeros(5), atol=1e-14)
    assert_close(gradient(loss, z, z), torch.zeros_like(z), atol=1e-12)


@pytest.mark.parametrize("loss", ALL)
def test_the_order_of_a_batch_does_not_matter(loss):
    s, z = pair()
    order = torch.tensor([3, 0, 4, 1, 2])
    assert_close(loss(s[order], z[order]), loss(s, z)[order])


@pytest.mark.parametrize("loss", ALL)
def test_gradients_check(loss):
    s, z = pair()
    assert torch.autograd.gradcheck(lambda x: loss(x, z), s.requires_grad_())


@pytest.mark.parametrize("loss", ALL)
def test_a_batch_of_one_has_no_relations(loss):
    s, z = pair(rows=1)
    assert_close(loss(s, z), torch.zeros(1), atol=1e-14)
    assert_close(gradient(loss, s, z), torch.zeros_like(s), atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", ALL)
def test_values_and_gradients_are_finite(loss, dtype):
    generator = torch.Generator().manual_seed(0)
    ordinary = torch.randn(6, 8, generator=generator)
    twice = ordinary.clone()
    twice[1] = twice[0]
    opposite = ordinary.clone()
    opposite[1] = -opposite[0]
    cases = {
        "ordinary": ordinary,
        "large": 1e4 * ordinary.clamp(-1, 1),
        "small": 1e-3 * ordinary,
        "zero": torch.zeros(6, 8),
        "all the same": torch.ones(6, 8),
        "two the same": twice,
        "two opposite": opposite,
    }
    for student, teacher in itertools.product(cases, cases):
        leaf = cases[student].to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            values = loss(leaf, cases[teacher].to(dtype))
        values.mean().backward()
        case = f"{student}, {teacher}"
        assert values.dtype == torch.float32, case
        assert values.isfinite().all(), case
        assert (values >= 0).all(), case
        assert leaf.grad.isfinite().all(), case


@pytest.mark.parametrize("loss", ALL)
def test_autocast_changes_no_digit(loss):
    s, z = (x.bfloat16() for x in pair())
    expected = loss(s.float(), z.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(s, z), expected)
        assert torch.equal(loss(s.float(), z.float()), expected)
        assert loss(s.double(), z.double()).dtype == torch.float64


@pytest.mark.parametrize("loss", ALL)
def test_the_teacher_gets_no_gradient_and_may_come_from_inference_mode(loss):
    s, z = pair()
    s.requires_grad_(), z.requires_grad_()
    loss(s, z).sum().backward()
    expected, s.grad = s.grad, None
    assert z.grad is None
    with torch.inference_mode():
        frozen = z.clone()
    loss(s, frozen).sum().backward()
    assert torch.equal(s.grad, expected)


@pytest.mark.parametrize("loss", ALL)
def test_no_value_is_read_on_the_way(loss):
    assert loss(*(x.to("meta") for x in pair())).shape == (5,)


@pytest.mark.parametrize("loss", ALL)
def test_maps_are_flattened(loss):
    s, z = embeddings(5, 12), embeddings(5, 18, seed=1)
    assert torch.equal(loss(s.reshape(5, 3, 2, 2), z.reshape(5, 2, 3, 3)), loss(s, z))


@pytest.mark.parametrize("loss", ALL)
def test_what_does_not_fit_is_refused(loss):
    s, z = pair()
    with pytest.raises(ValueError, match="embeddings of 5 and 4 examples"):
        loss(s, z[:4])
    with pytest.raises(ValueError, match="student embeddings must be a floating-point"):
        loss(s.long(), z)
    with pytest.raises(ValueError, match=r"teacher embeddings .* \[5\]"):
        loss(s, z[:, 0])


def test_distances_keep_their_digits_far_from_the_origin():
    s, z = (x.float() for x in pair())
    expected = relational_distance(s.double(), z.double())
    shifted = relational_distance(s + 100, z + 100).double()
    assert_close(shifted, expected, rtol=1e-3, atol=1e-5)


def test_neighbours_keep_their_digits_next_to_equality_in_float32():
    z = embeddings(16, 8).float()
    s = z + 1e-3 * embeddings(16, 8, seed=1).float()
    exact = probabilistic_transfer(s.double(), z.double())
    assert_close(probabilistic_transfer(s, z).double(), exact, rtol=1e-2, atol=1e-12)


def test_angles_of_a_known_triangle():
    right = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    flat = np.array([[0.0, 0.0], [3.0, 0.0], [-4.0, 0.0]])
    values = relational_angle(torch.from_numpy(flat), torch.from_numpy(right))
    # cosines 0, 3/5 and 4/5 become −1, 1 and 1, each for two orders of the other corners
    expected = [2 * huber(d) / 9 for d in (-1.0, 1 - 3 / 5, 1 - 4 / 5)]
    assert_close(values, torch.tensor(expected, dtype=torch.float64))


def test_the_examples_run():
    results = doctest.testmod(relational)
    assert results.failed == 0
    assert results.attempted >= len(ALL)
