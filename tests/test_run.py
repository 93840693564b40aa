"""The recipe of a run, in this process."""

import json
import logging
import math
import os
import resource
import shutil
import signal

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from scipy.stats import binomtest

from distill import run
from distill.config.overrides import CONF
from distill.models.bundle import load_student, read_facts
from distill.report import words
from distill.training.module import Distiller
from distill.utils import signals

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
    cfg = composed(*QUICK)
    told = cfg.copy()
    value = run.train(cfg)
    assert cfg == told  # what a run finds out is returned, and never written into it
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
    assert set(judged["intervals"]) >= {"top1", "top5", "balanced_accuracy", "nll", "brier", "ece"}
    for name, (low, high) in judged["intervals"].items():
        assert low <= judged[name] <= high, name


def test_differences_are_in_the_summary_on_the_screen_and_in_the_card(composed, tmp_path, capsys):
    value = run.train(composed(*QUICK, "optimized_metric=val/balanced_accuracy"))
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert value == pytest.approx(summary["validation"]["balanced_accuracy"])
    arrays = np.load(folder / "predictions.npz")
    target = arrays["test_target"]
    right = {role: arrays[f"test_{role}"].argmax(1) == target for role in ("student", "baseline")}
    found = summary["comparisons"]["baseline"]
    alone = [int((right[a] & ~right[b]).sum()) for a, b in (tuple(right), tuple(right)[::-1])]
    assert [found["only_first"], found["only_second"]] == alone
    assert found["mcnemar_p"] == pytest.approx(
        binomtest(alone[0], sum(alone)).pvalue if sum(alone) else 1
    )
    assert set(summary["comparisons"]) == {"baseline", "teacher"}
    assert summary["majority"]["share"] == np.bincount(target).max() / len(target)
    said = capsys.readouterr().out
    card, page = ((folder / name).read_text() for name in ("student/README.md", "report.html"))
    for sentence in words.comparison_sentences(summary):
        assert sentence in said
        assert sentence in card
        assert sentence.split(" (")[0].split(" by ")[0] in page
    # Baseline and student are one architecture, and it was measured once.
    for name in ("latency_ms", "images_per_second"):
        assert summary["student"][name] == summary["baseline"][name]
        low, high = summary["student"][f"{name}_quartiles"]
        assert low <= summary["student"][name] <= high


def test_the_best_epoch_is_the_one_whose_weights_are_judged(composed, tmp_path):
    run.train(composed(*QUICK, "trainer.max_epochs=3", "baseline=false", "optimizer.lr=0.3"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    saved = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    assert summary["epochs"] == {"last": 3, "best": saved["epoch"] + 1}
    if saved["epoch"] < 2:
        assert summary["student_best"]["nll"] != summary["student"]["nll"]
    assert summary["baseline"] is None

    bundle, checkpoint = tmp_path / "run/student_best", tmp_path / "run/checkpoints/best.ckpt"
    for name, value in load_file(bundle / "model.safetensors").items():
        assert torch.equal(value, saved["state_dict"][f"student.{name}"])
    facts, about = read_facts(bundle), read_facts(checkpoint)
    assert facts["epoch"] == {"number": saved["epoch"] + 1, "chosen": "best", "by": "val/top1",
                              "is_last": saved["epoch"] == 2}  # fmt: skip
    assert facts["temperature"] == summary["student_best"]["temperature_star"]
    assert facts["metrics"]["student"] == summary["student_best"]
    assert read_facts(tmp_path / "run/student")["epoch"]["number"] == 3
    assert about == {"classes": facts["classes"]}
    one, other = load_student(bundle), load_student(checkpoint)
    images = torch.rand(2, *other.pretrained_cfg["input_size"])
    assert torch.equal(one(images), other(images))
    for key in ("input_size", "mean", "std", "interpolation", "crop_pct"):
        assert str(one.pretrained_cfg[key]).strip("[]()") == str(other.pretrained_cfg[key]).strip(
            "[]()"
        ), key


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:Experiment logs directory")
def test_a_run_that_is_prolonged_ends_as_one_that_was_told_at_once(composed, tmp_path):
    options = (*QUICK[:2], *QUICK[3:], "teacher=none", "objective=supervised", "baseline=false",
               "report=false", "scheduler=null", "resume=auto", "optimizer.lr=0.3")  # fmt: skip
    run.train(composed(*options, "trainer.max_epochs=3", folder="at_once"))
    run.train(composed(*options, "trainer.max_epochs=1", folder="before"))
    (tmp_path / "before").rename(tmp_path / "run")  # and its first epoch is still known as the best
    run.train(composed(*options, "trainer.max_epochs=3", folder="run"))
    for name in ("student/model.safetensors", "student_best/model.safetensors"):
        one, other = ((tmp_path / folder / name).read_bytes() for folder in ("at_once", "run"))
        assert one == other, name
    assert not (tmp_path / "before").exists()
    assert (tmp_path / "run" / "summary.previous.json").is_file()
    with pytest.raises(ValueError, match=r"was run with trainer\.max_epochs=3, and this run says"):
        run.train(composed(*options, "trainer.max_epochs=2", folder="run"))


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


def test_a_table_of_costs_is_read_when_a_run_begins(composed, tmp_path, monkeypatch):
    """And may be gone when training ends, whatever other runs of this process do meanwhile."""
    table, fit = tmp_path / "costs.csv", run.fit
    options = (*QUICK, "baseline=false", "report=false", "objective=supervised")

    def with_another_run_between(*given):
        table.unlink()
        monkeypatch.setattr(run, "fit", fit)
        run.train(composed(*options, folder="other"))
        return fit(*given)

    table.write_text("\n".join(",".join(str(int(i != j)) for j in range(10)) for i in range(10)))
    monkeypatch.setattr(run, "fit", with_another_run_between)
    run.train(composed(*options, f"decision.costs={table}"))
    student = json.loads((tmp_path / "run" / "summary.json").read_text())["student"]
    assert student["cost_of_argmax"] == pytest.approx(1 - student["top1"])


@pytest.fixture
def file_limit():
    """Let no file grow beyond a number of bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def untimed(numbers):
    measured = ("images_per_second", "latency_ms")
    return {k: v for k, v in numbers.items() if k.removesuffix("_quartiles") not in measured}


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def measured_in_training_only(student, target):
    """A loss that is infinite wherever no gradient is asked for."""
    losses = torch.nn.functional.cross_entropy(student, target, reduction="none")
    return losses if torch.is_grad_enabled() else losses + math.inf


@pytest.mark.parametrize("more", ["optimized_metric=val/loss", "sweep.metrics=[val/top1,val/loss]"])
def test_a_sweeper_is_told_nothing_of_what_is_not_finite_and_the_run_is_over(
    composed, tmp_path, more
):
    options = (*QUICK, "baseline=false", "report=false", "objective=supervised", "resume=auto",
               f"objective.terms.ce.loss={__name__}.measured_in_training_only", more)  # fmt: skip
    assert run.train(composed(*options)) is None
    before = (tmp_path / "run/summary.json").read_bytes()
    assert json.loads(before)["validation"]["loss"] is None
    assert run.train(composed(*options)) is None
    assert (tmp_path / "run/summary.json").read_bytes() == before
    assert not (tmp_path / "run/summary.previous.json").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:Experiment logs directory")
def test_a_run_that_is_over_is_not_run_again_and_one_that_was_not_judged_is_judged(
    composed, tmp_path, caplog, file_limit
):
    caplog.set_level(logging.INFO, "distill")
    options = (*QUICK, "trainer.max_epochs=2", "baseline=false", "report=false",
               "callbacks=[checkpoints,ema]", "trainer.limit_train_batches=8",
               "resume=auto")  # fmt: skip
    run_folder, bundle = tmp_path / "run", tmp_path / "run/student/model.safetensors"
    value = run.train(composed(*options))
    assert "holds no checkpoint: from the beginning" in caplog.text
    before = files(run_folder)
    del before[run_folder / ".lock"]
    assert run.train(composed(*options)) == pytest.approx(value)
    assert before.items() <= files(run_folder).items()
    with pytest.raises(ValueError, match=r"was run with seed=0, and this run says 1$"):
        run.train(composed(*options, "seed=1", "data.seed=0"))
    assert before.items() <= files(run_folder).items()

    summary = json.loads((run_folder / "summary.json").read_text())
    (run_folder / "summary.json").unlink()
    weights = bundle.read_bytes()
    last = run_folder / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match=r"seed=0, and this run says 1: .*last\.ckpt was left by"):
        run.train(composed(*options, "seed=1", "data.seed=0"))
    file_limit(len(weights) // 2)  # of what is written from here on, only the bundle is larger
    with pytest.raises(OSError, match="student"):
        run.train(composed(*options))
    file_limit(resource.RLIM_INFINITY)
    assert bundle.read_bytes() == weights
    assert not (run_folder / "summary.json").exists()
    assert run.train(composed(*options)) == pytest.approx(value)
    again = json.loads((run_folder / "summary.json").read_text())
    assert bundle.read_bytes() == weights
    assert files(run_folder)[last] == before[last]
    for name in ("student", "student_best", "validation", "epochs"):
        ours, theirs = (untimed(one[name] or {}) for one in (summary, again))
        assert ours == theirs, name

    shutil.copyfile(last, run_folder / "kept.ckpt")
    run.set_aside(run_folder, str(last))
    assert last.is_file()
    run.set_aside(run_folder)
    assert not last.exists()
    assert (run_folder / "checkpoints.previous" / "last.ckpt").is_file()
    assert (run_folder / "summary.previous.json").is_file()


def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(
    composed, tmp_path, monkeypatch, file_limit
):
    from distill.training.callbacks.checkpoints import WholeCheckpoints

    save, done = WholeCheckpoints.save_checkpoint, []

    def fill_up(self, checkpoint, path, storage_options=None):
        if len(done) == 3:  # the second epoch's best and last
            file_limit(100_000)
        done.append(path)
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(WholeCheckpoints, "save_checkpoint", fill_up)
    options = (*QUICK, "trainer.max_epochs=4", "baseline=false", "report=false",
               "callbacks=[checkpoints]", "resume=auto")  # fmt: skip
    with pytest.raises(OSError, match="File too large"):
        run.train(composed(*options))
    checkpoints = tmp_path / "run" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"last.ckpt", "best.ckpt"}
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] > 0
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_signal_while_lightning_still_has_its_own_handler_is_heeded(
    composed, tmp_path, monkeypatch
):
    validate = Distiller.validation_step

    def told(self, batch, batch_idx):
        if self.trainer.sanity_checking:
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(self, batch, batch_idx)

    monkeypatch.setattr(Distiller, "validation_step", told)
    stops = (signals.Preempted, KeyboardInterrupt)  # the second would end all tests
    with pytest.raises(stops) as stopped, signals.heeded():
        run.train(composed(*QUICK[:2], *QUICK[3:], "baseline=false", "teacher=none",
                           "objective=supervised"))  # fmt: skip
    assert stopped.type is signals.Preempted
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("raised", [SystemExit(7), KeyboardInterrupt()])
def test_an_exit_that_a_scheduler_asks_for_is_not_taken_for_ctrl_c(composed, monkeypatch, raised):
    def leave(self, batch, batch_idx):
        raise raised  # as submitit's handler does, when Slurm's time is up

    monkeypatch.setattr(Distiller, "training_step", leave)
    keys = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)) as stopped:
            run.train(composed(*QUICK[:2], *QUICK[3:], "baseline=false", "teacher=none",
                               "objective=supervised"))  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, keys)  # which Lightning ignores after Ctrl-C
    assert stopped.type is type(raised)
    assert getattr(stopped.value, "code", 7) == 7
