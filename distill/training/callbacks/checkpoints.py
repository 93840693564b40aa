"""Checkpoints that are whole at any moment, and a run's last one when it is told to end."""

from __future__ import annotations

import io
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from distill.utils import signals
from distill.utils.compat import validates_next
from distill.utils.files import writing


class WholeCheckpoints(TorchCheckpointIO):
    """Write checkpoints beside their place, and rename them once they are whole.

    Lightning's own writes to the system's folder for temporary files and moves from there: between
    two disks that is a copy, which a kill leaves half done.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            OSError: if there is no room for it; the one that was there before is kept.
        """
        content = io.BytesIO()  # torch's own writer hides why a disk refuses
        torch.save(checkpoint, content)
        with writing(Path(path)) as file:
            file.write(content.getbuffer())


class StopWhenTold(pl.Callback):
    """Stop on a signal, after the batch at hand, where no checkpoint callback is configured."""

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """End, if the process has been told to."""
        signals.stop_if_told()


class LatestCheckpoint(Checkpoint):
    """Keep the latest state of training: each epoch's, and those within epochs that are due.

    Due they are after so many steps or minutes, and after each validation. It comes after the
    callback that keeps the best epoch, whose state it thereby holds. When the process is told to
    end, it writes one more after the batch that training is at, and ends it; never in the midst of
    accumulated gradients, and where a validation follows, after that.

    Args:
        dirpath: the folder.
        filename: the file's name without `.ckpt`.
        every_n_train_steps: optimiser steps between checkpoints within an epoch, or None.
        every_minutes: minutes between checkpoints within an epoch, or None; the process of rank 0
            looks at its clock.

    Raises:
        ValueError: if that is no number of steps, or of minutes.
    """

    def __init__(
        self,
        dirpath: str,
        filename: str = "last",
        every_n_train_steps: int | None = None,
        every_minutes: float | None = None,
    ) -> None:
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps must be at least 1, got {every_n_train_steps}")
        if every_minutes is not None and not every_minutes > 0:
            raise ValueError(f"every_minutes must be above 0, got {every_minutes}")
        self.path = Path(dirpath) / f"{filename}.ckpt"
        self.every_n_train_steps = every_n_train_steps
        self.every_minutes = every_minutes
        self._stepped = False  # whether the batch at hand ends with an update
        self._written = 0.0  # the clock's seconds at the last checkpoint

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals from Lightning, which would end training without a checkpoint."""
        signals.listen()
        self._written = monotonic()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Note that no gradients are left to be accumulated."""
        self._stepped = True

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write a checkpoint, but where the batch's validation or the epoch's own will follow."""
        signals.raise_lost_interrupt()
        if trainer.is_last_batch or not self._stepped or validates_next(trainer):
            return
        self._stepped = False
        told = should_stop(trainer)
        if told or self._due(trainer):
            self._write(trainer)
        if told:
            end()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write a checkpoint after a validation within an epoch, as that may have named the best.

        Before it, whoever resumes would not validate once more.
        """
        stepped, self._stepped = self._stepped, False
        ends = trainer.is_last_batch or trainer.should_stop  # which the epoch's own follows
        if trainer.sanity_checking or ends or not stepped:
            return
        self._write(trainer)
        if should_stop(trainer):
            end()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the epoch's checkpoint."""
        self._stepped = False
        self._write(trainer)
        if should_stop(trainer):
            end()

    def _write(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._written = monotonic()

    def _due(self, trainer: pl.Trainer) -> bool:
        """Return whether steps or minutes have passed, on all ranks alike."""
        every = self.every_n_train_steps
        if every is not None and trainer.global_step % every == 0:
            return True
        if self.every_minutes is None:
            return False
        passed = monotonic() - self._written >= 60 * self.every_minutes
        if trainer.world_size == 1:
            return passed
        return bool(trainer.strategy.broadcast(passed))


def end() -> NoReturn:
    """End a process that was told to, or whose run has another that was."""
    signals.stop_if_told()
    raise signals.Preempted("another rank")


def should_stop(trainer: pl.Trainer) -> bool:
    """Return whether any rank's process was told to end; all ranks then end at the same batch."""
    told = signals.pending()
    if trainer.world_size == 1:
        return told
    return bool(trainer.strategy.reduce_boolean_decision(told, all=False))
