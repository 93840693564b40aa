"""Searches for several goals at once: what the sweeper is told, what is refused, what goes on."""

import csv
import json

import pytest

pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
optuna = pytest.importorskip("optuna")
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


def test_a_search_is_not_resumed_by_its_folder(command, tmp_path):
    done = command("distill", *SEARCH, "sweep.resume=sweep", check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "goes on with the same hydra.sweeper.study_name" in line
    assert not (tmp_path / "sweep").exists()
