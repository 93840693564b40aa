"""What counts as a number where a person gives one, and how a rate is written."""

from __future__ import annotations

import math
from typing import Any


def is_number(value: Any) -> bool:
    """Whether a value is a number, NaN included; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """Whether a value is a finite number."""
    return is_number(value) and math.isfinite(value)


def rate_text(rate: float) -> str:
    """Return how many of something come in a second, for people: small rates in two digits.

    >>> rate_text(2000.4), rate_text(1 / 7)
    ('2,000', '0.14')
    """
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
