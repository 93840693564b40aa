"""Log back ends that are down: refused at the start, done without later."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from pytorch_lightning.loggers import Logger

from distill.utils.errors import first_line

log = logging.getLogger(__name__)
CALLS = ("log_metrics", "save", "after_save_checkpoint", "finalize")


def begin(logger: Logger, values: dict[str, Any]) -> None:
    """Tell a logger the configuration; from then on training does not end for what befalls it.

    Raises:
        ValueError: if it cannot be reached now, when nothing is lost yet.
    """
    name = type(logger).__name__
    try:
        logger.log_hyperparams(values)
    except Exception as error:  # each back end has its own
        why = first_line(error)
        raise ValueError(f"{name} cannot be reached: {why}; logger=none goes without") from error
    told: list[str] = []
    for call in CALLS:
        setattr(logger, call, forgiving(getattr(logger, call), name, told))


def forgiving(call: Callable[..., Any], name: str, told: list[str]) -> Callable[..., Any]:
    """Return a call that warns where it fails, once for all that share the list."""

    def attempted(*args: Any, **options: Any) -> Any:
        try:
            return call(*args, **options)
        except Exception as error:
            if not told:
                log.warning("%s fails (%s): training goes on, and metrics.csv has it all",
                            name, " ".join(str(error).split())[:200])  # fmt: skip
            told.append(name)
            return None

    return attempted
