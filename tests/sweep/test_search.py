"""Searches for several goals at once: what the sweeper is told, what is refused, what goes on."""

import csv
import json

import pytest
from hydra import compose, initialize_config_dir

from distill.config.overrides import CONF
from tests.commands import attempt

pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
optuna = pytest.importorskip("optuna")
SEARCHER = "hydra/sweeper=optuna_accuracy"
SEARCH = ("-m", "experiment=accuracy_calibration", "hydra.sweeper.study_name=both",
          "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=4", "hydra.sweep.dir=sweep",
          "hydra.sweeper.params.objective=kd", "trainer.max_epochs=1", "teacher.fit.max_epochs=1",
          "trainer.accelerator=cpu", "trainer.limit_train_batches=4", "baseline=false",
          "report=false", "logger=none")  # fmt: skip


def test_a_search_for_two_goals_is_told_both_and_leaves_a_front(command, tmp_path):
    command("distill", *SEARCH)
    study = optuna.load_study(study_name="both", storage=f"sqlite:///{tmp_path}/search.db")
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 4
    for trial in study.trials:
        summary = json.loads((tmp_path / f"sweep/{trial.number}/summary.json").read_text())
        found = [summary["validation"][name] for name in ("top1", "ece")]
        assert trial.values == pytest.approx(found, abs=1e-6)  # float32 in training
        told = summary["config"]["objective"]["temperature"]
        assert trial.params["objective.temperature"] == pytest.approx(told)
    with (tmp_path / "sweep/sweep.csv").open() as file:
        front = {int(row["job"]) for row in csv.DictReader(file) if row["front"]}
    best = {tuple(trial.values) for trial in study.best_trials}
    assert {tuple(study.trials[number].values) for number in front} == best


@pytest.mark.parametrize(
    ("told", "direction"),
    [
        (["optimized_metric=val/top1"], "maximize"),
        (["optimized_metric=val/agreement"], "maximize"),
        (["optimized_metric=val/nll"], "minimize"),
        (["optimized_metric=val/loss"], "minimize"),
        (["sweep.metrics=[val/nll,val/mrr,val/ece]"], ["minimize", "maximize", "minimize"]),
    ],
)
def test_the_direction_follows_from_what_is_searched(told, direction):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = ["hydra/sweeper=optuna_accuracy", *told]
        cfg = compose("train", overrides=overrides, return_hydra_config=True)
    assert cfg.hydra.sweeper.direction == direction


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("optimized_metric=val/nll hydra.sweeper.direction=maximize", "optimized_metric=val/nll, "
         "which is minimize"),
        ("hydra.sweeper.direction=minimize", "optimized_metric=val/top1, which is maximize"),
        ("hydra.sweeper.direction=null", "which is maximize"),
        ("sweep.metrics=[val/top1,val/ece] hydra.sweeper.direction=maximize",
         "which is maximize, minimize"),
        ("experiment=accuracy_calibration hydra.sweeper.direction=[minimize,maximize]",
         "which is maximize, minimize"),
        ("hydra/sweeper=optuna", "which is maximize"),  # the plugin's own minimises
    ],
)  # fmt: skip
def test_a_search_for_the_worst_is_refused_before_any_trial(told, said, tmp_path):
    search = "" if "hydra/sweeper" in told or "experiment" in told else SEARCHER
    done = attempt(f"distill -m {search} {told} hydra.sweep.dir=sweep", tmp_path)
    assert done.code == 2
    (line,) = done.errors.splitlines()
    assert said in line
    assert list(tmp_path.iterdir()) == []


def test_a_search_is_not_resumed_by_its_folder(command, tmp_path):
    done = command("distill", *SEARCH, "sweep.resume=sweep", check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "goes on with the same hydra.sweeper.study_name" in line
    assert not (tmp_path / "sweep").exists()
