"""What else a checkpoint has to hold, so that a run goes on as if it had never been interrupted."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor

from distill.models.checkpoint import as_object, epochs_done
from distill.utils.compat import epoch_is_over, epoch_results, epoch_row
from distill.utils.files import write_whole

KEY = "continuity"  # in a checkpoint
Sums = dict[str, tuple[Tensor, Tensor]]


class Continuity(pl.Callback):
    """Carry on what Lightning forgets: `metrics.csv`, an epoch's means so far, an early stop.

    Args:
        history: the run's own logger, whose file goes on where the checkpoint was written.
    """

    def __init__(self, history: CSVLogger) -> None:
        self.history = history
        self.sums: Sums = {}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put them into a checkpoint."""
        ended = epoch_is_over(trainer)
        checkpoint[KEY] = {
            "history": self._so_far() if trainer.is_global_zero else "",
            "to_be_logged": epoch_row(trainer) if ended else None,
            "sums": {} if ended else epoch_sums(trainer),
            "stopped": trainer.should_stop,
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take them back."""
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                moved_along(
                    as_object(checkpoint.get("callbacks")).get(callback.state_key), callback
                )
        state = checkpoint.get(KEY)
        if state is None:
            return
        self.sums = state["sums"]
        if trainer.is_global_zero:
            self._go_on(state["history"])
            if state["to_be_logged"]:
                row = dict(state["to_be_logged"])
                self.history.log_metrics(row, step=row.pop("step"))
                self.history.save()
        if state["stopped"]:  # early: there is nothing left to train
            trainer.fit_loop.max_epochs = epochs_done(checkpoint)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Add what was logged in this epoch before the interruption, in the order it had then."""
        if not self.sums:
            return
        results = epoch_results(trainer)
        for name, (value, count) in self.sums.items():
            if name in results:
                metric = results[name]
                metric.value += value.to(metric.value.device)
                metric.cumulated_batch_size = count.to(metric.value.device) + (
                    metric.cumulated_batch_size
                )
        self.sums = {}

    def _so_far(self) -> str:
        self.history.save()
        path = Path(self.history.experiment.metrics_file_path)
        return path.read_bytes().decode() if path.is_file() else ""

    def _go_on(self, text: str) -> None:
        if text:
            experiment = self.history.experiment
            write_whole(Path(experiment.metrics_file_path), text)
            experiment.metrics_keys = next(csv.reader(text.splitlines()))


def moved_along(state: Any, callback: ModelCheckpoint) -> None:
    """Let a run whose folder was moved or renamed find the checkpoints that it has kept there.

    Lightning keeps whole paths, and forgets which epoch was the best where they have changed.
    """
    state, folder = as_object(state), callback.dirpath
    before = state.get("dirpath")
    if not before or not folder or before == folder or Path(before).exists():
        return

    def here(path: Any) -> Any:
        inside = isinstance(path, str) and Path(path).is_relative_to(before)
        return str(Path(folder) / Path(path).relative_to(before)) if inside else path

    state["dirpath"] = str(folder)
    for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
        state[name] = here(state.get(name))
    best = as_object(state.get("best_k_models"))
    state["best_k_models"] = {here(path): score for path, score in best.items()}


def nothing_left(checkpoint: dict[str, Any], max_epochs: int) -> bool:
    """Return whether a checkpoint is that of the end of training."""
    stopped = (checkpoint.get(KEY) or {}).get("stopped", False)
    return stopped or epochs_done(checkpoint) >= max_epochs


def epoch_sums(trainer: pl.Trainer) -> Sums:
    """Return the sums, and over how many images, of the means that an epoch is in the midst of."""
    return {
        name: (metric.value.detach().cpu(), metric.cumulated_batch_size.detach().cpu())
        for name, metric in epoch_results(trainer).items()
        if metric.meta.on_epoch and metric.is_tensor and metric.meta.is_mean_reduction
    }
