"""Rows, axes and error bars of sweeps, from files that a sweep would leave."""

import json
import statistics

import pytest

from distill.report.leaderboard import (
    axis_of,
    gathered,
    mean_and_deviation,
    series_over,
    sweep_rows,
    varied,
)


def write_job(folder, name, overrides, top1, **config):
    job = folder / name
    (job / ".hydra").mkdir(parents=True)
    (job / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
    choices = {"hydra": {"runtime": {"choices": {"objective": "kd"}}}}
    (job / ".hydra" / "hydra.yaml").write_text(json.dumps(choices))
    student = {"top1": top1, "nll": 1 - top1, "ece": 0.1}
    content = {"student": student, "validation": {"top1": top1 - 0.01}, "seconds": 1.0}
    content |= {"baseline": {"top1": 0.4, "nll": 0.6, "ece": 0.2}}
    content["config"] = {"objective": {"temperature": 8.0}, "seed": 0, **config}
    (job / "summary.json").write_text(json.dumps(content))


@pytest.fixture
def sweep(tmp_path):
    folder = tmp_path / "first"
    number = 0
    for temperature in (1, 4):
        for seed in (0, 1, 2):
            told = [f"objective.temperature={temperature}", f"seed={seed}", "logger=none"]
            write_job(folder, str(number), told, 0.5 + 0.1 * seed + 0.01 * temperature)
            number += 1
    return folder


def test_means_and_deviations_are_over_seeds(sweep):
    rows = sweep_rows(sweep)
    assert varied(rows) == ["objective.temperature", "seed"]
    assert axis_of(rows) == "objective.temperature"
    found = series_over(rows, "objective.temperature", "top1")
    assert list(found) == ["student"]
    for (x, mean, deviation, count), temperature in zip(found["student"], (1, 4), strict=True):
        values = [0.5 + 0.1 * seed + 0.01 * temperature for seed in range(3)]
        assert x == temperature
        assert mean == pytest.approx(statistics.mean(values))
        assert deviation == pytest.approx(statistics.stdev(values))
        assert count == 3


def test_a_single_run_has_no_spread():
    assert mean_and_deviation([0.3]) == (0.3, 0.0)


def test_other_settings_make_a_series_each_and_seeds_do_not(sweep):
    told = ["objective.temperature=4", "seed=0", "logger=none", "objective=soft_ce"]
    write_job(sweep, "6", told, 0.9)
    found = series_over(gathered([sweep]), "objective.temperature", "nll")
    assert set(found) == {"objective=kd", "objective=soft_ce"}  # the default is filled in
    assert [p[0] for p in found["objective=soft_ce"]] == [4]


def test_without_temperatures_the_axis_is_the_number_that_varies_most(tmp_path):
    for number, (rate, epochs) in enumerate([(0.1, 1), (0.2, 2), (0.3, 2)]):
        told = [f"optimizer.lr={rate}", f"trainer.max_epochs={epochs}", f"student=s{number}"]
        write_job(tmp_path, str(number), told, 0.5)
    rows = sweep_rows(tmp_path)
    assert axis_of(rows) == "optimizer.lr"
    assert axis_of(rows[:1]) is None


def test_several_sweeps_share_one_leaderboard(sweep, tmp_path):
    write_job(tmp_path / "second", "0", ["seed=5"], 0.7)
    rows = gathered([sweep, tmp_path / "second"])
    assert [row["sweep"] for row in rows] == ["first"] * 6 + ["second"]
    assert rows[-1]["objective.temperature"] == 8.0  # what it was not told comes from its config
    alone = gathered([sweep / "0", tmp_path / "second"])
    assert alone[0]["folder"] == sweep / "0"
    assert "sweep" not in alone[0]


def test_what_is_no_sweep_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a finished run nor a sweep"):
        gathered([tmp_path])


def test_an_automatic_temperature_is_drawn_at_the_number_it_came_to(sweep):
    write_job(sweep, "6", ["objective.temperature=auto", "seed=0", "logger=none"], 0.9)
    rows = sweep_rows(sweep)
    assert axis_of(rows) == "objective.temperature"
    assert series_over(rows, axis_of(rows), "top1")["student"][-1] == (8.0, 0.9, 0.0, 1)
