"""What the files of CIFAR-10 and CIFAR-100 hold: pickles, binary files, the Hub's parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.data.sources.parquet import class_names, labelled_pictures
from distill.data.sources.pickled import PickledArray, read_pickle, text

Array = np.ndarray[Any, Any]
CHANNELS, SIDE = 3, 32
PIXELS = CHANNELS * SIDE * SIDE


@dataclass(frozen=True)
class Labels:
    """One of the ways in which a release labels its images.

    Args:
        name: of the labels' column in parquet files; pickles have it with an `s`, and files of
            class names with `_names`.
        classes: how many classes there are.
        place: of their byte among those before each image of a binary file.
        bytes: how many those are.
    """

    name: str
    classes: int
    place: int = 0
    bytes: int = 1


def checked_names(names: Sequence[str], labels: Labels) -> list[str]:
    """Return class names, refusing more, fewer or the same ones."""
    if not len(names) == len(set(names)) == labels.classes:
        raise ValueError(f"it names {len(set(names))} classes where {labels.classes} belong")
    return list(names)


def checked_part(images: Array, numbers: Array, labels: Labels, count: int) -> tuple[Array, Array]:
    """Return images as uint8 `[N, 3, 32, 32]` and labels as int64 `[N]`, refusing other counts.

    Args:
        images: uint8 `[N, 3072]`: rows of red, then of green and blue.
        numbers: the labels `[N]`.
        labels: which they are.
        count: how many there should be.
    """
    if not len(images) == len(numbers) == count:
        raise ValueError(
            f"{len(images):,} images and {len(numbers):,} labels where {count:,} belong: a partial "
            "or damaged copy"
        )
    wrong = numbers[(numbers < 0) | (numbers >= labels.classes)]
    if len(wrong):
        raise ValueError(f"it has label {wrong[0]}, and there are {labels.classes} classes")
    return images.reshape(-1, CHANNELS, SIDE, SIDE), numbers.astype(np.int64)


# Pickles


def pickled_names(content: bytes, labels: Labels) -> list[str]:
    """Return the class names in a pickle."""
    names = entries(content, f"{labels.name}_names")[0]
    if not isinstance(names, list | tuple):
        raise ValueError("its class names are no list")
    return [text(name) for name in names]


def pickled_part(content: bytes, labels: Labels) -> tuple[Array, Array]:
    """Return the images `[N, 3072]` and labels `[N]` in a pickle."""
    data, numbers = entries(content, "data", f"{labels.name}s")
    images = integers(data)
    if images.dtype != np.uint8 or images.shape[1:] != (PIXELS,):
        raise ValueError(f"its images are {images.dtype} {list(images.shape)}, not uint8 [N, 3072]")
    return images, integers(numbers)


def entries(content: bytes, *keys: str) -> list[Any]:
    """Return what a pickled dictionary holds under these keys, which Python 2 wrote as bytes."""
    held = read_pickle(content)
    if not isinstance(held, dict):
        raise ValueError("it is no dictionary")
    named = {text(key): value for key, value in held.items()}
    lacking = [key for key in keys if key not in named]
    if lacking:
        raise ValueError(f"it has no {' and no '.join(lacking)}")
    return [named[key] for key in keys]


def integers(value: Any) -> Array:
    """Return the whole numbers of a pickled array or list."""
    if isinstance(value, PickledArray):
        return value.integers()
    if not isinstance(value, list | tuple) or not all(type(number) is int for number in value):
        raise ValueError("its labels are no list of whole numbers")
    return np.array(value, np.int64)


# Binary files


def binary_names(content: bytes, labels: Labels) -> list[str]:
    """Return the class names in a text, one in each line that is not empty."""
    return [name for line in content.decode().splitlines() if (name := line.strip())]


def binary_part(content: bytes, labels: Labels) -> tuple[Array, Array]:
    """Return the images `[N, 3072]` and labels `[N]` in a binary file."""
    length = labels.bytes + PIXELS
    whole = len(content) // length * length
    if whole != len(content):
        raise ValueError(f"{len(content):,} bytes are no whole number of images of {length:,} each")
    rows = np.frombuffer(content, np.uint8).reshape(-1, length)
    return rows[:, labels.bytes :], rows[:, labels.place]


# Parquet files


def parquet_names(path: Path, labels: Labels) -> list[str]:
    """Return the class names that a file of the Hub's knows, or else numbers."""
    return class_names(path, labels.name) or [str(number) for number in range(labels.classes)]


def parquet_part(paths: Sequence[Path], labels: Labels) -> tuple[Array, Array]:
    """Return the images `[N, 3072]` and labels `[N]` in files of the Hub's, in their order."""
    parts = (labelled_pictures(path, labels.name, SIDE) for path in paths)
    images, numbers = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return images.reshape(-1, PIXELS), numbers
