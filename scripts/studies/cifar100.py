"""The field's table on CIFAR-100: methods on the usual pairs, claimed against reproduced.

Every cell is a run of the installed command by `experiment=cifar100`, kept in a folder of its own
and gone on with where it was interrupted. Several processes, GPUs and machines that share the
folder fill one table: each claims the cell it runs. Teachers are trained once and kept. What has
finished is in `table.html`, `table.csv` and `table.md` after every cell.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmark.cells import ALONE, SUMMARIES, Cell, Pair, cells_of, claimed, command, finished
from benchmark.costs import Costs, fits, plan, seconds_of
from benchmark.published import PAIRS
from benchmark.table import lines_of, write_table
from distill.utils.files import write_whole

METHODS = ("kd", "hint", "attention_transfer", "sp", "rkd", "pkt", "crd", "dkd", "dist",
           "reviewkd", "simkd", "srd", "ofa", "standardized_kd", "nkd", "ttm", "wttm", "rld",
           "ewkd", "skd", "wkd", "mlkd", "mlkd_two_views")  # fmt: skip
LOG = "output.log"  # of each cell
FAILURES = 3  # cells of which it is clear that more would fail
IMAGES = 49_000  # that the protocol trains on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", nargs="+", default=["r32x4_r8x4"],
                        help="of conf/pair, TEACHER:STUDENT, or all")  # fmt: skip
    parser.add_argument("--methods", nargs="+", default=["kd", "dkd", "crd"],
                        help=f"objectives, or all: {' '.join(METHODS)}")  # fmt: skip
    parser.add_argument("--method", nargs="+", action="append", default=[], metavar="WORD",
                        help="your own: its name, then the overrides that make it")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=240)
    parser.add_argument("--subset", type=int, help="training images of each class; all without")
    parser.add_argument("--data", nargs="+", default=["data=cifar100", "data.root=cifar"],
                        help="overrides that say where the pictures are")  # fmt: skip
    parser.add_argument("--override", nargs="+", default=[], help="of every run")
    parser.add_argument("--budget", help="such as 8m: runs the cells that end within it")
    parser.add_argument("--devices", type=int, default=1, help="GPUs, with a process for each")
    parser.add_argument("--dry-run", action="store_true", help="what it would take, and end")
    parser.add_argument("--out", type=Path, default=Path("outputs/studies/cifar100"))
    options = parser.parse_args()
    for name in ("seeds", "epochs", "subset", "devices"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        options.out = options.out.absolute()
        if options.devices > 1:
            sys.exit(on_devices(options.devices))
        study(options)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command again goes on")


def on_devices(count: int) -> int:
    """Run the same command once for each GPU that is to be seen; 1 where one failed.

    Raises:
        ValueError: if there are fewer GPUs.
    """
    if count > torch.cuda.device_count():
        raise ValueError(f"--devices {count}: there are {torch.cuda.device_count()} GPUs here")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    words = [sys.executable, *sys.argv, "--devices", "1"]
    processes = [
        subprocess.Popen(words, env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu})
        for gpu in visible.split(",")[:count]
    ]
    try:
        codes = [process.wait() for process in processes]
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    return int(any(codes))


def study(options: argparse.Namespace) -> None:
    """Fill what is missing of the table, or say what that would take."""
    names = PAIRS if options.pairs == ["all"] else options.pairs
    methods = METHODS if options.methods == ["all"] else options.methods
    own = {name: tuple(overrides) for name, *overrides in options.method}
    pairs = [Pair.of(name) for name in names]
    cells = cells_of(pairs, methods, own, options.seeds, options.epochs)
    costs = Costs(100 * options.subset if options.subset else IMAGES, options.epochs)
    ends = time.monotonic() + (seconds_of(options.budget) if options.budget else math.inf)
    if options.dry_run:
        left = [cell for cell in cells if not cell.is_finished(options.out)]
        print(plan(left, costs, 64, teachers_of(cells, options.out)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    check_settings(options)
    failed = fill(options, cells, costs, ends)
    write(options)
    done = sum(cell.is_finished(options.out) for cell in cells)
    where = options.out / "table.html"
    print(f"{done} of {len(cells)} cells: {where if where.is_file() else 'there is no table yet'}")
    if failed:
        raise SystemExit(1)


def teachers_of(cells: list[Cell], out: Path) -> set[str]:
    """Return the teachers of the cells that have finished."""
    return {cell.pair.teacher for cell in cells if cell.method != ALONE and cell.is_finished(out)}


def check_settings(options: argparse.Namespace) -> None:
    """Refuse to add cells to a table whose cells were run otherwise.

    Raises:
        ValueError: naming what differs.
    """
    settings = {
        "epochs": options.epochs,
        "subset": options.subset,
        "data": [with_full_path(word) for word in options.data],
        "override": options.override,
        **{f"method {name}": overrides for name, *overrides in options.method},
    }
    file = options.out / "settings.json"
    kept = file.is_file() and any(options.out.glob(SUMMARIES))  # what nothing came of binds nobody
    before = json.loads(file.read_text(encoding="utf-8")) if kept else {}
    for name, value in settings.items():
        if before.get(name, value) != value:
            raise ValueError(
                f"the cells in {options.out} were run with --{name} {before[name]}, not {value}: "
                "give another --out"
            )
    write_whole(file, json.dumps({**before, **settings}, indent=2, ensure_ascii=False) + "\n")


def with_full_path(word: str) -> str:
    """Return an override whose path does not depend on where the command is typed."""
    key, _, value = word.partition("=")
    return f"{key}={Path(value).absolute()}" if key in ("data.root", "data.file") else word


def fill(options: argparse.Namespace, cells: list[Cell], costs: Costs, ends: float) -> list[Cell]:
    """Run the cells that nobody runs and that end in time, and return those that failed."""
    failed: list[Cell] = []
    for cell in cells:
        if cell.is_finished(options.out):
            continue
        trained = teachers_of(cells, options.out)
        if not fits(cell, costs, trained, ends - time.monotonic()):
            print(f"{cell.label}: about {costs.of(cell):.0f} s, more than is left", flush=True)
            continue
        with claimed(cell, options.out) as mine:
            if not mine:
                print(f"{cell.label}: claimed by another process", flush=True)
                continue
            seconds = run(cell, options)
            if not cell.is_finished(options.out):
                failed.append(cell)
                log = cell.folder(options.out) / LOG
                print(f"{cell.label}: failed: {last_line(log)} ({log})", flush=True)
                if len(failed) == FAILURES:
                    print(f"{FAILURES} cells failed: the others are not run", flush=True)
                    break
                continue
            print(f"{cell.label}: {seconds:.0f} s", flush=True)
            if cell.method == ALONE or cell.pair.teacher in trained:
                costs.add(cell, seconds)
            write(options)
    return failed


def last_line(log: Path) -> str:
    """Return what a command said last."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "it said nothing")


def run(cell: Cell, options: argparse.Namespace) -> float:
    """Run a cell's command, printing it, and return its seconds; it ends when this process does."""
    started = time.perf_counter()
    words = command(cell, options.out, overrides(options))
    print(shlex.join(words), flush=True)
    folder = cell.folder(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {**os.environ, "PATH": beside}
    with (folder / LOG).open("a") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            process.wait()
        except BaseException:
            process.terminate()  # it writes a checkpoint, from which it goes on
            process.wait()
            raise
    return time.perf_counter() - started


def overrides(options: argparse.Namespace) -> list[str]:
    """Return the overrides that all cells share."""
    shots = options.subset
    few = ["condition=few_shot", f"condition.shots={shots}"] if shots else []
    milestones = [max(1, round(options.epochs * epoch / 240)) for epoch in (150, 180, 210)]
    length = [
        f"trainer.max_epochs={options.epochs}",
        f"scheduler.decay_milestones={milestones}".replace(" ", ""),
    ]
    return ["experiment=cifar100", *options.data, *few, *length, *options.override]


def write(options: argparse.Namespace) -> None:
    """Write the table of all cells in its folder that have finished."""
    done = finished(options.out)
    if not done:
        return
    what = [f"{options.epochs} epochs of {' '.join(options.data)}"]
    if options.subset:
        what.append(f"{options.subset} training images of each class")
    if options.override:
        what.append(shlex.join(options.override))
    if options.epochs != 240:
        what.append("the literature's figures are of 240")
    published = is_literatures(options)
    if published:
        what.append(f"{IMAGES:,} training pictures, where the literature has all 50,000")
    title = f"{', '.join(what)}; {len(done)} cells."
    typed = shlex.join(["scripts/studies/cifar100", *sys.argv[1:]])
    write_table(options.out, lines_of(done, options.out, published), title, typed)


def is_literatures(options: argparse.Namespace) -> bool:
    """Whether the pictures are those of the published figures: all of CIFAR-100, 100 classes."""
    words = [*options.data, *options.override]
    whole = options.subset is None and not any(word.startswith("condition") for word in words)
    return whole and "data=cifar100" in words and "data.labels=coarse" not in words


if __name__ == "__main__":
    main()
