"""Cells of the table: which there are, the command of each, and who runs which."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from distill.config.overrides import CONF

ALONE = "alone"  # the student without a teacher
BEATS, STALE = 20.0, 300.0  # seconds between a claim's signs of life, and without any
# What the literature sets on CIFAR-100, where an objective's own defaults are for other data.
# The factors of `hint` and `attention_transfer` are per element there: 1000/64 is that of 8 × 8.
LITERATURE = {
    "kd": ("objective=kd_literature",),
    "hint": ("objective=hint", "objective.terms.ce.weight=1", "objective.terms.kl.weight=0",
             "objective.terms.hint.weight=100"),
    "attention_transfer": ("objective=attention_transfer", "objective.terms.ce.weight=1",
                           "objective.terms.kl.weight=0", "objective.terms.attention.weight=15.6"),
}  # fmt: skip
WARMED_UP = ("dkd", "reviewkd")  # for 20 of the literature's 240 epochs


@dataclass(frozen=True)
class Pair:
    """A teacher and a student, by the names that timm has for them."""

    name: str
    teacher: str
    student: str

    @classmethod
    def of(cls, name: str) -> Pair:
        """Return the pair of a file of `conf/pair`, or of `TEACHER:STUDENT`."""
        if ":" in name:
            teacher, _, student = name.partition(":")
            return cls(f"{teacher}--{student}", teacher, student)
        file = CONF / "pair" / f"{name}.yaml"
        if not file.is_file():
            known = sorted(path.stem for path in (CONF / "pair").glob("*.yaml"))
            raise ValueError(f"there is no pair {name}; there are {', '.join(known)}")
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

    def summary(self, out: Path) -> dict[str, Any] | None:
        """Return its numbers; None while it has not finished."""
        file = self.folder(out) / "summary.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def recipes(methods: Sequence[str], epochs: int) -> dict[str, tuple[str, ...]]:
    """Return the overrides that make each method, an objective, what it is in the literature."""
    made = {name: LITERATURE.get(name, (f"objective={name}",)) for name in methods}
    warm_up = f"objective.schedules.warmup.duration={epochs / 12:g}"
    return {name: (*own, warm_up) if name in WARMED_UP else own for name, own in made.items()}


def cells_of(
    pairs: Sequence[Pair], methods: Mapping[str, tuple[str, ...]], seeds: int
) -> list[Cell]:
    """Return the cells: every pair and method with one seed, then with the next."""
    every = {ALONE: ("objective=supervised", "teacher=none"), **methods}
    return [
        Cell(pair, method, seed, recipe)
        for seed in range(seeds)
        for pair in pairs
        for method, recipe in every.items()
    ]


def command(cell: Cell, out: Path, more: Sequence[str]) -> list[str]:
    """Return the command of a cell: it goes on where it was interrupted."""
    teacher = [] if cell.method == ALONE else [f"teacher.name={cell.pair.teacher}"]
    return [
        "distill", *more, *cell.recipe, f"student.name={cell.pair.student}", *teacher,
        f"seed={cell.seed}", "baseline=false", "logger=none",
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
    if file.exists() and time.time() - file.stat().st_mtime > STALE:
        file.unlink(missing_ok=True)
    try:
        with file.open("x", encoding="utf-8") as mine:
            mine.write(f"{socket.gethostname()} {os.getpid()}\n")
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
        file.unlink(missing_ok=True)


def _beat(file: Path, ended: threading.Event) -> None:
    while not ended.wait(BEATS):
        file.touch()


def finished(cells: Sequence[Cell], out: Path) -> Mapping[Cell, dict[str, Any]]:
    """Return the numbers of the cells that have finished."""
    read = ((cell, cell.summary(out)) for cell in cells)
    return {cell: summary for cell, summary in read if summary is not None}
