"""Pictures without labels, on which a teacher teaches too: read, told apart, put beside train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.data.sources.contents import read_splits
from distill.data.sources.folder import existing_folder, listed_files
from distill.data.sources.in_memory import resident
from distill.data.sources.listing import Seen, endings, image_files
from distill.data.sources.packed import PackedStrings
from distill.data.sources.pieces import Pieces
from distill.data.sources.splits import Resident, Source, Split, Streamed
from distill.utils.numbers import is_number

UNKNOWN = -1  # the label of a picture that has none


@dataclass(frozen=True)
class Reading:
    """How the files of a folder are read; see `distill.data.sources.contents.read_splits`."""

    verify: str = "new"
    broken: str = "refuse"
    cache: str | None = None


def read_beside(
    where: str | Source | None, source: Source, held_out: Sequence[Split], reading: Reading
) -> tuple[Split | None, int, list[str]]:
    """Return unlabelled pictures but for those held out, how many those are, and what is said.

    See `read` for the arguments and errors; nowhere to read from is no pictures.
    """
    if where is None:
        return None, 0, []
    pictures, notes = read(where, source, reading)
    pictures, left_out = without(pictures, held_out)
    if left_out is None:
        notes.append("its pictures cannot be compared with those of validation and test")
    elif left_out:
        notes.append(
            f"{left_out} pictures left out, which are also in validation or test; {len(pictures)} "
            "are used"
        )
    return pictures, left_out or 0, [f"data.unlabeled: {note}" for note in notes]


def read(where: str | Source, source: Source, reading: Reading) -> tuple[Split, list[str]]:
    """Return unlabelled pictures in the form of a source's training split, and what is to be said.

    Args:
        where: a folder, of which all pictures anywhere below it are taken, or a source, of which
            those of `train` are.
        source: the labelled images beside which they are shown.
        reading: how the files of a folder are read.

    Raises:
        ValueError: for what is no such place, holds no pictures, or other ones than the source's.
        FileNotFoundError: if there is no such folder.
    """
    pictures: Split
    if isinstance(where, str):
        pictures, notes = picture_folder(where, source.channels, reading)
    elif isinstance(where, Source):
        if where.channels != source.channels:
            raise ValueError(
                f"data.unlabeled: {where.name} has {where.channels} channels, and {source.name} "
                f"has {source.channels}"
            )
        pictures, notes = where.train, list(where.notes)
    else:
        raise ValueError(f"data.unlabeled is a folder, or a source with _target_, not {where!r}")
    if not len(pictures):
        raise ValueError(f"data.unlabeled={where}: there is no picture that can be read")
    pictures = pictures.relabelled(torch.full((len(pictures),), UNKNOWN))
    return in_form_of(source.train, pictures, source.channels), notes


def picture_folder(path: str, channels: int, reading: Reading) -> tuple[Split, list[str]]:
    """Return all pictures anywhere below a folder, and what was met there and is not read."""
    root = existing_folder(path)
    seen = Seen(root)
    pieces = Pieces(root, PackedStrings.of(image_files(root, seen)))
    if not len(pieces):
        raise ValueError(f"data.unlabeled={root} has no images ({', '.join(endings())})")
    seen.nested.clear()  # where a picture lies says nothing here
    listed = listed_files(pieces, torch.full((len(pieces),), UNKNOWN), channels)
    splits, left_out = read_splits({"unlabeled": listed}, (), **asdict(reading))
    return splits["unlabeled"], [*left_out, *seen.notes()]


def in_form_of(train: Split, unlabeled: Split, channels: int) -> Split:
    """Return pictures in memory or decoded on demand, as those of train are."""
    if isinstance(train, Streamed):
        if isinstance(unlabeled, Streamed):
            return unlabeled
        raise ValueError("data.unlabeled is held in memory, and data.source is not: give a folder")
    height, width = train.images.shape[-2:]
    if isinstance(unlabeled, Resident):
        if unlabeled.images.shape[1:] != train.images.shape[1:]:
            raise ValueError(
                f"data.unlabeled: its images are {list(unlabeled.images.shape[1:])}, and those of "
                f"train {list(train.images.shape[1:])}"
            )
        return unlabeled
    pictures = resident(unlabeled, channels, (height, width))
    if train.digests is None:  # they are told apart by their pixels, as those of train are
        return Resident(pictures.images, pictures.labels)
    return pictures


def joined(train: Split, unlabeled: Split, first: int) -> Split:
    """Return train with the unlabelled pictures after it, whose indices go on from `first`.

    Args:
        train: the labelled images, indexed below `first`.
        unlabeled: pictures in the same form.
        first: the index of their first.
    """
    labels = torch.cat([train.labels, unlabeled.labels])
    index = torch.cat([train.index, first + torch.arange(len(unlabeled))])
    if isinstance(train, Resident):
        assert isinstance(unlabeled, Resident)
        return Resident(torch.cat([train.images, unlabeled.images]), labels, index)
    assert isinstance(unlabeled, Streamed)
    places = unlabeled.index
    own = PackedStrings.at(np.arange(first), train.names)
    names = PackedStrings.joined([own, PackedStrings.at(places.numpy(), unlabeled.names)])
    load = JoinedLoader(train.load, unlabeled.load, first, places)
    return Streamed(load, labels, names, index)


@dataclass(frozen=True)
class JoinedLoader:
    """Index → image of a training split, or from `first` on of the unlabelled pictures."""

    train: Callable[[int], Image.Image]
    unlabeled: Callable[[int], Image.Image]
    first: int
    places: Tensor

    def __call__(self, index: int) -> Image.Image:
        """Decode one image."""
        if index < self.first:
            return self.train(index)
        return self.unlabeled(int(self.places[index - self.first]))


def without(unlabeled: Split, held_out: Sequence[Split]) -> tuple[Split, int | None]:
    """Return pictures less those whose content is one of the held-out splits', and how many.

    How many is None where a split does not know what its images hold, or one knows their files and
    another their pixels.
    """
    splits = (unlabeled, *held_out)
    own, *others = (split.contents() for split in splits)
    of_files = {split.digests is not None for split in splits}
    if not all(map(len, (own, *others))) or len(of_files) > 1:
        return unlabeled, None
    rest = np.flatnonzero(~np.isin(own, np.concatenate(others)))
    if not len(rest):
        raise ValueError("data.unlabeled: all its pictures are in validation or test, too")
    return unlabeled.subset(torch.from_numpy(rest)), len(own) - len(rest)


def per_batch(batch_size: int, share: float | None, labelled: int, unlabelled: int) -> int:
    """Return how many of a batch's samples are unlabelled, `round(batch_size·share)`.

    Args:
        batch_size: samples per step and device.
        share: of them that are unlabelled, in (0, 1); None is the share of all pictures that are.
        labelled: how many labelled images there are.
        unlabelled: how many unlabelled pictures there are.

    Raises:
        ValueError: if that leaves a batch without samples of one kind.
    """
    exact = unlabelled / (labelled + unlabelled) if share is None else share
    count = round(batch_size * exact)
    if not 1 <= count < batch_size:
        kind = "an unlabelled picture" if count < 1 else "a labelled image"
        raise ValueError(
            f"data.unlabeled_share={'null' if share is None else share}, here {exact:.4g}, leaves "
            f"no room for {kind} in a batch of data.batch_size={batch_size}"
        )
    return count


def fitting_batch(batch_size: int, share: float | None, labelled: int, unlabelled: int) -> int:
    """Return a batch size, less where there are fewer labelled images than a batch has of them."""
    if not unlabelled:
        return min(batch_size, labelled)
    while batch_size > 2:
        if batch_size - per_batch(batch_size, share, labelled, unlabelled) <= labelled:
            break
        batch_size -= 1
    return batch_size


def check_share(share: Any) -> None:
    """Refuse a share of a batch that is none."""
    if share is not None and not (is_number(share) and 0 < share < 1):
        raise ValueError(
            "data.unlabeled_share is the share of each batch that is unlabelled, between 0 and 1, "
            f"or null for that of all pictures, got {share!r}"
        )
