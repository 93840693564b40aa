"""Time the metrics, and measure their memory, against torchmetrics on the same logits.

The reference is what torchmetrics offers for the same questions: top-1, top-5 and
`MulticlassCalibrationError`. Both sides get the same float32 logits in the same batches; resetting,
the softmax and computing the values count. `basic` is the set to hold below the limit; the others
come alone.

Memory is measured in fresh processes that make their batches as they go, at N rows and at 4N: the
state in bytes, and the highest resident memory above what it was before the metrics were made.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import distill  # noqa: F401  (first: it makes torchvision, and so torchmetrics, importable)

# isort: split
import torch
from measure import Row, print_rows, ratio, resident, rounds, seconds
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from distill import metrics

LIMITS = {"basic": 3.0}
Batch = tuple[Tensor, Tensor]


class Side:
    """Metrics of logits, scores or probabilities, fed and read together."""

    def __init__(
        self,
        on_logits: dict[str, Metric] | None = None,
        on_probs: dict[str, Metric] | None = None,
        on_odds: dict[str, Metric] | None = None,
        read: Callable[[], object] = tuple,
    ) -> None:
        given = {"logits": on_logits, "probs": on_probs, "odds": on_odds}
        self.parts = {kind: MetricCollection(dict(part)) for kind, part in given.items() if part}
        self.read = read

    def run(self, batches: Iterator[Batch]) -> None:
        """Measure all batches from nothing to values."""
        for part in self.parts.values():
            part.reset()
        for logits, target in batches:
            for kind, part in self.parts.items():
                part.update(INPUTS[kind](logits), target)
        for part in self.parts.values():
            part.compute()
        self.read()

    def state_bytes(self) -> int:
        """Size of all states, one that several metrics share counted once."""
        single = (metric for part in self.parts.values() for metric in part.values())
        states = (getattr(metric, name) for metric in single for name in metric._defaults)
        tensors = {
            id(x): x for state in states for x in ([state] if torch.is_tensor(state) else state)
        }
        return sum(tensor.nbytes for tensor in tensors.values())


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "logits": lambda logits: logits,
    "probs": lambda logits: logits.softmax(dim=1),
    "odds": metrics.log_odds,
}


def reference(classes: int) -> Side:
    return Side(
        {
            "top1": MulticlassAccuracy(classes, top_k=1, average="micro"),
            "top5": MulticlassAccuracy(classes, top_k=5, average="micro"),
            "ece": MulticlassCalibrationError(classes),
        }
    )


def basic(classes: int) -> Side:
    classwise = metrics.ClasswiseCalibrationError(classes)
    return Side(
        {
            "top1": metrics.TopKAccuracy(1),
            "top5": metrics.TopKAccuracy(5),
            "mrr": metrics.MeanReciprocalRank(),
            "nll": metrics.NegativeLogLikelihood(classes),
        },
        {
            "brier": metrics.DecomposedBrierScore(classes),
            "ece": metrics.CalibrationError(classes),
            "rmsce": metrics.CalibrationError(classes, norm="l2"),
            "mce": metrics.CalibrationError(classes, norm="max"),
            "classwise_ece": classwise,
        },
        read=classwise.reliability,
    )


SIDES: dict[str, Callable[[int], Side]] = {
    "torchmetrics": reference,
    "basic": basic,
    "auroc": lambda classes: Side(on_odds={"auroc": metrics.AUROC(classes)}),
    "auroc of raw logits": lambda classes: Side({"auroc": metrics.AUROC(classes)}),
    "adaptive": lambda classes: Side(on_probs={"ace": metrics.AdaptiveCalibrationError(classes)}),
    "smooth": lambda classes: Side(on_probs={"smooth": metrics.SmoothCalibrationError(classes)}),
}


def times(options: argparse.Namespace) -> dict[str, list[float]]:
    logits = 3 * torch.randn(options.rows, options.classes)
    # Labels that a noisy version of the logits names: about half of them are the largest one's.
    target = (logits + torch.randn_like(logits)).argmax(dim=1)

    def turn(side: Side) -> float:
        batches = zip(logits.split(options.batch), target.split(options.batch), strict=True)
        return seconds(lambda: side.run(batches))

    sides = {name: partial(turn, make(options.classes)) for name, make in SIDES.items()}
    return rounds(sides, options.repeats or 5)


def made_as_needed(rows: int, classes: int, batch: int) -> Iterator[Batch]:
    for start in range(0, rows, batch):
        size = min(batch, rows - start)
        yield 3 * torch.randn(size, classes), torch.randint(classes, (size,))


def measure_memory(name: str, rows: int, classes: int, batch: int) -> dict[str, int]:
    # Warmed up on another object: what the libraries load and keep is not the metric's.
    SIDES[name](classes).run(made_as_needed(batch, classes, batch))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    side = SIDES[name](classes)
    side.run(made_as_needed(rows, classes, batch))
    return {"state": side.state_bytes(), "peak": resident("VmHWM") - before}


def memory(name: str, rows: int, options: argparse.Namespace) -> dict[str, int]:
    arguments = [name, str(rows), str(options.classes), str(options.batch)]
    answer = subprocess.run(
        [sys.executable, __file__, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        # Memory returned to the system at once, so that the peak is of what is in use.
        env=os.environ | {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    return json.loads(answer.stdout)


def print_memory(table: dict[str, list[dict[str, int]]], rows: list[int]) -> None:
    heads = [f"{what} at {count:,}" for count in rows for what in ("state", "peak")]
    print(f"{'MB':22}" + "".join(f"{head:>18}" for head in heads))
    for name, values in table.items():
        cells = [value[what] / 1e6 for value in values for what in ("state", "peak")]
        print(f"{name:22}" + "".join(f"{cell:18.3f}" for cell in cells))


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=1000, help="rows of one update")
    parser.add_argument("--no-memory", action="store_true", help="time only")


def measure(options: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    taken = times(options)
    compared = [
        Row(
            name,
            ratio(taken, name, "torchmetrics"),
            most=LIMITS.get(name),
            note=f"{median(taken[name]):.3f} and {median(taken['torchmetrics']):.3f} s",
        )
        for name in SIDES
        if name != "torchmetrics"
    ]
    print_rows(compared)
    rows = [options.rows, 4 * options.rows]
    space = {} if options.no_memory else {n: [memory(n, r, options) for r in rows] for n in SIDES}
    if space:
        print_memory(space, rows)
    return compared, {"seconds": taken, "memory": space}


if __name__ == "__main__":
    name, *numbers = sys.argv[1:]
    print(json.dumps(measure_memory(name, *map(int, numbers))))
