"""Time a step on the device at hand, operation by operation and as one graph; at most 4 minutes.

For the literature's pair, with a live teacher, with its stored answers, and without one:

- `bare`: the leanest eager loop, whose views are made ahead;
- `eager`, `graph`: what `distill` runs, with `trainer.graph=off` and `on`;
- `limit`: the captured step alone, replayed without Lightning, loader or logging.

Then eight temperatures in turns, how often a step waits for the device, and how far students that
were trained eagerly and by graphs lie apart. On a CPU it does all of this in small, with the same
function called where a GPU replays it: so it is known to work before it meets a GPU, and says
nothing about one. The bounds are those of an H200.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import Row, machine, print_rows, ratio, rounds
from steps import PAIRS, Clock, Pair, clock_of, wait
from sweep import TEMPERATURES, fused

from distill.training.graph import GraphedStep
from distill.training.module import Distiller

# What the table calls a way to train → the side of a pair, and what else its command says.
WAYS: dict[str, tuple[str, list[str]]] = {
    "live": ("live", []),
    "stored": ("fed", ["store.dtype=float16"]),
    "no teacher": ("supervised", []),
}
GRAPHS = {"eager": "off", "graph": "on"}
H200 = "H200"


def trained(pair: Pair, way: str, graph: str) -> tuple[Distiller, Clock]:
    """Return a student after a turn, and its clock."""
    side, more = WAYS[way]
    student, trainer = pair.trained(side, [*more, f"trainer.graph={graph}"])
    return student, clock_of(trainer)


def ours(pair: Pair, way: str, graph: str) -> float:
    """Return the ms of a step of a run."""
    clock = trained(pair, way, graph)[1]
    return 1e3 * clock.seconds / clock.steps


def limit(pair: Pair, way: str) -> float:
    """Return the ms in which the captured step of a run is replayed."""
    student = trained(pair, way, "on")[0]
    assert isinstance(student.graph, GraphedStep)
    replay = student.graph.last
    assert replay is not None
    wait(student.device)
    began = time.perf_counter()
    for _ in range(pair.steps):
        replay()
    wait(student.device)
    return 1e3 * (time.perf_counter() - began) / pair.steps


def bare(pair: Pair, way: str) -> float:
    """Return the ms of a step of the leanest loop, which reads no store."""
    return 1e3 * pair.batch / pair.bare(WAYS[way][0])


def waits(pair: Pair, way: str, graph: str) -> float:
    """Return how often a step waits for the device, beyond the clock's own."""
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            trained(pair, way, graph)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in told) / (pair.steps + pair.warm)


def apart(pair: Pair, way: str, graphs: Sequence[str]) -> float:
    """Return how far two students lie apart, as a share of the size of their weights."""
    states = [trained(pair, way, graph)[0].student.state_dict() for graph in graphs]
    one, other = ([v.double() for v in s.values() if v.is_floating_point()] for s in states)
    between = sum(float((a - b).square().sum()) for a, b in zip(one, other, strict=True))
    size = sum(float(a.square().sum()) for a in one)
    return (between / size) ** 0.5


def busy(pair: Pair, way: str, graph: str) -> float:
    """Return the share of a turn in which kernels run."""
    if not torch.cuda.is_available():
        return 1.0
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        clock = trained(pair, way, graph)[1]
    spent = sum(event.self_device_time_total for event in profile.key_averages()) / 1e6
    return spent / (clock.seconds * (pair.steps + pair.warm) / clock.steps)


def options(parser: argparse.ArgumentParser) -> None:
    on_gpu = torch.cuda.is_available()
    steps, batch = (100, 128) if on_gpu else (6, 16)
    name = next(iter(PAIRS)) if on_gpu else "digits' default pair"
    parser.add_argument("--steps", type=int, default=steps, help="steps of a turn that count")
    parser.add_argument("--batch", type=int, default=batch, help="images in a step")
    parser.add_argument("--warm", type=int, default=20 if on_gpu else 3, help="steps that do not")
    parser.add_argument("--pair", choices=list(PAIRS), default=name)


def measure(options: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    repeats, held = options.repeats or 2, H200 in machine()
    with tempfile.TemporaryDirectory(prefix="distill-bench-") as work:
        pair = Pair(options.pair, options.steps, Path(work), options.batch, options.warm)
        sides: dict[str, Callable[[], float]] = {}
        for way in WAYS:
            sides |= {f"{way}, {g}": partial(ours, pair, way, m) for g, m in GRAPHS.items()}
            sides[f"{way}, limit"] = partial(limit, pair, way)
            if way != "stored":
                sides[f"{way}, bare"] = partial(bare, pair, way)
        for name, mode in GRAPHS.items():
            sides[f"{len(TEMPERATURES)} temperatures, {name}"] = partial(together, pair, mode)
        taken = rounds(sides, repeats)
        facts = {
            f"{what.__name__}, {way}, {name}": what(pair, way, mode)
            for what in (waits, busy)
            for way in ("live", "stored")
            for name, mode in GRAPHS.items()
        }
        facts |= {
            "apart, eager and eager": apart(pair, "live", ("off", "off")),
            "apart, eager and graph": apart(pair, "live", ("off", "on")),
        }
    table(taken, facts, pair)
    rows = bounds(taken, held)
    print_rows(rows)
    return rows, {"ms_per_step": taken, "facts": facts, "batch": pair.batch}


def together(pair: Pair, graph: str) -> float:
    """Return the ms in which students at all temperatures take one step."""
    return 1e3 * fused(pair, [f"trainer.graph={graph}"])


def table(taken: dict[str, list[float]], facts: dict[str, float], pair: Pair) -> None:
    """Print what was measured."""
    print(f"{pair.name}, batches of {pair.batch}")
    for name, values in taken.items():
        ms = median(values)
        count = len(TEMPERATURES) if "temperatures" in name else 1
        print(f"  {name:32}{ms:9.2f} ms a step{count * 1e3 * pair.batch / ms:12,.0f} images/s")
    for name, value in facts.items():
        print(f"  {name:32}{value:9.3g}")


def bounds(taken: dict[str, list[float]], held: bool) -> list[Row]:
    """Return the ratios that are held on an H200."""

    def row(side: str, other: str, most: float) -> Row:
        note = f"{median(taken[side]):.2f} and {median(taken[other]):.2f} ms"
        bound = most if held else None
        return Row(f"{side} / {other}", ratio(taken, side, other), most=bound, note=note)

    rows = [row(f"{way}, graph", f"{way}, limit", 1.15) for way in WAYS]
    rows.append(row("live, eager", "live, bare", 1.1))
    swept = f"{len(TEMPERATURES)} temperatures"
    rows.append(row(f"{swept}, graph", f"{swept}, eager", 0.2))
    return rows
