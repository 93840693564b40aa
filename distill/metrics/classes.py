"""How the classes fare, each by itself: recall, F1, their means, and those over rare classes.

The functions work on answers `[N]`, the labels that a model names, and return float64 tensors. The
`Metric` classes read logits and keep counts of each class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill.metrics._shared import (
    SumMetric,
    check_classes,
    check_count,
    check_logits,
    check_target,
)

FEW_SHOT, MANY_SHOT = 20, 100
GROUPS = ("many", "medium", "few")


def per_class_recall(answers: Tensor, target: Tensor, classes: int) -> Tensor:
    """Share of the examples of each class that are given its label.

    `R_k = |{i : y_i = k, ŷ_i = k}| / |{i : y_i = k}|`, NaN for a class without examples.

    Args:
        answers: the labels named, integers `[N]`.
        target: true labels `[N]`.
        classes: K.

    Returns:
        Recall of each class, float64 `[K]`.

    Raises:
        ValueError: If a label does not lie in 0 … K − 1.

    Example:
        >>> per_class_recall(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2).tolist()
        [0.5, 1.0]
    """
    check_target(target, len(answers), classes)
    right = torch.bincount(target[answers == target], minlength=classes)
    return right.double() / torch.bincount(target, minlength=classes)


def balanced_accuracy(answers: Tensor, target: Tensor, classes: int) -> Tensor:
    """Mean of the recalls of all classes that have examples: each class counts the same.

    Args:
        answers: the labels named, integers `[N]`.
        target: true labels `[N]`.
        classes: K.

    Returns:
        A float64 scalar in [0, 1].

    Raises:
        ValueError: If a label does not lie in 0 … K − 1.

    Reference: Brodersen et al., The Balanced Accuracy and Its Posterior Distribution, ICPR 2010.
    """
    return per_class_recall(answers, target, classes).nanmean()


def per_class_f1(answers: Tensor, target: Tensor, classes: int) -> Tensor:
    """Harmonic mean of precision and recall of each class.

    `F1_k = 2·|{i : y_i = k, ŷ_i = k}| / (|{i : y_i = k}| + |{i : ŷ_i = k}|)`, NaN for a class
    without examples.

    Args:
        answers: the labels named, integers `[N]`.
        target: true labels `[N]`.
        classes: K.

    Returns:
        F1 of each class, float64 `[K]`.

    Raises:
        ValueError: If a label does not lie in 0 … K − 1.

    Example:
        >>> per_class_f1(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 3).tolist()
        [0.6666666666666666, 0.6666666666666666, nan]
    """
    check_target(target, len(answers), classes)
    return _f1(_class_counts(answers, target, classes).double())


def macro_f1(answers: Tensor, target: Tensor, classes: int) -> Tensor:
    """Mean of F1 over all classes that have examples: each class counts the same.

    Answers that name a class without examples count as mistakes of the classes they belong to.

    Args:
        answers: the labels named, integers `[N]`.
        target: true labels `[N]`.
        classes: K.

    Returns:
        A float64 scalar in [0, 1].

    Raises:
        ValueError: If a label does not lie in 0 … K − 1.

    Reference: Opitz and Burst, Macro F1 and Macro F1, arXiv:1911.03347 (the mean of F1).
    """
    return per_class_f1(answers, target, classes).nanmean()


class Favourite(NamedTuple):
    """The label that a model names most often.

    Attributes:
        label: which it is.
        share: of all examples that are given it.
        share_of_others: of the examples of other classes; NaN where there are none.
    """

    label: int
    share: float
    share_of_others: float


def favourite(answers: Tensor, target: Tensor, classes: int) -> Favourite:
    """Return the label that a model names most often, and for what.

    A model for which `share_of_others` is near one tells nothing apart, whatever its accuracy.

    Args:
        answers: the labels named, integers `[N]`.
        target: true labels `[N]`.
        classes: K.

    Raises:
        ValueError: If a label does not lie in 0 … K − 1.

    Example:
        >>> favourite(torch.tensor([1, 1, 0]), torch.tensor([1, 0, 0]), 2)
        Favourite(label=1, share=0.6666666666666666, share_of_others=0.5)
    """
    check_target(target, len(answers), classes)
    label = int(torch.bincount(answers, minlength=classes).argmax())
    predicted = answers == label
    return Favourite(label, float(_share(predicted)), float(_share(predicted[target != label])))


class BalancedAccuracy(SumMetric):
    """`balanced_accuracy` over batches, NaN before any.

    State: `counts` `[3, K]`: examples of each class that are right, that there are, that are named.

    Args:
        num_classes: K.
        **kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ValueError: If an input of `update(logits, target)` is wrong.

    Example:
        >>> metric = BalancedAccuracy(num_classes=3)
        >>> metric.update(torch.eye(3)[[0, 1, 1]], torch.tensor([0, 0, 1]))
        >>> float(metric.compute())
        0.75
    """

    higher_is_better = True
    counts: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_count(num_classes, "num_classes", least=2)
        self.num_classes = num_classes
        self._add_sum("counts", 3, num_classes)

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add scores `[N, K]` and labels `[N]`."""
        check_classes(logits, self.num_classes, "logits")
        check_logits(logits, target)
        self.counts = self.counts + _class_counts(logits.argmax(1), target, self.num_classes)

    def compute(self) -> Tensor:
        """Return the mean of the recalls of the classes seen so far."""
        right, there, _ = self.counts
        return (right / there).nanmean()


class MacroF1(BalancedAccuracy):
    """`macro_f1` over batches, NaN before any; arguments and state as of `BalancedAccuracy`.

    Example:
        >>> metric = MacroF1(num_classes=3)
        >>> metric.update(torch.eye(3)[[0, 1, 1]], torch.tensor([0, 0, 1]))
        >>> round(float(metric.compute()), 4)
        0.6667
    """

    def compute(self) -> Tensor:
        """Return the mean of F1 of the classes seen so far."""
        return _f1(self.counts).nanmean()


def recall_by_shots(
    recall: Tensor, class_counts: Sequence[float], few: int = FEW_SHOT, many: int = MANY_SHOT
) -> dict[str, Tensor]:
    """Mean recall of the classes with many, some and few training examples.

    With n_k training examples class k is few-shot if `n_k < few`, many-shot if `n_k > many`, and
    medium-shot otherwise. On a test split of equally many examples of each class these are
    accuracies.

    Args:
        recall: of each class `[K]`, NaN where there is none.
        class_counts: training examples n_k, `[K]`; NaN of a class is in no group.
        few: below which a class is few-shot.
        many: above which a class is many-shot.

    Returns:
        `many`, `medium` and `few`: float64 scalars, NaN for a group without classes.

    Raises:
        ValueError: If the numbers of classes differ, or `few > many`.

    Example:
        >>> recall_by_shots(torch.tensor([0.75, 0.5, 0.25]), [500, 50, 5])["few"].item()
        0.25

    Reference: Liu et al., Large-Scale Long-Tailed Recognition in an Open World, arXiv:1904.05160.
    """
    if len(recall) != len(class_counts):
        raise ValueError(f"recall of {len(recall)} classes, but {len(class_counts)} are counted.")
    if few > many:
        raise ValueError(f"few={few} must be at most many={many}.")
    counts = torch.tensor(list(class_counts))
    chosen = (counts > many, (counts >= few) & (counts <= many), counts < few)
    recall = recall.double().cpu()
    return {name: recall[mask].nanmean() for name, mask in zip(GROUPS, chosen, strict=True)}


def learned_labels(answers: Tensor, given: Tensor, true: Tensor) -> dict[str, Tensor]:
    """What a model makes of training labels of which some are wrong.

    `train_given` and `train_true` are the shares of all examples that it gives the label they were
    trained with, and their true one; `train_true_where_right` that among examples whose label was
    right. Of those whose label was wrong, `memorised` is the share that it gives the wrong label
    it was trained with, and `recovered` the share that it gives the true one nevertheless.

    Args:
        answers: the labels named for training examples, integers `[N]`.
        given: the labels they were trained with, `[N]`.
        true: their true labels, `[N]`.

    Returns:
        Float64 scalars, NaN where there is no such example.

    Raises:
        ValueError: If the three do not belong together.

    Example:
        >>> given, true = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 0])
        >>> found = learned_labels(torch.tensor([0, 1, 0]), given, true)
        >>> found["memorised"].item(), found["recovered"].item()
        (0.5, 0.5)

    Reference: Liu et al., Early-Learning Regularization Prevents Memorization of Noisy Labels,
    arXiv:2007.00151 (Figure 1).
    """
    if not answers.shape == given.shape == true.shape:
        raise ValueError("answers, given and true labels must have the same shape [N].")
    wrong = given != true
    return {
        "train_given": _share(answers == given),
        "train_true": _share(answers == true),
        "train_true_where_right": _share((answers == true)[~wrong]),
        "memorised": _share((answers == given)[wrong]),
        "recovered": _share((answers == true)[wrong]),
    }


def _class_counts(answers: Tensor, target: Tensor, classes: int) -> Tensor:
    """Return how many examples of each class are right, there are, and are named, `[3, K]`."""
    labels = (target[answers == target], target, answers)
    return torch.stack([torch.bincount(one.long(), minlength=classes) for one in labels])


def _f1(counts: Tensor) -> Tensor:
    right, there, predicted = counts
    return (2 * right / (there + predicted)).masked_fill(there == 0, torch.nan)


def _share(events: Tensor) -> Tensor:
    return events.double().mean()
