"""The table of CIFAR-100: its cells, claims, costs, and a small one filled by the command."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts" / "studies"))

from benchmark import cells, costs, published, table

PAIR = cells.Pair("a--b", "slim_resnet10_8", "slim_resnet10_4")


def cell(method="kd", seed=0, pair=PAIR):
    return cells.Cell(pair, method, seed, (f"objective={method}",))


def test_every_pair_of_the_literature_has_a_teacher_a_student_and_published_figures():
    import timm

    import distill.models.cifar  # noqa: F401

    for name in published.PAIRS:
        pair = cells.Pair.of(name)
        assert timm.is_model(pair.teacher)
        assert timm.is_model(pair.student)
        teacher, alone = (published.published(name, of).top1 for of in ("teacher", "alone"))
        assert 50 < alone < teacher < 85
    assert published.published("a--b", "kd") is None
    assert published.published("r32x4_r8x4", "kd").top1 == 73.33  # 1910.10699, table 1
    assert "best on test" in published.published("r32x4_r8x4", "dkd").protocol


def test_a_pair_is_a_file_or_two_models():
    assert cells.Pair.of("x:y") == cells.Pair("x--y", "x", "y")
    with pytest.raises(ValueError, match=r"there is no pair r32; there are .*r32x4_r8x4"):
        cells.Pair.of("r32")


def test_all_methods_come_before_more_seeds_and_the_student_alone_comes_first():
    made = cells.cells_of([PAIR], cells.recipes(["kd", "dkd"], 240), 2)
    assert [(one.method, one.seed) for one in made] == [
        ("alone", 0), ("kd", 0), ("dkd", 0), ("alone", 1), ("kd", 1), ("dkd", 1)
    ]  # fmt: skip
    dkd = cells.command(made[2], Path("out"), ["experiment=cifar100"])
    assert "objective.schedules.warmup.duration=20" in dkd
    assert "teacher.name=slim_resnet10_8" in dkd
    assert not any(
        word.startswith("teacher.name") for word in cells.command(made[0], Path("o"), [])
    )


def test_a_cell_is_claimed_by_one_and_a_claim_without_signs_of_life_is_taken_over(tmp_path):
    with cells.claimed(cell(), tmp_path) as mine:
        assert mine
        with cells.claimed(cell(), tmp_path) as other:
            assert not other
        with cells.claimed(cell(seed=1), tmp_path) as another:
            assert another
        (file,) = (tmp_path / "claims").iterdir()
    assert not list((tmp_path / "claims").iterdir())
    file.write_text("a machine that is gone")
    with cells.claimed(cell(), tmp_path) as mine:
        assert not mine
    long_ago = time.time() - 2 * cells.STALE
    os.utime(file, (long_ago, long_ago))
    with cells.claimed(cell(), tmp_path) as mine:
        assert mine


def test_what_a_cell_takes_is_by_its_speed_until_one_like_it_has_finished():
    speeds = {PAIR.name: costs.Speed(teacher=3e-3, student=1e-3, answer=5e-4)}
    by_speed = costs.Costs(speeds, images=1000, epochs=10, done={})
    assert by_speed.of(cell("alone")) == pytest.approx(10 + costs.START_AND_END)
    assert by_speed.of(cell("kd")) == pytest.approx(15 + costs.START_AND_END)
    assert by_speed.of_teacher(PAIR) == pytest.approx(30)
    measured = costs.Costs(speeds, 1000, 10, {cell("kd"): {"seconds": 99.0}})
    assert measured.of(cell("kd", seed=1)) == 99
    assert costs.fits(cell("kd"), measured, [PAIR.name], 100)
    assert not costs.fits(cell("kd"), measured, [], 100)  # its teacher takes 30 more
    left = [cell("alone"), cell("kd", seed=1)]
    plan = costs.plan(left, measured, batch_size=50, trained=[])
    assert "| a--b | 2 | 600 |" in plan  # two cells and a teacher, ten epochs of twenty steps
    assert costs.seconds_of("8m") == 480
    for wrong in ("8x", "-1s", ""):
        with pytest.raises(ValueError, match="--budget"):
            costs.seconds_of(wrong)


def numbers(top1, best=None, speed=100.0):
    model = {"top1": top1, "nll": 1.0, "ece": 0.05, "nll_after_scaling": 0.9,
             "ece_after_scaling": None}  # fmt: skip
    return {"student": model, "teacher": {**model, "top1": 0.8}, "images_per_second": speed,
            "student_best": best and {**model, "top1": best}, "seconds": 1.0}  # fmt: skip


def test_a_row_is_mean_and_deviation_with_the_gap_over_shared_seeds(tmp_path):
    pair = cells.Pair.of("r32x4_r8x4")
    done = {
        cell("alone", 0, pair): numbers(0.70),
        cell("alone", 1, pair): numbers(0.72),
        cell("kd", 0, pair): numbers(0.73, best=0.74, speed=50.0),
        cell("kd", 1, pair): numbers(0.75, best=0.75, speed=50.0),
        cell("crd", 0, pair): numbers(0.76, speed=25.0),
    }
    lines = {line.method: line for line in table.lines_of(done, tmp_path)}
    assert list(lines) == ["teacher", "alone", "kd", "crd"]
    kd = lines["kd"]
    assert kd.last.text() == "74.00 ± 1.41"
    assert kd.gap.mean == pytest.approx(3.0)
    assert kd.best.mean == pytest.approx(74.5)
    assert kd.difference == pytest.approx(74.0 - 73.33)
    assert lines["crd"].gap.seeds == 1
    assert lines["crd"].gap.mean == pytest.approx(6.0)
    assert lines["crd"].cost == pytest.approx(2.0)
    assert lines["teacher"].last.text() == "80.00"
    table.write_table(tmp_path, list(lines.values()), "told", "scripts/studies/cifar100")
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert rows[2]["published"] == "73.33"
    assert rows[2]["top-1 % last"] == "74.00 ± 1.41"
    page = (tmp_path / "table.html").read_text()
    assert "scripts/studies/cifar100" in page
    assert page.count("<tr>") == 5


@pytest.mark.slow
def test_a_small_table_is_filled_gone_on_with_and_shown(tmp_path, cache):
    (tmp_path / "mine.py").write_text(
        "def squared(student, teacher):\n    return (student - teacher).square().mean(1)\n"
    )
    words = [
        sys.executable, ROOT / "scripts/studies/cifar100.py", "--pairs",
        "slim_resnet10_8:slim_resnet10_4", "--methods", "kd", "--method", "mine",
        "objective=logit_mse", "objective.terms.mse={loss: mine.squared}", "imports=[mine]",
        "--epochs", "1", "--data", "data=digits", "--override", "data.val_fraction=0.1",
        f"paths.cache={cache}", "--out", "table",
    ]  # fmt: skip

    def fill(*more):
        return subprocess.run(
            [*words, *more], cwd=tmp_path, check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip

    assert "| all | 3 |" in fill("--dry-run")
    assert not (tmp_path / "table").exists()
    assert "more than is left" in fill("--budget", "1s")
    said = fill()
    assert "3 of 3 cells" in said
    rows = list(csv.DictReader((tmp_path / "table/table.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == ["teacher", "alone", "kd", "mine"]
    with pytest.raises(subprocess.CalledProcessError) as refused:
        fill("--epochs", "2")
    assert "were run with --epochs 1, not 2: give another --out" in refused.value.stderr
    again = fill()
    assert "distill " not in again
    assert "3 of 3 cells" in again
