"""What the folders of runs and sweeps hold, and where in a sweep's its jobs lie."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.utils.reading import read_json, read_yaml, there

SUMMARY = "summary.json"
METRICS = "metrics.csv"
RECORD = Path(".hydra", "overrides.yaml")  # of a job's overrides
ENDED = Path(".hydra", "ended")  # of a sweep's job that ended well and leaves no numbers
FAILED = Path(".hydra", "failed")  # of one that did not, since it was last begun
SWEEP = "multirun.yaml"  # Hydra's, in a sweep's folder
DEEPEST = 8  # folders between a sweep and a job
LARGEST_HISTORY = 2**27  # bytes, which no run comes near to: a million rows
Points = tuple[list[float], list[float]]


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, begun or finished."""
    return (folder / RECORD).is_file() or (folder / SUMMARY).is_file()


def jobs_in(folder: Path, depth: int = DEEPEST) -> list[Path]:
    """Return the folders of a sweep's jobs, however they are nested or named, 9 before 10.

    What is hidden, what lies in a job's folder and what belongs to a sweep within are passed over.
    """
    if not depth or not folder.is_dir():
        return []
    jobs: list[Path] = []
    inside = (path for path in folder.iterdir() if not path.name.startswith("."))
    for path in sorted(inside, key=lambda path: numbered(path.name)):
        if is_run(path):
            jobs.append(path)
        elif path.is_dir() and not path.is_symlink() and not (path / SWEEP).is_file():
            jobs += jobs_in(path, depth - 1)
    return jobs


def numbered(name: str) -> tuple[int, str]:
    """Return a sort key that puts job 10 after job 9."""
    return (int(name), "") if name.isdecimal() else (1 << 30, name)


def read_summary(path: Path) -> dict[str, Any]:
    """Read a run's numbers."""
    try:
        return read_json(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path.parent} holds no run that has ended: no {SUMMARY}"
        ) from None


def read_overrides(job: Path) -> list[str]:
    """Read a job's overrides, as they were typed."""
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


def by_epoch(history: Sequence[dict[str, str]], name: str) -> Points:
    """Return the epochs, counted from 1, that logged a value, and the values.

    Where an epoch has several, they are spread over it evenly, and its last is at its end.
    """
    rows = [row for row in history if row.get(name) and row.get("epoch")]
    several = Counter(row["epoch"] for row in rows)
    seen: Counter[str] = Counter()
    epochs = []
    for row in rows:
        seen[row["epoch"]] += 1
        epochs.append(float(row["epoch"]) + seen[row["epoch"]] / several[row["epoch"]])
    return epochs, [float(row[name]) for row in rows]
