"""What timm's readers know of their samples, found by the attributes that each kind has."""

from __future__ import annotations

import io
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from distill.data.sources.errors import explained
from distill.data.sources.images import decoded, upright
from distill.data.sources.listing import Seen, hidden
from distill.data.sources.pieces import Piece
from distill.data.sources.splits import DIGEST, Digests, digest_of
from distill.utils.compat import table_fingerprint


def reader_of(dataset: Any) -> Any:
    """Return what reads the files: torchvision's data sets do so themselves."""
    return getattr(dataset, "reader", dataset)


def class_names(dataset: Any) -> list[str]:
    """Return a data set's class names in label order, none where it has none."""
    reader = reader_of(dataset)
    indices = getattr(reader, "class_name_to_idx", None) or getattr(reader, "class_to_idx", None)
    if indices:
        return [str(name) for name, _ in sorted(indices.items(), key=lambda item: item[1])]
    features = getattr(getattr(reader, "dataset", None), "features", None) or {}
    return list(getattr(features.get(getattr(reader, "label_key", "")), "names", None) or [])


def sample_labels(dataset: Any) -> list[Any]:
    """Return all labels, without decoding images where the reader knows them."""
    reader = reader_of(dataset)
    if hasattr(reader, "targets"):  # a tar, torchvision
        return list(reader.targets)
    if hasattr(reader, "samples"):  # a folder
        return [label for _, label in reader.samples]
    if hasattr(reader, "label_key"):  # the Hub
        check_columns(reader)
        return list(reader.dataset[reader.label_key])
    return [dataset[position][1] for position in range(len(dataset))]


def check_columns(reader: Any) -> None:
    """Refuse a data set of the Hub whose columns have other names than timm expects."""
    table = reader.dataset
    for option, key in (("input_key", reader.image_key), ("target_key", reader.label_key)):
        # timm's cast to images makes up an empty column where there is none.
        if key not in table.column_names or table[:1][key] == [None]:
            names = ", ".join(table.column_names)
            raise ValueError(
                f"column {key!r} is missing or empty: give data.options.{option}, of {names}"
            )


def without_hidden(dataset: Any, seen: Seen) -> None:
    """Leave out what timm finds in hidden folders, or again behind links that lead back.

    timm follows every link, and takes a hidden folder for a class.
    """
    reader = reader_of(dataset)
    if not hasattr(reader, "samples") or not hasattr(reader, "class_to_idx") or in_tar(reader):
        return
    root, kept = Path(reader.root), []
    places: dict[str, str] = {}
    for path, label in sorted(reader.samples, key=lambda sample: depth(sample[0])):
        inside = Path(path).relative_to(root)
        place = os.path.realpath(os.path.dirname(path))
        if any(hidden(name) for name in inside.parts):
            seen.hidden.append(Path(path))
        elif places.setdefault(place, os.path.dirname(path)) != os.path.dirname(path):
            seen.links.append(Path(path))
        else:
            kept.append((path, label))
    if len(kept) < len(reader.samples):
        keep(reader, set(kept))


def depth(path: str) -> int:
    """Return how many folders deep a file lies."""
    return path.count(os.sep)


def keep(reader: Any, kept: Collection[tuple[str, int]]) -> None:
    """Let a reader of folders have these samples only, and no class that had others alone."""
    gone = {label for _, label in reader.samples} - {label for _, label in kept}
    names = sorted((i, name) for name, i in reader.class_to_idx.items() if i not in gone)
    numbers = {old: new for new, (old, _) in enumerate(names)}
    reader.class_to_idx = {name: numbers[old] for old, name in names}
    reader.samples = [(path, numbers[i]) for path, i in reader.samples if (path, i) in kept]
    if hasattr(reader, "targets"):  # torchvision's own
        reader.targets = [label for _, label in reader.samples]


def sample_pieces(dataset: Any) -> list[Piece] | None:
    """Return where the bytes of each sample are, or None where they lie in no files."""
    reader = reader_of(dataset)
    if in_tar(reader):
        return [tar_piece(reader, position) for position in range(len(reader.samples))]
    if hasattr(reader, "samples") and hasattr(reader, "root"):
        return [Piece(Path(sample[0])) for sample in reader.samples]
    return None


def sample_names(dataset: Any, count: int) -> list[str] | None:
    """Return one name per sample, which for a table of the Hub changes when the data do.

    There are none of a folder, whose files have names.
    """
    reader = reader_of(dataset)
    if in_tar(reader):
        return [member.name for member, _, _ in reader.samples]
    if hasattr(reader, "samples") and hasattr(reader, "root"):
        return None
    version = table_fingerprint(getattr(reader, "dataset", None))
    return [f"{version}:{position}" for position in range(count)]


def sample_digests(dataset: Any, count: int) -> Digests | None:
    """Return a hash of each image that lies in no file, or None where `sample_names` tell it."""
    reader = reader_of(dataset)
    if table_fingerprint(getattr(reader, "dataset", None)):
        return None
    images = (dataset[position][0] for position in range(count))
    return np.array([digest_of(pixels(image)) for image in images], DIGEST)


def pixels(image: Any) -> bytes:
    """Return all that an image shows, as bytes."""
    about = f"{image.mode} {image.size} " if isinstance(image, Image.Image) else ""
    return about.encode() + (image.tobytes() if about else repr(image).encode())


@dataclass(frozen=True)
class DatasetLoader:
    """Position → image of a timm data set."""

    dataset: Any
    channels: int

    def __call__(self, position: int) -> Image.Image:
        """Decode one image, naming the sample if it is broken."""
        # Not by the data set's own `[position]`, which gives the next image for a broken one.
        with explained(f"broken image {self.name(position)}"), self.open(position) as file:
            if isinstance(file, Image.Image):
                return upright(file, self.channels)
            return decoded(file, self.channels)

    def name(self, position: int) -> str:
        """Return what a person can find the sample by."""
        reader = getattr(self.dataset, "reader", None)
        filename = reader.filename(position, absolute=True) if reader else None
        return str(filename or f"{position} of {type(reader or self.dataset).__name__}")

    def open(self, position: int) -> IO[bytes] | Image.Image:
        """Return one sample's file, or its image where the data set has no files."""
        if not hasattr(self.dataset, "reader"):
            return self.dataset[position][0]
        reader = self.dataset.reader
        return open_in_tar(reader, position) if in_tar(reader) else reader[position][0]


def in_tar(reader: Any) -> bool:
    """Whether a timm reader reads from tar files."""
    return hasattr(reader, "tar_state")


def open_in_tar(reader: Any, position: int) -> IO[bytes]:
    """Read one member of a tar, or of a tar in it, by its place in the file.

    timm's reader keeps the tar open, and data workers would then share one place in it.
    """
    return io.BytesIO(tar_piece(reader, position).read())


def tar_piece(reader: Any, position: int) -> Piece:
    """Return where in which tar a sample's bytes are."""
    member, archive, inner = reader.samples[position]
    path = Path(reader.root, archive) if archive else Path(reader.root)
    start = member.offset_data + (inner.offset_data if inner else 0)
    return Piece(path, start, member.size, member.name)
