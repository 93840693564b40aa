"""Training that keeps no checkpoint ends at its next batch, also where others asked for time."""

import os
import signal

import pytest
import pytorch_lightning as pl

from distill import Distiller
from distill.training.callbacks.checkpoints import StopWhenTold
from distill.utils import signals


class Told(pl.Callback):
    """Tell the process to end while a batch is trained."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_it_ends_after_the_batch_it_is_at(tiny, loader, tmp_path):
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        callbacks=[Told(), StopWhenTold()],
    )  # fmt: skip
    with signals.heeded(), signals.deferred(), pytest.raises(signals.Preempted):
        trainer.fit(Distiller(tiny()), loader())
    assert trainer.global_step == 3
