"""What configuration files call: `${or:…}`, `${better:…}`, `${directions:…}` and `${blank:…}`.

`${job_folder:…}` is what a resumed sweep writes into `hydra.sweep.subdir` (`sweep.matching`).

The commands import this before anything else of the project: joblib gives its processes the
resolvers of the first one, which has imported no more than that.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

from omegaconf import OmegaConf

HIGHER_IS_BETTER = re.compile(r"top\d+|mrr|agreement")


def higher_is_better(metric: str) -> bool:
    """Whether more of a metric, such as `val/top1`, is better."""
    return bool(HIGHER_IS_BETTER.fullmatch(metric.partition("/")[2]))


def direction(metric: str) -> str:
    """Return which way a search for the best of a metric is to go."""
    return "maximize" if higher_is_better(metric) else "minimize"


def directions(metric: str, goals: Sequence[str] | None) -> str | list[str]:
    """Return which way a search is to go for a metric, or for several goals instead."""
    return [direction(goal) for goal in goals] if goals else direction(metric)


def blank(generations: int) -> list[dict[str, Any]]:
    """Return an assistant like the student for each of several generations but the last."""
    if not isinstance(generations, int) or generations < 1:
        raise ValueError(f"generations must be a whole number of at least 1, not {generations!r}")
    return [{} for _ in range(generations - 1)]


def job_folder(folders: str, number: int) -> str:
    """Return a job's folder in its sweep's, of those listed with blanks between, as in a URL."""
    return unquote(folders.split(" ")[number])


OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)
OmegaConf.register_new_resolver("blank", blank, replace=True)
OmegaConf.register_new_resolver("directions", directions, replace=True)
OmegaConf.register_new_resolver("or", lambda first, second: first or second, replace=True)
OmegaConf.register_new_resolver(
    "better", lambda metric: "max" if higher_is_better(metric) else "min", replace=True
)
