"""Kullback–Leibler divergences that keep their digits where student and teacher nearly agree.

`Σ q·log(q/p)` cancels to noise there. As p and q sum to 1 it equals `Σ q·(e^r − 1 − r)` with
`r = log p − log q`, of which no term is negative.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.losses._common import Temperature, at_label, per_example

# A logit whose probability is 0 at any temperature, but whose differences stay finite.
NEVER = -1e30


def tempered_kl(s: Tensor, z: Tensor, temperature: Temperature) -> Tensor:
    """`T²·KL(softmax(z/T) ‖ softmax(s/T))`, differentiable once, in s and T."""
    value: Tensor = _TemperedKL.apply(s, z, temperature)
    return value


def log_odds(x: Tensor, rest: Tensor, label: Tensor, temperature: Temperature) -> Tensor:
    """`log p_y − log(1 − p_y)` of the tempered softmax; `rest` is x without the label."""
    chosen = (at_label(x, label).unsqueeze(1) / temperature).squeeze(1)
    return chosen - torch.logsumexp(rest / temperature, dim=1)


def binary_kl(s_odds: Tensor, z_odds: Tensor) -> Tensor:
    """`KL(sigmoid(z_odds) ‖ sigmoid(s_odds))`, differentiable in both."""
    yes = divergence_terms(F.logsigmoid(s_odds), F.logsigmoid(z_odds))
    return yes + divergence_terms(F.logsigmoid(-s_odds), F.logsigmoid(-z_odds))


def divergence_terms(s_log: Tensor, z_log: Tensor) -> Tensor:
    """The terms of `KL(q ‖ p)` for logarithms of p and q, differentiable in both."""
    r, p, q = s_log - z_log, s_log.exp(), z_log.exp()
    return q * (torch.expm1(r.clamp(max=1.0)) - r) + torch.relu(p - math.e * q)


class _TemperedKL(torch.autograd.Function):
    """`T²·Σ p_z·(e^r − 1 − r)`, `r = log p_s − log p_z`, which equals `T²·KL` as both sum to 1.

    No cancellation at large T, and an error δ common to a row's r changes the sum by δ²/2 only.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, z: Tensor, temperature: Temperature) -> Tensor:
        s_prob, s_lse = _softmax_and_logsumexp(s / temperature)
        z_prob, z_lse = _softmax_and_logsumexp(z / temperature)
        log_ratio = torch.sub(s, z).div_(temperature).sub_(s_lse - z_lse)
        terms = _terms_in_place(s_prob, z_prob, log_ratio)
        # No term is negative but for a last digit of expm1, which differs between machines.
        kl = terms.sum(dim=1).clamp_(min=0)
        slope = None
        if ctx.needs_input_grad[2]:
            slope = _slope_in_temperature(s, z, s_prob, z_prob, log_ratio)
            slope += 2 * per_example(temperature) * kl
        ctx.temperature = temperature
        ctx.save_for_backward(s_prob.sub_(z_prob), slope)
        return per_example(temperature) ** 2 * kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor | None]:
        difference, slope = ctx.saved_tensors
        temperature = ctx.temperature
        in_student = (gradient * per_example(temperature)).unsqueeze(1) * difference
        if slope is None:
            return in_student, None, None
        in_temperature = gradient * slope
        if temperature.dim() == 0:
            return in_student, None, in_temperature.sum()
        return in_student, None, in_temperature.unsqueeze(1)


def _softmax_and_logsumexp(x: Tensor) -> tuple[Tensor, Tensor]:
    # The largest probability is at least 1/K, so its logarithm is well conditioned.
    p = torch.softmax(x, dim=1)
    return p, x.amax(dim=1, keepdim=True) - p.amax(dim=1, keepdim=True).log()


def _terms_in_place(p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
    """`q·(e^r − 1 − r)` for `p = q·e^r`, without overflow where q is 0 and r large."""
    # p > e·q exactly where r > 1, so the relu adds what the clamp took from q·e^r.
    near = log_ratio.clamp(max=1.0).expm1_().sub_(log_ratio).mul_(q)
    return near.add_(torch.sub(p, q, alpha=math.e).relu_())


def _slope_in_temperature(
    s: Tensor, z: Tensor, s_prob: Tensor, z_prob: Tensor, log_ratio: Tensor
) -> Tensor:
    """`T²·∂KL/∂T = Σ (p_z − p_s)·s + Cov_{p_z}(z, r)`."""
    # Both are blind to a shift of the logits; removing it keeps digits.
    moved = ((z_prob - s_prob) * (s - s.amax(dim=1, keepdim=True))).sum(dim=1)
    spread = z_prob * (z - (z_prob * z).sum(dim=1, keepdim=True))
    return moved + (spread * log_ratio).sum(dim=1)
