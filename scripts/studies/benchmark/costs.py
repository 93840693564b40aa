"""What the table takes: seconds of a step, measured here, and of cells that have finished."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from benchmark.cells import ALONE, TWO_VIEWS, Cell, Pair
from distill.models.build import ModelSpec, build_model
from distill.models.weights import DataShape
from distill.plan.timing import timed
from distill.utils.memory import keep_freed_memory

BATCH = 64
H200_IMAGES_PER_SECOND = 40_600  # r32x4_r8x4, live teacher, the whole step in one hand-made graph
# Steps against those of kd, for the methods that take much longer: `scripts/bench methods`.
TIMES_KD = {TWO_VIEWS: 2.0, "reviewkd": 2.31}
START_AND_END = 20.0  # seconds of a run that are no training: imports, evaluation, page


@dataclass(frozen=True)
class Speed:
    """Seconds that an image takes in training: of a pair's teacher, of its student, of answers."""

    teacher: float
    student: float
    answer: float

    def of(self, method: str) -> float:
        """Return the seconds of an image under a method, its own work in proportion to `kd`'s."""
        if method == ALONE:
            return self.student
        return TIMES_KD.get(method, 1.0) * (self.student + self.answer)


def measured(pair: Pair, classes: int) -> Speed:
    """Time a teacher's and a student's step on made-up images, medians of a few."""
    keep_freed_memory()  # as the command does
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = torch.rand(BATCH, 3, 32, 32, device=device)
    target = torch.randint(classes, (BATCH,), device=device)
    shape = DataShape(classes, 3, (32, 32))
    teacher, student = (
        build_model(ModelSpec(name), shape, name).to(device)
        for name in (pair.teacher, pair.student)
    )

    def step(model: torch.nn.Module) -> None:
        F.cross_entropy(model(images), target).backward()

    def answer() -> None:
        with torch.inference_mode():
            teacher(images)

    seconds = [timed(lambda: step(teacher), device), timed(lambda: step(student), device)]
    teacher.eval()
    return Speed(*(value / BATCH for value in (*seconds, timed(answer, device))))


class Costs:
    """How long cells take: as those of the pair and method did here, else by the speed of a step.

    Args:
        images: training images of an epoch.
        epochs: of a cell, and of a teacher.
        classes: K.
    """

    def __init__(self, images: int, epochs: int, classes: int = 100) -> None:
        self.images, self.epochs, self.classes = images, epochs, classes
        self.speeds: dict[str, Speed] = {}
        self.seconds: dict[tuple[str, str], list[float]] = {}

    def speed(self, pair: Pair) -> Speed:
        """Return the speed of a pair's steps, measured when it is first needed."""
        if pair.name not in self.speeds:
            self.speeds[pair.name] = measured(pair, self.classes)
        return self.speeds[pair.name]

    def add(self, cell: Cell, seconds: float) -> None:
        """Learn how long a cell took, from its command's start to its end."""
        self.seconds.setdefault((cell.pair.name, cell.method), []).append(seconds)

    def of(self, cell: Cell) -> float:
        """Return the seconds that a cell will take, without its teacher's training."""
        if before := self.seconds.get((cell.pair.name, cell.method)):
            return statistics.median(before)
        rate = self.speed(cell.pair).of(cell.method)
        return START_AND_END + rate * self.images * self.epochs

    def of_teacher(self, pair: Pair) -> float:
        """Return the seconds that a pair's teacher takes to be trained."""
        return self.speed(pair).teacher * self.images * self.epochs


def plan(cells: Sequence[Cell], costs: Costs, batch_size: int, trained: Collection[str]) -> str:
    """Return what the cells would take, in Markdown.

    Args:
        cells: those that have not finished.
        costs: of each.
        batch_size: images of a step.
        trained: the teachers that are there; another is counted with the first pair that has it.
    """
    lines = ["| pair | cells | steps | hours here | hours on an H200 |", "|---|---|---|---|---|"]
    steps_each, there = costs.images // batch_size * costs.epochs, {*trained}
    all_cells, all_steps, all_hours = 0, 0, 0.0
    pairs = list(dict.fromkeys(cell.pair for cell in cells))
    reference = costs.speed(Pair.of("r32x4_r8x4"))
    scale = (reference.student + reference.answer) * H200_IMAGES_PER_SECOND
    for pair in pairs:
        own = [cell for cell in cells if cell.pair == pair]
        new = pair.teacher not in there
        there.add(pair.teacher)
        seconds = sum(costs.of(cell) for cell in own) + new * costs.of_teacher(pair)
        steps = (len(own) + new) * steps_each
        all_cells, all_steps = all_cells + len(own), all_steps + steps
        all_hours += seconds / 3600
        lines.append(_line(pair.name, len(own), steps, seconds / 3600, scale))
    lines.append(_line("all", all_cells, all_steps, all_hours, scale))
    slower = ", ".join(f"{name} {times:g}" for name, times in TIMES_KD.items())
    lines += [
        "",
        f"Here: measured on batches of {BATCH}, teachers included, live; a method takes as long as "
        f"kd, or so many times: {slower}. H200: scaled by {H200_IMAGES_PER_SECOND:,} images/s of "
        "r32x4_r8x4, the one pair that was measured there.",
    ]
    return "\n".join(lines)


def _line(name: str, cells: int, steps: int, hours: float, scale: float) -> str:
    return f"| {name} | {cells} | {steps:,} | {hours:,.1f} | {hours / scale:,.1f} |"


def seconds_of(text: str) -> float:
    """Return the seconds of a time such as `90s`, `8m` or `2h`."""
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], text[-1:]) if text[-1:] in units else (text, "s")
    try:
        seconds = float(number) * units[unit]
    except ValueError:
        raise ValueError(f"--budget {text} is no time, such as 90s, 8m or 2h") from None
    if not seconds > 0:
        raise ValueError(f"--budget {text} leaves no time")
    return seconds


def fits(cell: Cell, costs: Costs, trained: Collection[str], left: float) -> bool:
    """Whether a cell, and its teacher if need be, would end in so many seconds."""
    if left == math.inf:
        return True
    needs_teacher = cell.method != ALONE and cell.pair.teacher not in trained
    return costs.of(cell) + needs_teacher * costs.of_teacher(cell.pair) <= left
