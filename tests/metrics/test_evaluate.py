"""The summary of one model: its keys, its types, and which split each number comes from."""

import doctest
import importlib
import math
import subprocess
import sys

import pytest
import torch

from distill import metrics
from distill.metrics import (
    cost_numbers,
    evaluate,
    fit_temperature,
    fit_vector_scaling,
    vector_numbers,
)

SCALABLE = ["nll", "brier", "ece", "accuracy_when_sure", "coverage_when_sure"]
BINNED = ["rmsce", "mce", "classwise_ece", "adaptive_ece", "smooth_ece", "brier_reliability",
          "brier_resolution", "brier_uncertainty", "brier_within"]  # fmt: skip
ORDERED = ["mrr", "auroc", "error_auroc", "aurc", "excess_aurc"]
SCALED = ["temperature_star", "temperature_status", *(f"{key}_after_scaling" for key in SCALABLE)]
FIDELITY = ["agreement", "kl_from_teacher", "kl_to_teacher", "jensen_shannon", "total_variation",
            "centred_logit_mse", "entropy_gap", "confidence_slope",
            "agreement_where_teacher_wrong", "topk_overlap"]  # fmt: skip
PLAIN = ["top1", "top5", *SCALABLE, *BINNED, *ORDERED]


def sample(rows=600, classes=8, seed=0, sharpness=2.0):
    """Logits twice as large as the ones their labels are drawn from: T* is about 2."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(rows, classes, generator=generator)
    target = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return 2 * logits, target


def test_keys_and_types():
    logits, target = sample()
    numbers = evaluate(logits, target, logits.sin(), validation=sample(seed=1))
    assert set(numbers) == {*PLAIN, *SCALED, *FIDELITY}
    assert numbers.pop("temperature_status") == "ok"
    assert {type(value) for value in numbers.values()} == {float}
    without = evaluate(logits, target)
    assert set(without) == {*PLAIN, *SCALED}
    assert [without[key] for key in SCALED] == [None] * len(SCALED)


def test_every_number_is_its_function():
    logits, target = sample()
    teacher = logits + logits.sin()
    validation = sample(seed=1)
    numbers = evaluate(
        logits, target, teacher, bins=9, topk=(1, 3), validation=validation, confidence=0.7
    )
    temperature = fit_temperature(*validation).temperature
    scaled = logits.double() / temperature
    probs, scaled_probs = logits.double().softmax(1), scaled.softmax(1)
    confidence = metrics.log_odds(logits).amax(1)
    correct = logits.argmax(1) == target
    parts = metrics.brier_decomposition(probs, target, 9)
    expected = {
        "top1": metrics.topk_accuracy(logits, target, 1),
        "top3": metrics.topk_accuracy(logits, target, 3),
        "rmsce": metrics.expected_calibration_error(probs, target, 9, "l2"),
        "mce": metrics.expected_calibration_error(probs, target, 9, "max"),
        "classwise_ece": metrics.classwise_calibration_error(probs, target, 9),
        "adaptive_ece": metrics.adaptive_calibration_error(probs, target, 9),
        "smooth_ece": metrics.smooth_calibration_error(probs, target),
        **{f"brier_{name}": value for name, value in parts._asdict().items()},
        "mrr": metrics.mean_reciprocal_rank(logits, target),
        "auroc": metrics.auroc(metrics.log_odds(logits), target),
        "error_auroc": metrics.auroc(confidence, correct.long()),
        "aurc": metrics.area_under_risk_coverage(confidence, correct),
        "excess_aurc": metrics.excess_area_under_risk_coverage(confidence, correct),
        "temperature_star": temperature,
        "temperature_status": "ok",
        "agreement_where_teacher_wrong": metrics.agreement_where_teacher_wrong(
            logits, teacher, target
        ),
        "topk_overlap": metrics.topk_overlap(logits, teacher, 5),
    }
    expected |= {name: getattr(metrics, name)(logits, teacher) for name in FIDELITY[:-2]}
    for suffix, s, p in (("", logits, probs), ("_after_scaling", scaled, scaled_probs)):
        accuracy, coverage = metrics.accuracy_at_confidence(p, target, 0.7)
        expected |= {
            f"nll{suffix}": metrics.negative_log_likelihood(s, target),
            f"brier{suffix}": metrics.brier_score(p, target),
            f"ece{suffix}": metrics.expected_calibration_error(p, target, 9),
            f"accuracy_when_sure{suffix}": accuracy,
            f"coverage_when_sure{suffix}": coverage,
        }
    assert numbers.keys() == expected.keys()
    for key, value in expected.items():
        wanted = value if isinstance(value, str) else pytest.approx(float(value), abs=1e-12)
        assert numbers[key] == wanted, key


def test_the_parts_of_the_brier_score_add_up():
    numbers = evaluate(*sample())
    whole = numbers["brier_reliability"] - numbers["brier_resolution"]
    whole += numbers["brier_uncertainty"] + numbers["brier_within"]
    assert whole == pytest.approx(numbers["brier"], abs=1e-12)


def test_what_is_undefined_is_none():
    logits, target = torch.eye(4).repeat(3, 1) * 9, torch.arange(4).repeat(3)
    numbers = evaluate(logits, target, logits, confidence=1.0)
    assert numbers["agreement_where_teacher_wrong"] is None  # it makes no mistake
    assert numbers["error_auroc"] is None
    assert numbers["accuracy_when_sure"] is None
    assert numbers["coverage_when_sure"] == 0


def test_costs_before_and_after_scaling():
    """Where a missed class 1 costs much, calibrated probabilities pay what they expect to pay."""
    generator = torch.Generator().manual_seed(0)
    honest = torch.randn(20000, 2, generator=generator, dtype=torch.float64)
    target = torch.multinomial(honest.softmax(1), 1, generator=generator).squeeze(1)
    costs = torch.tensor([[0.0, 1.0, 0.6], [10.0, 0.0, 0.6]])
    numbers = cost_numbers(4 * honest, target, costs, temperature=4.0)
    assert numbers["cost_after_scaling"] < numbers["cost"] < numbers["cost_of_argmax"]
    assert numbers["cost_anticipated_after_scaling"] == pytest.approx(
        numbers["cost_after_scaling"], rel=0.03
    )
    assert numbers["cost_anticipated"] < 0.8 * numbers["cost"]  # too sure of itself
    unscaled = cost_numbers(4 * honest, target, costs, temperature=None)
    assert unscaled["cost_after_scaling"] == unscaled["cost"] == numbers["cost"]


def test_vector_scaling_repairs_one_class_that_a_temperature_cannot():
    logits, target = sample(rows=4000)
    bent = torch.cat([logits[:, :1] + 3, logits[:, 1:]], dim=1)
    numbers = vector_numbers(fit_vector_scaling(bent[:2000], target[:2000]), bent[2000:],
                             target[2000:])  # fmt: skip
    by_temperature = evaluate(bent[2000:], target[2000:], validation=(bent[:2000], target[:2000]))
    assert numbers["vector_status"] == "ok"
    assert numbers["nll_after_vector"] < by_temperature["nll_after_scaling"] - 0.02
    assert numbers["top1_after_vector"] > by_temperature["top1"]
    assert numbers["ece_after_vector"] < 0.05


def test_the_temperature_comes_from_validation_and_helps_here():
    logits, target = sample(rows=4000)
    numbers = evaluate(logits, target, validation=sample(rows=4000, seed=1))
    assert numbers["temperature_star"] == pytest.approx(2, abs=0.1)
    assert numbers["ece_after_scaling"] < numbers["ece"] / 3
    assert numbers["nll_after_scaling"] < numbers["nll"]
    doubled = sample(rows=4000, seed=1)
    other = evaluate(logits, target, validation=(2 * doubled[0], doubled[1]))
    assert other["temperature_star"] == pytest.approx(2 * numbers["temperature_star"], rel=1e-6)
    assert [other[key] for key in PLAIN] == [numbers[key] for key in PLAIN]


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
        "or (m.startswith('distill.') and not m.startswith(('distill.metrics', 'distill.utils')))])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_examples_in_the_documentation_run():
    result = doctest.testmod(importlib.import_module("distill.metrics.evaluate"))
    assert result.attempted > 0
    assert result.failed == 0
