"""How large pictures are shown: a model's own size, bounded by that of the pictures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

import torch
from PIL import Image

from distill.data.sources.splits import Resident, Split, Streamed

Size = tuple[int, int]  # height and width in pixels
SAMPLED = 200  # pictures whose headers are read
STEP = 32  # pixels: what timm's models that are not of one size halve to a whole number
USUAL = (224, 224)  # of a model that does not say
TURNED, ORIENTATION = (5, 6, 7, 8), 0x0112  # EXIF's orientations that swap height and width


class ModelSize:  # no data class, of which Hydra would make a dictionary
    """What a model says of the size of its images.

    Args:
        size: height and width in pixels.
        exact: whether no other will do: the model is of one size, or was trained at this one.
    """

    def __init__(self, size: Size = USUAL, exact: bool = False) -> None:
        self.size, self.exact = size, exact

    def __repr__(self) -> str:
        return f"{self.size} {self.exact}"


@dataclass(frozen=True)
class Header:
    """What a picture's header says: its size as it is shown upright, and whether it is grey."""

    size: Size
    grey: bool


def as_size(image_size: Any) -> Size:
    """Return height and width of one number, a square's side, or of two.

    Raises:
        ValueError: if it is neither.
    """
    pair = image_size if isinstance(image_size, Sequence) else (image_size, image_size)
    whole = len(pair) == 2 and all(type(side) is int for side in pair)
    if not whole or min(pair) < 1:
        raise ValueError(
            "data.image_size must be at least 1 pixel: one number, or height and width such as "
            f"[96,128], got {image_size!r}"
        )
    return pair[0], pair[1]


def chosen_size(image_size: Any, model: ModelSize | None, headers: Sequence[Header]) -> Size:
    """Return the size that pictures are shown at.

    It is `image_size` where that is given, else the model's own. A model's larger side becomes
    smaller with the median of the pictures' shorter sides, in steps of 32 pixels from 32 on:
    enlarged pictures cost time and hold nothing new.

    Args:
        image_size: pixels, one number or height and width; None lets the model decide.
        model: what the model says.
        headers: of some of the pictures; none where they cannot be read.
    """
    if image_size is not None:
        return as_size(image_size)
    model = model or ModelSize()
    if model.exact or not headers:
        return model.size
    bound = statistics.median(min(header.size) for header in headers)
    if bound >= min(model.size):
        return model.size
    height, width = (bounded(side, bound / min(model.size)) for side in model.size)
    return height, width


def bounded(side: int, share: float) -> int:
    """Return so much of a side in whole steps, at least one, and never more than the side."""
    return min(side, max(STEP, int(side * share) // STEP * STEP))


def sampled_headers(split: Split) -> list[Header]:
    """Return the headers of up to `SAMPLED` pictures, evenly spread over a streamed split.

    There are none of data in memory, or of what cannot be opened: decoding names it.
    """
    if not isinstance(split, Streamed) or not len(split):
        return []
    if hasattr(split.load, "headers"):
        return list(split.load.headers)
    if not hasattr(split.load, "open"):
        return []
    places = torch.linspace(0, len(split) - 1, min(SAMPLED, len(split))).round().long()
    headers = (opened_header(split.load, i) for i in split.index[places].tolist())
    return [header for header in headers if header is not None]


def opened_header(load: Any, position: int) -> Header | None:
    """Return the header of a loader's picture, or None where it cannot be read."""
    try:
        with load.open(position) as file:
            return header_of(file)
    except Exception:  # decoders raise whatever they stumble on
        return None


def header_of(file: IO[bytes] | Image.Image) -> Header:
    """Return what a picture's header says; its pixels are not decoded."""
    image = file if isinstance(file, Image.Image) else Image.open(file)
    width, height = image.size
    # Of a PNG without EXIF before its pixels, Pillow would decode them to look behind.
    readable = image.format != "PNG" or "exif" in image.info
    turned = readable and image.getexif().get(ORIENTATION) in TURNED
    return Header((width, height) if turned else (height, width), is_grey(image.mode))


def is_grey(mode: str) -> bool:
    """Whether pixels of a mode of Pillow's have no colour."""
    return mode in ("1", "L", "LA", "La") or mode.startswith("I")


def size_note(count: int, headers: Sequence[Header], shown: Size) -> str | None:
    """Return what is done to the pictures' size, for people; None where that is not known."""
    if not headers:
        return None
    sizes = sorted({header.size for header in headers}, key=lambda size: (size[0] * size[1], size))
    ends = " to ".join(map(size_text, sizes if len(sizes) == 1 else (sizes[0], sizes[-1])))
    square = all(height == width for height, width in (sizes[0], sizes[-1], shown))
    order = "" if square else " (height × width)"
    return f"{count:,} pictures of {ends} shown at {size_text(shown)}{order}"


def size_text(size: Size) -> str:
    """Return a size for people."""
    return f"{size[0]} × {size[1]}"


def grey_note(headers: Sequence[Header], channels: int) -> str | None:
    """Return that grey pictures are shown as if they had colours; None where they are not."""
    if channels == 1 or not headers or not all(header.grey for header in headers):
        return None
    return (
        f"the pictures are grey and shown in {channels} channels; data.channels=1 is enough for "
        "them"
    )


def view_size(
    split: Split, requested: Any, model: ModelSize | None, channels: int
) -> tuple[Size, list[str]]:
    """Return the size of a split's views, and what is said of what is done to its pictures.

    Args:
        split: a sample of whose pictures' headers is read, where they are not in memory.
        requested: the side in pixels, or height and width, or None.
        model: what the model says of its images' size.
        channels: how many the views have.
    """
    if isinstance(split, Resident):
        return (split.images.shape[-2], split.images.shape[-1]), []
    headers = sampled_headers(split)
    size = chosen_size(requested, model, headers)
    notes = size_note(len(split), headers, size), grey_note(headers, channels)
    return size, [note for note in notes if note]
