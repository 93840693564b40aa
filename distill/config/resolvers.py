"""What configuration files call: `${or:…}`, `${better:…}`, `${cache_folder:}` and the like.

`${job_folder:…}` is what a resumed sweep writes into `hydra.sweep.subdir` (`sweep.matching`).

The commands import this before anything else of the project: joblib gives its processes the
resolvers of the first one, which has imported no more than that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

from omegaconf import OmegaConf

from distill.utils.files import resolved_path

HIGHER_IS_BETTER = re.compile(r"top\d+|mrr|agreement|balanced_accuracy|macro_f1")


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


def recommended_lr(name: str | None) -> float:
    """Return the learning rate of AdamW to begin with, for a student of that name.

    The slim ones take the largest that was tried (2e-3 … 3e-2); it was the best for the student
    without a teacher, too.
    """
    return 3e-2 if str(name).startswith("slim_") else 1e-3


def cifar_lr(name: str | None, times: float = 1) -> float:
    """Return so many times the rate of SGD that the literature trains a network for CIFAR-100 with.

    Source: Tian et al., 1910.10699: 0.05, and 0.01 for MobileNetV2 and the ShuffleNets.
    """
    light = str(name).startswith(("cifar_mobilenet", "cifar_shufflenet"))
    return times * (0.01 if light else 0.05)


def best_precision(accelerator: str) -> str:
    """Return the precision that training is fastest in without a loss that could be told."""
    if accelerator not in ("auto", "gpu", "cuda"):
        return "32-true"
    import torch

    # Older GPUs compute in bfloat16 step by step.
    fast = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return "bf16-mixed" if fast else "32-true"


def cache_folder() -> str:
    """Return where runs keep what they share: `DISTILL_CACHE`, or as the system has its caches.

    A variable that is set to nothing is not set. No home is needed where a variable says it all.
    """
    own, systems = os.environ.get("DISTILL_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return str(resolved_path(own or f"{systems or '~/.cache'}/distill"))


def job_folder(folders: str, number: int) -> str:
    """Return a job's folder in its sweep's, of those listed with blanks between, as in a URL."""
    return unquote(folders.split(" ")[number])


OmegaConf.register_new_resolver("cache_folder", cache_folder, replace=True)
OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)
OmegaConf.register_new_resolver("best_precision", best_precision, replace=True)
OmegaConf.register_new_resolver("cifar_lr", cifar_lr, replace=True)
OmegaConf.register_new_resolver("blank", blank, replace=True)
OmegaConf.register_new_resolver("recommended_lr", recommended_lr, replace=True)
OmegaConf.register_new_resolver("directions", directions, replace=True)
OmegaConf.register_new_resolver("or", lambda first, second: first or second, replace=True)
OmegaConf.register_new_resolver(
    "better", lambda metric: "max" if higher_is_better(metric) else "min", replace=True
)
