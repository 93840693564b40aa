"""What the loss tests share: random batches and plain-Python pieces of the formulas."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

checks = settings(max_examples=30, deadline=None, derandomize=True)
temperatures = st.floats(0.2, 20.0)


class Batch(NamedTuple):
    student: torch.Tensor
    teacher: torch.Tensor
    target: torch.Tensor

    @property
    def classes(self):
        return self.student.shape[1]


@st.composite
def batches(draw, classes=(2, 6), rows=(1, 4), bound=8.0):
    """Float64 logits on a grid of eighths or not, so that ties and zeros come up too."""
    shape = draw(st.integers(*rows)), draw(st.integers(*classes))
    eighths = st.integers(int(-8 * bound), int(8 * bound)).map(lambda n: n / 8)
    values = arrays(np.float64, shape, elements=st.one_of(st.floats(-bound, bound), eighths))
    target = arrays(np.int64, shape[:1], elements=st.integers(0, shape[1] - 1))
    return Batch(*(torch.from_numpy(draw(a).copy()) for a in (values, values, target)))


def random_batch(rows=6, classes=7, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    return Batch(student, teacher, torch.randint(classes, (rows,), generator=generator))


def row_by_row(formula, *tensors):
    """The formula, written for lists and numbers of one example, over the batch."""
    values = [formula(*row) for row in zip(*(t.tolist() for t in tensors), strict=True)]
    return torch.tensor(values, dtype=torch.float64)


def assert_close(actual, expected, rtol=1e-9, atol=1e-9):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, check_dtype=False)


def gradient(loss, student, *arguments, **options):
    leaf = student.detach().clone().requires_grad_()
    (result,) = torch.autograd.grad(loss(leaf, *arguments, **options).sum(), leaf)
    return result


def log_softmax(logits, temperature=1.0):
    scaled = [x / temperature for x in logits]
    peak = max(scaled)
    total = math.log(math.fsum(math.exp(x - peak) for x in scaled))
    return [x - peak - total for x in scaled]


def softmax(logits, temperature=1.0):
    return [math.exp(x) for x in log_softmax(logits, temperature)]


def kl(p, log_p, log_q):
    return math.fsum(a * (b - c) for a, b, c in zip(p, log_p, log_q, strict=True))
