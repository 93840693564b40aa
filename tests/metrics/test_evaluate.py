"""The summary of one model: its keys, its types, and which split each number comes from."""

import doctest
import importlib
import math
import subprocess
import sys

import pytest
import torch

from distill import metrics
from distill.metrics import evaluate, fit_temperature

PLAIN = ["nll", "brier", "ece", "classwise_ece", "adaptive_ece", "smooth_ece", "mrr"]
SCALED = ["temperature_star", "temperature_status", "ece_after_scaling", "nll_after_scaling"]


def sample(rows=600, classes=8, seed=0, sharpness=2.0):
    """Logits twice as large as the ones their labels are drawn from: T* is about 2."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(rows, classes, generator=generator)
    target = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return 2 * logits, target


def test_keys_and_types():
    logits, target = sample()
    numbers = evaluate(logits, target, logits.sin(), validation=sample(seed=1))
    assert list(numbers) == ["top1", "top5", *PLAIN, *SCALED, "agreement", "kl_from_teacher"]
    assert numbers.pop("temperature_status") == "ok"
    assert {type(value) for value in numbers.values()} == {float}
    without = evaluate(logits, target)
    assert list(without) == ["top1", "top5", *PLAIN, *SCALED]
    assert [without[key] for key in SCALED] == [None] * 4


def test_every_number_is_its_function():
    logits, target = sample()
    teacher = logits + logits.sin()
    validation = sample(seed=1)
    numbers = evaluate(logits, target, teacher, bins=9, topk=(1, 3), validation=validation)
    probs = logits.double().softmax(1)
    temperature = fit_temperature(*validation).temperature
    scaled = logits.double() / temperature
    expected = {
        "top1": metrics.topk_accuracy(logits, target, 1),
        "top3": metrics.topk_accuracy(logits, target, 3),
        "nll": metrics.negative_log_likelihood(logits, target),
        "brier": metrics.brier_score(probs, target),
        "ece": metrics.expected_calibration_error(probs, target, 9),
        "classwise_ece": metrics.classwise_calibration_error(probs, target, 9),
        "adaptive_ece": metrics.adaptive_calibration_error(probs, target, 9),
        "smooth_ece": metrics.smooth_calibration_error(probs, target),
        "mrr": metrics.mean_reciprocal_rank(logits, target),
        "temperature_star": temperature,
        "ece_after_scaling": metrics.expected_calibration_error(scaled.softmax(1), target, 9),
        "nll_after_scaling": metrics.negative_log_likelihood(scaled, target),
        "agreement": metrics.agreement(logits, teacher),
        "kl_from_teacher": metrics.kl_from_teacher(logits, teacher),
        "temperature_status": "ok",
    }
    assert numbers.keys() == expected.keys()
    for key, value in expected.items():
        wanted = value if isinstance(value, str) else pytest.approx(float(value), abs=1e-12)
        assert numbers[key] == wanted, key


def test_the_temperature_comes_from_validation_and_helps_here():
    logits, target = sample(rows=4000)
    numbers = evaluate(logits, target, validation=sample(rows=4000, seed=1))
    assert numbers["temperature_star"] == pytest.approx(2, abs=0.1)
    assert numbers["ece_after_scaling"] < numbers["ece"] / 3
    assert numbers["nll_after_scaling"] < numbers["nll"]
    doubled = sample(rows=4000, seed=1)
    other = evaluate(logits, target, validation=(2 * doubled[0], doubled[1]))
    assert other["temperature_star"] == pytest.approx(2 * numbers["temperature_star"], rel=1e-6)
    unscaled = ["top1", "top5", *PLAIN]
    assert [other[key] for key in unscaled] == [numbers[key] for key in unscaled]


@pytest.mark.parametrize(
    ("status", "validation"),
    [
        ("infinite", (torch.zeros(8, 8), torch.arange(8))),
        ("infinite", (-torch.eye(8), torch.arange(8))),
        ("zero", (torch.eye(8), torch.arange(8))),
    ],
)
def test_without_a_best_temperature_nothing_is_applied(status, validation):
    numbers = evaluate(*sample(), validation=validation)
    assert numbers["temperature_status"] == status
    assert numbers["temperature_star"] is None
    assert numbers["ece_after_scaling"] == numbers["ece"]
    assert numbers["nll_after_scaling"] == numbers["nll"]


def test_top1_is_always_there_and_k_beyond_the_classes_is_none():
    logits, target = sample(classes=2)
    numbers = evaluate(logits, target, topk=(2, 5))
    assert list(numbers)[:3] == ["top1", "top2", "top5"]
    assert numbers["top2"] == 1
    assert numbers["top5"] is None


def test_order_gradient_and_precision_do_not_matter():
    logits, target = sample()
    expected = evaluate(logits, target, validation=(logits, target))
    for other in (logits.double(), logits.clone().requires_grad_()):
        found = evaluate(other.flip(0), target.flip(0), validation=(logits, target))
        status = found.pop("temperature_status")
        assert status == expected["temperature_status"]
        for key, value in found.items():
            assert value == pytest.approx(expected[key], abs=1e-12), key


def test_a_saturated_student_is_measured_in_double():
    # In float32 the softmax of 20 rounds to one; in float64 it does not.
    logits, target = torch.tensor([[20.0, 0.0]]), torch.tensor([0])
    assert evaluate(logits, target)["ece"] == pytest.approx(1 / (1 + math.exp(20)), rel=1e-6)


def test_mistakes_are_explained():
    logits, target = sample(rows=10)
    with pytest.raises(ValueError, match="logits holds NaN or infinity in 10 of 10 rows"):
        evaluate(logits * math.nan, target)
    with pytest.raises(ValueError, match="teacher_logits holds NaN"):
        evaluate(logits, target, logits * math.nan)
    with pytest.raises(ValueError, match="same shape"):
        evaluate(logits, target, logits[:, :4])
    with pytest.raises(ValueError, match="validation logits have 2 classes, but logits have 8"):
        evaluate(logits, target, validation=(torch.eye(2), torch.arange(2)))
    with pytest.raises(ValueError, match="empty"):
        evaluate(logits[:0], target[:0])
    with pytest.raises(ValueError, match="bins must be"):
        evaluate(logits, target, bins=0)
    with pytest.raises(ValueError, match="k must be"):
        evaluate(logits, target, topk=(0,))


def test_every_public_name_exists():
    assert metrics.__all__ == sorted(metrics.__all__)
    assert all(hasattr(metrics, name) for name in metrics.__all__)


@pytest.mark.slow
def test_the_room_imports_no_trainer_and_no_other_room():
    code = (
        "import sys, distill.metrics; "
        "print([m for m in sys.modules if m.split('.')[0] in ('hydra', 'omegaconf', 'timm') "
        "or (m.startswith('distill.') and not m.startswith(('distill.metrics', 'distill._')))])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_examples_in_the_documentation_run():
    result = doctest.testmod(importlib.import_module("distill.metrics.evaluate"))
    assert result.attempted > 0
    assert result.failed == 0
