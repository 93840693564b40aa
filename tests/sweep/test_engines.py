"""Presets of other launchers and sweepers, with their plugins and without; Ray has its own file."""

import csv
import re
from dataclasses import fields

import pytest
import yaml

from distill.config.overrides import CONF

LAUNCHERS = ("joblib", "ray", "submitit_slurm")
SWEEPERS = ("optuna_accuracy",)
QUICK = ("trainer.max_epochs=1", "teacher.fit.max_epochs=1", "trainer.accelerator=cpu",
         "trainer.limit_train_batches=2", "baseline=false", "report=false", "logger=none",
         "hydra.sweep.dir=sweep")  # fmt: skip
PLUGINS = {
    "hydra/launcher=joblib": "joblib",
    "hydra/launcher=ray": "ray",
    "hydra/launcher=submitit_slurm": "slurm",
    "hydra/sweeper=optuna_accuracy": "optuna",
}
# Hydra finds its plugins by pkgutil; Python imports a sitecustomize.py at start.
HIDE = """
import pkgutil
found = pkgutil.iter_modules
def iter_modules(path=None, prefix=""):
    return (m for m in found(path, prefix) if not m.name.startswith("hydra_plugins.hydra_"))
pkgutil.iter_modules = iter_modules
"""


@pytest.fixture
def without_plugins(tmp_path, monkeypatch):
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text(HIDE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hide"))


def preset(group, name):
    return CONF / "hydra" / group / f"{name}.yaml"


def jobs(folder):
    with (folder / "sweep" / "sweep.csv").open() as file:
        return [row["status"] for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    ("group", "name"),
    [*(("launcher", name) for name in LAUNCHERS), *(("sweeper", name) for name in SWEEPERS)],
)
def test_every_preset_opens_with_a_command_that_composes_without_the_plugin(
    without_plugins, command, group, name
):
    first = preset(group, name).read_text().splitlines()[0]
    assert re.match(rf"# distill -m .*hydra/{group}={name}", first)
    shown = command("distill", f"hydra/{group}={name}", "--cfg", "hydra").stdout
    shown = yaml.safe_load(shown)["hydra"]
    assert shown[group]["_target_"].startswith("hydra_plugins.hydra_")


def test_ray_gives_each_trial_a_gpu_and_a_process_and_joins_a_cluster():
    ray = yaml.safe_load(preset("launcher", "ray").read_text())["ray"]
    assert ray["remote"]["num_gpus"] == ray["remote"]["max_calls"] == 1
    assert ray["remote"]["max_retries"] > 0
    # The plugin would set one, at which ray.init refuses to join.
    assert ray["init"]["object_store_memory"] is None


def test_slurm_knows_every_key_of_its_preset():
    from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf

    asked = yaml.safe_load(preset("launcher", "submitit_slurm").read_text())
    assert asked.keys() <= {field.name for field in fields(SlurmQueueConf)}
    assert asked["tasks_per_node"] == asked["gpus_per_node"] == 1


def test_no_sweeper_has_the_name_of_the_plugins_own():
    # Hydra 1.3 refuses a file with the name of a stored configuration that has defaults.
    assert not preset("sweeper", "optuna").exists()


@pytest.mark.parametrize("override", PLUGINS)
def test_a_plugin_that_is_not_there_is_named_in_one_line(without_plugins, command, override):
    done = command("distill", "-m", override, "objective.temperature=1,4", *QUICK, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"pip install 'distill-kd[{PLUGINS[override]}]'" in line


@pytest.mark.slow
def test_joblib_trains_more_jobs_than_it_has_processes(command, tmp_path):
    done = command("distill", "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2",
                   "objective.temperature=1,-1,2,4", *QUICK, check=False)  # fmt: skip
    assert jobs(tmp_path) == ["done", "failed", "done", "done"]
    assert "job 1: objective.temperature must be a number above 0" in done.stdout + done.stderr
    assert "ConfigStore" not in done.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of an Optuna older than its own needs
def test_a_search_runs_fused_goes_on_and_outlives_failing_trials(command, tmp_path):
    import optuna

    options = ("-m", "hydra/sweeper=optuna_accuracy", "hydra/launcher=fused", *QUICK,
               "hydra.sweeper.study_name=test", "hydra.sweeper.n_trials=3",
               "hydra.sweeper.n_jobs=3", "hydra.sweeper.params.objective=kd")  # fmt: skip
    command("distill", *options)
    assert jobs(tmp_path) == ["done"] * 3
    broken = ("objective.temperature=-1", "hydra.sweep.dir=broken")
    assert command("distill", *options, *broken, check=False).returncode == 2
    study = optuna.load_study(study_name="test", storage=f"sqlite:///{tmp_path}/search.db")
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE"] * 3 + ["FAIL"] * 3
    assert [direction.name for direction in study.directions] == ["MAXIMIZE"]
    began = [trial.datetime_start for trial in study.trials[:3]]
    assert max(began) < min(trial.datetime_complete for trial in study.trials[:3])
