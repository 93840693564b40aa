"""Helper networks in a run: trained, kept in checkpoints, and not in the bundle."""

import pytest
import timm
import torch
from safetensors.torch import load_file

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
