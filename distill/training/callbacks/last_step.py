"""The last step of training, where a number of steps says how long that is."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl


class LastStep(pl.Callback):
    """Stop after so many optimiser steps, in the midst of an epoch too, and validate the last.

    It takes the place of the Trainer's own `max_steps`, which ends such an epoch without a
    validation, and under which a run that goes on from an epoch's end trains one batch too many.

    Args:
        steps: optimiser steps of all training.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stop, if that was the last."""
        if trainer.global_step >= self.steps:
            trainer.should_stop = True


def last_step(trainer: pl.Trainer) -> int | None:
    """Return the step that training ends with at the latest, or None where epochs alone say it."""
    callbacks = getattr(trainer, "callbacks", ())
    own = next((one.steps for one in callbacks if isinstance(one, LastStep)), trainer.max_steps)
    return own if own > 0 else None
