"""What the jobs of a command take together: what they share is paid for once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig

from distill.plan.fits import STUDENT, Fit
from distill.plan.measure import Decoding, Trial

SECONDS = 3600


@dataclass(frozen=True)
class Plan:
    """What one run would take.

    Args:
        name: of the job, where there are several.
        cfg: its configuration.
        fits: what it trains, in its order.
        trials: a few steps of each, by role.
        decoding: how fast its pictures are decoded; None where they lie in memory.
        answers: the same for jobs that read each other's kept answers; None where none are kept.
        store: what a store of its teacher's answers would hold, or why there is none, for people.
        store_bytes: that a complete one takes; 0 without a teacher whose answers could be kept.
        facts: further numbers and words, by name.
        data: the same for jobs that read the same files of data.
        copies: bytes that copies of shards take on each machine; 0 where none lie elsewhere.
    """

    name: str
    cfg: DictConfig
    fits: Sequence[Fit]
    trials: Mapping[str, Trial]
    decoding: Decoding | None
    answers: str | None
    store: str
    store_bytes: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""
    copies: int = 0

    @property
    def student(self) -> Fit:
        """The fit that the run is for."""
        return self.fits[-1]

    @property
    def checkpoint_bytes(self) -> int:
        """What the checkpoints take that are there when the run ends."""
        return int(self.facts["checkpoints"]) * self.trials[self.student.role].checkpoint

    def alone(self, fit: Fit, asked: int | None = None) -> float:
        """Return the seconds of one fit by itself.

        Args:
            fit: one of the plan's.
            asked: in how many epochs its teacher is asked; None is all in which no answer is kept
                yet.
        """
        if asked is None:
            asked = fit.new_views if fit.role == STUDENT and self.answers else fit.epochs
        return together([(self, fit)], asked)


@dataclass(frozen=True)
class Total:
    """What the jobs of a command take together.

    Args:
        jobs: how many there are.
        fits: how many models are trained, what is shared once.
        steps: optimiser updates of all.
        images: that are shown, to each model.
        seconds: on one device.
        memory: bytes on each device, while what takes most of it is trained.
        answers: bytes of kept answers, once for all machines.
        checkpoints: bytes of what is there when all have ended, once for all machines.
        copies: bytes of copied shards, on each machine.
    """

    jobs: int
    fits: int
    steps: int
    images: int
    seconds: float
    memory: int
    answers: int
    checkpoints: int
    copies: int

    def hours(self, devices: int) -> float:
        """Return the hours on so many devices, if they share the work evenly."""
        return self.seconds / devices / SECONDS

    def disk(self, machines: int) -> int:
        """Return the bytes on the disks of so many machines, of which all share the run's."""
        return self.answers + self.checkpoints + machines * self.copies


def total_of(groups: Sequence[Sequence[Plan]]) -> Total:
    """Return what jobs take together.

    Args:
        groups: of jobs that are trained in turns, which decode a batch once and ask their teacher
            once; a job that is trained alone is a group of one.
    """
    fits: dict[str, Fit] = {}  # what is trained once for all
    students: list[Fit] = []
    seen: dict[str, int] = {}  # answers → views of which a job before has asked for them
    seconds = 0.0
    for group in groups:
        for plan in group:
            for fit in plan.fits[:-1]:
                if fit.key not in fits and not fit.kept:
                    fits[fit.key] = fit
                    seconds += plan.alone(fit)
        students += [plan.student for plan in group]
        first = group[0]
        views = max(plan.student.new_views for plan in group)
        asked = max(plan.student.epochs for plan in group)
        if first.answers is not None:
            before = seen.get(first.answers, 0)
            asked, seen[first.answers] = max(views - before, 0), max(views, before)
        seconds += together([(plan, plan.student) for plan in group], asked)
    every = [*fits.values(), *students]
    plans = [plan for group in groups for plan in group]
    answers = {plan.answers: plan.store_bytes for plan in plans if plan.answers is not None}
    return Total(
        jobs=len(students),
        fits=len(every),
        steps=sum(fit.steps for fit in every),
        images=sum(fit.images for fit in every),
        seconds=seconds,
        memory=max(map(memory_of, groups)),
        answers=sum(answers.values()),
        checkpoints=sum(plan.checkpoint_bytes for plan in plans),
        copies=sum({plan.data: plan.copies for plan in plans}.values()),
    )


def memory_of(group: Sequence[Plan]) -> int:
    """Return the most bytes that jobs which are trained in turns take on a device.

    `max teacher + Σ (weights + gradients + optimiser) + max activations` of their students, or all
    of what one of them trains before, if that is more.
    """
    before = [plan.trials[fit.role].memory.total
              for plan in group for fit in plan.fits[:-1] if not fit.kept]  # fmt: skip
    students = [plan.trials[plan.student.role].memory for plan in group]
    own = sum(one.weights + one.gradients + one.optimizer for one in students)
    shared = max(one.teacher for one in students) + max(one.activations for one in students)
    return max([own + shared, *before])


def together(parts: Sequence[tuple[Plan, Fit]], asked: int) -> float:
    """Return the seconds of fits that take turns with the same batches and the same teacher.

    `Σ images · step + max images of an epoch · epochs asked · teacher`, beside the decoding of the
    longest one's images.

    Args:
        parts: plans, and which of their fits.
        asked: in how many epochs the teacher is asked.
    """
    steps = sum(fit.images * plan.trials[fit.role].step for plan, fit in parts)
    answers = max(
        fit.images_per_epoch * min(asked, fit.epochs) * plan.trials[fit.role].teacher
        for plan, fit in parts
    )
    decoding, images = parts[0][0].decoding, max(fit.images for _, fit in parts)
    busy = steps + answers
    return busy if decoding is None else decoding.together(images, busy)
