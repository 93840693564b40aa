"""Take turns, take medians, say what machine it was: what every benchmark here shares."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

RESULTS = Path(__file__).parent / "results"
Times = dict[str, list[float]]


class Row(NamedTuple):
    """One measured ratio, and the bound it is held to, if any.

    Args:
        name: what is compared with what.
        ratio: the median over rounds.
        least: what it has to reach.
        most: what it may reach.
        note: the two sides in their own units.
    """

    name: str
    ratio: float
    least: float | None = None
    most: float | None = None
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether the ratio is within its bounds."""
        return (self.least or 0) <= self.ratio and (self.most is None or self.ratio <= self.most)


def seconds(work: Callable[[], object]) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rounds(turns: Mapping[str, Callable[[], float]], repeats: int, warm: int = 1) -> Times:
    """Let all sides take turns, so that a busy machine slows all of them.

    Args:
        turns: side → what does its work once and returns the measure of it.
        repeats: rounds that count.
        warm: rounds before them that do not.

    Returns:
        Side → one value per round.
    """
    taken: Times = {name: [] for name in turns}
    for round_ in range(warm + repeats):
        for name, turn in turns.items():
            value = turn()
            if round_ >= warm:
                taken[name].append(value)
    return taken


def ratio(taken: Times, side: str, other: str) -> float:
    """Return the median over rounds of one side's value over another's, pair by pair."""
    return median(a / b for a, b in zip(taken[side], taken[other], strict=True))


def print_rows(rows: list[Row]) -> None:
    width = max(len(row.name) for row in rows) + 2
    print(f"{'':{width}}{'ratio':>8}  bound")
    for row in rows:
        bound = f"≥ {row.least:g}" if row.least else f"≤ {row.most:g}" if row.most else ""
        verdict = "" if row.holds else "MISSED"
        print(f"{row.name:{width}}{row.ratio:8.2f}  {bound:8}{verdict:8}{row.note}".rstrip())


def machine() -> str:
    """Return what this machine is, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    named = re.search(r"model name\s*:\s*(.+)", info)
    name = re.sub(r"\((R|TM)\)", "", named[1]) if named else platform.processor()
    wide = torch.backends.cpu.get_cpu_capability().replace("DEFAULT", "no AVX")
    return f"{name}, {wide}, {os.cpu_count()} cores"


def resident(field: str = "VmRSS") -> int:
    """Return bytes of resident memory.

    Args:
        field: `VmRSS` now, `RssAnon` without what is mapped from files, `VmHWM` the highest since
            it was last reset.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def save(folder: Path, name: str, command: str, tables: Mapping[str, Any]) -> Path:
    """Write one benchmark's tables into the machine's file, beside those of the others."""
    here = machine()
    path = folder / (re.sub(r"\W+", "-", here).strip("-").lower() + ".json")
    known = json.loads(path.read_text()) if path.is_file() else {}
    about = {
        "command": command,
        "when": datetime.now(UTC).isoformat(timespec="minutes"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    known |= {"machine": here, name: {**about, **tables}}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n")
    return path
