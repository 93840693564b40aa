"""Whose class is whose: models that know the data's classes in another order, or more of them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from distill.data.condition.costs import Line, listed, read_lines
from distill.utils.errors import printable
from distill.utils.files import resolved_path

log = logging.getLogger(__name__)

Find = Callable[[str], list[int]]  # a name → the classes that go by it
Groups = list[list[int]]  # for each of the data's classes, those of the model that mean it
SHOWN = 3  # pairs of classes that a message shows


@dataclass(frozen=True)
class LabelSet:
    """The classes that weights tell apart.

    Args:
        count: how many there are.
        names: what each of them is called, one name or several; None where nothing says.
        origin: where the weights come from, for messages.
        of_imagenet: whether the names are ImageNet's, inferred from nothing but the count.
    """

    count: int
    names: Sequence[Sequence[str]] | None
    origin: str
    of_imagenet: bool = False


class MappedClasses(nn.Module):
    r"""Let a model answer for the data's classes, in the data's order.

    The logit of class k is that of the model's class that means it; of several, whose probabilities
    add up, `z'_k = log Σ_{j ∈ groups_k} exp z_j`. The model's other classes are left out, so that
    `softmax(z')` is its answer given that it is one of the data's.

    All else (`pretrained_cfg`, `feature_info`, …) is the model's own.

    Args:
        model: images → logits `[N, M]`.
        groups: for each of the K classes, indices below M of at least one of the model's.
    """

    model: Any
    index: Tensor
    absent: Tensor

    def __init__(self, model: nn.Module, groups: Groups) -> None:
        super().__init__()
        self.model, self.groups, self.num_classes = model, groups, len(groups)
        width = max(map(len, groups))
        index = torch.tensor([group + group[:1] * (width - len(group)) for group in groups])
        absent = torch.tensor([[place >= len(group) for place in range(width)] for group in groups])
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("absent", absent, persistent=False)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def extra_repr(self) -> str:
        """Return what the state dict leaves out, for whoever tells models apart."""
        return f"groups={self.groups}"

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `[N, K]`."""
        return self._mapped(self.model(images))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits `[N, K]` for the model's last feature map, or what they are made of."""
        if pre_logits:
            embedding: Tensor = self.model.forward_head(features, pre_logits=True)
            return embedding
        return self._mapped(self.model.forward_head(features))

    def get_classifier(self) -> None:
        """Return nothing: what makes these logits is no single layer."""

    def _mapped(self, logits: Tensor) -> Tensor:
        if self.index.shape[1] == 1:
            return logits.index_select(1, self.index[:, 0])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits[:, self.index].masked_fill(self.absent, -torch.inf).logsumexp(dim=2)


def matched(
    label_set: LabelSet, classes: Sequence[str], role: str, file: str | None
) -> Groups | None:
    """Return which of a model's classes are the data's, saying how they were matched.

    Args:
        label_set: the model's classes.
        classes: the data's class names, in label order.
        role: `teacher`, … for messages.
        file: a table of own classes and the model's (`read_groups`), which then decides.

    Returns:
        The groups, or None where the model's classes are the data's in their order.

    Raises:
        ValueError: if a class of the data has none of the model's, or it is not clear which.
    """
    if file is not None:
        groups = read_groups(file, label_set, classes)
        log.info("%s: classes by %s: %s", label_set.origin, file, pairs(label_set, groups, classes))
        return groups
    if is_unnamed(label_set, classes):
        take_in_order(label_set, classes, role)
        return None
    groups = by_name(label_set, classes, role)
    if groups == [[k] for k in range(label_set.count)]:
        return None
    if label_set.count == len(classes):
        log.info("%s has the data's %d classes in another order: they are matched by name",
                 label_set.origin, label_set.count)  # fmt: skip
        return groups
    log.info("%s has %d classes, of which the data's %d are taken by name: %s", label_set.origin,
             label_set.count, len(classes), pairs(label_set, groups, classes))  # fmt: skip
    return groups


def is_unnamed(label_set: LabelSet, classes: Sequence[str]) -> bool:
    """Whether nothing says what a model's classes are, or a guess has proved wrong."""
    if label_set.names is None:
        return True
    guessed = label_set.of_imagenet and label_set.count == len(classes)
    return guessed and not any(places(label_set.names, classes))


def take_in_order(label_set: LabelSet, classes: Sequence[str], role: str) -> None:
    """Take classes without names for the data's, saying so.

    Raises:
        ValueError: if there are more or fewer of them.
    """
    if label_set.count != len(classes):
        raise ValueError(
            f"{label_set.origin} has {label_set.count} classes and the data have {len(classes)}, "
            f"and it does not say what its are{remedy(role)}"
        )
    log.warning("%s does not say what its %d classes are: their order is taken for the data's (%s)",
                label_set.origin, label_set.count, shown(classes))  # fmt: skip


def by_name(label_set: LabelSet, classes: Sequence[str], role: str) -> Groups:
    """Return the one class of a model that has the name of each of the data's.

    Raises:
        ValueError: if there is none for one of them, or there are several.
    """
    assert label_set.names is not None
    groups = places(label_set.names, classes)
    missing = [name for name, group in zip(classes, groups, strict=True) if not group]
    counts = f"{label_set.origin} has {label_set.count} classes and the data have {len(classes)}"
    if missing:
        raise ValueError(
            f"{counts}, and none of its is called {listed(missing)}: "
            f"it knows {shown(['/'.join(names) for names in label_set.names])}{remedy(role)}"
        )
    unclear = next((k for k, group in enumerate(groups) if len(group) > 1), None)
    if unclear is not None:
        several = " or ".join(described(label_set, j) for j in groups[unclear])
        raise ValueError(f"{counts}: its {classes[unclear]!r} could be {several}{remedy(role)}")
    check_shared(label_set, groups, classes, f"{counts}, and by name")
    return groups


def check_shared(label_set: LabelSet, groups: Groups, classes: Sequence[str], what: str) -> None:
    """Refuse to take one class of a model for two of the data's, or for one twice."""
    owner: dict[int, str] = {}
    for name, group in zip(classes, groups, strict=True):
        for place in group:
            if place in owner:
                both = f"both {owner[place]!r} and {name!r}" if owner[place] != name else (
                    f"{name!r} twice")  # fmt: skip
                raise ValueError(f"{what} its {described(label_set, place)} is {both}")
            owner[place] = name


def remedy(role: str) -> str:
    """Return what a person can do about classes that cannot be matched."""
    if role != "teacher":
        return ""
    return (
        ": teacher=finetuned trains a new last layer, or say which class is which in "
        "teacher.classes=FILE.csv"
    )


def places(aliases: Sequence[Sequence[str]], wanted: Sequence[str]) -> Groups:
    """Return for each name the classes that go by it: as it is written, or else as read."""
    return list(map(finder(aliases), wanted))


def finder(aliases: Sequence[Sequence[str]]) -> Find:
    """Return what finds the classes that go by a name."""
    written, read = index_of(aliases, str), index_of(aliases, as_read)
    return lambda name: written.get(name) or read.get(as_read(name), [])


def index_of(aliases: Sequence[Sequence[str]], form: Callable[[str], str]) -> dict[str, list[int]]:
    """Return name in a form → the classes that go by it."""
    index: dict[str, list[int]] = {}
    for place, names in enumerate(aliases):
        for name in {form(name) for name in names}:
            index.setdefault(name, []).append(place)
    return index


def as_read(name: str) -> str:
    """Return a name in which case, `_`, `-` and spaces make no difference."""
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def shared_rows(theirs: Sequence[str], wanted: Sequence[str]) -> dict[int, int]:
    """Return own class → their class for all classes of the same name, one of each."""
    groups = places([[name] for name in theirs], wanted)
    rows = {own: group[0] for own, group in enumerate(groups) if len(group) == 1}
    return rows if len(set(rows.values())) == len(rows) else {}


def read_groups(path: str, label_set: LabelSet, classes: Sequence[str]) -> Groups:
    """Read which of a model's classes mean the data's.

    The file is UTF-8 text; each line holds a class of the data and one of the model's, by name or
    by its number from 0. Several lines may give one class of the data several of the model's. A
    first line of which neither is a class is a heading.

    Raises:
        ValueError: for anything wrong in the file, naming its line, or if it cannot be read.
    """
    try:
        lines = read_lines(resolved_path(path))
    except OSError as error:
        raise ValueError(f"teacher.classes={path}: {error.strerror}") from error
    table = {name: label for label, name in enumerate(classes)}
    find = finder(label_set.names or [])
    if lines:
        own, other = lines[0].cells[0], lines[0].cells[-1]
        if own not in table and not place_of(other, find, label_set):
            lines = lines[1:]
    groups: Groups = [[] for _ in classes]
    for line in lines:
        label, place = entry(f"{path} line {line.number}", line, table, find, label_set)
        groups[label].append(place)
    missing = [name for name, group in zip(classes, groups, strict=True) if not group]
    if missing:
        raise ValueError(f"{path} has no line for {listed(missing)}: each class needs one")
    check_shared(label_set, groups, classes, f"{path}:")
    return groups


def entry(
    where: str, line: Line, table: Mapping[str, int], find: Find, label_set: LabelSet
) -> tuple[int, int]:
    """Return the class of the data and that of the model which a line names."""
    if len(line.cells) != 2:
        raise ValueError(
            f"{where} has {len(line.cells)} cells, not two: own class, class of {label_set.origin}"
        )
    own, other = line.cells
    if own not in table:
        raise ValueError(f"{where}: {own!r} is not a class: name one of {listed(list(table))}")
    matches = place_of(other, find, label_set)
    if len(matches) != 1:
        several = " and ".join(described(label_set, place) for place in matches)
        why = f"could be {several}: give a number" if matches else (
            f"is no class of {label_set.origin}: give a name of its, or a number from 0 to "
            f"{label_set.count - 1}")  # fmt: skip
        raise ValueError(f"{where}: {other!r} {why}")
    return table[own], matches[0]


def place_of(cell: str, find: Find, label_set: LabelSet) -> list[int]:
    """Return the model's classes that a cell names, or the one whose number it is."""
    if matches := find(cell):
        return matches
    return [int(cell)] if re.fullmatch(r"[0-9]{1,9}", cell) and int(cell) < label_set.count else []


def pairs(label_set: LabelSet, groups: Groups, classes: Sequence[str]) -> str:
    """Return the first classes with those of the model that mean them, for people."""
    return shown([
        f"{name} = {' + '.join(described(label_set, place) for place in group)}"
        for name, group in zip(classes, groups, strict=True)
    ])  # fmt: skip


def described(label_set: LabelSet, place: int) -> str:
    """Return what people call one of a model's classes: a stranger's names command no terminal."""
    if label_set.names is None:
        return f"class {place}"
    first, *others = map(printable, label_set.names[place])
    return f"{first} ({', '.join(others)})" if others else first


def shown(names: Sequence[str]) -> str:
    """Return the first names and how many there are."""
    more = f", … ({len(names)})" if len(names) > SHOWN else ""
    return ", ".join(map(printable, names[:SHOWN])) + more


@cache
def imagenet_names(count: int) -> list[list[str]] | None:
    """Return synset and lemmas of each class of the ImageNet that has so many; None of any other.

    Example:
        >>> imagenet_names(1000)[0]
        ['n01440764', 'tench', 'Tinca tinca']
    """
    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    lemmas: Any = info.label_descriptions()
    return [
        [synset, *lemma.split(", ")]
        for synset, lemma in zip(info.label_names(), lemmas, strict=True)
    ]
