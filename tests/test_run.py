"""The recipe of a run, in this process."""

import json
import logging

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from distill import run
from distill.cli import CONF

QUICK = ("trainer.max_epochs=1", "trainer.limit_train_batches=2", "teacher.fit.max_epochs=1",
         "trainer.accelerator=cpu", "logger=none")  # fmt: skip


@pytest.fixture
def composed(tmp_path, cache):
    def make(*overrides, name="train", folder="run"):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            paths = (f"paths.output_dir={tmp_path / folder}", f"paths.cache={cache}")
            return compose(name, overrides=[*paths, *overrides])

    return make


def test_a_run_returns_its_metric_and_leaves_numbers_that_evaluation_repeats(
    composed, tmp_path, capsys, caplog
):
    caplog.set_level(logging.INFO, "distill")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text("{}")  # of an earlier run
    (tmp_path / "run" / "report.html").write_text("old")
    value = run.train(composed(*QUICK))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (tmp_path / "run" / "summary.previous.json").read_text() == "{}"
    assert (tmp_path / "run" / "report.previous.html").read_text() == "old"
    assert value == pytest.approx(summary["validation"]["top1"])
    assert summary["epochs"] == {"last": 1, "best": 1}
    for role in ("teacher", "baseline", "student"):
        assert summary[role]["images_per_second"] > 0
    assert "distilled" in capsys.readouterr().out
    assert "epoch 1/1" in caplog.text

    bundle = tmp_path / "run" / "student"
    run.evaluate(composed(f"student.checkpoint={bundle}", "trainer.accelerator=cpu", name="eval",
                          folder="judged"))  # fmt: skip
    judged = json.loads((tmp_path / "judged" / "summary.json").read_text())["student"]
    for name in ("top1", "nll", "brier", "ece", "temperature_star", "mrr"):
        assert judged[name] == pytest.approx(summary["student"][name], abs=1e-5), name


def test_the_best_epoch_is_the_one_whose_weights_are_judged(composed, tmp_path):
    run.train(composed(*QUICK, "trainer.max_epochs=3", "baseline=false", "optimizer.lr=0.3"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    saved = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    assert summary["epochs"] == {"last": 3, "best": saved["epoch"] + 1}
    if saved["epoch"] < 2:
        assert summary["student_best"]["nll"] != summary["student"]["nll"]
    assert summary["baseline"] is None


def test_with_weight_averaging_the_bundle_holds_the_average(composed, tmp_path):
    run.train(composed(*QUICK, "callbacks=[checkpoints,ema]", "baseline=false", "report=false",
                       "trainer.limit_train_batches=8"))  # fmt: skip
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    bundle = load_file(tmp_path / "run/student/model.safetensors")
    differs = 0
    for name, value in bundle.items():
        assert torch.equal(value, saved["state_dict"][f"student.{name}"])
        raw = saved["current_model_state"][f"student.{name}"]
        differs += not torch.equal(value, raw)
    assert differs > len(bundle) / 2
