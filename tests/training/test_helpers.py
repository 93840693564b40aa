"""Helper networks in a run: trained, kept in checkpoints, and not in the bundle."""

import pytest
import timm
import torch
from safetensors.torch import load_file

TINY = ("teacher.name=slim_resnet10_8 teacher.fit.max_epochs=1 trainer.limit_train_batches=4 "
        "trainer.accelerator=cpu trainer.max_epochs=2 store=off logger=none baseline=false "
        "report=false data.batch_size=30")  # fmt: skip


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
