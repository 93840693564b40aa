"""Helper networks in a run: trained, kept in checkpoints, gone on with, and not in the bundle."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

TINY = ("teacher.name=slim_resnet10_8 teacher.fit.max_epochs=1 trainer.limit_train_batches=4 "
        "trainer.accelerator=cpu store=off logger=none baseline=false report=false "
        "data.batch_size=30")  # fmt: skip


@pytest.fixture
def distill(tmp_path, cache, command):
    def run(arguments, folder="run", check=True):
        line = f"distill {TINY} paths.cache={cache} hydra.run.dir={folder} {arguments}"
        return command(*line.split(), folder=tmp_path, check=check)

    return run


@pytest.mark.slow
def test_stock_timm_loads_a_student_that_answers_by_its_teachers_classifier(distill, tmp_path):
    distill("objective=simkd trainer.max_epochs=2 student=timm student.name=resnet10t")
    bundle = tmp_path / "run" / "student"
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    state = checkpoint["state_dict"]
    assert not any("objective" in name for name in load_file(bundle / "model.safetensors"))
    projection = state["objective.learned.embedding.project.weight"]
    program = (
        "import timm, torch\n"
        f"model = timm.create_model('local-dir:{bundle}', pretrained=True)\n"
        f"torch.save((model.fc.weight, model.fc.bias), {str(tmp_path / 'fc.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    weight, bias = torch.load(tmp_path / "fc.pt", weights_only=True)
    teacher = next((tmp_path.parent).rglob("unused"), None)
    assert teacher is None
    # W·P has no more rank than P, and the same row space: it is the teacher's layer of P·s.
    rank = torch.linalg.matrix_rank(weight.double())
    assert rank <= min(weight.shape[0], projection.shape[0])
    _, residual = solved(projection, weight)
    assert residual < 1e-4
    numbers = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert numbers["student"]["top1"] > 0.1
    assert bias.abs().sum() > 0


def solved(projection, weight):
    """Return W with W·P next to a weight, and how far it is from it."""
    found = torch.linalg.lstsq(projection.double().T, weight.double().T).solution.T
    return found, (found @ projection.double() - weight.double()).abs().max()
