"""How long training is, and where in it training stands: what every schedule is laid out over."""

from __future__ import annotations

import logging
import math

import pytorch_lightning as pl

from distill.training.callbacks.last_step import last_step

log = logging.getLogger(__name__)


def updates_per_epoch(trainer: pl.Trainer) -> int | None:
    """Return how many optimiser updates an epoch has, or None before that can be known.

    What an epoch was seen to have counts for more than what its loader says.
    """
    counted = getattr(trainer.lightning_module, "counted_updates", None)
    if counted is not None:
        return counted
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    batches = trainer.num_training_batches
    return None if math.isinf(batches) else updates_in(int(batches), trainer)


def updates_in(batches: int, trainer: pl.Trainer) -> int:
    """Return how many updates so many batches make: the last may gather fewer than the others."""
    return max(math.ceil(batches / trainer.accumulate_grad_batches), 1)


def total_updates(trainer: pl.Trainer) -> int | None:
    """Return how many updates training has: `min(max_epochs · updates per epoch, max_steps)`.

    None where it has an end, and epochs whose length is not known yet.

    Raises:
        ValueError: if training has no end, so that nothing can be laid out over it.
    """
    endless, each = trainer.max_epochs in (None, -1), updates_per_epoch(trainer)
    if (last := last_step(trainer)) is not None:
        whole = math.inf if endless or each is None else each * (trainer.max_epochs or 1)
        return int(min(whole, last))
    if endless:
        raise ValueError(
            "training without an end has no schedule: give the Trainer max_epochs, or leave out "
            "the scheduler and annealing"
        )
    return None if each is None else each * (trainer.max_epochs or 1)


def position_of(trainer: pl.Trainer, unit: str) -> tuple[int, int]:
    """Return where training is, in epochs or optimiser steps, and how many there will be.

    While the first epoch's length is unknown it is at its start.
    """
    total = total_updates(trainer)
    if unit == "step":
        return (0, 1) if total is None else (trainer.global_step, total)
    return trainer.current_epoch, epochs_of(trainer) or 1


def epochs_of(trainer: pl.Trainer) -> int | None:
    """Return how many epochs are begun in training, the last perhaps cut short by `max_steps`.

    None where that is not known.
    """
    endless, each = trainer.max_epochs in (None, -1), updates_per_epoch(trainer)
    last = last_step(trainer)
    if last is None or each is None:
        return None if endless else trainer.max_epochs
    by_steps = -(-last // each)
    return by_steps if endless else min(by_steps, trainer.max_epochs or 1)


def ends_here(trainer: pl.Trainer) -> bool:
    """Return whether training ends with the batch at hand, in the midst of its epoch."""
    must_go_on = trainer.min_epochs or trainer.min_steps
    last = last_step(trainer)
    return (last is not None and trainer.global_step >= last) or (
        trainer.should_stop and not must_go_on
    )


def tell_of_unknown_length(trainer: pl.Trainer) -> None:
    """Say that schedules hold still for an epoch, where nothing says how long epochs are."""
    if updates_per_epoch(trainer) is None:
        log.warning(
            "the training loader has no length: schedules hold still in the first epoch, after "
            "which it is known; the Trainer's limit_train_batches=N says it ahead"
        )


def counted(trainer: pl.Trainer) -> int | None:
    """Return how many updates the epoch that ends had, where its loader has not said so.

    An epoch that was cut short tells nothing.
    """
    known = updates_per_epoch(trainer)
    short = ends_here(trainer) or trainer.should_stop
    found = updates_in(trainer.fit_loop.epoch_loop.batch_progress.current.ready, trainer)
    if short or found == known:
        return getattr(trainer.lightning_module, "counted_updates", None)
    if known is not None:
        log.warning("the training loader's length gives %d updates an epoch, and this one had %d: "
                    "schedules go by that from here", known, found)  # fmt: skip
    return found
