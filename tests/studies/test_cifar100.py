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


def test_mlkd_is_of_two_views_at_its_own_rate_and_costs_twice_as_much():
    for name, top1, epochs, rate in (
        ("r32x4_r8x4", 77.08, 240, 0.025),
        ("r50_mobilenetv2", 71.04, 480, 0.0025),
        ("r32x4_shufflev2", 78.44, 480, 0.01),
    ):
        claim = published.published(name, "mlkd_two_views")
        assert claim.top1 == top1
        assert f"{epochs} epochs, best on test, two views" in claim.protocol
        own = cells.recipe("mlkd_two_views", name, 240)
        assert own == ("objective=mlkd_two_views", f"optimizer.lr={rate}")
    assert published.published("r32x4_shufflev1", "mlkd_two_views") is None
    speed = costs.Speed(teacher=3e-3, student=1e-3, answer=5e-4)
    assert speed.of("mlkd_two_views") == 2 * speed.of("mlkd") == 3e-3


@pytest.mark.parametrize(
    ("method", "pair", "words"),
    [  # as the authors' repositories set them
        ("standardized_kd", "r32x4_r8x4", ["temperature=2", "terms.kl.weight=9"]),
        ("standardized_kd", "vgg13_vgg8", ["temperature=3", "terms.kl.weight=9"]),
        ("standardized_kd", "r50_mobilenetv2", ["temperature=3", "terms.kl.weight=1"]),
        ("reviewkd", "r56_r20", ["terms.review.weight=0.6", "schedules.warmup.start=0.03"]),
        ("reviewkd", "r32x4_shufflev2", ["terms.review.weight=8", "schedules.warmup.start=0.4"]),
        ("reviewkd", "r32x4_r8x4", ["terms.review.weight=5", "schedules.warmup.start=0.25"]),
        ("hint", "r32x4_r8x4", ["stages=[-2]"]),
        ("hint", "vgg13_vgg8", ["stages=[-3]"]),
        ("attention_transfer", "r50_vgg8", ["stages=[-4,-3,-2,-1]"]),
    ],
)
def test_a_method_is_the_one_that_was_published(method, pair, words):
    last = dict(word.split("=", 1) for word in cells.recipe(method, pair, 240))
    assert {key: last[f"objective.{key}"] for key, _, value in map(parted, words)} == {
        key: value for key, _, value in map(parted, words)
    }


def parted(word):
    return word.partition("=")


@pytest.mark.parametrize("pair", ["vgg13_vgg8", "vgg13_mobilenetv2", "r50_mobilenetv2", "r50_vgg8"])
def test_hints_are_of_the_maps_of_16_pixels_in_models_of_four_stages(pair):
    import timm
    import torch

    import distill.models.cifar  # noqa: F401
    from distill.models.features import forward_with_features

    for name in (cells.Pair.of(pair).teacher, cells.Pair.of(pair).student):
        model = timm.create_model(name, num_classes=100).eval()
        stages = [-4, -3, -2, -1]
        _, features = forward_with_features(model, torch.zeros(1, 3, 32, 32), stages)
        sides = [one.shape[-1] for one in features.maps]
        assert len(sides) == 4
        assert sides == sorted(sides, reverse=True)


def test_figures_of_other_papers_say_how_they_were_come_by():
    for method, pair, top1, words in (
        ("wttm", "vgg13_vgg8", 74.44, "2402.11148"),
        ("dist", "r32x4_r8x4", 76.31, "2402.11148"),
        ("reviewkd", "r32x4_shufflev2", 77.78, "2104.09044"),
        ("standardized_kd", "r110_r20", 71.48, "2403.01427: 240 epochs, best on test"),
    ):
        claim = published.published(pair, method)
        assert claim.top1 == top1
        assert words in claim.protocol
    assert published.published("r110_r32", "reviewkd") is None
    assert published.published("r32x4_r8x4", "skd") is None


def test_a_pair_is_a_file_or_two_models():
    pair = cells.Pair.of("x:y")
    assert (pair.name, pair.teacher, pair.student) == ("x--y", "x", "y")
    with pytest.raises(ValueError, match=r"there is no pair r32; there are .*r32x4_r8x4"):
        cells.Pair.of("r32")


def test_all_methods_come_before_more_seeds_and_the_student_alone_comes_first():
    made = cells.cells_of([PAIR], ["kd", "dkd"], {"mine": ("objective=kd",)}, 2, 240)
    methods = ["alone", "kd", "dkd", "mine"]
    assert [(one.method, one.seed) for one in made] == [(m, s) for s in (0, 1) for m in methods]
    dkd = cells.command(made[2], Path("out"), ["experiment=cifar100"])
    assert "teacher.name=slim_resnet10_8" in dkd
    assert "store=off" in dkd  # else whoever comes first would pay for the teacher
    alone = cells.command(made[0], Path("out"), [])
    assert not any(word.startswith("teacher.name") for word in alone)
    for wrong in ("alone", "kd", "teacher"):
        with pytest.raises(ValueError, match=f"--method {wrong} is the name of another"):
            cells.cells_of([PAIR], ["kd"], {wrong: ()}, 1, 240)
    with pytest.raises(ValueError, match="there is no objective nosuch; there are "):
        cells.cells_of([PAIR], ["nosuch"], {}, 1, 240)


@pytest.mark.parametrize(("epochs", "duration"), [(240, 20), (12, 1), (2, 1)])
def test_a_warm_up_is_the_same_share_of_any_training(epochs, duration):
    for method, weight in (("dkd", 1.0), ("rld", 1.0), ("reviewkd", 5.0)):
        own = cells.recipe(method, "a--b", epochs)
        assert f"objective.schedules.warmup.duration={duration}" in own
        # min(epoch/duration, 1) of the weight in the first epoch, as the authors count from 1.
        assert f"objective.schedules.warmup.start={weight / duration:g}" in own
    assert "objective.terms.dkd.beta=2" in cells.recipe("dkd", "r56_r20", epochs)
    assert not any("beta" in word for word in cells.recipe("dkd", "r32x4_r8x4", epochs))


def test_a_cell_is_claimed_by_one_and_a_claim_without_signs_of_life_is_taken_over(tmp_path):
    with cells.claimed(cell(), tmp_path) as mine:
        assert mine
        with cells.claimed(cell(), tmp_path) as other:
            assert not other
        with cells.claimed(cell(seed=1), tmp_path) as another:
            assert another
        (file,) = (tmp_path / "claims").iterdir()
    assert not list((tmp_path / "claims").iterdir())
    file.write_text("a machine that is gone\n")
    with cells.claimed(cell(), tmp_path) as mine:
        assert not mine
    long_ago = time.time() - 2 * cells.STALE
    os.utime(file, (long_ago, long_ago))
    with cells.claimed(cell(), tmp_path) as mine:
        assert mine
        file.write_text("another that took it over\n")
    assert file.read_text() == "another that took it over\n"
    assert [path.name for path in (tmp_path / "claims").iterdir()] == [file.name]


def test_what_a_cell_takes_is_by_its_speed_until_one_like_it_has_finished():
    taken = costs.Costs(images=1000, epochs=10)
    taken.speeds[PAIR.name] = costs.Speed(teacher=3e-3, student=1e-3, answer=5e-4)
    assert taken.of(cell("alone")) == pytest.approx(10 + costs.START_AND_END)
    assert taken.of(cell("kd")) == pytest.approx(15 + costs.START_AND_END)
    assert taken.of_teacher(PAIR) == pytest.approx(30)
    for seconds in (99.0, 50.0, 101.0):
        taken.add(cell("kd"), seconds)
    assert taken.of(cell("kd", seed=1)) == 99
    assert costs.fits(cell("kd"), taken, [PAIR.teacher], 100)
    assert not costs.fits(cell("kd"), taken, [], 100)  # its teacher takes 30 more
    same = cells.Pair("c--b", PAIR.teacher, "another")
    taken.speeds["c--b"] = taken.speeds[PAIR.name]
    known = costs.Speed(teacher=1e-3, student=1 / 81_200, answer=1 / 81_200)
    taken.speeds["r32x4_r8x4"] = known  # as fast as the H200 is
    left = [cell("alone"), cell("kd", seed=1), cell("kd", pair=same)]
    plan = costs.plan(left, taken, batch_size=50, trained=[])
    assert "| a--b | 2 | 600 |" in plan  # two cells and a teacher, ten epochs of twenty steps
    assert "| c--b | 1 | 200 |" in plan  # whose teacher is the same
    hours = [line.split("|")[4:6] for line in plan.splitlines() if "--b" in line]
    assert all(here == there for here, there in hours)
    assert costs.seconds_of("8m") == 480
    for wrong in ("8x", "-1s", ""):
        with pytest.raises(ValueError, match="--budget"):
            costs.seconds_of(wrong)


def test_figures_of_the_best_epoch_on_test_are_marked_but_for_the_csv(tmp_path):
    done = {cell("dkd", 0, cells.Pair.of("r32x4_r8x4")): numbers(0.76)}
    table.write_table(tmp_path, table.lines_of(done, tmp_path), "told", "it")
    assert "| 76.32 † | -0.32 † |" in (tmp_path / "table.md").read_text()
    assert "76.32 †" in (tmp_path / "table.html").read_text()
    assert "†" not in (tmp_path / "table.csv").read_text()


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
    assert {line.claim for line in table.lines_of(done, tmp_path, with_published=False)} == {None}
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
    assert "73.33 †" not in page
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
    another = [word.replace("slim_resnet10_4", "slim_resnet10_8") for word in map(str, words)]
    words[:] = [*another, "--budget", "1s"]
    fill()  # a command for another pair leaves the others' rows where they are
    assert (tmp_path / "table/table.csv").read_text().count("slim_resnet10_4") == 4
