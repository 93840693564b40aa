"""A run on shards, on one rank or two, that is killed in an epoch goes on as if it had not been."""

import os
import signal

import pytest
import torch
import torch.multiprocessing as mp

import distill  # noqa: F401  (first: it makes the libraries below importable in a new process)
from tests.conftest import free_port
from tests.data.sources.shard_cases import lose, write_shards

STEPS, EPOCHS = 5, 3  # of an epoch; 60 samples in 5 shards, 12 in a global batch


def run(rank, ranks, port, root, folder, tiny, kill_at, resume):
    """Train on shards; at a step all ranks are killed."""
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import ModelCheckpoint

    from distill import Distiller, Objective
    from distill.data import DataModule
    from distill.data.sources import shards

    class Journal(pl.Callback):
        """Write down which samples each step saw; be killed where told."""

        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.seen.append((batch.index.tolist(), batch.view.sum().item()))

    if ranks > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(ranks))
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), NODE_RANK="0")
    torch.set_num_threads(1)
    source = shards(str(root), channels=1, cache=str(folder.parent / "cache"), shuffle_window=15)
    data = DataModule(
        source, {"scale": [0.5, 1.0]}, image_size=8, batch_size=12 // ranks, num_workers=1
    )
    torch.manual_seed(0)
    teacher, student = tiny(width=16), tiny()
    student.body[3] = torch.nn.Identity()  # dropout draws from torch's own generator
    objective = Objective({"ce": "cross_entropy", "kl": "kl_divergence"}, 4.0, 0.5)
    module = Distiller(student, teacher, objective, optimizer={"opt": "adamw", "lr": 0.01})
    journal = Journal()
    checkpoint = ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, save_top_k=-1,
        auto_insert_metric_name=False,
    )  # fmt: skip
    trainer = pl.Trainer(
        accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto",
        max_epochs=EPOCHS, use_distributed_sampler=False, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[journal, checkpoint],
        limit_val_batches=1, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    torch.save((journal.seen, student.state_dict()), folder / f"{rank}.pt")
    if ranks > 1:
        torch.distributed.destroy_process_group()  # else gloo's threads may abort the exit


def train(ranks, root, folder, tiny, kill_at=None, resume=None):
    """Run all ranks; return what each saw and its student, or nothing if they were killed."""
    folder.mkdir()
    given = (ranks, free_port(), root, folder, tiny, kill_at, resume)
    if kill_at is not None:
        with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
            mp.spawn(run, given, nprocs=ranks)
        return None
    mp.spawn(run, given, nprocs=ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_it_sees_the_same_views_and_ends_in_the_same_bytes(tiny, tmp_path, ranks):
    root = write_shards(tmp_path / "shards", train=5)
    whole = train(ranks, root, tmp_path / "whole", tiny)
    step = STEPS + 2  # in the second epoch
    train(ranks, root, tmp_path / "killed", tiny, kill_at=step)
    path = tmp_path / "killed" / f"{step}.ckpt"
    rest = train(ranks, root, tmp_path / "rest", tiny, resume=path)
    for (seen, student), (seen_after, resumed) in zip(whole, rest, strict=True):
        assert len(seen) == STEPS * EPOCHS
        assert seen_after == seen[step:]
        assert all(torch.equal(value, student[key]) for key, value in resumed.items())
    first_epoch = [index for seen, _ in whole for indices, _ in seen[:STEPS] for index in indices]
    assert sorted(first_epoch) == list(range(60))


def test_what_was_lost_before_an_interruption_is_in_the_numbers_of_the_run_that_goes_on(
    tiny, tmp_path
):
    import pytorch_lightning as pl

    from distill import Distiller, Objective
    from distill.data import DataModule
    from distill.data.sources import shards

    root = write_shards(tmp_path / "shards", train=5)
    path = root / "train-0003.tar"
    content, about = path.read_bytes(), path.stat()

    def trained(epochs, *lost, resume=None):
        source = shards(str(root), channels=1, retries=0, broken="skip")
        data = DataModule(source, {"scale": [0.5, 1.0]}, image_size=8, batch_size=12)
        lose(data, *lost)
        torch.manual_seed(0)
        student = tiny()
        student.body[3] = torch.nn.Identity()  # dropout draws from torch's own generator
        module = Distiller(student, None, Objective({"ce": "cross_entropy"}))
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=epochs, use_distributed_sampler=False, logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return data, student.state_dict()

    before, _ = trained(1, path)
    path.write_bytes(content)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    after, resumed = trained(2, resume=tmp_path / "1.ckpt")
    assert "without 12 of its 60 images" in before.lost_note
    assert after.lost_note == before.lost_note
    _, uninterrupted = trained(2, path)
    assert all(torch.equal(value, resumed[name]) for name, value in uninterrupted.items())
