"""How an annealed value moves: pure functions of progress in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[float, float, float], float]


def linear(progress: float, start: float, end: float) -> float:
    """Move in a straight line: `start + progress·(end − start)`.

    >>> linear(0.25, 8.0, 4.0)
    7.0
    """
    return start + progress * (end - start)


def cosine(progress: float, start: float, end: float) -> float:
    """Leave and arrive gently: `end + (start − end)·(1 + cos(π·progress))/2` (1608.03983).

    >>> cosine(0.5, 8.0, 4.0)
    6.0
    """
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def exponential(progress: float, start: float, end: float) -> float:
    """Change by a constant factor per unit of progress: `start·(end/start)^progress`.

    Raises:
        ValueError: if `start` or `end` is not positive.

    >>> exponential(0.5, 8.0, 2.0)
    4.0
    """
    if start <= 0 or end <= 0:
        raise ValueError(f"an exponential schedule needs positive ends, got {start} and {end}")
    return start * (end / start) ** progress


def step(progress: float, start: float, end: float, steps: int = 4) -> float:
    """Move in `steps` equal jumps, the first at progress `1/(steps + 1)`.

    >>> [step(p, 5.0, 1.0) for p in (0.0, 0.2, 0.59, 1.0)]
    [5.0, 4.0, 3.0, 1.0]
    """
    if steps < 1:
        raise ValueError(f"a step schedule needs at least one step, got {steps}")
    # The guard keeps a progress computed as 1/5 from falling below the edge it names.
    return linear(min(math.floor(progress * (steps + 1) + 1e-9), steps) / steps, start, end)


SCHEDULES: dict[str, Schedule] = {
    "linear": linear,
    "cosine": cosine,
    "exponential": exponential,
    "step": step,
}
