"""How fast training goes, and how long the rest will take, for people."""

import re

import pytest
import pytorch_lightning as pl

from distill import Distiller
from distill.training.callbacks import progress
from distill.training.callbacks.progress import EpochLines, duration
from distill.training.callbacks.speed import Speed


class Clock:
    """A time that a step moves on by half a minute, and validation by ten."""

    now = 0.0

    def __call__(self):
        return self.now


class Passing(pl.Callback):
    def __init__(self, clock):
        self.clock = clock

    def on_train_batch_start(self, *_):
        self.clock.now += 30

    def on_validation_start(self, *_):
        self.clock.now += 600


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("least", [120, 10**9])
def test_an_epochs_line_says_when_the_end_is_to_be_expected(
    least, tiny, loader, tmp_path, caplog, monkeypatch
):
    caplog.set_level("INFO")
    monkeypatch.setattr(progress, "WORTH_TELLING", least)
    clock = Clock()
    speed = Speed(clock)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False,
        callbacks=[speed, Passing(clock), EpochLines()], enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Distiller(tiny(), num_classes=4), loader(), loader())
    assert speed.images_per_second == pytest.approx(16 / 30)  # validation does not count
    lines = [line for line in caplog.messages if "epoch" in line and "train/loss" in line]
    told = [re.search(r"(\S+) images/s, (.*) left", line) for line in lines]
    if least == 120:  # an epoch takes 4 batches and a validation: 12 minutes
        assert [found and found[2] for found in told] == ["24 min", "12 min", None]
    else:
        assert told == [None] * 3


def test_a_time_is_told_to_the_minute():
    assert [duration(s) for s in (140, 3600, 7 * 3600 + 59)] == ["2 min", "1 h 0 min", "7 h 1 min"]
