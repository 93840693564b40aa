"""Two gloo processes against one: the same numbers, the same student."""

import os

import pytest
import torch
import torch.multiprocessing as mp

import distill  # noqa: F401  (first: it makes the libraries below importable in a new process)

NAMES = ("top1", "top2", "mrr", "nll", "brier", "ece", "agreement", "ce", "kl")


def run(rank, ranks, port, folder, tiny, views):
    """Train on 64 and test on 49 samples: an odd number, so that two ranks need padding."""
    import pytorch_lightning as pl

    from distill import Distiller, Objective
    from distill.data import DataModule
    from distill.data.sources.splits import Resident, Source

    if ranks > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(ranks))
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), NODE_RANK="0")
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (64 + 49 + 49, 1, 8, 8), generator=generator).to(torch.uint8)
    split = Resident(images, torch.arange(len(images)) % 4)
    parts = [split.subset(torch.arange(a, b)) for a, b in ((0, 64), (64, 113), (113, 162))]
    source = Source("random", list("abcd"), 1, *parts)
    data = DataModule(source, {"pad": 1, "flip": True}, batch_size=16 // ranks,
                      views_per_step=views, strong_view={"rotate": 20})  # fmt: skip
    torch.manual_seed(0)
    teacher, student = tiny(width=16).double(), tiny()
    student.body[1] = torch.nn.Identity()  # batch norm sees each rank's own batch
    student.body[3] = torch.nn.Identity()  # and dropout each rank's own noise
    # dist's columns run over the whole batch: in training over the ranks, in validation over none,
    # for there the last batch (49 = 3·16 + 1 samples) leaves one rank with nothing but padding
    terms = {"ce": "cross_entropy", "kl": "kl_divergence", "dist": "dist"}
    # small losses are chosen, and what is kept is averaged, over the batch of all ranks
    selection = {"small_loss": 0.6, "agreement": 0.25}
    objective = Objective(terms, 4.0, 0.5, label_smoothing=0.1, sample_selection=selection)
    module = Distiller(
        student, teacher, objective, topk=(1, 2), optimizer={"opt": "momentum", "lr": 0.01}
    )
    trainer = pl.Trainer(
        accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_epochs=2,
        precision="64-true",  # the columns of noise are nearly constant: float32 would blur them
        use_distributed_sampler=False, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    kept = {"train/kept": trainer.callback_metrics["train/kept"].item()}
    numbers = {**trainer.test(module, datamodule=data, verbose=False)[0], **kept}
    if rank == 0:
        torch.save((numbers, student.state_dict()), folder / f"{ranks}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("views", [1, 2])
def test_two_processes_give_the_numbers_and_the_student_of_one(tiny, tmp_path, views):
    port = 20000 + os.getpid() % 20000
    mp.spawn(run, (2, port, tmp_path, tiny, views), nprocs=2)
    run(0, 1, port, tmp_path, tiny, views)
    (two, student_of_two), (one, student_of_one) = (
        torch.load(tmp_path / f"{ranks}.pt", weights_only=True) for ranks in (2, 1)
    )
    for key, value in student_of_one.items():  # averaged gradients are the whole batch's gradient
        torch.testing.assert_close(student_of_two[key], value, rtol=1e-6, atol=1e-9)
    for name in NAMES:
        assert two[f"test/{name}"] == pytest.approx(one[f"test/{name}"], rel=1e-6), name
    assert 0 < one["train/kept"] < 0.625  # round(0.6·16) = 10 of 16, less what the teacher doubts
    assert two["train/kept"] == pytest.approx(one["train/kept"], rel=1e-6)
    for name in ("top1", "top2"):  # counts: any padding counted twice would show
        assert round(two[f"test/{name}"] * 49, 4) == round(one[f"test/{name}"] * 49, 4)
