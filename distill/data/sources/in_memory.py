"""Pictures of files, decoded once and kept in memory: any folder gets the views of small images."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distill.data.sources.contents import MANY
from distill.data.sources.images import covering
from distill.data.sources.sizes import (
    Header,
    ModelSize,
    Size,
    chosen_size,
    grey_note,
    sampled_headers,
    size_note,
    size_text,
)
from distill.data.sources.splits import PARTS, Resident, Source, Split, Streamed
from distill.utils.memory import available_bytes, bytes_text

log = logging.getLogger(__name__)

AT_ONCE = 256  # pictures that a worker hands over together


def in_memory(
    source: Source,
    image_size: int | Sequence[int] | None = None,
    model_size: ModelSize | None = None,
    num_workers: int = 0,
) -> Source:
    """Return a source whose pictures are decoded once and kept as uint8 `[N, C, H, W]`.

    Splits, labels, indices and what is known of the files are those of the streamed source. A
    picture of another size is resized until it covers H × W and centre cropped, see `covering`: as
    the clean view of a streamed one is by default.

    Args:
        source: pictures that are decoded on demand.
        image_size: side length in pixels, or height and width; None is the size that the pictures
            have in common, unless the model takes no other than its own, and without such a size
            the one that streamed pictures are shown at, see `chosen_size`.
        model_size: what the model says of its images' size.
        num_workers: processes that decode; 0 is this one.

    Raises:
        ValueError: if the pictures would take more than half of the free memory, or one is broken.
    """
    splits = {part: split for part in PARTS if (split := getattr(source, part)) is not None}
    count = sum(map(len, splits.values()))
    shown = source.train if len(source.train) or source.test is None else source.test
    headers = sampled_headers(shown)
    size = kept_size(image_size, model_size, headers)
    taken = checked_bytes(
        count,
        (source.channels, *size),
        available_bytes(),
        "lower data.image_size, or let data.resident=false decode them as they are needed",
    )
    if count >= MANY:
        log.info("%s: decoding %s images into memory", source.name, f"{count:,}")
    kept: dict[str, Any] = {
        part: resident(split, source.channels, size, num_workers) for part, split in splits.items()
    }
    said = (
        size_note(count, headers, size),
        grey_note(headers, source.channels),
        f"kept in memory: {count:,} pictures in {bytes_text(taken)}",
    )
    return replace(source, notes=[*source.notes, *filter(None, said)], **kept)


def kept_size(image_size: Any, model_size: ModelSize | None, headers: Sequence[Header]) -> Size:
    """Return the size that pictures are kept at, of which these headers are a sample."""
    sizes = {header.size for header in headers}
    free = image_size is None and not (model_size and model_size.exact)
    return sizes.pop() if free and len(sizes) == 1 else chosen_size(image_size, model_size, headers)


def checked_bytes(count: int, shape: tuple[int, int, int], free: int, remedy: str) -> int:
    """Return how much memory so many pictures take, refusing more than half of what is free.

    Args:
        count: of pictures.
        shape: of one of them, `[C, H, W]`.
        free: bytes; 0 where that is not known.
        remedy: what a person can do where they are too many.

    Raises:
        ValueError: if they are.
    """
    taken = count * math.prod(shape)
    if free and taken > free / 2:
        raise ValueError(
            f"{count:,} pictures of {size_text(shape[1:])} would take {bytes_text(taken)}, more "
            f"than half of the {bytes_text(free)} of free memory: {remedy}"
        )
    return taken


def resident(split: Split, channels: int, size: Size, num_workers: int = 0) -> Resident:
    """Return a split whose pictures are decoded, with what is known of their files.

    Raises:
        ValueError: for a picture that cannot be decoded.
    """
    if isinstance(split, Resident):
        return split
    images = torch.empty(len(split), channels, *size, dtype=torch.uint8)
    begins = range(0, len(split), AT_ONCE)
    loader: DataLoader[Any] = DataLoader(
        Decoding(split, size),
        batch_size=None,
        sampler=begins,
        num_workers=num_workers if len(begins) > 1 else 0,
        generator=torch.Generator(),  # else it would draw from the run's own
    )
    for begin, pictures in zip(begins, loader, strict=True):
        if isinstance(pictures, ValueError):
            raise pictures
        images[begin : begin + AT_ONCE] = pictures
    digests = None if split.digests is None else split.contents()
    return Resident(images, split.labels, split.index, digests)


@dataclass(frozen=True, eq=False)
class Decoding(Dataset[Any]):
    """Position → `AT_ONCE` pictures of a split from there on, uint8 `[n, C, H, W]`."""

    split: Streamed
    size: Size

    def __getitem__(self, begin: int) -> Tensor | ValueError:
        """Decode pictures; a broken one is handed over, as a worker raises with its traceback."""
        places = self.split.index[begin : begin + AT_ONCE].tolist()
        try:
            return torch.stack([covering(self.split.load(place), self.size) for place in places])
        except ValueError as error:
            return error
