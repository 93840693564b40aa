"""Splits of a data set, in memory or decoded on demand, and how to cut them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from distill.data.sources.listing import some
from distill.data.sources.packed import PackedStrings

DIGEST = np.dtype("S16")  # of a hash of what a sample holds
Digests = npt.NDArray[np.bytes_]
NO_DIGESTS = np.empty(0, DIGEST)


def digest_of(content: Any) -> bytes:
    """Return a hash of some bytes, of type `DIGEST`."""
    return hashlib.blake2b(content, digest_size=DIGEST.itemsize).digest()


def pixel_digests(images: Tensor) -> Digests:
    """Return a hash of each image's pixels, of uint8 `[N, C, H, W]`."""
    return np.array([digest_of(image.data) for image in images.contiguous().numpy()], DIGEST)


class Resident:
    """A split that fits in memory.

    Args:
        images: uint8 `[N, C, H, W]`.
        labels: int64 `[N]`.
        index: the samples' indices in the source, int64 `[N]`; None counts from 0.
        digests: a hash of the file that each sample was decoded from, `[N]` of type `DIGEST`; None
            where there was none.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        index: Tensor | None = None,
        digests: Digests | None = None,
    ) -> None:
        self.images, self.labels, self.digests = images, labels, digests
        self.index = torch.arange(len(labels)) if index is None else index

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, positions: Tensor) -> Resident:
        """Return the samples at these positions, which keep their index."""
        digests = None if self.digests is None else self.digests[positions.numpy()]
        labels, index = self.labels[positions], self.index[positions]
        return Resident(self.images[positions], labels, index, digests)

    def relabelled(self, labels: Tensor) -> Resident:
        """Return the same samples with other labels, int64 `[N]`."""
        return Resident(self.images, labels, self.index, self.digests)

    def contents(self) -> Digests:
        """Return a hash of the file of each sample, or of its pixels where there was none."""
        if self.digests is not None:
            return self.digests
        return pixel_digests(self.images)

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
    """A split whose images are decoded when they are requested.

    Args:
        load: position in the source → PIL image.
        labels: int64 `[N]`.
        names: one name per sample of the source, for the fingerprint.
        index: the samples' positions in the source, int64 `[N]`; None counts from 0.
        digests: a hash of what each sample of the source holds, of type `DIGEST`; None where only
            names tell it.
    """

    def __init__(
        self,
        load: Callable[[int], Image.Image],
        labels: Tensor,
        names: Sequence[str],
        index: Tensor | None = None,
        digests: Digests | None = None,
    ) -> None:
        self.load, self.labels, self.names, self.digests = load, labels, names, digests
        self.index = torch.arange(len(labels)) if index is None else index

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, positions: Tensor) -> Streamed:
        """Return the samples at these positions, which keep their index."""
        labels, index = self.labels[positions], self.index[positions]
        return Streamed(self.load, labels, self.names, index, self.digests)

    def relabelled(self, labels: Tensor) -> Streamed:
        """Return the same samples with other labels, int64 `[N]`."""
        return Streamed(self.load, labels, self.names, self.index, self.digests)

    def contents(self) -> Digests:
        """Return a hash of what each sample holds; none where that is not known."""
        return NO_DIGESTS if self.digests is None else self.digests[self.index.numpy()]

    def fingerprint(self) -> str:
        """Return a hash of names, of what the samples hold, and of labels, made once."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        places = self.index.numpy()
        names = PackedStrings.at(places, self.names)
        digest = hashlib.sha256()
        for part in (places, names.ends, names.text, self.labels.numpy(), self.contents()):
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()


Split = Resident | Streamed
PARTS = ("train", "val", "test")
MEANINGS = {  # of names of folders and of values in tables, in small letters
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


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


def meaning(name: str) -> str | None:
    """Return which split a name means, whatever its letters' case, or None."""
    return MEANINGS.get(name.strip().lower())


def named_classes(place: Path, names: Sequence[str] | None, count: int) -> list[str]:
    """Return class names in label order, at least as many as labels; without any, numbers."""
    if names is None:
        return [str(k) for k in range(count)]
    if len(names) < count:
        raise ValueError(
            f"{place}: labels go up to {count - 1}, but {len(names)} classes are named"
        )
    return list(names)


def with_test_split(
    name: str, classes: list[str], channels: int, parts: Mapping[str, Split]
) -> Source:
    """Return the source of these parts, of which a lone held-out one is the test split."""
    source = Source(name, classes, channels, parts["train"], parts.get("val"), parts.get("test"))
    if source.test is None and source.val is not None:
        source.test, source.val = source.val, None
        source.notes = ["the one held-out split is the test split; validation is cut from train"]
    return source


def check_same_classes(label: str, part: str, names: Sequence[str], classes: Sequence[str]) -> None:
    """Refuse a split with classes that train lacks; it may lack some itself."""
    unknown = sorted(set(names) - set(classes))
    if unknown:
        differing = sorted(set(names) ^ set(classes))
        raise ValueError(
            f"{label}: train and {part} have different classes: {some(differing, 5)}; train lacks "
            f"{some(unknown, 5)}"
        )


def stratified(
    labels: Tensor, fraction: float, seed: int, spared: Collection[int] = ()
) -> tuple[Tensor, Tensor]:
    """Return the positions of a seeded share of every class, and of the rest, both sorted.

    The share holds at least one sample of each class but those that are `spared`, of which, as of
    a class of one sample, all are in the rest.
    """
    from sklearn.model_selection import train_test_split

    classes, counts = np.unique(labels.numpy(), return_counts=True)
    whole = np.isin(labels.numpy(), [*spared, *classes[counts < 2]])
    positions = np.flatnonzero(~whole)
    try:
        rest, part = train_test_split(
            positions, test_size=fraction, stratify=labels.numpy()[positions], random_state=seed
        )
    except ValueError as error:
        raise ValueError(
            f"cannot cut {fraction:.0%} of {len(labels)} images (data.val_fraction, "
            f"data.test_fraction): {error}"
        ) from error
    _, first = np.unique(labels.numpy()[rest], return_index=True)
    lacking = ~np.isin(labels.numpy()[rest[first]], labels.numpy()[part])
    part = np.concatenate([part, rest[first[lacking]]])
    rest = np.setdiff1d(np.arange(len(labels)), part)
    return torch.from_numpy(np.sort(part)), torch.from_numpy(rest)
