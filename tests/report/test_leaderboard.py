"""Rows, axes and error bars of sweeps, from files that a sweep would leave."""

import json
import math
import random
import re
import shutil
import statistics

import pytest
from scipy.stats import ttest_1samp

from distill.report import write_pages, write_sweep_page
from distill.report.leaderboard import (
    axis_of,
    by_cost,
    gains,
    gathered,
    mean_and_deviation,
    over_seeds,
    series_over,
    sweep_rows,
    varied,
)
from distill.report.words import gain_sentences
from tests.fuzz import fuzz


def write_job(folder, name, overrides, top1, **config):
    job = folder / name
    (job / ".hydra").mkdir(parents=True)
    (job / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
    choices = {"hydra": {"runtime": {"choices": {"objective": "kd"}}}}
    (job / ".hydra" / "hydra.yaml").write_text(json.dumps(choices))
    student = {"top1": top1, "nll": 1 - top1, "ece": 0.1}
    content = {"student": student, "validation": {"top1": top1 - 0.01}, "seconds": 1.0}
    content |= {"baseline": {"top1": 0.4, "nll": 0.6, "ece": 0.2}}
    told = dict(o.split("=") for o in overrides)
    temperature = told.get("objective.temperature", 8.0)
    content["config"] = {
        "objective": {"temperature": 8.0 if temperature == "auto" else float(temperature),
                      "name": told.get("objective", "kd")},
        "seed": int(told.get("seed", 0)),
        "optimizer": {"lr": float(told.get("optimizer.lr", 0.01))},
        "trainer": {"max_epochs": int(told.get("trainer.max_epochs", 8))},
        **config,
    }  # fmt: skip
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
    mean, deviation = mean_and_deviation([0.3])
    assert mean == 0.3
    assert math.isnan(deviation)


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


def test_settings_are_averaged_over_their_seeds_and_the_best_on_validation_comes_first(
    sweep, tmp_path
):
    first, second = over_seeds(sweep_rows(sweep))
    for row, temperature in ((first, 4), (second, 1)):
        values = [0.5 + 0.1 * seed + 0.01 * temperature for seed in range(3)]
        assert (row["setting"], row["seeds"]) == (f"objective.temperature={temperature}.0", 3)
        expected = statistics.fmean(values), statistics.stdev(values)
        assert row["test_top1"] == pytest.approx(expected)
        assert row["val_top1"] == pytest.approx((expected[0] - 0.01, expected[1]))
        assert row["baseline_top1"] == pytest.approx((0.4, 0.0))
    write_job(tmp_path / "only", "0", ["seed=1"], 0.5)
    write_job(tmp_path / "only", "1", ["seed=3"], 0.7)
    (row,) = over_seeds(sweep_rows(tmp_path / "only"))
    assert row["test_top1"] == pytest.approx((0.6, statistics.stdev([0.5, 0.7])))
    assert over_seeds(sweep_rows(sweep)[:1]) == []


def test_gains_over_seeds_are_a_paired_t_test(sweep):
    found = gains(sweep_rows(sweep))
    assert [row["setting"] for row in found] == [f"objective.temperature={t}.0" for t in (1, 4)]
    for row, temperature in zip(found, (1, 4), strict=True):
        apart = [0.5 + 0.1 * seed + 0.01 * temperature - 0.4 for seed in range(3)]
        expected = ttest_1samp(apart, 0).confidence_interval(0.95)
        assert row["top1"]["value"] == pytest.approx(statistics.fmean(apart))
        assert row["top1"]["interval"] == pytest.approx(tuple(expected))
    said = gain_sentences(found)
    assert "Over 3 seeds the student of objective.temperature=1.0 and the same" in said[0]
    assert "cannot be told apart (difference +21.0 points of top-1, 95 %: −3.8 to 45.8)" in said[0]
    assert gains(sweep_rows(sweep)[:1]) == []
    clear = gain_sentences([found[0] | {"top1": {"value": -0.02, "interval": (-0.03, -0.01)}}])
    assert "is worse than the same student without a teacher by 2.0 points" in clear[0]
    assert "(95 %: 1.0 to 3.0)" in clear[0]


def test_one_architecture_has_one_latency_and_others_their_own(tmp_path):
    for number, (width, latency) in enumerate([(8, 1.0), (8, 1.4), (8, 1.1), (16, 3.0)]):
        write_job(tmp_path, str(number), [f"student.args.width={width}", f"seed={number}"], 0.5)
        path = tmp_path / str(number) / "summary.json"
        summary = json.loads(path.read_text())
        summary["student"] |= {"params": width, "flops": width**2, "latency_ms": latency}
        path.write_text(json.dumps(summary))
    rows = sweep_rows(tmp_path)
    assert [row["latency_ms"] for row in rows] == [1.1, 1.1, 1.1, 3.0]
    assert not {"params", "flops", "latency_ms"} & set(varied(rows))
    wide = [("args.width=16", 16.0, 0.5), ("args.width=8", 8.0, 0.5)]
    assert sorted(kind[:3] for kind in by_cost(rows, "params")) == wide
    assert [kind[4] for kind in by_cost(rows, "latency_ms")] == [3, 1]
    page = write_sweep_page([tmp_path], tmp_path / "report.html").read_text()
    assert '<section id="costs">' in page
    assert "top-1 (%) over parameters. args.width=8 at 8: 50 ± 0 over 3 runs; " in page
    shutil.rmtree(tmp_path / "3")
    page = write_sweep_page([tmp_path], tmp_path / "report.html").read_text()
    assert '<section id="costs">' not in page
    assert "latency, ms" in page


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
    x, mean, deviation, seeds = series_over(rows, axis_of(rows), "top1")["student"][-1]
    assert (x, mean, seeds) == (8.0, 0.9, 1)
    assert math.isnan(deviation)


def test_one_setting_written_two_ways_is_one_and_two_settings_are_never_averaged(tmp_path):
    write_job(tmp_path, "0", ["optimizer.lr=8e-3", "seed=0"], 0.6)
    write_job(tmp_path, "1", ["optimizer.lr=0.008", "seed=1"], 0.8)
    write_job(tmp_path, "2", ["optimizer.lr=0.008", "seed=1"], 0.1, trainer={"max_epochs": 30})
    found = series_over(sweep_rows(tmp_path), "objective.temperature", "top1")
    assert found == {}  # nothing was told of it
    found = series_over(sweep_rows(tmp_path), "optimizer.lr", "top1")
    assert list(found) == ["student", "student (2)"]  # the third differs in what it was not told
    assert found["student"] == [(0.008, pytest.approx(0.7), pytest.approx(0.1 * 2**0.5), 2)]
    assert found["student (2)"][0][:2] == (0.008, 0.1)


def test_a_group_switched_off_is_shown_as_it_was_told(tmp_path):
    for name, told, node in (("0", "none", {}), ("1", "cosine", {"schedule": "cosine"})):
        write_job(tmp_path, name, [f"annealing={told}"], 0.5, annealing=node)
    assert [row["annealing"] for row in sweep_rows(tmp_path)] == ["none", "cosine"]


def test_a_run_made_twice_counts_once(tmp_path):
    for name, top1 in (("0", 0.6), ("1", 0.9)):
        write_job(tmp_path, name, ["optimizer.lr=0.1", "seed=3"], top1)
    (points,) = series_over(sweep_rows(tmp_path), "optimizer.lr", "top1").values()
    assert points[0][1] == 0.9
    assert points[0][3] == 1


@pytest.mark.parametrize("seed", ["condition.seed", "teacher.fit.seed", "data.seed"])
def test_another_seed_than_the_runs_is_another_draw_of_the_same_setting(tmp_path, seed):
    accuracies = {1: (0.5, 0.6, 0.9), 4: (0.7, 0.8, 0.9)}
    for temperature, draws in accuracies.items():
        for draw, top1 in enumerate(draws):
            node = draw
            for key in reversed(seed.split(".")[1:]):
                node = {key: node}
            told = [f"objective.temperature={temperature}", f"{seed}={draw}"]
            config = {seed.partition(".")[0]: node}
            write_job(tmp_path, f"{temperature}{draw}", told, top1, **config)
    rows = gathered([tmp_path])
    (points,) = series_over(rows, "objective.temperature", "top1").values()
    assert axis_of(rows) == "objective.temperature"
    for (x, mean, deviation, count), temperature in zip(points, (1, 4), strict=True):
        assert (x, count) == (temperature, 3)
        assert mean == pytest.approx(statistics.fmean(accuracies[temperature]))
        assert deviation == pytest.approx(statistics.stdev(accuracies[temperature]))
    averaged = [(row["setting"], row["seeds"], row["test_top1"][0]) for row in over_seeds(rows)]
    assert averaged == [
        ("objective.temperature=4.0", 3, pytest.approx(0.8)),
        ("objective.temperature=1.0", 3, pytest.approx(2 / 3)),
    ]
    assert "6 finished runs, 3 seeds" in write_sweep_page([tmp_path], tmp_path / "p").read_text()


def test_seeds_alone_are_no_axis(tmp_path):
    for draw in range(3):
        told = [f"condition.seed={draw}"]
        write_job(tmp_path, str(draw), told, 0.5, condition={"seed": draw})
    assert axis_of(sweep_rows(tmp_path)) is None


def test_a_damaged_list_of_overrides_is_named(tmp_path):
    write_job(tmp_path, "0", ["seed=3"], 0.5)
    (tmp_path / "0" / ".hydra" / "overrides.yaml").write_text("[a: {")
    with pytest.raises(ValueError, match=r"overrides\.yaml is damaged"):
        sweep_rows(tmp_path)


def write_validation(folder, name, **numbers):
    file = folder / name / "summary.json"
    content = json.loads(file.read_text())
    content["validation"] = numbers
    file.write_text(json.dumps(content))


def test_a_job_without_a_finite_loss_is_not_the_best_by_its_loss(tmp_path):
    for name, top1, loss in (("0", 0.9, None), ("1", 0.5, 2.0), ("2", 0.6, 3.0)):
        write_job(tmp_path, name, [f"optimizer.lr={name}"], top1, optimized_metric="val/loss")
        write_validation(tmp_path, name, top1=top1, loss=loss)
    text = write_sweep_page([tmp_path], tmp_path / "page.html").read_text()
    assert "Best on validation: job 1" in text
    for name in ("1", "2"):
        write_validation(tmp_path, name, top1=0.9, loss=None)
    text = write_sweep_page([tmp_path], tmp_path / "page.html").read_text()
    assert "Best on validation" not in text
    assert "None is best" in text


RESULTS = {(1, 0): (0.9, 0.8), (1, 1): (0.9, 0.6), (4, 0): (0.6, 0.3), (4, 1): (0.6, 0.5)}


def test_the_metric_that_decides_ranks_the_jobs_and_their_means_and_is_shown(tmp_path):
    for number, ((temperature, seed), (top1, nll)) in enumerate(RESULTS.items()):
        told = [f"objective.temperature={temperature}", f"seed={seed}"]
        write_job(tmp_path, str(number), told, top1, optimized_metric="val/nll")
        write_validation(tmp_path, str(number), top1=top1, nll=nll)
    first, second = over_seeds(sweep_rows(tmp_path))
    assert first["setting"] == "objective.temperature=4.0"
    assert first["val_nll"] == pytest.approx((0.4, statistics.stdev([0.3, 0.5])))
    assert first["val_top1"] == pytest.approx((0.6, 0.0))
    assert second["val_nll"][0] == pytest.approx(0.7)
    text = write_sweep_page([tmp_path], tmp_path / "page.html").read_text()
    (lead,) = re.findall(r'<p class="lead">(.*?)</p>', text)
    assert "job 2 objective.temperature=4.0, seed=0, with nll 0.3000 and 60.00 % there" in lead
    sorted_by = re.findall(r'aria-sort="(\w+)"><button type="button">([^<]*)<', text)
    assert sorted_by == [("ascending", "validation nll")]
    means = text[text.index('id="seeds"') : text.index('id="leaderboard"')]
    assert re.findall(r"<td>(objective[^<]*)</td><td>2</td><td>([^<]*)<", means) == [
        ("objective.temperature=4.0", "0.4000 ± 0.1414"),
        ("objective.temperature=1.0", "0.7000 ± 0.1414"),
    ]


def test_sweeps_that_do_not_agree_on_what_decides_are_ranked_by_accuracy(tmp_path):
    for metric, top1, nll in (("top1", 0.5, 0.1), ("nll", 0.8, 0.9)):
        write_job(tmp_path / metric, "0", ["seed=0"], top1, optimized_metric=f"val/{metric}")
        write_validation(tmp_path / metric, "0", top1=top1, nll=nll)
    paths = [tmp_path / "top1", tmp_path / "nll"]
    text = write_sweep_page(paths, tmp_path / "page.html").read_text()
    (lead,) = re.findall(r'<p class="lead">(.*?)</p>', text)
    assert "sweep=nll, with 80.00 % there" in lead
    assert re.findall(r'aria-sort="\w+"><button type="button">([^<]*)<', text) == [
        "validation top-1\xa0%"
    ]


def write_goals(folder, results, metrics=("val/top1", "val/ece")):
    for number, (top1, ece) in enumerate(results):
        write_job(folder, str(number), [f"seed={number}"], 0.5, sweep={"metrics": list(metrics)})
        write_validation(folder, str(number), top1=top1, ece=ece)


def test_the_front_is_what_no_other_job_beats_in_every_goal(tmp_path):
    generator = random.Random(0)
    results = [(generator.randrange(6) / 6, generator.randrange(6) / 6) for _ in range(40)]
    write_goals(tmp_path, results)
    for row, (top1, ece) in zip(sweep_rows(tmp_path), results, strict=True):
        beaten = any(
            a >= top1 and b <= ece and (a > top1 or b < ece) for a, b in results
        )  # more accuracy is better, and less error of calibration
        assert row["front"] == ("" if beaten else "yes")
        assert (row["val_top1"], row["val_ece"]) == (top1, ece)


def test_a_goal_that_was_not_measured_is_the_worst_and_without_goals_there_is_no_front(tmp_path):
    write_goals(tmp_path / "search", [(0.5, None), (0.5, 0.9)])
    assert [row["front"] for row in sweep_rows(tmp_path / "search")] == ["", "yes"]
    write_job(tmp_path / "plain", "0", ["seed=0"], 0.5)
    assert "front" not in sweep_rows(tmp_path / "plain")[0]


def test_the_page_of_a_search_names_its_front(tmp_path):
    write_goals(tmp_path, [(0.5, 0.2), (0.6, 0.1), (0.7, 0.3)])
    text = write_sweep_page([tmp_path], tmp_path / "page.html").read_text()
    assert "weighed top1, ece on validation" in text
    assert "jobs 1, 2." in text
    assert ">validation ece<" in text


def test_a_strangers_sweep_reads_no_environment_and_is_not_followed(sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    hydra = sweep / "0" / ".hydra" / "hydra.yaml"
    asked = {"hydra": {"runtime": {"choices": {"objective": "${oc.env:SECRET}"}}}}
    hydra.write_text(json.dumps(asked))
    write_job(sweep, "9", ["objective=${oc.env:SECRET}"], 0.7)
    text = write_sweep_page([sweep], tmp_path / "page.html").read_text()
    assert "${oc.env:SECRET}" in text
    assert "hunter2" not in text
    hydra.write_text("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n")
    with pytest.raises(ValueError, match=r"hydra\.yaml is damaged: it has an alias"):
        write_sweep_page([sweep], tmp_path / "page.html")
    hydra.unlink()
    hydra.symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="link out of its folder"):
        write_sweep_page([sweep], tmp_path / "page.html")


def test_no_page_is_written_through_a_link(sweep, tmp_path):
    write_job(tmp_path, "elsewhere", [], 0.7)
    (sweep / "7").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"7 is a link out of its folder: name the run itself"):
        write_pages([sweep], tmp_path / "page.html")
    assert not (tmp_path / "elsewhere" / "report.html").exists()


def test_damaged_sweeps_end_as_a_page_or_in_one_line(sweep):
    opened = fuzz("report", sweep, 60)
    assert opened[True] > 20
    assert opened[False] > 0
