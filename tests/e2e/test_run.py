"""The installed commands, as a person would use them: files on disk are the evidence."""

import csv
import hashlib
import json

import numpy as np
import pytest
import torch

import distill

QUICK = ("trainer.max_epochs=1", "teacher.fit.max_epochs=1", "trainer.accelerator=cpu")
STUDENT = {"top1", "top5", "nll", "brier", "ece", "classwise_ece", "adaptive_ece", "smooth_ece",
           "temperature_star", "ece_after_scaling", "params"}  # fmt: skip


def weights(run):
    return hashlib.sha256((run / "student" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    """One quick run that several tests look at."""
    from hydra.core.global_hydra import GlobalHydra

    assert not GlobalHydra.instance().is_initialized()
    folder = tmp_path_factory.mktemp("run")
    import os
    import subprocess

    from tests.conftest import BIN

    environment = {**os.environ, "DISTILL_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [BIN / "distill", *QUICK, "hydra.run.dir=first", "annealing=linear", "annealing.unit=step"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "first", done.stdout, done.stderr


def test_the_table_names_three_models(finished):
    _, output, _ = finished
    for word in ("teacher", "baseline", "distilled", "top-1", "top-5", "NLL", "ECE", "parameters"):
        assert word in output
    assert "images/s" in output


def test_nothing_is_said_that_a_user_cannot_use(finished):
    _, output, errors = finished
    assert errors == ""
    assert "Warning" not in output
    assert "GPU available" not in output


def test_the_run_directory_is_complete(finished):
    run, _, _ = finished
    names = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    assert {
        "summary.json", "metrics.csv", ".hydra/config.yaml", ".hydra/overrides.yaml",
        "checkpoints/last.ckpt", "checkpoints/best.ckpt", "student/model.safetensors",
        "student/config.json", "student/distill.json", "student/README.md",
        "predictions.npz", "examples.npz", "report.html",
    } <= names  # fmt: skip
    assert any("tensorboard/events" in name for name in names)


def test_the_summary_keeps_the_contract_and_agrees_with_the_bundle(finished):
    run, _, _ = finished
    summary = json.loads((run / "summary.json").read_text())
    for role in ("teacher", "baseline", "student"):
        assert set(summary[role]) >= STUDENT, role
    assert set(summary["student"]) >= {"agreement", "kl_from_teacher"}
    assert set(summary) >= {"config", "seconds", "images_per_second", "versions", "git", "seed"}
    assert summary["epochs"] == {"last": 1, "best": 1}
    model = distill.load_student(run / "student")
    assert summary["student"]["params"] == sum(p.numel() for p in model.parameters())
    facts = json.loads((run / "student" / "distill.json").read_text())
    assert facts["metrics"]["student"] == summary["student"]
    assert facts["temperature"] == summary["student"]["temperature_star"]
    assert facts["classes"] == [str(k) for k in range(10)]
    card = (run / "student" / "README.md").read_text()
    assert f"{summary['student']['top1']:.4f}" in card


def test_the_summary_is_what_the_student_gives_on_the_held_out_digits(finished):
    from distill.data.sources import digits
    from distill.metrics import evaluate
    from distill.models.build import normalization

    run, _, _ = finished
    model, test = distill.load_student(run / "student"), digits().test
    with torch.inference_mode():
        logits = model(normalization(model, 1)(test.images.float() / 255))
    numbers = evaluate(logits, test.labels)
    summary = json.loads((run / "summary.json").read_text())["student"]
    for name in ("top1", "top5", "nll", "brier", "ece"):
        assert numbers[name] == pytest.approx(summary[name], abs=1e-5), name


def test_the_metrics_file_has_a_row_per_epoch_and_per_change_of_temperature(finished):
    run, _, _ = finished
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    changes = [float(row["temperature"]) for row in rows if row["temperature"]]
    assert changes[0] == 8.0
    assert changes[-1] == pytest.approx(1.0)
    assert len(changes) == 897 // 32
    (epoch,) = [row for row in rows if row["val/top1"]]
    for name in ("top1", "top5", "mrr", "nll", "brier", "ece", "agreement", "loss", "kl"):
        assert np.isfinite(float(epoch[f"val/{name}"]))


def test_the_checkpoint_holds_no_teacher(finished):
    run, _, _ = finished
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(key.startswith("student.") for key in content["state_dict"])
    about = content["distill"]
    del about["config"], about["learned_from"]  # what the run was told, and hashes of what it read
    assert "teacher" not in repr(content).lower().replace("teacherless", "")
    weights = sum(value.numel() for value in content["state_dict"].values())
    assert (run / "checkpoints" / "last.ckpt").stat().st_size < 4 * 4 * weights + 200_000


def test_the_same_command_gives_the_same_bytes_and_reuses_teacher_and_baseline(
    command, tmp_path, finished
):
    again = command("distill", *QUICK, "hydra.run.dir=again", "annealing=linear",
                    "annealing.unit=step")  # fmt: skip
    assert weights(tmp_path / "again") == weights(finished[0])
    assert again.stdout.count("trained before") == 2
    other = command("distill", *QUICK, "hydra.run.dir=other", "seed=1", "baseline=false")
    assert weights(tmp_path / "other") != weights(finished[0])
    assert "baseline" not in other.stdout


@pytest.mark.slow
def test_a_resumed_run_gives_the_student_of_an_uninterrupted_one(command, tmp_path):
    options = ("teacher.fit.max_epochs=1", "baseline=false", "trainer.max_epochs=2",
               "annealing=cosine", "annealing.unit=step", "trainer.accelerator=cpu")  # fmt: skip
    middle = (
        "{_target_: pytorch_lightning.callbacks.ModelCheckpoint, dirpath: middle, filename: x, "
    )
    middle += "every_n_train_steps: 40, enable_version_counter: false}"  # of 28 an epoch
    command("distill", *options, "hydra.run.dir=whole", f"+callbacks.middle={middle}")
    command("distill", *options, "hydra.run.dir=rest", "ckpt_path=middle/x.ckpt")
    assert weights(tmp_path / "rest") == weights(tmp_path / "whole")


def test_evaluation_gives_the_numbers_of_the_run(command, tmp_path, finished):
    run, _, _ = finished
    done = command("distill-eval", f"student.checkpoint={run}/student", "hydra.run.dir=judged")
    assert "│ student" in done.stdout  # of whose training nothing is asked here
    judged = json.loads((tmp_path / "judged" / "summary.json").read_text())["student"]
    summary = json.loads((run / "summary.json").read_text())["student"]
    assert (tmp_path / "judged" / "report.html").is_file()
    for name in STUDENT - {"params"}:
        assert judged[name] == pytest.approx(summary[name], abs=1e-5), name
    best = command("distill-eval", f"student.checkpoint={run}/checkpoints/best.ckpt",
                   "hydra.run.dir=best", "teacher=timm",
                   f"teacher.checkpoint={run}/student")  # fmt: skip
    assert "teacher" in best.stdout
    numbers = json.loads((tmp_path / "best" / "summary.json").read_text())
    assert numbers["student"]["agreement"] == 1.0  # one epoch: the best is the last


def test_a_student_becomes_a_teacher_and_a_starting_point(command, tmp_path, finished):
    run, _, _ = finished
    command("distill", "trainer.max_epochs=1", "teacher=timm", f"teacher.checkpoint={run}/student",
            f"student.checkpoint={run}/student", "baseline=false", "trainer.limit_train_batches=1",
            "optimizer.lr=1e-12", "hydra.run.dir=next")  # fmt: skip
    summary = json.loads((tmp_path / "next" / "summary.json").read_text())
    first = json.loads((run / "summary.json").read_text())
    assert summary["teacher"]["nll"] == pytest.approx(first["student"]["nll"], abs=1e-5)


@pytest.mark.parametrize("extra", [
    ("callbacks=[checkpoints,progress,ema,early_stopping]", "trainer.accumulate_grad_batches=2"),
    ("trainer.gradient_clip_val=1.0", "trainer.precision=bf16-mixed", "logger=none"),
    ("student=timm", "student.name=cifar_resnet8", "trainer.limit_train_batches=2"),
    ("objective=supervised", "teacher=none", "annealing=step", "annealing.start=4"),
    ("trainer.precision=bf16-true", "objective=dist"),
])  # fmt: skip
def test_options_work_together(command, tmp_path, extra):
    teacher = () if "teacher=none" in extra else QUICK[1:2]
    command("distill", QUICK[0], QUICK[2], *teacher, "baseline=false", "hydra.run.dir=run",
            "trainer.log_every_n_steps=1", *extra)  # fmt: skip
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 <= summary["student"]["top1"] <= 1
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()
    if "trainer.precision=bf16-mixed" in extra:  # judged as the float32 student a user will load
        command("distill-eval", "student.checkpoint=run/student", "hydra.run.dir=judged")
        judged = json.loads((tmp_path / "judged" / "summary.json").read_text())
        assert judged["student"]["nll"] == pytest.approx(summary["student"]["nll"], abs=1e-6)


@pytest.mark.slow
def test_a_compiled_student_is_saved_like_any_other(command, tmp_path):
    command("distill", QUICK[0], QUICK[2], "teacher=none", "objective=supervised", "baseline=false",
            "student=timm", "student.name=cifar_resnet8", "trainer.limit_train_batches=2",
            "trainer.compile=true", "hydra.run.dir=run")  # fmt: skip
    assert distill.load_student(tmp_path / "run" / "student")(torch.zeros(1, 1, 32, 32)).shape


@pytest.mark.slow
def test_one_run_over_two_processes(command, tmp_path):
    command("distill", *QUICK, "trainer=ddp", "trainer.accelerator=cpu", "hydra.run.dir=run",
            "data.batch_size=16")  # fmt: skip
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["student"]["top1"] > 0.1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
