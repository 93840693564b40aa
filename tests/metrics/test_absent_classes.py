"""A class that no example has leaves every number defined, and none of its own."""

import math

import pytest
import torch

from distill.metrics import (
    class_numbers,
    evaluate,
    fit_vector_scaling,
    vector_numbers,
)

N, K, ABSENT = 60, 5, 3


@pytest.fixture
def answers():
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, K - 1, (N,), generator=generator)
    target[target >= ABSENT] += 1
    logits = torch.randn(N, K, generator=generator)
    logits[torch.arange(N), target] += 1.5
    logits *= 3
    return logits, target


def undefined(numbers):
    return [key for key, value in numbers.items() if value is None]


def test_every_number_is_defined_without_a_class(answers):
    logits, target = answers
    teacher = logits + torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    numbers = evaluate(logits, target, teacher, topk=(1, 3), validation=answers)
    assert undefined(numbers) == []
    assert all(math.isfinite(v) for v in numbers.values() if not isinstance(v, str))
    vector = vector_numbers(fit_vector_scaling(logits, target), logits, target)
    assert undefined(vector) == []


def test_the_absent_class_has_no_recall_and_the_mean_is_over_the_others(answers):
    logits, target = answers
    numbers = class_numbers(logits, target, [100] * K, (20, 100))
    recall = numbers["recall"]
    assert [value is None for value in recall] == [k == ABSENT for k in range(K)]
    present = [value for value in recall if value is not None]
    assert numbers["balanced_accuracy"] == pytest.approx(sum(present) / len(present))


def test_what_is_averaged_over_classes_is_that_of_the_others_alone(answers):
    logits, target = answers
    # No example is of the class, and none is given a probability of it.
    impossible = logits.clone()
    impossible[:, ABSENT] = -1e4
    others = [k for k in range(K) if k != ABSENT]
    fewer = evaluate(logits[:, others], torch.tensor([0, 1, 2, -1, 3])[target])
    whole = evaluate(impossible, target)
    for key in ("top1", "nll", "brier", "ece", "auroc", "mrr", "error_auroc"):
        assert whole[key] == pytest.approx(fewer[key], abs=1e-9), key
