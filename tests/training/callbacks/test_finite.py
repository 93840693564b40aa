"""A loss that is not finite stops training, or costs the one update it belongs to."""

import math

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distill import Distiller, Objective
from distill.training.callbacks.finite import FiniteLoss, Seen

BAD = 3  # of five batches


class Blank(nn.Module):
    """A teacher that has no answer to white images."""

    num_classes = 4

    def forward(self, view):
        answers = view.mean((1, 2, 3))[:, None] * torch.arange(4.0)
        return answers.masked_fill((view == 1).all((1, 2, 3))[:, None], math.nan)


def batches(left_out=None):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 1, 8, 8, generator=generator)
    images[BAD * 8 + 2] = 1.0
    rows = torch.arange(40)
    kept = rows[rows // 8 != left_out] if left_out is not None else rows
    return DataLoader(TensorDataset(images[kept], rows[kept] % 4, rows[kept]), batch_size=8)


def fit(tiny, folder, on_nan, left_out=None, **options):
    torch.manual_seed(0)
    student = tiny()
    student.body[3] = nn.Identity()  # dropout would draw for a batch more
    module = Distiller(student, Blank(), Objective({"ce": "cross_entropy", "kl": "kl_divergence"}),
                       topk=(1,), optimizer={"opt": "adamw", "lr": 0.01})  # fmt: skip
    finite = FiniteLoss(on_nan)
    saved = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[finite, saved], logger=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, batches(left_out))
    return finite, student, trainer


def test_it_stops_and_names_step_term_and_images_and_saves_nothing_of_it(tiny, tmp_path):
    told = (
        r"^step 3: the loss is not finite \(kl\), nor are the teacher's answers; "
        r"training images 24, 25, 26, 27, 28, 29, 30, 31: "
    )
    with pytest.raises(ValueError, match=told):
        fit(tiny, tmp_path, "stop")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step={n}.ckpt" for n in (1, 2, 3)]
    last = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in last["state_dict"].values())


def test_a_window_of_steps_is_looked_at_together_before_a_checkpoint():
    finite = FiniteLoss()
    for step in range(6):
        value = torch.tensor(math.inf if step >= 4 else 1.0)
        finite._seen.append(Seen(step, {"loss": value, "ce": value}, None))
    with pytest.raises(ValueError, match=r"^step 4: the loss is not finite \(ce\); look at"):
        finite.on_save_checkpoint(None, None, {})
    finite.look()  # once


def test_skipping_is_training_without_the_batch(tiny, tmp_path, caplog):
    finite, skipped, trainer = fit(tiny, tmp_path / "a", "skip")
    _, without, _ = fit(tiny, tmp_path / "b", "stop", left_out=BAD)
    pairs = zip(skipped.named_parameters(), without.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for (_, ours), theirs in pairs)
    assert (finite.skipped, trainer.callback_metrics["train/skipped"]) == (1, 1)
    assert "step 3: the loss is not finite" in caplog.text


def test_a_student_that_is_not_finite_is_not_trained_on(tiny, tmp_path):
    class Overflow(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.student.head.weight.data.mul_(math.inf)

    module = Distiller(tiny(), None, Objective({"ce": "cross_entropy"}), topk=(1,))
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[FiniteLoss("skip"), Overflow()], logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="the student itself is not finite at step 0"):
        trainer.fit(module, batches())


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="on_nan=ignore is unknown; there are stop, skip"):
        FiniteLoss("ignore")
