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
UNITS = ("epoch", "step")


def check_timing(label: str, schedule: str, unit: str, warmup: float, duration: int | None) -> None:
    """Refuse a timing that `value_at` cannot follow.

    Raises:
        ValueError: naming `label`, for an unknown schedule or unit, or times below zero.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown {label} {schedule!r}; there are {', '.join(SCHEDULES)}")
    if unit not in UNITS:
        raise ValueError(f"{label}.unit must be {' or '.join(UNITS)}, got {unit!r}")
    if not 0 <= warmup < math.inf or not 1 <= (duration or 1) < math.inf or duration == 0:
        raise ValueError(f"{label}.warmup must be at least 0 and {label}.duration at least 1")


def value_at(
    schedule: str,
    position: int,
    total: int,
    start: float,
    end: float,
    warmup: float = 0,
    duration: int | None = None,
) -> float:
    """Hold `start` for `warmup`, then move to `end`: a function of the position alone.

    Args:
        schedule: a name in `SCHEDULES`.
        position: the unit (epoch or step) that is asked for.
        total: how many units there are; the last is `total − 1`.
        start: the value at the beginning.
        end: the value reached at the end.
        warmup: units (below 1: the share of all) during which `start` is held.
        duration: units from the end of the warm-up to `end`; None lasts until the last.

    >>> [value_at("linear", k, 6, 4.0, 1.0, warmup=2) for k in range(6)]
    [4.0, 4.0, 4.0, 3.0, 2.0, 1.0]
    """
    held = int(warmup * total) if warmup < 1 else warmup
    length = duration or max(total - 1 - held, 1)
    progress = min(max((position - held) / length, 0.0), 1.0)
    return SCHEDULES[schedule](progress, start, end)
