"""Cells of the table: which there are, the command of each, and who runs which."""

from __future__ import annotations

import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from distill.config.explain import nearest
from distill.config.overrides import CONF

ALONE, TEACHER = "alone", "teacher"  # rows: the student without a teacher, and the teacher
SUMMARIES = "*/*/seed-*/summary.json"  # of all cells, in a table's folder
BEATS, STALE = 20.0, 300.0  # seconds between a claim's signs of life, and without any
# What the literature sets on CIFAR-100, where an objective's own defaults are for other data.
LITERATURE = {
    "kd": ("objective=kd_literature",),
    "hint": ("objective=hint", "objective.stages=[-2]", "objective.terms.ce.weight=1",
             "objective.terms.kl.weight=0", "objective.terms.hint.weight=100"),
    "attention_transfer": ("objective=attention_transfer", "objective.stages=[-3,-2,-1]",
                           "objective.terms.ce.weight=1", "objective.terms.kl.weight=0",
                           "objective.terms.attention.weight=50"),
    "standardized_kd": ("objective=standardized_kd", "objective.temperature=2",
                        "objective.alpha=null", "objective.terms.ce.weight=0.1",
                        "objective.terms.kl.weight=9"),
}  # fmt: skip
WARMED_UP = {"dkd": "dkd", "rld": "rld", "reviewkd": "review"}  # which term, for 20 of 240 epochs
# Where published runs of a pair differ from the method's others.
FOUR_STAGES = ("vgg13_vgg8", "vgg13_mobilenetv2", "r50_mobilenetv2", "r50_vgg8")
STAGES = {"hint": "[-3]", "attention_transfer": "[-4,-3,-2,-1]"}  # of models with four of them
REVIEWS = {"r56_r20": 0.6, "r110_r32": 1.0, "r32x4_shufflev2": 8.0}  # weights, if not 5
HOTTER = ("vgg13_vgg8", "vgg13_mobilenetv2", "r50_mobilenetv2")  # of standardized_kd, T = 3
BETAS = {"r56_r20": 2, "r110_r32": 2, "wrn40_2_wrn16_2": 6, "wrn40_2_wrn40_1": 6,
         "vgg13_vgg8": 6, "vgg13_mobilenetv2": 6}  # of DKD, where it is not 8  # fmt: skip
TWO_VIEWS = "mlkd_two_views"
RATES = {"r32x4_shufflev1": 0.01, "r32x4_shufflev2": 0.01, "wrn40_2_shufflev1": 0.0025,
         "vgg13_mobilenetv2": 0.0025, "r50_mobilenetv2": 0.0025}  # its, if not 0.025  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A teacher and a student, by the names that timm has for them."""

    name: str
    teacher: str = field(compare=False)
    student: str = field(compare=False)

    @classmethod
    def of(cls, name: str) -> Pair:
        """Return the pair of a file of `conf/pair`, or of `TEACHER:STUDENT`."""
        if ":" in name:
            teacher, _, student = name.partition(":")
            return cls(f"{teacher}--{student}", teacher, student)
        file = CONF / "pair" / f"{name}.yaml"
        if not file.is_file():
            every = sorted(path.stem for path in (CONF / "pair").glob("*.yaml"))
            raise ValueError(f"there is no pair {name}; there are {', '.join(every)}")
        models = OmegaConf.load(file)
        return cls(name, models.teacher.name, models.student.name)


@dataclass(frozen=True)
class Cell:
    """One run of the table."""

    pair: Pair
    method: str
    seed: int
    recipe: tuple[str, ...] = field(compare=False)  # the overrides that make the method

    @property
    def label(self) -> str:
        """What it is called on the screen."""
        return f"{self.pair.name} {self.method} seed {self.seed}"

    def folder(self, out: Path) -> Path:
        """Return where its run is."""
        return out / self.pair.name / self.method / f"seed-{self.seed}"

    def is_finished(self, out: Path) -> bool:
        """Whether its numbers are there."""
        return (self.folder(out) / "summary.json").is_file()


def recipe(method: str, pair: str, epochs: int) -> tuple[str, ...]:
    """Return the overrides that make a method, an objective, what it is in the literature.

    Raises:
        ValueError: if there is no such objective.
    """
    if method == ALONE:
        return "objective=supervised", "teacher=none"
    if not (CONF / "objective" / f"{method}.yaml").is_file():
        every = sorted(path.stem for path in (CONF / "objective").glob("*.yaml"))
        raise ValueError(f"there is no objective {method}{nearest(method, every)}")
    own = LITERATURE.get(method, (f"objective={method}",))
    weight = REVIEWS.get(pair, 5.0) if method == "reviewkd" else 1.0
    if term := WARMED_UP.get(method):
        duration = max(1, round(epochs / 12))
        start = weight / duration  # min(epoch/duration, 1) of the first epoch, counted from 1
        warm_up = "objective.schedules.warmup"
        own = (*own, f"{warm_up}.duration={duration}", f"{warm_up}.start={start:g}",
               f"objective.terms.{term}.weight={weight:g}")  # fmt: skip
    return *own, *own_of_pair(method, pair)


def own_of_pair(method: str, pair: str) -> list[str]:
    """Return the overrides that published runs of a method have for one pair."""
    if method == "dkd" and pair in BETAS:
        return [f"objective.terms.dkd.beta={BETAS[pair]}"]
    if method in STAGES and pair in FOUR_STAGES:
        return [f"objective.stages={STAGES[method]}"]
    if method == "standardized_kd" and pair in HOTTER:
        weight = ["objective.terms.kl.weight=1"] if pair == "r50_mobilenetv2" else []
        return ["objective.temperature=3", *weight]
    if method == TWO_VIEWS:
        return [f"optimizer.lr={RATES.get(pair, 0.025)}"]
    return []


def cells_of(
    pairs: Sequence[Pair],
    methods: Sequence[str],
    own: Mapping[str, tuple[str, ...]],
    seeds: int,
    epochs: int,
) -> list[Cell]:
    """Return the cells: every pair and method with one seed, then with the next.

    Args:
        pairs: of teacher and student.
        methods: objectives, beside the student alone.
        own: further methods, and the overrides that make each.
        seeds: how many.
        epochs: of each run.

    Raises:
        ValueError: if there is no such objective, or a further method has the name of another.
    """
    every = list(dict.fromkeys((ALONE, *methods)))
    if clash := {*every, TEACHER} & own.keys():
        raise ValueError(f"--method {min(clash)} is the name of another: give it one of its own")
    if empty := [name for name, overrides in own.items() if not overrides]:
        raise ValueError(f"--method {empty[0]} needs the overrides that make it")
    return [
        Cell(pair, method, seed, own.get(method) or recipe(method, pair.name, epochs))
        for seed in range(seeds)
        for pair in pairs
        for method in (*every, *own)
    ]


def command(cell: Cell, out: Path, more: Sequence[str]) -> list[str]:
    """Return the command of a cell: it goes on where it was interrupted."""
    teacher = [] if cell.method == ALONE else [f"teacher.name={cell.pair.teacher}"]
    return [
        "distill", *more, *cell.recipe, f"student.name={cell.pair.student}", *teacher,
        f"seed={cell.seed}", "baseline=false", "logger=none", "store=off",
        f"hydra.run.dir={cell.folder(out)}", "resume=auto",
    ]  # fmt: skip


@contextmanager
def claimed(cell: Cell, out: Path) -> Iterator[bool]:
    """Claim a cell by a file that is made once, on any machine that shares the folder.

    The file is touched while the cell runs; one that was not for five minutes belongs to a process
    that is gone, and is taken over.

    Yields:
        Whether it is this process's.
    """
    file = out / "claims" / f"{cell.pair.name}--{cell.method}--{cell.seed}"
    file.parent.mkdir(parents=True, exist_ok=True)
    mine = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4()}\n"
    _remove_stale(file, mine)
    try:
        with file.open("x", encoding="utf-8") as claim:
            claim.write(mine)
    except FileExistsError:
        yield False
        return
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(file, ended), daemon=True)
    beating.start()
    try:
        yield True
    finally:
        ended.set()
        beating.join()
        if file.is_file() and file.read_text(encoding="utf-8") == mine:
            file.unlink()


def _remove_stale(file: Path, mine: str) -> None:
    """Take away a claim without signs of life: of several processes that try, one does."""
    clock = file.with_name(f".{mine.split()[2]}")
    try:
        clock.touch()  # the time of the file's own server
        if clock.stat().st_mtime - file.stat().st_mtime > STALE:
            os.rename(file, clock)
    except FileNotFoundError:
        pass  # nobody claims it, or somebody else took it away
    finally:
        clock.unlink(missing_ok=True)


def _beat(file: Path, ended: threading.Event) -> None:
    while not ended.wait(BEATS):
        if file.is_file():
            file.touch()


def finished(out: Path) -> dict[Cell, dict[str, Any]]:
    """Return the numbers of all cells of a table that have finished, whoever ran them."""
    numbers = {}
    for file in sorted(out.glob(SUMMARIES)):
        pair, method, seed = file.parts[-4:-1]
        cell = Cell(Pair(pair, "", ""), method, int(seed.removeprefix("seed-")), ())
        numbers[cell] = json.loads(file.read_text(encoding="utf-8"))
    return numbers
