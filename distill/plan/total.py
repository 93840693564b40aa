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

    @property
    def student(self) -> Fit:
        """The fit that the run is for."""
        return self.fits[-1]

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
    """

    jobs: int
    fits: int
    steps: int
    images: int
    seconds: float

    def hours(self, devices: int) -> float:
        """Return the hours on so many devices, if they share the work evenly."""
        return self.seconds / devices / SECONDS


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
    return Total(
        jobs=len(students),
        fits=len(every),
        steps=sum(fit.steps for fit in every),
        images=sum(fit.images for fit in every),
        seconds=seconds,
    )


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
