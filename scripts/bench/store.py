"""Measure how a teacher store grows with classes, samples and views.

Each store is filled with random logits in batches of 1,024 rows of a view, then read by a fresh
process in batches of 128 random rows, as a shuffled epoch does: `first` with the checksums that are
checked once, `again` without. Memory is what that process has gained after reading every record:
`own`, and what is mapped from the files, which the system takes back when it needs it. Stores that
are larger than --max-gb are not written: their size is a formula.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import Row, resident, seconds

from distill.teacher.room import expected_bytes
from distill.teacher.store import TeacherStore
from distill.utils.memory import bytes_text

BATCH = 128
FILLED_AT_ONCE = 1024
HEAD = (
    f"{'K':>7}{'N':>12}{'V':>5}{'top-k':>7}{'size':>12}{'fill s':>9}"
    f"{'first ms':>10}{'again ms':>10}{'own MB':>9}{'mapped MB':>11}"
)
GROWTH: dict[str, list[tuple[int, int, int, int | None]]] = {  # what grows → stores as (K, N, V, k)
    "classes": [(k, 10_000, 1, None) for k in (10, 100, 1_000, 10_000, 50_000)],
    "samples": [(100, n, 1, None) for n in (1_000, 10_000, 100_000, 1_000_000)],
    "views": [(100, 10_000, v, None) for v in (1, 10, 100, 300)],
    "top-k": [(50_000, 10_000, 1, k) for k in (10, 100)],
    "ImageNet-1k": [(1_000, 1_281_167, v, k) for v, k in ((1, None), (300, None), (300, 20))],
    "ImageNet-21k": [(21_841, 14_197_122, 1, None), (21_841, 14_197_122, 30, 20)],
}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-gb", type=float, default=2.0, help="the largest store to write")
    parser.add_argument("--only", choices=list(GROWTH), help="one table")


def measure(options: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    tables: dict[str, Any] = {}
    print(HEAD)
    for what, shapes in GROWTH.items():
        if options.only in (None, what):
            tables[what] = [growth(*shape, options) for shape in shapes]
    return [], {"growth": tables}


def growth(
    classes: int, samples: int, views: int, topk: int | None, options: argparse.Namespace
) -> dict[str, Any]:
    """Return, and print, what one store takes."""
    size = expected_bytes(samples, classes, views, topk=topk)
    row: dict[str, Any] = {"classes": classes, "samples": samples, "views": views, "topk": topk}
    row["bytes"] = size
    line = f"{classes:7,}{samples:12,}{views:5}{topk or '–':>7}{bytes_text(size):>12}"
    if size > options.max_gb * 1e9:
        print(f"{line}  by formula", flush=True)
        return row
    with tempfile.TemporaryDirectory(prefix="distill-bench-") as made:
        folder = Path(made)
        row["fill_seconds"] = seconds(lambda: fill(open_store(folder, row)))
        found = sum(path.stat().st_size for path in folder.glob("view-*.bin"))
        assert found == size, f"{found} bytes, not {size}"
        row |= read_elsewhere(folder, row)
    print(
        f"{line}{row['fill_seconds']:9.2f}{row['first_ms']:10.3f}{row['again_ms']:10.3f}"
        f"{row['own_bytes'] / 1e6:9.1f}{row['mapped_bytes'] / 1e6:11.1f}",
        flush=True,
    )
    return row


def open_store(folder: Path, row: dict[str, Any]) -> TeacherStore:
    kept = {key: row[key] for key in ("samples", "classes", "views", "topk")}
    return TeacherStore(folder, {"for": "scripts/bench"}, **kept)


def fill(store: TeacherStore) -> None:
    logits = 3 * torch.randn(FILLED_AT_ONCE, store.layout.classes)
    for view in range(store.views):
        for rows in torch.arange(store.samples).split(FILLED_AT_ONCE):
            store.write(view, rows, logits[: len(rows)])
    store.close()


def read_elsewhere(folder: Path, row: dict[str, Any]) -> dict[str, float]:
    command = [sys.executable, __file__, str(folder), json.dumps(row)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def read(folder: Path, row: dict[str, Any]) -> dict[str, float]:
    """Return what reading takes in this process."""
    torch.zeros(BATCH, row["classes"]).half().float()  # what torch keeps is not the store's
    own, mapped = resident("RssAnon"), resident("RssFile")
    store = open_store(folder, row)
    times: dict[str, list[float]] = {"first": [], "again": []}
    whole = row["samples"] // BATCH * BATCH
    for taken in times.values():
        for view in range(store.views):
            for rows in torch.randperm(row["samples"])[:whole].split(BATCH):
                start = time.perf_counter()
                there = store.read(view, rows)[1]
                taken.append(time.perf_counter() - start)
                assert there.all()
    return {f"{name}_ms": 1e3 * median(taken) for name, taken in times.items()} | {
        "own_bytes": resident("RssAnon") - own,
        "mapped_bytes": resident("RssFile") - mapped,
    }


if __name__ == "__main__":
    print(json.dumps(read(Path(sys.argv[1]), json.loads(sys.argv[2]))))
