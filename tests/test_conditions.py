"""Runs under a condition: what is trained on, what is judged, and what can be verified after."""

import json

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

import distill
from distill import run
from distill.config import build
from distill.config.overrides import CONF
from distill.data.condition.image_corruptions import ImageCorruption
from distill.data.sources import digits
from distill.models.build import ModelSpec, build_model
from distill.models.weights import DataShape

SMALL = {"layers": [1, 1, 1, 1], "channels": [4, 8, 8, 8]}
QUICK = ("trainer.max_epochs=1", "trainer.limit_train_batches=2", "teacher.fit.max_epochs=1",
         "trainer.accelerator=cpu", "logger=none", "callbacks=none")  # fmt: skip


@pytest.fixture
def composed(tmp_path, cache):
    def make(*overrides, name="train", folder="run"):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            paths = (f"paths.output_dir={tmp_path / folder}", f"paths.cache={cache}")
            return compose(name, overrides=[*paths, *overrides])

    return make


@pytest.mark.slow
def test_a_run_on_wrong_labels_leaves_what_verifies_its_numbers(composed, tmp_path, capsys):
    condition = ("condition=[pair_noise,long_tail]", "condition.rate=0.3", "condition.imbalance=4")
    run.train(composed(*QUICK, *condition, "shot_groups=[30,60]"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    found = summary["condition"]
    assert found["asked"]["noise"] == "pair"
    assert (
        found["train"]["kept"][0] == 4 * found["train"]["kept"][9] + found["train"]["kept"][0] % 4
    )
    assert summary["images"]["train"] == sum(found["train"]["given"])

    page = (tmp_path / "run" / "report.html").read_text().split('<section id="condition">')[1]
    for name in ("balanced_accuracy", "recall_many", "memorised", "recovered"):
        assert f"{100 * summary['student'][name]:.2f}" in page

    source = digits()
    labels = dict(zip(source.train.index.tolist(), source.train.labels.tolist(), strict=True))
    arrays = np.load(tmp_path / "run" / "condition.npz")
    for part in ("train", "val"):
        true, given = arrays[f"{part}_true"], arrays[f"{part}_given"]
        assert [labels[index] for index in arrays[f"{part}_index"].tolist()] == true.tolist()
        assert set(((given - true) % 10).tolist()) == {0, 1}
        assert (given != true).sum() == found[part]["wrong_labels"] > 0
    predictions = np.load(tmp_path / "run" / "predictions.npz")
    assert predictions["test_target"].tolist() == source.test.labels.tolist()

    student = distill.load_student(tmp_path / "run" / "student").eval()
    places = torch.searchsorted(source.train.index, torch.from_numpy(arrays["train_index"]))
    pixels = source.train.images[places].float() / 255
    numbers = json.loads((tmp_path / "run" / "student" / "config.json").read_text())
    mean, std = (torch.tensor(numbers["pretrained_cfg"][k])[:, None, None] for k in ("mean", "std"))
    with torch.no_grad():
        answers = student((pixels - mean) / std).argmax(1).numpy()
    true, given = arrays["train_true"], arrays["train_given"]
    wrong = true != given
    for role in ("teacher", "baseline"):
        assert 0 <= summary[role]["memorised"] <= 1
    assert summary["student"]["memorised"] == pytest.approx((answers == given)[wrong].mean())
    assert summary["student"]["recovered"] == pytest.approx((answers == true)[wrong].mean())

    answers = predictions["test_student"].argmax(1)
    recall = [(answers == k)[predictions["test_target"] == k].mean() for k in range(10)]
    counts = np.array(found["train"]["kept"])
    assert summary["student"]["recall"] == pytest.approx(recall)
    assert summary["student"]["balanced_accuracy"] == pytest.approx(np.mean(recall))
    many = np.array(recall)[counts > 60].mean()
    assert summary["student"]["recall_many"] == pytest.approx(many)


def test_the_objective_is_told_the_counts_under_the_condition(composed):
    cfg = composed(*QUICK, "condition=few_shot", "condition.shots=4", "objective=ldam",
                   "data.batch_size=8")  # fmt: skip
    data = build.build_data(cfg)
    assert build.build_objective(cfg, data).class_counts == [4] * 10
    plain = composed(*QUICK)
    shared = {build.shared_key(c, what) for c in (cfg, plain) for what in ("data", "teacher")}
    assert len(shared) == 4


def test_a_class_that_is_dropped_stays_in_the_test_split(composed, tmp_path):
    cfg = composed(*QUICK, "condition.drop=[3]", "baseline=false")
    data = build.build_data(cfg)
    assert data.class_counts[3] == 0
    assert 3 not in data.val.labels
    run.train(cfg)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["condition"]["train"]["wrong_labels"] == 0
    assert "memorised" not in summary["student"]
    assert "memorised" not in (tmp_path / "run" / "report.html").read_text()
    assert summary["student"]["recall_few"] == summary["student"]["recall"][3]


@pytest.mark.slow
def test_an_evaluation_on_corrupted_images_compares_with_the_baseline(composed, tmp_path, capsys):
    shape = DataShape(10, 1, (32, 32))
    for seed, name in enumerate(("student", "baseline")):
        torch.manual_seed(seed)
        model = build_model(ModelSpec("resnet18", SMALL), shape, name)
        distill.save_student(model, tmp_path / name, input_size=(1, 32, 32), mean=[0.5], std=[0.5])
    names = ["contrast", "impulse_noise"]
    run.evaluate(composed(f"student.checkpoint={tmp_path / 'student'}", "trainer.accelerator=cpu",
                          f"baseline={tmp_path / 'baseline'}", f"corruptions={names}",
                          name="eval"))  # fmt: skip
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    source, index = digits(), digits().test.index
    means = {}
    for role in ("student", "baseline"):
        model = distill.load_student(tmp_path / role).eval()
        errors = []
        for name in names:
            images = ImageCorruption(name, 3)(source.test.images, index)
            with torch.no_grad():
                answers = model(images / 255 * 2 - 1).argmax(1)
            errors.append((answers != source.test.labels).double().mean().item())
        found = summary[role]["corruption_errors"]
        assert [found[name][2] for name in names] == pytest.approx(errors, abs=3e-3)
        means[role] = {name: sum(found[name]) / 5 for name in names}
        assert summary[role]["mean_corruption_error"] == pytest.approx(
            sum(means[role].values()) / 2
        )
    relative = sum(means["student"][name] / means["baseline"][name] for name in names) / 2
    assert summary["student"]["relative_corruption_error"] == pytest.approx(relative)
    assert summary["baseline"]["relative_corruption_error"] == 1
    told = f"{100 * summary['student']['mean_corruption_error']:.2f}"
    assert told in capsys.readouterr().out.split("corrupted test images")[1]
    page = (tmp_path / "run" / "report.html").read_text().split('<section id="corruptions">')[1]
    assert told in page
    assert "impulse noise" in page
