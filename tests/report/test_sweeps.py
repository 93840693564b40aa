"""Sweeps that were nested, renamed, or run in parts: their jobs are found and pooled."""

import json

import pytest

from distill.config.keys import is_bookkeeping
from distill.report.leaderboard import gathered, over_seeds, sweep_rows, varied


def write_job(folder, overrides, top1, baseline=None, record=True, **config):
    folder.mkdir(parents=True)
    if record:
        (folder / ".hydra").mkdir()
        (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
    for override in overrides:
        name, _, value = override.partition("=")
        target = config
        *path, last = name.split(".")
        for key in path:
            target = target.setdefault(key, {})
        target[last] = json.loads(value) if value[:1].isdigit() else value
    numbers = {"top1": baseline, "nll": 1.0, "ece": 0.1}
    summary = {"student": {"top1": top1, "nll": 0.5, "ece": 0.1}, "validation": {"top1": top1},
               "baseline": baseline and numbers, "seconds": 1, "config": config}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))


def test_seeds_pool_over_sweeps_whatever_their_bookkeeping_says(tmp_path):
    for sweep, seeds in (("a", (0, 1)), ("b", (2, 3))):
        for seed in seeds:
            told = [f"seed={seed}", "objective.temperature=4", f"sweep.resume={sweep}",
                    f"paths.output_dir=/{sweep}/{seed}", f"tags=[{sweep}]"]  # fmt: skip
            baseline = 0.5 if sweep == "a" else None
            write_job(tmp_path / sweep / str(seed), told, seed / 10, baseline,
                      callbacks={"best": {"dirpath": f"/{sweep}"}})  # fmt: skip
    rows = gathered([tmp_path / "a", tmp_path / "b"])
    assert varied(rows) == ["seed"]
    (pooled,) = over_seeds(rows)
    assert (pooled["setting"], pooled["seeds"]) == ("student", 4)
    assert pooled["test_top1"][0] == pytest.approx(0.15)


def test_one_baseline_of_a_student_its_budget_and_its_data(tmp_path):
    student, budget = {"name": "resnet18"}, {"max_epochs": 2}
    jobs = [("objective.temperature=1", 0.5, budget), ("objective.temperature=4", None, budget),
            ("objective.temperature=8", None, {"max_epochs": 3})]  # fmt: skip
    for name, (told, baseline, trainer) in enumerate(jobs):
        write_job(tmp_path / str(name), [told], 0.6, baseline, student=student, trainer=trainer)
    assert [row["baseline_top1"] for row in sweep_rows(tmp_path)] == [0.5, 0.5, None]


def test_jobs_are_found_however_nested_and_without_hydras_record(tmp_path):
    write_job(tmp_path / "t4" / "10", ["objective.temperature=4"], 0.1, record=False)
    write_job(tmp_path / "t4" / "9", ["objective.temperature=2"], 0.1, record=False)
    write_job(tmp_path / "best", ["objective.temperature=8"], 0.1)
    write_job(tmp_path / "best" / "inner", ["objective.temperature=9"], 0.1)  # the job's own
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "multirun.yaml").touch()
    write_job(tmp_path / "other" / "0", ["objective.temperature=7"], 0.1)  # of another sweep
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    rows = sweep_rows(tmp_path)
    found = {row["job"]: row["objective.temperature"] for row in rows}
    assert found == {"best": 8, "t4/9": 2, "t4/10": 4}


@pytest.mark.parametrize("name", ["resume", "sweep.resume", "ckpt_path", "hydra.run.dir", "tags",
                                  "hydra/launcher", "paths.cache", "callbacks.best.dirpath",
                                  "task_name", "logger"])  # fmt: skip
def test_bookkeeping_is_no_hyperparameter(name):
    assert is_bookkeeping(name)


@pytest.mark.parametrize("name", ["reports", "data.root", "seed", "trainer.max_epochs", "objective",
                                  "resumed", "annealing.direction", "teacher.name"])  # fmt: skip
def test_what_decides_numbers_is_one(name):
    assert not is_bookkeeping(name)
