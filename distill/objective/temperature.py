"""Curriculum temperature: a temperature learned against the student instead of scheduled."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class LearnedTemperature(nn.Module):
    r"""Learn the temperature that makes the teacher hardest to follow.

    `T = low + (high − low)·sigmoid(r)`. The gradient that reaches `r` is reversed and scaled by
    `strength` λ: while the student descends, the temperature ascends. λ usually grows from 0 to 1
    on a cosine schedule, so that the task starts easy.

    Args:
        start: the temperature before anything is learned, between `low` and `high`.
        scope: `run`, one parameter; or `instance`, a small network of both logits.
        num_classes: K, needed for `instance`.
        low: the lowest temperature.
        high: the highest temperature.
        hidden: width of the network for `instance`.

    Raises:
        ValueError: for an unknown scope or temperatures out of order.

    Reference:
        Li et al., Curriculum Temperature for Knowledge Distillation, 2211.16231.
    """

    last_mean: Tensor

    def __init__(
        self,
        start: float,
        scope: str = "run",
        num_classes: int | None = None,
        low: float = 1.0,
        high: float = 21.0,
        hidden: int = 64,
    ) -> None:
        super().__init__()
        if not 0 < low < start < high < math.inf:
            raise ValueError(
                "a learned temperature needs 0 < objective.curriculum.low < objective.temperature "
                f"< objective.curriculum.high, got {low}, {start}, {high}"
            )
        share = (start - low) / (high - low)
        raw = torch.tensor(math.log(share / (1 - share)))
        self.low, self.high, self.strength = low, high, 1.0
        if scope == "run":
            self.raw = nn.Parameter(raw)
        elif scope == "instance":
            if not num_classes:
                raise ValueError("objective.curriculum.scope=instance needs num_classes")
            head = nn.Linear(hidden, 1)
            nn.init.zeros_(head.weight)  # every instance starts at `start`
            nn.init.constant_(head.bias, raw.item())
            self.network = nn.Sequential(nn.Linear(2 * num_classes, hidden), nn.ReLU(), head)
        else:
            raise ValueError(f"objective.curriculum.scope must be run or instance, got {scope!r}")
        self.scope = scope
        self.register_buffer("last_mean", torch.tensor(float(start)))

    @property
    def last(self) -> float:
        """The mean temperature of the last batch (reading it waits for the device)."""
        return self.last_mean.item()

    def forward(
        self, student: Tensor, teacher: Tensor, strength: float | Tensor | None = None
    ) -> Tensor:
        """Return the temperature, `[]` for the run or `[N, 1]` for instances.

        Args:
            student: logits `[N, K]`, whose gradient is not followed.
            teacher: logits `[N, K]`.
            strength: λ, in the place of the module's own.
        """
        strength = self.strength if strength is None else strength
        with torch.autocast(student.device.type, enabled=False):
            raw = self.raw if self.scope == "run" else self._of_instances(student, teacher)
            raw = _Reversed.apply(raw, strength)
            temperature = self.low + (self.high - self.low) * raw.sigmoid()
        self.last_mean.copy_(temperature.detach().mean())
        return temperature

    def _of_instances(self, student: Tensor, teacher: Tensor) -> Tensor:
        both = (student.detach().float(), teacher.detach().float())
        # Logits of any scale, so the network sees them with mean 0 and deviation 1.
        standard = [torch.nn.functional.layer_norm(x, x.shape[1:]) for x in both]
        return self.network(torch.cat(standard, dim=1))


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, raw: Tensor, strength: float | Tensor) -> Tensor:
        ctx.strength = strength
        return raw.view_as(raw)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradient, None
