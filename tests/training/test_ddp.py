"""Two gloo processes against one: the same numbers, the same student."""

import os

import pytest
import torch
import torch.multiprocessing as mp
from torch.distributed import destroy_process_group  # else gloo's threads may abort the exit

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
    if ranks > 1:
        destroy_process_group()


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


def learn_from_its_share(rank, port, folder, bundle):
    """Train one epoch as a rank of two, and note which samples its teacher was asked about."""
    from hydra import compose, initialize_config_dir

    from distill.config import build
    from distill.config.overrides import CONF
    from distill.teacher.cached import CachedTeacher
    from distill.training import fit, teachers

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), NODE_RANK="0")
    torch.set_num_threads(1)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=[
            f"paths.output_dir={folder}/run", f"paths.cache={folder}/cache", "trainer=ddp",
            "trainer.devices=2", "trainer.accelerator=cpu", "trainer.max_epochs=1", "logger=none",
            "callbacks=none", "data.batch_size=16", "teacher=timm", "store=disk",
            f"teacher.checkpoint={bundle}",
        ])  # fmt: skip
    loaded, asked, looked = [], [], CachedTeacher.__call__
    build_matched = teachers.build_matched

    def load(*given):
        loaded.append(given)
        return build_matched(*given)

    def ask(cached, batch, step=None):
        if batch.split == "train":
            asked.append(batch.index)
        return looked(cached, batch, step)

    teachers.build_matched, CachedTeacher.__call__ = load, ask
    data = build.build_data(cfg)
    (teacher,), _ = teachers.prepare_teachers(cfg, data, build.build_objective(cfg, data))
    views = []
    teacher.model.register_forward_pre_hook(lambda _, given: views.append(len(given[0])))
    fit.fit(cfg, data, teacher)
    found = {"asked": torch.cat(asked), "loaded": len(loaded), "views": sum(views)}
    torch.save(found, folder / f"rank-{rank}.pt")
    destroy_process_group()


@pytest.mark.slow
def test_each_rank_asks_a_teacher_of_its_own_about_its_own_share(tmp_path):
    import timm

    from distill import save_student

    options = {"layers": [1, 1, 1, 1], "channels": [4, 8, 16, 32]}
    teacher = timm.create_model("resnet18", num_classes=10, in_chans=1, **options)
    known = {"input_size": (1, 32, 32), "mean": [0.5], "std": [0.5]}
    bundle = save_student(teacher, tmp_path / "teacher", classes=list("0123456789"), **known)
    port = 20000 + (os.getpid() + 1) % 20000
    mp.spawn(learn_from_its_share, (port, tmp_path, bundle), nprocs=2)
    one, other = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one["loaded"] == other["loaded"] == 1
    assert len(one["asked"]) == len(other["asked"]) == 897 // 32 * 16
    assert not {*one["asked"].tolist()} & {*other["asked"].tolist()}
    validation = 2 * 50  # at most: padded to whole batches, and once more as a first trial
    for rank in (one, other):
        assert len(rank["asked"]) <= rank["views"] <= len(rank["asked"]) + 2 * validation
