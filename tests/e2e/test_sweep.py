import csv

import pytest

QUICK = ("trainer.max_epochs=1", "teacher.fit.max_epochs=1", "trainer.accelerator=cpu")


def test_a_sweep_ends_in_one_table_and_prepares_the_teacher_once(command, tmp_path):
    done = command("distill", "-m", "objective.temperature=1,4", *QUICK, "hydra.sweep.dir=sweep",
                   "data.batch_size=33")  # fmt: skip
    assert done.stdout.count("teacher: training") == 1
    assert done.stdout.count("baseline: training") == 1
    with (tmp_path / "sweep" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["objective.temperature"] for row in rows] == ["1", "4"]
    assert all(row["status"] == "done" and 0 <= float(row["test_top1"]) <= 1 for row in rows)
    for job in ("0", "1"):
        assert (tmp_path / "sweep" / job / "student" / "model.safetensors").is_file()
    assert "sweep: val decides" in done.stdout
    assert done.stderr == ""


def test_a_failing_job_is_named_and_the_others_finish(command, tmp_path):
    done = command("distill", "-m", "objective.temperature=-1,4", *QUICK, "hydra.sweep.dir=sweep",
                   "baseline=false", check=False)  # fmt: skip
    assert done.returncode == 2
    assert "job 0: objective.temperature must be a number above 0, got -1" in done.stderr
    assert "Traceback" not in done.stderr
    with (tmp_path / "sweep" / "sweep.csv").open() as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["failed", "done"]


@pytest.mark.parametrize(
    "wrong",
    [
        ("objective.temperature=-1",),
        ("objective.temperature=4", "data=folder"),  # and no root
        ("objective.temperature=4", "trainer.devices=2"),
    ],
)
def test_a_job_that_fails_in_a_used_folder_does_not_show_the_old_numbers(command, tmp_path, wrong):
    options = (*QUICK, "hydra.sweep.dir=sweep", "baseline=false", "trainer.limit_train_batches=1")
    command("distill", "-m", "objective.temperature=4", *options)
    again = command("distill", "-m", *options, *wrong, check=False)
    assert again.returncode == 2
    with (tmp_path / "sweep" / "sweep.csv").open() as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["failed"]
    assert (tmp_path / "sweep" / "0" / "summary.previous.json").is_file()


@pytest.mark.parametrize("launcher", ["fused", "joblib"])
def test_previews_have_no_table_and_have_not_failed(command, tmp_path, launcher):
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    options = (f"hydra/launcher={launcher}", "hydra.sweep.dir=sweep")
    done = command("distill", "-m", "preview.enabled=true", "seed=0,1", *options)
    assert "sweep:" not in done.stdout
    assert not (tmp_path / "sweep" / "sweep.csv").exists()
    again = command(
        "distill", "-m", "preview.enabled=true", "preview.row=0,-1", *options, check=False
    )
    assert again.returncode == 2  # the folder in which job 1 had ended well does not help it
    assert "job 1: preview.row must be a whole number" in again.stderr
    assert "sweep:" not in again.stdout


def test_a_sweep_of_stores_ends_well(command, tmp_path):
    done = command("distill-store", "-m", "store.views=1", "data.seed=0,1",
                   "teacher.fit.max_epochs=1", "trainer.accelerator=cpu", "hydra.sweep.dir=sweep",
                   f"store.path={tmp_path}/store")  # fmt: skip
    assert "sweep:" not in done.stdout
    assert not (tmp_path / "sweep" / "sweep.csv").exists()


def test_jobs_that_take_turns_do_not_change_directory(command, tmp_path):
    done = command("distill", "-m", "seed=0,1", *QUICK, "hydra.job.chdir=true", check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "hydra/launcher=basic" in line


def test_subprocess_ddp_in_a_sweep_is_refused_with_the_ways_out(command, tmp_path):
    done = command("distill", "-m", "seed=0,1", "trainer=ddp", "trainer.accelerator=cpu",
                   "hydra.sweep.dir=sweep", check=False)  # fmt: skip
    assert done.returncode == 2
    for way_out in ("trainer.devices=1", "torchrun"):
        assert way_out in done.stderr
    assert not list(tmp_path.rglob("*.safetensors"))
