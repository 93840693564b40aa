"""Time a sweep of eight temperatures in one process: against its parts, and against separate runs.

The step of the fused sweep, teacher live, is held to the time of one teacher's and eight students'
steps, as measured alone in the same run: a student's is that of a supervised run, the teacher's
what a distilled one takes longer. `start to end` is the whole command on digits, start-up, numbers
and pages included, against the command of a single run: in one process, in one for each core, and
one job after the other. Teacher and baseline are in the cache.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from measure import Row, print_rows, ratio, rounds, seconds
from steps import PAIRS, Pair, clock_of

from distill.plan.timing import Clock
from distill.sweep.lockstep import in_turns
from distill.training.fit import fit
from distill.utils.sharing import Sharing

TEMPERATURES = (1, 2, 3, 4, 6, 8, 12, 16)


def fused(pair: Pair, more: Sequence[str] = ()) -> float:
    """Return the seconds in which all students take one step."""
    clocks: list[Clock] = []

    def train_at(temperature: float, sharing: Sharing) -> None:
        cfg = pair.config(["store=off", f"objective.temperature={temperature}", *more])
        shared = sharing.once("data", pair.make_data)
        data = shared.with_options(seed=0, batch_size=pair.batch)
        data.sharing = sharing
        teacher = sharing.once("teacher", lambda: pair.make_teacher(data))
        trainer = fit(cfg, data, teacher)[1]
        clocks.append(clock_of(trainer))

    in_turns([partial(train_at, temperature) for temperature in TEMPERATURES])
    # The last student ends a round: these are the ends of the last uncounted and of the last round.
    began = max(clock.began for clock in clocks)
    ended = max(clock.ended for clock in clocks)
    return (ended - began) / pair.steps


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=6, help="steps of a turn that count")


def measure(options: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    repeats = options.repeats or 3
    with tempfile.TemporaryDirectory(prefix="distill-bench-") as work:
        rows, tables = steps(Pair(next(iter(PAIRS)), options.steps, Path(work)), repeats)
        more, commands = whole_commands(Path(work), repeats)
    print_rows(rows + more)
    return rows + more, {"seconds_per_step": tables, "seconds_per_command": commands}


def steps(pair: Pair, repeats: int) -> tuple[list[Row], dict[str, Any]]:
    def alone(side: str) -> float:
        return pair.batch / pair.ours(side)

    sides = {side: partial(alone, side) for side in ("live", "supervised")}
    taken = rounds({**sides, "fused": partial(fused, pair)}, repeats)
    count = len(TEMPERATURES)
    taken["parts"] = [
        live + (count - 1) * supervised
        for live, supervised in zip(taken["live"], taken["supervised"], strict=True)
    ]
    taken["separate"] = [count * live for live in taken["live"]]

    def row(other: str, most: float | None) -> Row:
        note = f"{median(taken['fused']):.2f} and {median(taken[other]):.2f} s a step of all"
        label = f"{pair.name}: fused / {other}"
        return Row(label, ratio(taken, "fused", other), most=most, note=note)

    return [row("parts", 1.1), row("separate", None)], taken


def whole_commands(work: Path, repeats: int) -> tuple[list[Row], dict[str, Any]]:
    """Return how long eight temperatures take on digits, and how long one does."""
    swept = ["-m", f"objective.temperature={','.join(map(str, TEMPERATURES))}"]
    cores = len(os.sched_getaffinity(0))
    spread = f"fused in {cores} processes"
    commands = {
        "one": [],
        "fused": [*swept, "hydra/launcher=fused"],
        spread: [*swept, "hydra/launcher=fused", f"hydra.launcher.devices={cores}"],
        "apart": [*swept, "hydra/launcher=basic"],
    }

    def command(arguments: list[str]) -> float:
        program = [sys.executable, "-c", "from distill.cli import train; train()", *arguments]
        store = ["store.path=" + tempfile.mkdtemp(dir=work)]  # as if it were the first time
        environment = {**os.environ, "DISTILL_CACHE": str(work / "cache")}
        return seconds(
            lambda: subprocess.run(
                program + store, cwd=work, env=environment, check=True, capture_output=True
            )
        )

    taken = rounds({name: partial(command, given) for name, given in commands.items()}, repeats)

    def row(side: str, other: str, most: float | None) -> Row:
        note = f"{median(taken[side]):.1f} and {median(taken[other]):.1f} s"
        label = f"digits, start to end: {side} (8 temperatures) / {other}"
        return Row(label, ratio(taken, side, other), most=most, note=note)

    return [row("fused", "one", None), row(spread, "one", 3.0), row("fused", "apart", None)], taken
