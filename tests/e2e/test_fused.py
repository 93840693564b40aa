"""`hydra/launcher=fused` makes the files and numbers of separate runs, and isolates failures."""

import csv
import json
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

QUICK = ("trainer.accelerator=cpu", "teacher.fit.max_epochs=1", "trainer.max_epochs=2",
         "baseline=false", "report=false", "logger=none")  # fmt: skip
FUSED = "hydra/launcher=fused"
LOSSES = """
import os
from pathlib import Path

import torch


def breaks(student, target):
    raise RuntimeError("this loss breaks")


def crowded(student, target):
    mark = Path("crowded")
    if not mark.exists():
        mark.touch()
        raise torch.OutOfMemoryError("out of memory")
    return torch.nn.functional.cross_entropy(student, target, reduction="none")


def too_large(student, target):
    raise torch.OutOfMemoryError("out of memory")


def seen(student, target):
    Path("seen").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    return torch.nn.functional.cross_entropy(student, target, reduction="none")
"""


def rows(folder):
    with (folder / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def numbers(folder):
    """Return a summary without what a clock measured."""
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("seconds", "images_per_second", "config", "command", "date", "host"):
        summary.pop(name, None)
    for role in ("student", "teacher", "student_best"):
        for name in ("latency_ms", "images_per_second"):
            summary[role].pop(name, None)
            summary[role].pop(f"{name}_quartiles", None)
    return summary


def files(folder):
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return found - {"teacher/hparams.yaml"}  # of the first run ever, which trained the teacher


def same_weights(one, other):
    one, other = (torch.load(path, weights_only=True)["state_dict"] for path in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    ("swept", "shared"),
    [
        # Dropout, weight averaging, early stopping; no store, so that the teacher is asked live.
        (("objective=kd,dist", "+student.args.drop_rate=0,0.3"),
         ("store=off", "callbacks=[checkpoints,progress,ema,early_stopping]",
          "trainer.gradient_clip_val=1")),
        # Other students, schedules and optimisers; mixed views, the store, and runs that end early.
        (("objective.temperature=1,8", "trainer.max_epochs=1,3"),
         ("data.view.mixup=0.3", "annealing=cosine", "annealing.unit=step", "optimizer.opt=sgd",
          "callbacks=[checkpoints,progress,sparsity]")),
    ],
)  # fmt: skip
def test_a_fused_sweep_leaves_what_separate_runs_leave(finish, tmp_path, swept, shared):
    for folder, launcher in (("apart", "hydra/launcher=basic"), ("fused", FUSED)):
        finish("train", folder, "-m", launcher, *QUICK, *shared, *swept, "hydra.sweep.dir=sweep",
               "store.path=answers")  # fmt: skip
    apart, fused = (tmp_path / folder / "sweep" for folder in ("apart", "fused"))
    assert len(rows(apart)) == 4
    for job in "0123":
        one, other = apart / job, fused / job
        bundle = "student/model.safetensors"
        assert (one / bundle).read_bytes() == (other / bundle).read_bytes()
        assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
        for checkpoint in ("last", "best"):
            name = f"checkpoints/{checkpoint}.ckpt"
            assert same_weights(one / name, other / name)
        assert numbers(one) == numbers(other)
        assert files(one) == files(other)
    weights = [load_file(fused / job / "student/model.safetensors") for job in "0123"]
    assert not any(all(torch.equal(one[k], weights[0][k]) for k in one) for one in weights[1:])


def test_what_fails_is_named_and_what_does_not_fit_runs_again(finish, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "mine.py").write_text(LOSSES)
    said = finish(
        "train", "sweep", "-m", FUSED, *QUICK, "objective=supervised",
        "objective.terms.ce.loss=cross_entropy,mine.breaks,mine.crowded,gone,mine.too_large",
        "hydra.sweep.dir=out", code=2,
    )  # fmt: skip
    status = [row["status"] for row in rows(tmp_path / "sweep" / "out")]
    assert status == ["done", "failed", "done", "failed", "failed"]
    assert "RuntimeError: this loss breaks" in said
    assert "job 2 does not fit beside the others: it runs again, alone" in said
    assert "job 3: objective: unknown loss 'gone'" in said
    assert "job 4 does not fit beside the others: it runs again, alone" in said
    assert "job 4: out of memory" in said


def test_two_processes_share_the_jobs_out(finish, tmp_path):
    options = (*QUICK, "objective.temperature=1,2,4", "hydra.sweep.dir=sweep")
    finish("train", "one", "-m", FUSED, *options)
    finish("train", "two", "-m", FUSED, *options, "hydra.launcher.devices=2")
    assert [row["status"] for row in rows(tmp_path / "two" / "sweep")] == ["done"] * 3
    for job in "012":
        bundle = f"sweep/{job}/student/model.safetensors"
        one, two = tmp_path / "one" / bundle, tmp_path / "two" / bundle
        assert one.read_bytes() == two.read_bytes()


def test_the_one_gpu_that_is_listed_is_the_one_that_is_seen(finish, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "mine.py").write_text(LOSSES)
    finish("train", "one", "-m", FUSED, *QUICK, "objective=supervised", "hydra.sweep.dir=sweep",
           "objective.terms.ce.loss=mine.seen", "hydra.launcher.devices=[7]")  # fmt: skip
    assert (tmp_path / "one" / "seen").read_text() == "7"


def test_a_sweep_that_was_told_to_end_goes_on_where_it_was(start, finish, tmp_path):
    options = ("-m", FUSED, *QUICK, "objective.temperature=1,2", "trainer.max_epochs=6")
    finish("train", "whole", *options, "hydra.sweep.dir=sweep")
    options += ("sweep.resume=sweep",)  # also for the first time, when there is nothing to resume
    child = start("train", "killed", *options)
    sweep = tmp_path / "killed" / "sweep"
    last = [sweep / job / "checkpoints" / "last.ckpt" for job in "01"]
    while not all(path.exists() for path in last):
        assert child.is_alive()
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGTERM)
    child.join()
    assert child.exitcode == 75
    said = (tmp_path / "killed" / "output.txt").read_text()
    assert "distill: SIGTERM: stopped; the same command with sweep.resume=sweep" in said
    assert not list(sweep.glob("*/summary.json"))
    said = finish("train", "killed", *options)
    assert said.count("going on from") == 2
    for job in "01":
        bundle = f"sweep/{job}/student/model.safetensors"
        whole, resumed = (tmp_path / folder / bundle for folder in ("whole", "killed"))
        assert whole.read_bytes() == resumed.read_bytes()

    before = last[0].stat().st_mtime_ns
    said = finish("train", "killed", *options, "objective.temperature=1,2,4")
    assert said.count("has been run before") == 2
    assert last[0].stat().st_mtime_ns == before
    assert [row["status"] for row in rows(sweep)] == ["done"] * 3
    said = finish("train", "killed", *options, "objective.temperature=4,8,1")
    assert "3 jobs: 2 finished before, 1 new; 1 more there, not asked for now, kept" in said
    assert last[0].stat().st_mtime_ns == before
    assert [row["objective.temperature"] for row in rows(sweep)] == ["1", "2", "4", "8"]
