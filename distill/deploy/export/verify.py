"""Exported files judged: the whole test split through their own runtime, against torch's float."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from distill.data import DataModule
from distill.data.sources.splits import Split
from distill.data.views.views import CLEAN
from distill.deploy.export.program import Runtime
from distill.metrics import (
    agreement,
    expected_calibration_error,
    negative_log_likelihood,
    topk_accuracy,
)
from distill.report.table import number, show

SIZES = {1: 100, 64: 20}  # batches that are timed, and how often
ODD = 7  # a batch that no exporter has thought of
Row = dict[str, Any]
Prepare = Callable[[Tensor], Tensor]  # images in [0, 1] → what the program takes


def test_images(data: DataModule, prepare: Prepare) -> Iterator[Tensor]:
    """Yield the test split in order, as the program takes it."""
    return view_batches(data, data.test, CLEAN, torch.arange(len(data.test)), prepare)


def calibration_images(data: DataModule, count: int, prepare: Prepare) -> Iterator[Tensor]:
    """Yield training views, chosen by the data module's seed, as the program takes them."""
    generator = torch.Generator().manual_seed(data.seed)
    chosen = torch.randperm(len(data.train), generator=generator)[:count]
    return view_batches(data, data.train, 0, chosen, prepare)


def view_batches(
    data: DataModule, split: Split, number: int, positions: Tensor, prepare: Prepare
) -> Iterator[Tensor]:
    """Yield one view of some of a split's images in batches `[N, C, H, W]`, on the CPU."""
    batches = positions.split(data.batch_size)
    for batch in data.in_order(split, number, batches, torch.device("cpu")):
        yield prepare(batch.view)


def answers(run: Runtime, batches: Iterable[Tensor]) -> Tensor:
    """Return a runtime's logits, float32 `[N, K]`, for all batches."""
    with torch.inference_mode():
        return torch.cat([run(images) for images in batches])


def scores(logits: Tensor, target: Tensor, reference: Tensor) -> Row:
    """Return `top1`, `nll`, `ece` and the `agreement` with the float student.

    Args:
        logits: what is judged `[N, K]`; log-probabilities may be −∞.
        target: labels `[N]`.
        reference: the float student's logits `[N, K]`.
    """
    return {
        "top1": float(topk_accuracy(logits, target, 1)),
        "nll": float(negative_log_likelihood(logits, target)),
        "ece": float(expected_calibration_error(logits.double().softmax(1), target)),
        "agreement": float(agreement(logits, reference)),
    }


def check_batches(run: Runtime, shape: tuple[int, ...], classes: int, name: str) -> None:
    """Refuse a file that does not take batches of any size.

    Args:
        run: images `[N, C, H, W]` → logits `[N, K]`.
        shape: `(C, H, W)`.
        classes: K.
        name: of the file, for messages.
    """
    for size in (*SIZES, ODD):
        output = tuple(run(torch.zeros(size, *shape)).shape)
        if output != (size, classes):
            raise ValueError(f"{name} answers {output} for {size} images, not {(size, classes)}")


def milliseconds(runs: Mapping[str, Runtime], shape: tuple[int, ...]) -> dict[str, Row]:
    """Return what a batch of 1 and of 64 takes each runtime: medians of repeats, taken in turns.

    Args:
        runs: name → images `[N, C, H, W]` to logits.
        shape: `(C, H, W)`.
    """
    taken: dict[str, Row] = {name: {f"ms_batch{size}": [] for size in SIZES} for name in runs}
    for size, repeats in SIZES.items():
        images = torch.rand(size, *shape)
        for _ in range(repeats):
            for name, run in runs.items():
                start = time.perf_counter()
                with torch.inference_mode():
                    run(images)
                taken[name][f"ms_batch{size}"].append(1000 * (time.perf_counter() - start))
    return {
        name: {key: statistics.median(values) for key, values in row.items()}
        for name, row in taken.items()
    }


def print_rows(rows: dict[str, Row], title: str) -> None:
    """Print rows by name; times also as how often they fit into the first row's.

    An empty row is one of a file that was not written.
    """
    first = next(iter(rows.values()))
    columns = ["", "top-1 %", "NLL", "ECE %", "agreement %"]
    columns += [*(f"batch of {size}, ms" for size in SIZES), "KB"]
    lines = [
        [
            name,
            number(row.get("top1"), 100, 2),
            "∞" if row.get("nll") == math.inf else number(row.get("nll"), 1, 4),
            number(row.get("ece"), 100, 2),
            number(row.get("agreement"), 100, 2),
            *(latency(row, first, f"ms_batch{size}") for size in SIZES),
            number(row.get("bytes"), 1e-3, 0),
        ]
        for name, row in rows.items()
    ]
    least = ["ECE %", "NLL", f"batch of {max(SIZES)}, ms", "agreement %"]
    show(columns, lines, title, drop=least, rest="export.json")


def latency(row: Row, first: Row, key: str) -> str:
    """Return a time and how much faster it is than the first row's."""
    if key not in row:
        return "–"
    return f"{row[key]:.2f} ({first[key] / row[key]:.1f}×)"
