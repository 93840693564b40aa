"""Data sets in MNIST's format."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.data.sources.folder import existing_folder
from distill.data.sources.images import resize
from distill.data.sources.splits import Resident, Source, named_classes


def idx(
    root: str, image_size: int | Sequence[int] = 32, classes: Sequence[str] | None = None
) -> Source:
    """Return a data set in MNIST's format: `train-*` and `t10k-*` idx files, plain or gzipped.

    Args:
        root: the folder of the four `*-images-idx3-ubyte` and `*-labels-idx1-ubyte` files.
        image_size: side length in pixels, or height and width, the images are enlarged or reduced
            to.
        classes: the class names in label order; None numbers them.

    Raises:
        ValueError: for files that are truncated, of another format or inconsistent.
        FileNotFoundError: if one is missing.
    """
    folder = existing_folder(root)
    train, test = (read_idx_split(folder, part, image_size) for part in ("train", "t10k"))
    count = int(max(train.labels.max(), test.labels.max())) + 1
    return Source(folder.name, named_classes(folder, classes or None, count), 1, train, test=test)


def read_idx_split(folder: Path, part: str, image_size: int | Sequence[int]) -> Resident:
    """Read one part of an idx data set."""
    images = read_idx(find_idx(folder, f"{part}-images-idx3-ubyte"), dimensions=3)
    labels = read_idx(find_idx(folder, f"{part}-labels-idx1-ubyte"), dimensions=1)
    if len(images) != len(labels):
        raise ValueError(f"{folder}: {len(images)} {part} images but {len(labels)} labels")
    if not images.numel():
        raise ValueError(f"{folder}: the {part} images are empty")
    return Resident(resize(images[:, None], image_size), labels.long())


def find_idx(folder: Path, stem: str) -> Path:
    """Return the idx file of that name, plain or gzipped; some copies have `.idx` for `-idx`."""
    dotted = stem.replace("-idx", ".idx")
    for name in (stem, f"{stem}.gz", dotted, f"{dotted}.gz"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} has no {stem} or {stem}.gz")


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Read a file of unsigned bytes in the idx format (LeCun, MNIST)."""
    data = path.read_bytes()
    try:
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from error
    header = 4 + 4 * dimensions
    if len(data) < header or data[:4] != bytes([0, 0, 8, dimensions]):
        raise ValueError(f"{path} is not an idx file of unsigned bytes in {dimensions} dimensions")
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    expected = int(np.prod(shape, dtype=object))
    if len(data) - header != expected:
        raise ValueError(
            f"{path} is truncated or damaged: {len(data) - header} bytes where {expected} belong"
        )
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy())
