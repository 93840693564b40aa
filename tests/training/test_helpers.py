"""Helper networks in a run: trained, kept in checkpoints, and not in the bundle."""

import pytest
import pytorch_lightning as pl
import timm
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import load_file

import distill.models.slim  # noqa: F401  (registers the models)
from distill import Distiller, Objective
from distill.data import DataModule
from distill.data.sources.splits import Resident, Source
from distill.training.module import check_helpers

TINY = ("teacher.name=slim_resnet10_8 teacher.fit.max_epochs=1 trainer.limit_train_batches=4 "
        "trainer.accelerator=cpu trainer.max_epochs=2 store=off logger=none baseline=false "
        "report=false data.batch_size=30")  # fmt: skip


def test_a_checkpoint_of_other_helpers_is_refused_in_one_line():
    here = {"student.w": torch.ones(2), "objective.helpers.contrast.queued": torch.ones(3, 2)}
    check_helpers(here, here)
    for other in ({}, {"objective.helpers.contrast.queued": torch.ones(4, 2)}):
        with pytest.raises(ValueError, match=r"contrast.queued is (None|\[4, 2\]) there and \[3"):
            check_helpers(other, here)


@pytest.mark.slow
def test_stock_timm_loads_a_student_that_answers_by_its_teachers_classifier(tmp_path, command):
    line = f"distill objective=simkd student=timm student.name=resnet10t {TINY}"
    own = ["paths.cache=cache", "hydra.run.dir=run"]
    command(*line.split(), *own, folder=tmp_path)
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    (teacher,) = (tmp_path / "cache").glob("teacher-*/**/*.safetensors")
    theirs = load_file(teacher)
    bundle = tmp_path / "run" / "student"
    assert not any("objective" in name for name in load_file(bundle / "model.safetensors"))
    student = timm.create_model(f"local-dir:{bundle}", pretrained=True)
    projection = state["objective.helpers.embedding.project.weight"]
    torch.testing.assert_close(student.fc.weight.detach(), theirs["fc.weight"] @ projection)
    torch.testing.assert_close(student.fc.bias.detach(), theirs["fc.bias"])


def trained(folder, stop_at=None, resume=None):
    """Train under CRD with a queue, and return the student, the helpers, and what they remember."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (64, 1, 16, 16), generator=generator).to(torch.uint8)
    split = Resident(images, torch.arange(64) % 4)
    parts = [split.subset(torch.arange(a, b)) for a, b in ((0, 48), (48, 56), (56, 64))]
    data = DataModule(Source("random", list("abcd"), 1, *parts), {"pad": 1}, batch_size=8)
    torch.manual_seed(0)
    options = {"num_classes": 4, "in_chans": 1}
    teacher, student = (
        timm.create_model(name, **options) for name in ("slim_resnet10_8", "slim_resnet10_4")
    )
    terms = {"ce": "cross_entropy", "contrast": {"loss": "contrast", "weight": 0.8, "queue": 20}}
    module = Distiller(
        student, teacher, Objective(terms, alpha=None), optimizer={"opt": "adamw", "lr": 0.01}
    )
    checkpoint = ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, save_top_k=-1,
        auto_insert_metric_name=False,
    )  # fmt: skip
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, max_steps=stop_at or -1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        default_root_dir=folder, callbacks=[checkpoint],
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module.state_dict()


@pytest.mark.parametrize("step", [1, 5, 6, 9])
def test_helpers_and_their_memory_go_on_where_they_were(tmp_path, step):
    whole = trained(tmp_path / "whole")
    trained(tmp_path / "stopped", stop_at=step)
    resumed = trained(tmp_path / "rest", resume=tmp_path / "stopped" / f"{step}.ckpt")
    assert sum("helpers" in name for name in whole) > 2
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
