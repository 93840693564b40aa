"""Classes by themselves: equality with scikit-learn, groups by hand, and wrong labels."""

import doctest
import importlib
import math

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score, recall_score

from distill.config.resolvers import direction
from distill.metrics import (
    BalancedAccuracy,
    MacroF1,
    balanced_accuracy,
    class_numbers,
    favourite,
    learned_labels,
    macro_f1,
    mean_corruption_error,
    per_class_f1,
    per_class_recall,
    recall_by_shots,
)


def labels(seed, count=400, classes=7):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, classes, (count,), generator=generator)
    answers = torch.where(
        torch.rand(count, generator=generator) < 0.6,
        target,
        torch.randint(0, classes, (count,), generator=generator),
    )
    return answers, target


@pytest.mark.parametrize("seed", range(3))
def test_recall_and_balanced_accuracy_are_those_of_scikit_learn(seed):
    answers, target = labels(seed)
    recall = per_class_recall(answers, target, 7)
    assert recall.tolist() == pytest.approx(recall_score(target, answers, average=None).tolist())
    assert balanced_accuracy(answers, target, 7).item() == pytest.approx(
        balanced_accuracy_score(target, answers)
    )


@pytest.mark.parametrize("seed", range(3))
def test_f1_is_that_of_scikit_learn_over_the_classes_that_are_there(seed):
    answers, target = labels(seed, count=60)
    kept = target != seed  # a class that only answers name
    answers, target = answers[kept], target[kept]
    there = target.unique().tolist()
    assert macro_f1(answers, target, 7).item() == pytest.approx(
        f1_score(target, answers, labels=there, average="macro")
    )
    assert math.isnan(per_class_f1(answers, target, 7)[seed])


@pytest.mark.parametrize(("metric", "function"), [
    (BalancedAccuracy, balanced_accuracy), (MacroF1, macro_f1),
])  # fmt: skip
def test_over_batches_they_are_those_of_everything(metric, function):
    answers, target = labels(1, count=90)
    target[target == 4] = 2  # in no batch
    whole, logits = metric(7), torch.eye(7)[answers]
    for rows in torch.randperm(90).split(7):
        whole.update(logits[rows], target[rows])
    assert whole.compute().item() == pytest.approx(function(answers, target, 7).item())
    with pytest.raises(ValueError, match="num_classes=3"):
        metric(3).update(logits, target)


def test_a_favourite_is_judged_by_the_images_of_other_classes():
    target = torch.tensor([0] * 97 + [1, 2, 2])
    right = favourite(target, target, 3)
    assert (right.label, right.share, right.share_of_others) == (0, 0.97, 0.0)
    blind = favourite(torch.zeros(100, dtype=torch.long), target, 3)
    assert (blind.share, blind.share_of_others) == (1, 1)
    assert math.isnan(favourite(target[:3], target[:3], 3).share_of_others)


def test_a_class_without_examples_has_no_recall_and_no_say():
    answers, target = torch.tensor([0, 2, 1]), torch.tensor([0, 0, 1])
    assert math.isnan(per_class_recall(answers, target, 3)[2])
    assert balanced_accuracy(answers, target, 3).item() == 0.75


def test_classes_at_the_thresholds_are_medium():
    recall = torch.tensor([0.1, 0.2, 0.4, 0.8])
    found = recall_by_shots(recall, [19, 20, 100, 101])
    assert {name: round(value.item(), 6) for name, value in found.items()} == {
        "many": 0.8, "medium": 0.3, "few": 0.1,
    }  # fmt: skip
    assert math.isnan(recall_by_shots(recall, [50] * 4)["few"])
    with pytest.raises(ValueError, match="at most many"):
        recall_by_shots(recall, [1] * 4, few=5, many=4)
    with pytest.raises(ValueError, match="4 classes, but 2"):
        recall_by_shots(recall, [1, 2])


def test_class_numbers_are_plain_values():
    logits = torch.eye(3)[[0, 1, 1, 0]] * 5
    numbers = class_numbers(logits, torch.tensor([0, 1, 1, 1]), [200, 50, 0], (20, 100))
    assert numbers["balanced_accuracy"] == pytest.approx(5 / 6)
    assert numbers["recall"] == pytest.approx([1.0, 2 / 3, None])
    assert (numbers["recall_many"], numbers["recall_few"]) == (1.0, None)


def test_what_was_learned_adds_up():
    answers, true = labels(5)
    given = torch.where(torch.arange(len(true)) % 3 == 0, (true + 1) % 7, true)
    found = {name: share.item() for name, share in learned_labels(answers, given, true).items()}
    wrong = (given != true).double().mean().item()
    right = (1 - wrong) * found["train_true_where_right"]
    assert found["train_true"] == pytest.approx(right + wrong * found["recovered"])
    assert found["train_given"] == pytest.approx(right + wrong * found["memorised"])
    parrot = learned_labels(given, given, true)
    assert (parrot["memorised"], parrot["recovered"], parrot["train_given"]) == (1, 0, 1)
    assert math.isnan(learned_labels(answers, true, true)["memorised"])


def test_mean_corruption_error_is_what_a_loop_gives():
    errors, other = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    ratios = []
    for c in range(4):
        mine = sum(errors[c, s].item() for s in range(5))
        ratios.append(mine / sum(other[c, s].item() for s in range(5)))
    assert mean_corruption_error(errors, other).item() == pytest.approx(sum(ratios) / 4)
    assert mean_corruption_error(errors).item() == pytest.approx(errors.mean().item())
    assert mean_corruption_error(other, other).item() == 1
    assert math.isnan(mean_corruption_error(errors, torch.zeros(4, 5)))
    with pytest.raises(ValueError, match="shape"):
        mean_corruption_error(errors, other[:2])


def test_the_examples_in_the_docstrings_run():
    for name in (
        "distill.metrics.classes",
        "distill.metrics.robustness",
        "distill.data.condition.corrupt",
    ):
        result = doctest.testmod(importlib.import_module(name))
        assert result.attempted > 0
        assert result.failed == 0


@pytest.mark.parametrize("name", ["balanced_accuracy", "macro_f1", "top1"])
def test_more_of_them_is_better(name):
    assert direction(f"val/{name}") == "maximize"
    assert direction("val/nll") == "minimize"
