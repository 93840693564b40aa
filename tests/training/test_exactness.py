"""A run that is killed at any step and resumed gives the student of an uninterrupted one."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from distill import Annealing, Distiller, Objective
from distill.data import DataModule
from distill.data.sources.splits import Resident, Source
from distill.training.callbacks.sparsity import Sparsity


class Journal(pl.Callback):
    """Write down which samples each step saw, and stop where told."""

    def __init__(self, stop_at=None):
        self.seen, self.stop_at = [], stop_at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.stop_at:
            raise RuntimeError("killed")
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        self.seen.append((batch.index.tolist(), round(batch.view.sum().item(), 3), lr))


def fit(folder, tiny, stop_at=None, resume=None, beside=False, views=1):
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (80, 1, 8, 8), generator=generator).to(torch.uint8)
    split = Resident(images, (torch.arange(80) % 8).clamp(max=3))
    parts = [split.subset(torch.arange(a, b)) for a, b in ((0, 48), (48, 64), (64, 80))]
    more = Source("more", list("abcd"), 1, split.subset(torch.arange(7, 80, 5))) if beside else None
    data = DataModule(Source("random", list("abcd"), 1, *parts), {"pad": 1}, batch_size=8,
                      balance=0.5, unlabeled=more, views_per_step=views,
                      strong_view={"rotate": 20, "erase": 0.5})  # fmt: skip
    torch.manual_seed(0)
    teacher, student = tiny(width=16), tiny()
    student.body[3] = torch.nn.Identity()  # dropout draws from torch's own generator
    terms = {"ce": "cross_entropy", "kl": "kl_divergence"}
    module = Distiller(
        student, teacher, Objective(terms, 4.0, 0.5, sample_selection={"small_loss": 0.5}),
        topk=(1,), optimizer={"opt": "adamw", "lr": 0.01}, scheduler={"sched": "cosine"},
    )  # fmt: skip
    journal = Journal(stop_at)
    checkpoint = ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, save_top_k=-1,
        auto_insert_metric_name=False,
    )  # fmt: skip
    sparsity = Sparsity(2.0, start=0.5)
    trust = Annealing("linear", start=1.0, end=0.5, duration=2, value="sample_selection.small_loss")
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=3, logger=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, default_root_dir=folder,
        callbacks=[Annealing("cosine", end=1.0, unit="step"), trust, sparsity, journal,
                   checkpoint],
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return journal.seen, module.student.state_dict()


# Of 6 an epoch, or of 12 where half of each batch is without labels.
@pytest.mark.parametrize(
    ("step", "beside", "views"),
    [*((k, False, 1) for k in (1, 5, 6, 7, 12, 16)), (5, True, 1), (12, True, 1),
     (5, False, 2), (6, False, 2), (13, True, 2)],
)  # fmt: skip
def test_it_sees_the_same_views_and_ends_in_the_same_bytes(tiny, tmp_path, step, beside, views):
    own = {"beside": beside, "views": views}
    seen, student = fit(tmp_path / "whole", tiny, **own)
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path / "killed", tiny, stop_at=step, **own)
    path = tmp_path / "killed" / f"{step}.ckpt"
    seen_after, resumed = fit(tmp_path / "rest", tiny, resume=path, **own)
    assert seen_after == seen[step:]
    assert all(torch.equal(value, student[key]) for key, value in resumed.items())
    assert (student["head.weight"] == 0).any()
