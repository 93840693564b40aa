"""Sparse students, from the command to what a user loads."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.models.test_teacher_and_bundle import STOCK

pytestmark = pytest.mark.slow
QUICK = ("trainer.accelerator=cpu", "teacher.fit.max_epochs=1", "trainer.max_epochs=2",
         "baseline=false", "logger=none", "hydra.run.dir=run")  # fmt: skip
SPARSE = "callbacks=[checkpoints,progress,sparsity]"


def test_a_strength_of_zero_leaves_the_bytes_of_a_run_without_it(finish, tmp_path):
    options = (*QUICK, "trainer.limit_train_batches=10", "report=false")
    finish("train", "plain", *options)
    finish("train", "zero", *options, SPARSE, "callbacks.sparsity.strength=0",
           "callbacks.sparsity.groups=true")  # fmt: skip
    for name in ("model.safetensors", "config.json"):
        one, other = (tmp_path / folder / "run" / "student" / name for folder in ("plain", "zero"))
        assert one.read_bytes() == other.read_bytes(), name


def test_channels_are_removed_and_stock_timm_loads_what_was_judged(finish, tmp_path):
    said = finish("train", "a", *QUICK, SPARSE, "callbacks.sparsity.groups=true",
                  "callbacks.sparsity.start=20", "callbacks.sparsity.strength=20",
                  "callbacks.sparsity.warmup=0")  # fmt: skip
    run = tmp_path / "a" / "run"
    summary = json.loads((run / "summary.json").read_text())
    removed = summary["sparsity"]["removed"]
    before, after = removed["params"]["before"], removed["params"]["after"]
    assert f"parameters {before:,} → {after:,}" in said
    assert summary["student"]["params"] == after < before == summary["student_best"]["params"]
    assert summary["student"]["flops"] == removed["flops"]["after"] < removed["flops"]["before"]
    assert removed["latency_ms"]["after"] > 0
    widths = {name: new for name, (_, new) in removed["widths"].items()}
    args = json.loads((run / "student" / "config.json").read_text())["model_args"]
    assert args["channels"] == [widths[f"layer{k}"] for k in (1, 2, 3, 4)]
    assert args["stem_width"] == widths["stem"]
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert content["student.fc.weight"].shape == (10, 32)  # a resumed run goes on with the whole

    answers = np.load(run / "predictions.npz")
    found = logits_of_stock_timm(run / "student", tmp_path)
    np.testing.assert_allclose(found, answers["test_student"], atol=1e-4)
    page = (run / "report.html").read_text()
    assert page.count('<section id="sparsity">') == 1
    assert f"<td>{widths['layer4']}</td>" in page
    for layer in summary["sparsity"]["layers"]:
        assert f'<th scope="row">{layer["name"]}</th><td>{layer["weights"]:,}</td>' in page


def logits_of_stock_timm(bundle, folder):
    """Return the logits on the test digits, normalised as the bundle says, by timm alone."""
    from distill.data.sources import digits

    settings = json.loads((bundle / "config.json").read_text())["pretrained_cfg"]
    images = (digits().test.images.float() / 255 - settings["mean"][0]) / settings["std"][0]
    torch.save(images, folder / "images.pt")
    arguments = map(str, (bundle, folder / "images.pt", folder / "logits.pt"))
    subprocess.run([sys.executable, "-c", STOCK, *arguments], check=True, cwd=folder)
    return torch.load(folder / "logits.pt", weights_only=True)["logits"].numpy()
