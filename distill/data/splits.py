"""Splits of a data set, in memory or decoded on demand, and how to cut them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class Resident:
    """A split that fits in memory.

    Args:
        images: uint8 `[N, C, H, W]`.
        labels: int64 `[N]`.
        index: the samples' indices in the source, int64 `[N]`; None counts from 0.
    """

    def __init__(self, images: Tensor, labels: Tensor, index: Tensor | None = None) -> None:
        self.images, self.labels = images, labels
        self.index = torch.arange(len(labels)) if index is None else index

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, positions: Tensor) -> Resident:
        """Return the samples at these positions, which keep their index."""
        return Resident(self.images[positions], self.labels[positions], self.index[positions])

    def relabelled(self, labels: Tensor) -> Resident:
        """Return the same samples with other labels, int64 `[N]`."""
        return Resident(self.images, labels, self.index)

    def fingerprint(self) -> str:
        """Return a hash of the pixels and labels, made once: the runs of a sweep share a split."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        for part in (self.images, self.labels, self.index):
            digest.update(np.ascontiguousarray(part.numpy()).data)
        return digest.hexdigest()


class Streamed:
    """A split whose images are decoded when they are asked for.

    Args:
        load: position in the source → PIL image.
        labels: int64 `[N]`.
        names: one name per sample, for the fingerprint.
        index: the samples' positions in the source, int64 `[N]`; None counts from 0.
    """

    def __init__(
        self,
        load: Callable[[int], Image.Image],
        labels: Tensor,
        names: Sequence[str],
        index: Tensor | None = None,
    ) -> None:
        self.load, self.labels, self.names = load, labels, names
        self.index = torch.arange(len(labels)) if index is None else index

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, positions: Tensor) -> Streamed:
        """Return the samples at these positions, which keep their index."""
        return Streamed(self.load, self.labels[positions], self.names, self.index[positions])

    def relabelled(self, labels: Tensor) -> Streamed:
        """Return the same samples with other labels, int64 `[N]`."""
        return Streamed(self.load, labels, self.names, self.index)

    def fingerprint(self) -> str:
        """Return a hash of the names and labels, made once."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for index, label in zip(self.index.tolist(), self.labels.tolist(), strict=True):
            digest.update(f"{index}\0{self.names[index]}\0{label}\n".encode(errors="replace"))
        return digest.hexdigest()


Split = Resident | Streamed
PARTS = ("train", "val", "test")


@dataclass
class Source:
    """Images with their splits and class names; a missing split is cut from `train` later.

    What is `judged` by a trained model may lack classes, and have nothing to train on.
    """

    name: str
    classes: list[str]
    channels: int
    train: Split
    val: Split | None = None
    test: Split | None = None
    notes: list[str] = field(default_factory=list)
    judged: bool = False


def with_test_split(
    name: str, classes: list[str], channels: int, parts: Mapping[str, Split]
) -> Source:
    """Return the source of these parts, of which a lone held-out one is the test split."""
    source = Source(name, classes, channels, parts["train"], parts.get("val"), parts.get("test"))
    if source.test is None and source.val is not None:
        source.test, source.val = source.val, None
        source.notes = ["the one held-out split is the test split; validation is cut from train"]
    return source


def check_same_classes(label: str, part: str, names: list[str], classes: list[str]) -> None:
    """Refuse a split whose classes are not those of train: its labels would mean something else."""
    if names != classes:
        differing = sorted(set(names) ^ set(classes))
        more = " …" if len(differing) > 5 else ""
        raise ValueError(
            f"{label}: train and {part} have different classes: {', '.join(differing[:5])}{more}"
        )


def stratified(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the positions of a seeded share of every class, and of the rest, both sorted.

    The share holds at least one sample of each class.
    """
    from sklearn.model_selection import train_test_split

    positions = np.arange(len(labels))
    try:
        rest, part = train_test_split(
            positions, test_size=fraction, stratify=labels.numpy(), random_state=seed
        )
    except ValueError as error:
        raise ValueError(
            f"cannot cut {fraction:.0%} of {len(labels)} images (data.val_fraction, "
            f"data.test_fraction): {error}"
        ) from error
    _, first = np.unique(labels.numpy()[rest], return_index=True)
    lacking = ~np.isin(labels.numpy()[rest[first]], labels.numpy()[part])
    part = np.concatenate([part, rest[first[lacking]]])
    rest = np.setdiff1d(rest, part)
    return torch.from_numpy(np.sort(part)), torch.from_numpy(rest)
