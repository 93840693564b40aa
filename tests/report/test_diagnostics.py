"""What a page shows, against the functions and counts it must come from."""

import json

import numpy as np
import pytest
import torch

from distill import metrics
from distill.data import DataModule
from distill.data.sources import digits
from distill.report.diagnostics import (
    confusion,
    diagnostics,
    disputed,
    examples,
    model_diagnostics,
    save_thumbnails,
    scaling_curve,
)


def sample(rows=400, classes=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    honest = 2 * torch.randn(rows, classes, generator=generator)
    target = torch.multinomial(honest.softmax(1), 1, generator=generator).squeeze(1)
    return 2 * honest, target


def split(**logits):
    target = sample()[1]
    return {**logits, "target": target, "index": torch.arange(len(target)) + 1000}


def test_the_bins_are_those_of_the_metric_and_give_its_ece():
    logits, target = sample()
    found = model_diagnostics(logits, target, 2.0)
    for bins, divisor in ((found["reliability"], 1.0), (found["reliability_after_scaling"], 2.0)):
        probs = (logits.double() / divisor).softmax(1)
        assert sum(bins["count"]) == len(target)
        gaps = [
            n * abs(a - c)
            for n, a, c in zip(bins["count"], bins["accuracy"], bins["confidence"], strict=True)
            if n
        ]
        ece = float(metrics.expected_calibration_error(probs, target))
        assert sum(gaps) / len(target) == pytest.approx(ece, abs=1e-5)
        empty = [a for n, a in zip(bins["count"], bins["accuracy"], strict=True) if not n]
        assert set(empty) <= {None}
    assert model_diagnostics(logits, target, None)["reliability_after_scaling"] is None


@pytest.mark.parametrize(("rows", "classes"), [(400, 6), (1500, 1000)])
def test_the_scaling_curve_is_that_of_the_metrics_at_each_temperature(rows, classes):
    logits, target = sample(rows, classes)
    logits[0] *= 100  # certain, and no overflow
    curve = scaling_curve(logits, target, 2.0)
    for k in (0, 12, 24):
        scaled = logits.double() / curve["temperature"][k]
        nll = metrics.negative_log_likelihood(scaled, target)
        error = metrics.expected_calibration_error(scaled.softmax(1), target)
        # temperatures are kept in six digits, which may move an answer to the next bin
        assert curve["nll"][k] == pytest.approx(float(nll), rel=1e-4)
        assert curve["ece"][k] == pytest.approx(float(error), abs=2e-3)


def test_the_scaling_curve_dips_at_the_temperature_that_fits():
    logits, target = sample(rows=5000)
    curve = scaling_curve(logits, target, 2.0)
    best = curve["temperature"][int(np.argmin(curve["nll"]))]
    fitted = metrics.fit_temperature(logits, target).temperature
    step = curve["temperature"][1] / curve["temperature"][0]
    assert 1 / step <= best / fitted <= step
    assert min(curve["temperature"]) == pytest.approx(0.25)
    assert max(curve["temperature"]) == pytest.approx(8)


def test_risk_ends_in_the_error_rate_at_full_coverage():
    logits, target = sample()
    curve = model_diagnostics(logits, target, None)["risk_coverage"]
    assert curve["coverage"][-1] == 1
    error = 1 - float(metrics.topk_accuracy(logits, target, 1))
    assert curve["risk"][-1] == pytest.approx(error, abs=1e-5)
    assert len(curve["risk"]) <= 101


@pytest.mark.parametrize(("classes", "whole"), [(3, True), (20, True), (21, False)])
def test_confusion_counts_every_pair(classes, whole):
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, classes, (500,), generator=generator)
    answer = torch.randint(0, classes, (500,), generator=generator)
    logits = torch.nn.functional.one_hot(answer, classes).float()
    found = confusion(logits, target)
    counted = {}
    for pair in zip(target.tolist(), answer.tolist(), strict=True):
        counted[pair] = counted.get(pair, 0) + 1
    if whole:
        assert {(i, j): n for i, row in enumerate(found["matrix"]) for j, n in enumerate(row) if n
                } == counted  # fmt: skip
    else:
        assert found["matrix"] is None
    wrong = sorted((n for (i, j), n in counted.items() if i != j), reverse=True)[:20]
    assert [n for *_, n in found["pairs"]] == wrong
    assert all(counted[i, j] == n for i, j, n in found["pairs"])


def test_a_perfect_student_has_no_pairs_and_no_examples():
    target = torch.arange(5)
    logits = torch.eye(5)
    assert confusion(logits, target)["pairs"] == []
    answers = {"student": logits, "teacher": 3 * logits, "target": target, "index": target}
    assert len(disputed(answers)) == 0


def test_disputed_rows_are_where_the_two_name_other_classes_the_farthest_apart_first():
    student, _ = sample()
    teacher, _ = sample(seed=1)
    answers = split(student=student, teacher=teacher)
    rows = disputed(answers)
    assert len(rows) == 24
    assert (student.argmax(1) != teacher.argmax(1))[rows].all()
    apart = (student.double().softmax(1) - teacher.double().softmax(1)).abs().sum(1)
    assert apart[rows].tolist() == sorted(apart[rows].tolist(), reverse=True)
    left = set(range(len(student))) - set(rows.tolist())
    most = max(apart[i] for i in left if student[i].argmax() != teacher[i].argmax())
    assert apart[rows].min() >= most


def test_without_a_teacher_they_are_the_surest_mistakes():
    student, target = sample()
    rows = disputed(split(student=student))
    assert (student.argmax(1) != target)[rows].all()
    sure = student.softmax(1).amax(1)[rows]
    assert (sure.diff() <= 1e-6).all()


def test_examples_say_who_answered_what():
    student, target = sample()
    answers = split(student=student, teacher=-student)
    (example,) = examples(answers, torch.tensor([7]))
    assert example["row"] == 7
    assert example["index"] == 1007
    assert example["target"] == int(target[7])
    assert example["student"]["answer"] == int(student[7].argmax())
    confidence = float(student[7].double().softmax(0).max())
    assert example["student"]["confidence"] == pytest.approx(confidence, rel=1e-5)
    assert example["teacher"]["answer"] == int(student[7].argmin())
    assert "baseline" not in example


def test_evidence_is_plain_json_without_nan():
    student, _ = sample()
    found = diagnostics(split(student=student), {"student": {"temperature_star": None}})
    json.loads(json.dumps(found, allow_nan=False))
    assert set(found) == {"models", "confusion", "examples"}


def test_thumbnails_are_the_clean_test_images_in_order(tmp_path):
    data = DataModule(digits())
    summary = {"evidence": {"examples": [{"row": 5}, {"row": 2}]}}
    save_thumbnails(tmp_path / "x.npz", data, summary)
    images = np.load(tmp_path / "x.npz")["images"]
    assert images.dtype == np.uint8
    assert (images[0] == data.test.images[5].permute(1, 2, 0).numpy()).all()
    assert (images[1] == data.test.images[2].permute(1, 2, 0).numpy()).all()
    save_thumbnails(tmp_path / "none.npz", data, {"evidence": {"examples": []}})
    assert len(np.load(tmp_path / "none.npz")["images"]) == 0


def test_large_images_become_small_ones_of_the_same_shape(tmp_path):
    class Large:
        def clean_test_images(self, rows):
            return torch.arange(3 * 50 * 200).remainder(256).byte().view(1, 3, 50, 200)

    save_thumbnails(tmp_path / "x.npz", Large(), {"evidence": {"examples": [{"row": 0}]}})
    assert np.load(tmp_path / "x.npz")["images"].shape == (1, 24, 96, 3)
