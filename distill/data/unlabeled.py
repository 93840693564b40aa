"""Pictures without labels, on which a teacher teaches too: read, told apart, put beside train."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from distill.checks import is_number
from distill.data.folder import FileLoader, existing_folder, sized_names
from distill.data.images import check_image, squared
from distill.data.splits import Resident, Source, Split, Streamed

UNKNOWN = -1  # the label of a picture that has none
SHOWN = 3  # broken files that a message names
OTHER = ""  # in place of the hash of a file that nothing asked about can be equal to


def read(where: str | Source, source: Source, image_size: int, verify: bool = True) -> Split:
    """Return unlabelled pictures in the form of a source's training split.

    Args:
        where: a folder, of which all pictures anywhere below it are taken, or a source, of which
            those of `train` are.
        source: the labelled images beside which they are shown.
        image_size: side length in pixels of streamed views.
        verify: whether to open each file of a folder once, to find broken ones now.

    Raises:
        ValueError: for what is no such place, holds no pictures, or other ones than the source's.
        FileNotFoundError: if there is no such folder.
    """
    found: Split
    if isinstance(where, str | os.PathLike):
        found = picture_folder(where, source.channels, verify)
    elif isinstance(where, Source):
        if where.channels != source.channels:
            raise ValueError(
                f"data.unlabeled: {where.name} has {where.channels} channels, and {source.name} "
                f"has {source.channels}"
            )
        found = where.train
    else:
        raise ValueError(f"data.unlabeled is a folder, or a source with _target_, not {where!r}")
    found = found.relabelled(torch.full((len(found),), UNKNOWN))
    return in_form_of(source.train, found, source.channels, image_size)


def picture_folder(path: str | os.PathLike[str], channels: int, verify: bool) -> Streamed:
    """Return all pictures anywhere below a folder, by name, but for what is hidden."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    root = existing_folder(os.fspath(path))
    files = [file for file in below(root) if file.suffix.lower() in IMG_EXTENSIONS]
    if not files:
        raise ValueError(f"data.unlabeled={root} has no images ({', '.join(IMG_EXTENSIONS)})")
    if verify:
        check_files(files)
    labels = torch.full((len(files),), UNKNOWN)
    return Streamed(FileLoader(files, channels), labels, sized_names(files, root))


def below(root: Path) -> list[Path]:
    """Return the files anywhere below a folder in the order of their names; links are followed."""
    found = []
    for folder, inner, names in os.walk(root, followlinks=True):
        inner[:] = [name for name in inner if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def check_files(files: Iterable[Path]) -> None:
    """Refuse files that are no images, all at once."""
    broken = []
    for file in files:
        try:
            check_image(file)
        except ValueError as error:
            broken.append(str(error).removeprefix("broken image "))
    if broken:
        more = f" and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
        raise ValueError(
            f"data.unlabeled: {len(broken)} broken images: {'; '.join(broken[:SHOWN])}{more}"
        )


def in_form_of(train: Split, found: Split, channels: int, image_size: int) -> Split:
    """Return pictures in memory or decoded on demand, as those of train are."""
    if isinstance(train, Streamed):
        if isinstance(found, Streamed):
            return found
        raise ValueError("data.unlabeled is held in memory, and data.source is not: give a folder")
    height, width = train.images.shape[-2:]
    if isinstance(found, Resident):
        if found.images.shape[1:] != train.images.shape[1:]:
            raise ValueError(
                f"data.unlabeled: its images are {list(found.images.shape[1:])}, and those of "
                f"train {list(train.images.shape[1:])}"
            )
        return found
    if height != width:
        raise ValueError("data.unlabeled: a folder is read as squares, and train's images are none")
    pictures = [squared(found.load(place), channels, height) for place in found.index.tolist()]
    return Resident(torch.stack(pictures), found.labels)


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
    places = unlabeled.index.tolist()
    names = [*train.names[:first], *(unlabeled.names[place] for place in places)]
    return Streamed(JoinedLoader(train.load, unlabeled.load, first, places), labels, names, index)


@dataclass(frozen=True)
class JoinedLoader:
    """Index → image of a training split, or from `first` on of the unlabelled pictures."""

    train: Callable[[int], Image.Image]
    unlabeled: Callable[[int], Image.Image]
    first: int
    places: Sequence[int]

    def __call__(self, index: int) -> Image.Image:
        """Decode one image."""
        if index < self.first:
            return self.train(index)
        return self.unlabeled(self.places[index - self.first])


def without(unlabeled: Split, held_out: Sequence[Split]) -> tuple[Split, int | None]:
    """Return pictures less those whose content is one of the held-out splits', and how many.

    Content is the bytes of a file, or the pixels of what is in memory. How many is None where
    there is no way to compare: data sets without files.
    """
    known = [contents(split, file_sizes([unlabeled])) for split in held_out]
    own = contents(unlabeled, file_sizes(held_out)) if None not in known else None
    if own is None:
        return unlabeled, None
    held = {content for found in known for content in found or ()} - {OTHER}
    rest = [position for position, content in enumerate(own) if content not in held]
    if not rest:
        raise ValueError("data.unlabeled: all its pictures are of validation or of the test")
    return unlabeled.subset(torch.tensor(rest)), len(own) - len(rest)


def contents(split: Split, sizes: set[int] | None) -> list[str] | None:
    """Return a hash of each sample's content, or None where a sample has no file.

    Args:
        split: the samples.
        sizes: only files of so many bytes can be equal to what is asked about, and others are not
            read; None reads all.
    """
    if isinstance(split, Resident):
        return [hashed(image.numpy().tobytes()) for image in split.images]
    found = []
    for place in split.index.tolist():
        content = file_hash(split.load, place, sizes)
        if content is None:
            return None
        found.append(content)
    return found


def file_sizes(splits: Sequence[Split]) -> set[int] | None:
    """Return the sizes in bytes of all files, or None where some samples are not files on disk."""
    found: set[int] = set()
    for split in splits:
        files = getattr(getattr(split, "load", None), "files", None)
        if files is None:
            return None
        found |= {os.stat(files[place]).st_size for place in split.index.tolist()}
    return found


def file_hash(load: Any, place: int, sizes: set[int] | None) -> str | None:
    """Return a hash of a sample's file, `OTHER` for one of another size, None where it has none."""
    files = getattr(load, "files", None)
    if files is not None:
        path = Path(files[place])
        if sizes is not None and path.stat().st_size not in sizes:
            return OTHER
        return hashed(path.read_bytes())
    opened = load.open(place) if hasattr(load, "open") else None
    if not hasattr(opened, "read"):
        return None
    with opened:
        return hashed(opened.read())


def hashed(content: bytes) -> str:
    """Return a hash of some bytes."""
    return hashlib.sha256(content).hexdigest()


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


def check_share(share: Any) -> None:
    """Refuse a share of a batch that is none."""
    if share is not None and not (is_number(share) and 0 < share < 1):
        raise ValueError(
            "data.unlabeled_share is the share of each batch that is unlabelled, between 0 and 1, "
            f"or null for that of all pictures, got {share!r}"
        )
