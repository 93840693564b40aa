"""What the studies share: quiet libraries, configurations, results on file, mean ± deviation."""

from __future__ import annotations

import json
import logging
import statistics
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import distill  # noqa: F401  (first: it makes torchvision importable)
from distill.config.overrides import CONF

Row = dict[str, Any]


def quiet() -> None:
    """Silence the libraries, and use one thread: models this small lose to a second one."""
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)


def composed(*overrides: str, name: str = "train") -> DictConfig:
    """Return a configuration of a command."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, overrides=list(overrides))


class Rows(list[Row]):
    """The rows of a study, kept in a file as they come, so that it can go on where it was."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file = file
        known = file.read_text().splitlines() if file.exists() else []
        super().__init__(map(json.loads, known))

    def keep(self, rows: Iterable[Row]) -> None:
        """Add rows, print them and put them on file."""
        for row in rows:
            self.append(row)
            print(self.file.stem, row, flush=True)
            with self.file.open("a") as log:
                log.write(json.dumps(row) + "\n")


def spread(values: Sequence[float], digits: int) -> str:
    """Return mean ± standard deviation over seeds."""
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.mean(values), deviation
