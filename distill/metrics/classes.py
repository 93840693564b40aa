"""How the classes fare, each by itself: recall, its mean, and its mean over rare classes.

Everything works on answers `[N]`, the labels that a model names, and returns float64 tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.metrics._shared import check_target

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


def _share(events: Tensor) -> Tensor:
    return events.double().mean()
