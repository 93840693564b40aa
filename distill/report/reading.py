"""A run directory, read for its page; nothing in it is trusted to be what it should."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import yaml

from distill.models.checkpoint import inside, read_json
from distill.utils.errors import first_line
from distill.utils.run_folder import RECORD
from distill.utils.run_folder import SUMMARY as SUMMARY

METRICS, IMAGES = "metrics.csv", "examples.npz"
# Bytes that no run comes near to: a million rows, and some thousand thumbnails.
LARGEST_HISTORY, LARGEST_IMAGES, LARGEST_YAML = 2**27, 2**26, 2**22
Points = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Run:
    """What a run left behind.

    Attributes:
        folder: the run directory.
        summary: the content of `summary.json`.
        history: the rows of `metrics.csv`.
        baseline_history: the same of the student without a teacher, where this run trained it.
        images: thumbnails `[n, H, W, C]` of the summary's examples, in their order.
    """

    folder: Path
    summary: dict[str, Any]
    history: list[dict[str, str]]
    baseline_history: list[dict[str, str]]
    images: Sequence[np.ndarray]


def read_run(folder: Path) -> Run:
    """Read a run directory.

    Raises:
        FileNotFoundError: if it holds no run that has ended.
        ValueError: if a file is damaged.
    """
    return Run(
        folder,
        read_summary(folder / SUMMARY),
        read_history(folder / METRICS),
        read_history(folder / "baseline" / METRICS),
        read_images(folder / IMAGES),
    )


def read_summary(path: Path) -> dict[str, Any]:
    """Read a run's numbers."""
    try:
        return read_json(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path.parent} holds no run that has ended: no {SUMMARY}"
        ) from None


def read_overrides(job: Path) -> list[str]:
    """Read what a job was told, as it was told."""
    file = job / RECORD
    listed = read_yaml(file) or []
    if not isinstance(listed, list):
        raise ValueError(f"{file} is damaged: it does not hold a list")
    return [str(override) for override in listed]


def read_history(path: Path) -> list[dict[str, str]]:
    """Read what was logged during training; nothing where nothing was."""
    if not there(path, LARGEST_HISTORY):
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def read_images(path: Path) -> Sequence[np.ndarray]:
    """Read thumbnails; an array of objects, which would be unpickled, is refused."""
    if not there(path, LARGEST_IMAGES):
        return ()
    try:
        with ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > LARGEST_IMAGES:
            raise ValueError(f"it unpacks to {unpacked:,} bytes")
        with np.load(path, allow_pickle=False) as file:
            images = file["images"]
    except Exception as error:  # a damaged archive fails in many ways
        raise ValueError(f"{path} is damaged: {error}") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"{path} is damaged: it does not hold images")
    return list(images)


def read_yaml(path: Path) -> Any:
    """Read a file of Hydra's as plain values; None where there is none.

    Nothing in it is resolved: an interpolation could name a variable of the reader's environment.
    """
    if not there(path, LARGEST_YAML):
        return None
    try:
        return parsed_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {first_line(error)}") from error


def parsed_yaml(text: str) -> Any:
    """Return a text of YAML as plain values; see `read_yaml`."""
    return yaml.load(text, PlainLoader)


class PlainLoader(yaml.SafeLoader):
    """A loader without aliases, by which a few lines can stand for more than there is memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse an alias; see `yaml.composer.Composer`."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias")
        return super().compose_node(parent, index)


def there(path: Path, largest: int) -> bool:
    """Whether there is a file, refusing a link out of its folder and what is out of proportion."""
    if not path.is_symlink() and not path.is_file():
        return False
    size = inside(path.parent, path.name).stat().st_size
    if size > largest:
        raise ValueError(f"{path} is damaged: it has {size:,} bytes")
    return True


def by_epoch(history: Sequence[dict[str, str]], name: str) -> Points:
    """Return the epochs, counted from 1, that logged a value, and the values."""
    rows = [row for row in history if row.get(name) and row.get("epoch")]
    return [float(row["epoch"]) + 1 for row in rows], [float(row[name]) for row in rows]


def temperature_of(run: Run) -> Points:
    """Return how the objective's temperature moved, over epochs; nothing where there is none."""
    learned = by_epoch(run.history, "train/temperature")
    if learned[0]:
        return learned
    steps = [float(row["step"]) for row in run.history if row.get("epoch")]
    moved = [row for row in run.history if row.get("temperature")]
    if moved and steps:
        per_epoch = (max(steps) + 1) / run.summary["epochs"]["last"]
        places = [float(row["step"]) / per_epoch for row in moved]
        return places, [float(row["temperature"]) for row in moved]
    constant = run.summary["config"]["objective"].get("temperature")
    epochs = by_epoch(run.history, "val/top1")[0]
    if isinstance(constant, int | float) and constant != 1 and epochs:
        return [0.0, epochs[-1]], [float(constant)] * 2
    return [], []
