"""The course of the loss from step to step."""

import pytest
import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger

from distill import Distiller
from distill.training.callbacks.step_losses import StepLosses


class Memory(Logger):
    """What is logged, in memory."""

    name, version = "memory", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_hyperparams(self, *_):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))


class Losses(pl.Callback):
    """Each batch's loss."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append((trainer.global_step, float(outputs["losses"]["loss"])))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("accumulate", "steps"), [(1, [3, 6]), (2, [3])])
def test_every_so_many_steps_the_losses_are_logged_once(accumulate, steps, tiny, loader, tmp_path):
    memory, losses = Memory(), Losses()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False,
        callbacks=[losses, StepLosses([memory], 3)], accumulate_grad_batches=accumulate,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Distiller(tiny(), num_classes=4), loader(48))
    assert [step for step, _ in memory.rows] == steps
    for step, row in memory.rows:
        assert {*row} == {"train/loss_step", "train/ce_step"}
        first = next(value for at, value in losses.seen if at == step)
        assert row["train/loss_step"] == first
