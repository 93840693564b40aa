"""What a soak notices, and a short one."""

import json
import math
import warnings

import pytest
import torch
from safetensors.torch import save_file

from tests import soaking
from tests.soaking import LIMITS, Usage, attempt, draw, growth, leaks


def leave(folder, value=0.5, logged="0.5", weight=1.0):
    """Leave what is looked at of a run."""
    (folder / "student").mkdir(parents=True)
    row = dict.fromkeys(soaking.NUMBERS, value)
    summary = {"student": row, "teacher": None, "baseline": None, "config": {"nll": math.nan}}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.csv").write_text(f"epoch,val/top1,val/nll\n0,{logged},\n")
    save_file({"w": torch.tensor([1.0, weight])}, folder / "student" / "model.safetensors")


@pytest.mark.parametrize(
    ("left", "wrong"),
    [
        ({}, []),
        ({"value": math.nan}, [f"student.{name}" for name in ("brier", "ece", "nll", "top1")]),
        ({"value": None}, [f"student.{name}" for name in ("brier", "ece", "nll", "top1")]),
        ({"logged": "inf"}, ["metrics.csv: val/top1"]),
        ({"weight": math.nan}, ["student: w"]),
    ],
)
def test_a_number_that_is_missing_or_not_finite_is_named(tmp_path, left, wrong):
    outcome = attempt([], tmp_path, lambda cfg: leave(tmp_path / "run", **left))
    assert outcome.wrong == wrong
    assert not (tmp_path / "run").exists()


def test_crashes_and_warnings_fail_and_a_refusal_is_told_apart(tmp_path):
    def crash(cfg):
        raise RuntimeError("this breaks")

    def refuse(cfg):
        raise ValueError("give another value")

    def warn(cfg):
        warnings.warn("something is odd", UserWarning, stacklevel=1)
        warnings.warn("3 of 10 classes have no training examples", UserWarning, stacklevel=1)
        leave(tmp_path / "run")

    broken, refused, warned = (attempt([], tmp_path, train) for train in (crash, refuse, warn))
    assert broken.wrong == ["RuntimeError: this breaks"]
    assert "in crash" in broken.trace
    assert (refused.wrong, refused.refused) == ([], "give another value")
    assert warned.wrong == ["UserWarning: something is odd"]


def test_a_leak_is_told_from_caches_that_fill_and_from_noise():
    filling = [100 * min(run, 29) for run in range(80)]
    assert growth(filling) == 0
    assert growth(filling[:20]) == 0
    noisy = [Usage(500 + 20 * (-1) ** run, 30, 2) for run in range(80)]
    assert leaks(noisy) == {}
    leaking = [Usage(500 + 3 * run, 30 + run // 5, 2) for run in range(80)]
    assert leaks(leaking).keys() == {"megabytes", "files"}
    assert leaks(leaking)["megabytes"] == pytest.approx(3)
    assert LIMITS["megabytes"] < 3


def test_a_configuration_is_a_function_of_the_seed_and_its_number():
    assert draw(0, 7) == draw(0, 7)
    assert draw(0, 7) != draw(0, 8)
    assert draw(0, 7) != draw(1, 7)


@pytest.mark.slow
def test_six_random_configurations_run_clean(tmp_path):
    files = []
    for number in range(6):
        outcome = attempt(draw(0, number), tmp_path)
        assert (outcome.wrong, outcome.refused) == ([], None), outcome.command
        files.append(Usage.now().files)
    assert max(files[2:]) <= files[1]
