"""A run directory, read for its page; nothing in it is trusted to be what it should."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np

from distill.utils.reading import there
from distill.utils.run_folder import METRICS, Points, by_epoch, read_history, read_summary
from distill.utils.run_folder import SUMMARY as SUMMARY

IMAGES = "examples.npz"
LARGEST_IMAGES = 2**26  # bytes, which no run comes near to: some thousand thumbnails


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
