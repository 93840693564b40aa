"""Conditions that make training hard: wrong labels, rare classes, classes and images left out.

Whatever is random is a function of (seed, index) alone: the same image has the same wrong label,
or is left out, whichever others are there and in whatever order. Test images are never touched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from distill.data.condition.costs import read_costs
from distill.data.sources.splits import Source, Split
from distill.data.views.draws import keyed_uniform, keyed_words
from distill.utils.numbers import is_number

NOISES = ("symmetric", "pair")
TAILS = ("exponential", "step")
CUT, OWN = 0, 1  # images of a source's train split, and of a validation split of its own


class Draw(IntEnum):
    """The number of each draw, apart from those of views."""

    LABEL = 1000
    KEPT = 1001


@dataclass(frozen=True)
class Condition:
    """What is made hard about training images, and about validation images as about them.

    First images are left out (`drop`, `tail` or `shots`) by their true labels, then those that are
    kept get wrong labels (`noise`).

    Args:
        noise: `symmetric`, `pair`, or a CSV of how often each true class (rows) is given each label
            (columns); see `transition_matrix`.
        rate: share of wrong labels that is expected; a CSV says that itself.
        tail: `exponential` or `step`: later classes are rarer; see `tail_sizes`.
        imbalance: images of the most frequent class for one of the rarest.
        drop: names of classes of which no image is kept. Their scores remain to be learned, from a
            teacher that knows them.
        shots: images that are kept of each class.
        clean_validation: whether validation images stay as they are.
        seed: of all draws; apart from the run's, so that seeds share their condition.

    Raises:
        ValueError: for what is out of range or does not go together.
    """

    noise: str | None = None
    rate: float | None = None
    tail: str | None = None
    imbalance: float = 100.0
    drop: Sequence[Any] = ()
    shots: int | None = None
    clean_validation: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_condition(self)

    @property
    def active(self) -> bool:
        """Whether anything is made hard."""
        return bool(self.noise or self.tail or self.drop or self.shots)

    def sizes(self, counts: Tensor, classes: Sequence[str], least: int) -> Tensor:
        """Return how many images of each class are kept, int64 `[K]`.

        Args:
            counts: how many there are, `[K]`.
            classes: their names.
            least: how many a tail leaves at least of a class; of validation it leaves one.
        """
        sizes = counts.clone()
        if self.tail:
            sizes = tail_sizes(counts, self.tail, self.imbalance).clamp(min=least).minimum(counts)
        if self.shots:
            sizes = counts.clamp(max=self.shots)
        for name in self.drop:
            sizes[place_of(str(name), classes)] = 0
        return sizes

    def transition(self, classes: Sequence[str]) -> Tensor:
        """Return the probability of each label (columns) for each true class, `[K, K]`."""
        assert self.noise is not None
        if self.noise in NOISES:
            return transition_matrix(self.noise, self.rate or 0.0, len(classes))
        try:
            return read_transition(self.noise, classes)
        except OSError as error:
            raise ValueError(
                f"condition.noise={self.noise} is neither {' nor '.join(NOISES)}, and no file that "
                f"can be read: {error.strerror}"
            ) from error


@dataclass(frozen=True)
class CorruptedSplit:
    """A split under a condition.

    Attributes:
        split: what is kept, with the labels that are given.
        true: the true labels of what is kept, int64 `[N]`.
        before: images of each class before, `[K]`.
    """

    split: Split
    true: Tensor
    before: Tensor

    @property
    def wrong(self) -> Tensor:
        """Which labels are wrong, bool `[N]`."""
        return self.split.labels != self.true

    def counts(self) -> dict[str, Any]:
        """Return the images of each class before, kept by true class and by label given."""
        classes = len(self.before)
        return {
            "before": self.before.tolist(),
            "kept": torch.bincount(self.true, minlength=classes).tolist(),
            "given": torch.bincount(self.split.labels, minlength=classes).tolist(),
            "wrong_labels": int(self.wrong.sum()),
        }

    def described(self, part: str) -> str:
        """Return in words what was done to images of a part."""
        kept, given = len(self.true), int(self.wrong.sum())
        left_out = int(self.before.sum()) - kept
        return f"condition: {left_out} {part} images left out, {given} of {kept} labels wrong"


def corrupt_splits(
    source: Source, train: Split, val: Split, condition: Condition | None
) -> dict[str, CorruptedSplit]:
    """Return the splits of a source that a condition changes, by name; see `corrupt_split`."""
    if condition is None:
        return {}
    if not len(train):
        raise ValueError(f"condition: {source.name} has no training images to make hard")
    changed = {"train": corrupt_split(train, condition, source.classes, CUT, training=True)}
    if not condition.clean_validation:
        where = CUT if source.val is None else OWN
        changed["val"] = corrupt_split(val, condition, source.classes, where, training=False)
    return changed


def corrupt_split(
    split: Split, condition: Condition, classes: Sequence[str], where: int, training: bool
) -> CorruptedSplit:
    """Return a split under a condition.

    Args:
        split: of training or validation images.
        condition: what to make of it.
        classes: the class names.
        where: CUT or OWN, whose indices count apart.
        training: whether a class that the condition cannot be met for is refused.

    Raises:
        ValueError: if there are too few images, or a class is left empty that was not dropped.
    """
    before = torch.bincount(split.labels, minlength=len(classes))
    sizes = condition.sizes(before, classes, least=0 if training else 1)
    if training:
        check_sizes(condition, before, sizes, classes)
    if not torch.equal(sizes, before):
        split = split.subset(kept(split.labels, split.index, sizes, condition.seed, where))
    true = split.labels
    if condition.noise:
        transition = condition.transition(classes)
        given = noisy_labels(true, split.index, transition, condition.seed, where)
        split = split.relabelled(given)
        if training:
            check_given(given, sizes, classes)
    return CorruptedSplit(split, true, before)


def transition_matrix(noise: str, rate: float, classes: int) -> Tensor:
    r"""Return the probabilities of each label (columns) for each true class, float64 `[K, K]`.

    `symmetric`: `T_kk = 1 − ρ` and `T_kj = ρ / (K − 1)` for every other class j, so that ρ is the
    share of labels that *are* wrong. `pair`: `T_kk = 1 − ρ` and `T_{k, (k + 1) mod K} = ρ`.

    Args:
        noise: `symmetric` or `pair`.
        rate: ρ in [0, 1).
        classes: K.

    Example:
        >>> transition_matrix("pair", 0.25, 3).tolist()
        [[0.75, 0.25, 0.0], [0.0, 0.75, 0.25], [0.25, 0.0, 0.75]]

    Reference: Han et al., Co-teaching, arXiv:1804.06872 (both kinds).
    """
    same = torch.eye(classes, dtype=torch.float64)
    other = (1 - same) / (classes - 1) if noise == "symmetric" else same.roll(1, dims=1)
    return (1 - rate) * same + rate * other


def read_transition(path: str, classes: Sequence[str]) -> Tensor:
    """Read how often each true class is given each label: counts or shares, float64 `[K, K]`.

    Rows are divided by their sums, so that a confusion matrix of counts will do. The file is one of
    `distill.data.condition.costs.read_costs`, with a column for each class.

    Raises:
        ValueError: for anything wrong in the file.
        OSError: if it cannot be read.
    """
    table, columns = read_costs(path, classes, "label shares")
    if len(columns) > len(classes):
        raise ValueError(f"{path} has {len(columns)} columns for {len(classes)} classes")
    for name, row in zip(classes, table, strict=True):
        if bool((row < 0).any()) or not bool(row.sum() > 0):
            raise ValueError(
                f"{path}: the row of {name} must hold shares or counts, none below 0 and one above"
            )
    return table / table.sum(dim=1, keepdim=True)


def noisy_labels(
    labels: Tensor, index: Tensor, transition: Tensor, seed: int, where: int = CUT
) -> Tensor:
    """Return labels that are drawn by the rows of a transition matrix, int64 `[N]`.

    A draw u in [0, 1) keeps the label where `u < T_kk`: what is wrong at one rate is wrong at
    every higher one too.

    Args:
        labels: true labels, int64 `[N]`.
        index: the samples' indices, int64 `[N]`.
        transition: probabilities, float64 `[K, K]`; rows sum to one.
        seed: of the draws.
        where: which indices these are.
    """
    classes = len(transition)
    names = torch.arange(classes)
    rolled = transition.gather(1, (names[:, None] + names) % classes)  # the own class comes first
    upto = rolled.cumsum(dim=1)
    upto[:, -1] = 1.0
    # Row k lies in [k, k + 1]: one search finds every sample's place in the row of its class.
    borders = (upto.clamp(max=1.0) + names[:, None]).flatten()
    draws = keyed_uniform(seed, where, index, Draw.LABEL).double() + labels
    offset = torch.searchsorted(borders, draws, right=True) - labels * classes
    return (labels + offset) % classes


def poisoned(
    features: Tensor, labels: Tensor, radius: float, share: float
) -> tuple[Tensor, Tensor]:
    r"""Add points with wrong labels, far out where their true class would be, to points in space.

    For each class k with mean μ_k, and μ the mean of all, `⌈share·n_k⌉` points at
    `μ + radius·(μ_k − μ)/‖μ_k − μ‖` that are labelled `(k + 1) mod K`.

    Args:
        features: `[N, D]`, floating.
        labels: int64 `[N]`, of classes 0 … K − 1 that all have points.
        radius: distance from μ, in the unit of the features.
        share: points added for one there is, at least 0.

    Returns:
        Features `[N + M, D]` and labels `[N + M]`, the added ones last.

    Example:
        >>> x, y = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
        >>> poisoned(x, y, radius=9.0, share=1.0)[0].flatten().tolist()
        [-1.0, 1.0, -9.0, 9.0]
    """
    counts = torch.bincount(labels)
    means = torch.zeros(len(counts), features.shape[1], dtype=features.dtype)
    means = means.index_add(0, labels, features) / counts[:, None]
    centre = features.mean(dim=0)
    places = centre + radius * torch.nn.functional.normalize(means - centre, dim=1)
    truly = torch.arange(len(counts)).repeat_interleave((share * counts).ceil().long())
    given = (truly + 1) % len(counts)
    return torch.cat([features, places[truly]]), torch.cat([labels, given])


def tail_sizes(counts: Tensor, tail: str, imbalance: float) -> Tensor:
    r"""Return how many images of each class a long tail has, int64 `[K]`.

    `exponential`: `n_k = ⌊n_max · γ^(−k / (K − 1))⌋` for classes k = 0 … K − 1 in label order;
    `step`: `n_max` for the first half of the classes, `⌊n_max / γ⌋` for the others. `n_max` is the
    largest number for which there are enough images of every class that has any.

    Args:
        counts: images of each class, `[K]`.
        tail: `exponential` or `step`.
        imbalance: γ = n_max / n_min, at least 1.

    Example:
        >>> tail_sizes(torch.tensor([100, 100, 100]), "exponential", 100.0).tolist()
        [100, 10, 1]

    Reference: Cao et al., arXiv:1906.07413; `step`: Buda et al., arXiv:1710.05381.
    """
    classes = len(counts)
    place = torch.arange(classes, dtype=torch.float64)
    if tail == "exponential":
        share = imbalance ** (-place / (classes - 1))
    else:
        share = torch.ones_like(place)
        share[math.ceil(classes / 2) :] /= imbalance
    largest = ((counts.double() + 1 - 2e-6) / share)[counts > 0].amin().floor()
    # A power may be a rounding below the whole number that it stands for.
    return (largest * share + 1e-6).floor().long()


def kept(labels: Tensor, index: Tensor, sizes: Tensor, seed: int, where: int = CUT) -> Tensor:
    """Return the positions of a seeded choice of so many samples of each class, sorted.

    A sample's place in the choice is drawn for its index: a smaller choice is part of a larger one.

    Args:
        labels: true labels, int64 `[N]`.
        index: the samples' indices, int64 `[N]`, below 2³¹.
        sizes: how many to keep of each class, `[K]`; all where there are fewer.
        seed: of the draws.
        where: which indices these are.
    """
    words = keyed_words(seed, where, index, Draw.KEPT)
    order = (words << 31 | index).argsort()
    order = order[labels[order].argsort(stable=True)]
    counts = torch.bincount(labels, minlength=len(sizes))
    begins = counts.cumsum(0) - counts
    sorted_labels = labels[order]
    place = torch.arange(len(labels)) - begins[sorted_labels]
    return order[place < sizes[sorted_labels]].sort().values


def build_condition(options: Mapping[str, Any] | None) -> Condition | None:
    """Return the condition of these options, or None where nothing is made hard."""
    names = [one.name for one in fields(Condition)]
    for name in options or {}:
        if name not in names:
            raise ValueError(f"condition has no option {name}; there are {', '.join(names)}")
    condition = Condition(**(options or {}))
    return condition if condition.active else None


def check_condition(condition: Condition) -> None:
    """Refuse values that are out of range, or do not go together."""
    noise, rate = condition.noise, condition.rate
    if noise in NOISES and (rate is None or not (is_number(rate) and 0 <= rate < 1)):
        raise ValueError(f"condition.rate must be a share from 0 to below 1, got {rate!r}")
    if noise not in NOISES and rate is not None:
        raise ValueError(
            f"condition.rate={rate} goes with condition.noise={' or '.join(NOISES)}, not {noise}"
        )
    if condition.tail not in (None, *TAILS):
        raise ValueError(f"condition.tail must be {' or '.join(TAILS)}, got {condition.tail!r}")
    if not is_number(condition.imbalance) or not 1 <= condition.imbalance < math.inf:
        raise ValueError(f"condition.imbalance must be at least 1, got {condition.imbalance!r}")
    shots = condition.shots
    if shots is not None and (isinstance(shots, bool) or not isinstance(shots, int) or shots < 1):
        raise ValueError(f"condition.shots must be how many images, at least 1, got {shots!r}")
    if shots and condition.tail:
        raise ValueError("condition.shots and condition.tail both say how many images are kept")
    if isinstance(condition.drop, str) or not isinstance(condition.drop, Sequence):
        raise ValueError(f"condition.drop is a list of classes like [3], got {condition.drop!r}")
    if not isinstance(condition.clean_validation, bool):
        raise ValueError("condition.clean_validation must be true or false")
    if isinstance(condition.seed, bool) or not isinstance(condition.seed, int):
        raise ValueError(f"condition.seed must be a whole number, got {condition.seed!r}")


def place_of(name: str, classes: Sequence[str]) -> int:
    """Return the label of a class."""
    if name not in classes:
        some = ", ".join(classes[:5]) + (" …" if len(classes) > 5 else "")
        raise ValueError(f"condition.drop: there is no class {name}; there are {some}")
    return classes.index(name)


def check_sizes(
    condition: Condition, before: Tensor, sizes: Tensor, classes: Sequence[str]
) -> None:
    """Refuse more images than there are, and a class of which none is left."""
    dropped = {str(name) for name in condition.drop}
    for name, count, size in zip(classes, before.tolist(), sizes.tolist(), strict=True):
        if name in dropped:
            continue
        if condition.shots and count < condition.shots:
            raise ValueError(
                f"condition.shots={condition.shots}: there are {count} training images of {name}"
            )
        if size == 0:
            raise ValueError(
                f"condition.imbalance={condition.imbalance:g} leaves no training image of {name}"
            )
    if int((sizes > 0).sum()) < 2:
        raise ValueError("condition.drop leaves fewer than two classes: nothing to tell apart")


def check_given(given: Tensor, sizes: Tensor, classes: Sequence[str]) -> None:
    """Refuse labels of which none names a class that has images."""
    counts = torch.bincount(given, minlength=len(classes))
    for label in torch.nonzero((counts == 0) & (sizes > 0)).flatten().tolist():
        raise ValueError(
            f"condition.noise leaves no training image with the label {classes[label]}: "
            "there are too few for this rate"
        )
