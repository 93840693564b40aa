"""Annealing: move the objective's temperature, or a weight, as training goes."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl

from distill.objective.objective import Objective
from distill.objective.schedules import SCHEDULES, check_timing, value_at
from distill.training.horizon import position_of


class Annealing(pl.Callback):
    """Move one value of the objective along a schedule.

    The value is a function of the trainer's position alone (epoch, or optimiser step), so a resumed
    run continues exactly where it would have been, also in the middle of an epoch. It holds `start`
    for `warmup` units, then reaches `end` at the last unit (or `duration` units after the warm-up).
    Every change is logged.

    Args:
        schedule: `linear`, `cosine`, `exponential` or `step`.
        end: the value reached at the end.
        start: the value at the beginning; None takes the objective's own.
        unit: `epoch` or `step` (one optimiser step).
        warmup: units (below 1: the share of training) during which `start` is held.
        duration: units from the end of the warm-up to `end`; None lasts until training ends.
        value: what is moved: any of `Objective.annealed`, such as `temperature`, `alpha`,
            `terms.NAME.weight` or `sample_selection.small_loss`.

    Raises:
        ValueError: for an unknown schedule or unit; when training starts, for values that the
            objective refuses.
    """

    def __init__(
        self,
        schedule: str = "cosine",
        end: float = 1.0,
        start: float | None = None,
        unit: str = "epoch",
        warmup: float = 0,
        duration: int | None = None,
        value: str = "temperature",
    ) -> None:
        check_timing("annealing", schedule, unit, warmup, duration)
        for name, number in (("start", start), ("end", end)):
            if number is not None and not math.isfinite(number):
                raise ValueError(f"annealing.{name} must be finite, got {number}")
        self.schedule, self.start, self.end = schedule, start, end
        self.unit, self.warmup, self.duration, self.value = unit, warmup, duration, value

    def at(self, position: int, total: int) -> float:
        """Return the value at unit `position` of `total` (the last is `total − 1`)."""
        assert self.start is not None
        return value_at(
            self.schedule, position, total, self.start, self.end, self.warmup, self.duration
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the starting value from the objective, before a checkpoint moves it."""
        if stage != "fit":  # an evaluation keeps the value that training ended with
            return
        objective = objective_of(pl_module)
        self.start = objective.annealed[self.value] if self.start is None else self.start
        self.check(objective)
        objective.annealed[self.value] = self.start

    def check(self, objective: Objective) -> None:
        """Refuse now the ends that the objective or the schedule would refuse in some epoch."""
        own = objective.annealed[self.value]
        start = own if self.start is None else self.start
        for name, number in (("start", start), ("end", self.end)):
            try:
                objective.annealed[self.value] = number
            except ValueError as error:
                raise ValueError(f"annealing.{name}={number:g}: {error}") from error
            finally:
                objective.annealed[self.value] = own
        SCHEDULES[self.schedule](0.5, start, self.end)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the value for this batch; log it when it changes."""
        value = self.at(*position_of(trainer, self.unit))
        objective = objective_of(pl_module)
        if value != objective.annealed[self.value] or trainer.global_step == 0:
            objective.annealed[self.value] = value
            for logger in trainer.loggers:
                logger.log_metrics({self.value: value}, step=trainer.global_step)


def objective_of(module: pl.LightningModule) -> Objective:
    """Return the module's objective."""
    objective = getattr(module, "objective", None)
    if not isinstance(objective, Objective):
        raise ValueError("Annealing needs a Distiller, a module with an `objective`")
    return objective
