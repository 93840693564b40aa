"""The means that a training epoch logs."""

import csv

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from distill import Distiller
from distill.training.means import EpochMeans


class Record(pl.Callback):
    """Each batch's loss and samples, and what an epoch's callbacks see of the mean."""

    def __init__(self):
        self.losses, self.samples, self.seen = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["losses"]["loss"].double().item())
        self.samples.append(len(batch[1]))

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append(float(trainer.callback_metrics["train/loss"]))


def fitted(tiny, folder, **options):
    """Train on 40 samples in batches of 16, 16 and 8."""
    torch.manual_seed(0)
    data = TensorDataset(torch.rand(40, 1, 8, 8), torch.arange(40) % 4)
    record = Record()
    trainer = pl.Trainer(
        accelerator="cpu", logger=CSVLogger(folder, name="", version=""), callbacks=[record],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        **{"max_epochs": 1, "log_every_n_steps": 1, **options},
    )  # fmt: skip
    model = Distiller(tiny(), num_classes=4, optimizer={"lr": 0.1})
    trainer.fit(model, DataLoader(data, batch_size=16))
    with (folder / "metrics.csv").open() as file:
        rows = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    return record, rows


def mean(record, batches):
    losses, samples = record.losses[batches], record.samples[batches]
    return sum(a * b for a, b in zip(losses, samples, strict=True)) / sum(samples)


@pytest.mark.filterwarnings("ignore")
def test_a_ragged_batch_counts_by_its_samples(tiny, tmp_path):
    record, rows = fitted(tiny, tmp_path, max_epochs=2)
    assert record.samples == [16, 16, 8] * 2
    expected = [mean(record, slice(0, 3)), mean(record, slice(3, 6))]
    assert rows == pytest.approx(expected, rel=1e-6)
    assert record.seen == pytest.approx(expected, rel=1e-6)  # callbacks come before the module


@pytest.mark.filterwarnings("ignore")
def test_an_epoch_that_ends_early_logs_what_there_was(tiny, tmp_path):
    record, rows = fitted(tiny, tmp_path, max_epochs=-1, max_steps=5)
    expected = [mean(record, slice(0, 3)), mean(record, slice(3, 5))]
    assert rows == pytest.approx(expected, rel=1e-6)
    assert record.seen == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_means_are_over_what_training_is_limited_to(tiny, tmp_path):
    record, rows = fitted(tiny, tmp_path, limit_train_batches=2)
    assert rows == pytest.approx([mean(record, slice(0, 2))], rel=1e-6)


def test_an_interruption_changes_no_bit():
    torch.manual_seed(0)
    batches = [({"loss": a, "ce": b}, n) for (a, b), n in zip(torch.rand(9, 2), [3, 7, 5] * 3,
                                                              strict=True)]  # fmt: skip
    whole, first, rest = EpochMeans(), EpochMeans(), EpochMeans()
    for values, samples in batches:
        whole.add(values, samples)
    for values, samples in batches[:4]:
        first.add(values, samples)
    rest.load_state_dict(first.state_dict(), torch.device("cpu"))
    for values, samples in batches[4:]:
        rest.add(values, samples)
    assert rest.take() == whole.take()
    assert not whole.take()


def test_values_that_only_some_batches_have_are_means_over_these():
    means = EpochMeans()
    means.add({"loss": torch.tensor(1.0), "top1": torch.tensor(0.5)}, 4)
    means.add({"loss": torch.tensor(4.0)}, 2)
    means.add({"loss": torch.tensor(2.0), "top1": torch.tensor(0.0)}, 4)
    taken = {name: (float(total), samples) for name, (total, samples) in means.take().items()}
    assert taken == {"loss": (20.0, 10), "top1": (2.0, 8)}


def test_half_precision_is_added_up_in_single():
    means = EpochMeans()
    for _ in range(1000):
        means.add({"loss": torch.tensor(1.0, dtype=torch.bfloat16)}, 128)
    total, samples = means.take()["loss"]
    assert float(total) == samples == 128_000
