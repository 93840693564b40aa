import doctest

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.losses import attention_transfer, features, hint


def maps(seed, channels=3, size=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, size, size, generator=generator, dtype=torch.float64)


def brute_attention(s, z):
    values = []
    for a, b in zip(s.numpy(), z.numpy(), strict=True):
        q = [
            np.array([(x[:, i, j] ** 2).sum() for i in range(4) for j in range(4)]) for x in (a, b)
        ]
        q = [x / np.sqrt((x**2).sum()) for x in q]
        values.append(((q[0] - q[1]) ** 2).sum())
    return torch.tensor(values)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_both_equal_their_formulas(seed):
    s, z = maps(seed), maps(seed + 1)
    torch.testing.assert_close(attention_transfer([s], [z]), brute_attention(s, z))
    expected = torch.tensor(
        [np.mean((a - b) ** 2) for a, b in zip(s.numpy(), z.numpy(), strict=True)]
    )
    torch.testing.assert_close(hint([s], [z]), expected)


@pytest.mark.parametrize("loss", [hint, attention_transfer])
def test_zero_at_equality_and_gradients_check(loss):
    s, z = maps(0).requires_grad_(), maps(1)
    assert loss([s], [s.detach()]).abs().max() < 1e-12
    assert torch.autograd.gradcheck(lambda x: loss([x, x], [z, 2 * z]), s)


@given(scale=st.floats(0.01, 100))
def test_attention_ignores_scale_and_the_number_of_channels(scale):
    s = maps(0)
    twice = torch.cat([s, s], dim=1) * scale
    assert attention_transfer([s], [twice]).abs().max() < 1e-10


def test_the_larger_map_is_averaged_down():
    small, large = torch.ones(1, 2, 2, 2), torch.ones(1, 2, 4, 4)
    large[..., ::2] = 3.0
    assert hint([large], [small]).item() == pytest.approx(1.0)
    assert hint([small], [large]).item() == pytest.approx(1.0)


def test_the_teacher_gets_no_gradient_and_may_come_from_inference_mode():
    s = maps(0).requires_grad_()
    with torch.inference_mode():
        z = maps(1) * 2
    (hint([s], [z]) + attention_transfer([s], [z])).sum().backward()
    assert s.grad.isfinite().all()


def test_maps_that_do_not_compare_are_refused():
    with pytest.raises(ValueError, match="3 and 5 channels"):
        hint([maps(0)], [maps(0, channels=5)])
    with pytest.raises(ValueError, match="1 maps against 2"):
        attention_transfer([maps(0)], [maps(0), maps(1)])


def test_the_examples_run():
    assert doctest.testmod(features).failed == 0
