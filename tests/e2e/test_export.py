"""From a run to its exported files, and back to a run that is made to be quantised."""

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file

from distill.deploy.export import onnx as formats
from tests.deploy.export.conftest import digits, record

QUICK = ("trainer.max_epochs=2", "trainer.accelerator=cpu", "teacher=none", "objective=supervised",
         "baseline=false", "report=false", "logger=none")  # fmt: skip


@pytest.mark.slow
def test_a_run_is_exported_with_the_answers_it_was_judged_by(command, finish, tmp_path):
    finish("train", ".", *QUICK, "hydra.run.dir=run")
    done = command(
        "distill-export", "student.checkpoint=run/student", "hydra.run.dir=run/export",
        "export.max_drop=5", COLUMNS="120",
    )  # fmt: skip
    assert done.stderr == ""
    written = record(tmp_path / "run" / "export")
    for word in ("test split, 800 images", *written["formats"], "export.json in run/export"):
        assert word in done.stdout
    assert written["command"].startswith("distill-export student.checkpoint=run/student")
    assert {"onnx", "onnxruntime"} <= written["versions"].keys()
    path = tmp_path / "run" / "export" / "student.onnx"
    said = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert float(said["temperature"]) == written["temperature"] > 0
    data = digits()
    images = data.clean_test_images(torch.arange(len(data.test))).float() / 255
    judged = np.load(tmp_path / "run" / "predictions.npz")["test_student"]
    answers = formats.open_onnx(path)(images).numpy()
    assert np.abs(answers - judged / written["temperature"]).max() < 1e-4

    quick = ("experiment=qad", *QUICK[1:], "trainer.max_epochs=1")
    printed = finish("train", ".", *quick, "student.checkpoint=run/student", "hydra.run.dir=qad")
    assert "fake_quantize: validation was of int8" in printed
    before, after = (
        load_file(tmp_path / name / "student" / "model.safetensors") for name in ("run", "qad")
    )
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    assert not torch.equal(before["fc.weight"], after["fc.weight"])
    assert "student.checkpoint" in finish("train", "none", *quick, code=2)
