"""What the configuration files call as `${or:…}` and `${better:…}`.

The commands import this before anything else of the project: joblib gives its processes the
resolvers of the first one, which has imported no more than that.
"""

from __future__ import annotations

import re

from omegaconf import OmegaConf

HIGHER_IS_BETTER = re.compile(r"top\d+|mrr|agreement")


def higher_is_better(metric: str) -> bool:
    """Whether more of a metric, such as `val/top1`, is better."""
    return bool(HIGHER_IS_BETTER.fullmatch(metric.partition("/")[2]))


OmegaConf.register_new_resolver("or", lambda first, second: first or second, replace=True)
OmegaConf.register_new_resolver(
    "better", lambda metric: "max" if higher_is_better(metric) else "min", replace=True
)
