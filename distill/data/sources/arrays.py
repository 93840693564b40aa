"""Arrays of images and labels: one NumPy archive, or a folder of NumPy files."""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.data.sources.errors import explained
from distill.data.sources.images import resize
from distill.data.sources.listing import some
from distill.data.sources.splits import PARTS, Resident, Source, named_classes, with_test_split
from distill.utils.files import resolved_path

Array = np.ndarray[Any, Any]
# What the arrays of images and of labels of a split are called: here, and in MedMNIST's files.
NAMES = (("x_{}", "y_{}"), ("{}_images", "{}_labels"))
CLASSES = "classes"


def arrays(root: str, image_size: int | Sequence[int] | None = None) -> Source:
    """Return images and labels in a NumPy archive (`.npz`) or in a folder of `.npy` files.

    Arrays are called `x_train`, `y_train`, `x_val`, `y_val`, `x_test`, `y_test` and `classes`, or
    as in MedMNIST `train_images`, `train_labels` and so on; those of a folder are the files' names.
    Images are uint8 `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]` with C 1 or 3, labels integers
    `[N]` or `[N, 1]`, and `classes` the names in label order, without which they are numbers.
    Validation and test may be missing: they are cut from train, and a lone one is the test split.
    Files of a folder are mapped into memory, so that images which need no conversion are read as
    they are used. Nothing is ever unpickled.

    Args:
        root: the archive or folder.
        image_size: side length in pixels, or height and width, the images are enlarged or reduced
            to; None leaves them as they are.

    Raises:
        ValueError: for arrays that are missing, damaged, of another type or shape, or do not belong
            together.
        FileNotFoundError: if there is no such archive or folder.

    Example:
        >>> import tempfile
        >>> images, labels = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 1])
        >>> with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        ...     np.savez(file, x_train=images, y_train=labels)
        ...     arrays(file.name).train.images.shape
        torch.Size([4, 1, 8, 8])

    Reference:
        MedMNIST: Yang et al., 2110.14795.
    """
    place = resolved_path(root)
    names = array_names(place)
    calls = naming(place, names)
    parts: dict[str, Resident] = {}
    for part in PARTS:
        pair = [call.format(part) for call in calls]
        if set(pair) & set(names):
            parts[part] = labelled_images(place, names, pair, image_size)
    check_same_shape(place, parts)
    count = max(int(split.labels.max()) for split in parts.values()) + 1
    classes = named_classes(place, class_names(place) if CLASSES in names else None, count)
    source = with_test_split(place.stem, classes, parts["train"].images.shape[1], parts)
    read = {CLASSES, *(call.format(part) for call in calls for part in PARTS)}
    if unused := [name for name in names if name not in read]:
        source.notes.append(f"arrays that are not used: {some(unused, 10)}")
    return source


def array_names(place: Path) -> list[str]:
    """Return the names of the arrays in an archive or a folder, refusing what is neither."""
    if place.is_dir():
        return sorted(path.stem for path in place.glob("*.npy"))
    if not place.exists():
        raise FileNotFoundError(
            f"{place} does not exist: data.root is a .npz archive, or a folder of .npy files"
        )
    if not zipfile.is_zipfile(place):
        raise ValueError(f"{place} is no .npz archive, or a truncated one")
    with explained(str(place)), np.load(place, allow_pickle=False) as archive:
        return list(archive.files)


def read_array(place: Path, name: str) -> Array:
    """Return one of the arrays; of a folder it is mapped into memory, and changes stay there."""
    if place.is_dir():
        path = place / f"{name}.npy"
        with explained(str(path)):
            return np.lib.format.open_memmap(path, mode="c")
    with explained(f"{place}, {name}"), np.load(place, allow_pickle=False) as archive:
        array = archive[name]
        if not isinstance(array, np.ndarray):
            raise ValueError("it is no array")
        return array


def naming(place: Path, names: Collection[str]) -> tuple[str, str]:
    """Return what the arrays of images and of labels are called, `{}` being the split."""
    for images, labels in NAMES:
        if images.format("train") in names:
            return images, labels
    wanted = " or ".join(" and ".join(call.format("train") for call in calls) for calls in NAMES)
    there = some(names, 10) or "no arrays"
    raise ValueError(f"{place} holds {there}: images and labels are called {wanted}")


def labelled_images(
    place: Path, names: Collection[str], pair: Sequence[str], size: int | Sequence[int] | None
) -> Resident:
    """Return the images and labels of one split, whose arrays have this pair of names."""
    for name, other in (pair, pair[::-1]):
        if name not in names:
            raise ValueError(f"{place} has {other} and no {name}")
    images, labels = (read_array(place, name) for name in pair)
    with explained(f"{place}, {pair[0]}"):
        images = channels_first(images)
    with explained(f"{place}, {pair[1]}"):
        labels = class_numbers(labels)
    if len(images) != len(labels):
        raise ValueError(f"{place}: {len(images)} images in {pair[0]}, {len(labels)} in {pair[1]}")
    if not images.size:
        raise ValueError(f"{place}: {pair[0]} is empty")
    pictures = torch.from_numpy(images)
    return Resident(pictures if size is None else resize(pictures, size), torch.from_numpy(labels))


def channels_first(images: Array) -> Array:
    """Return images as uint8 `[N, C, H, W]`."""
    if images.dtype != np.uint8:
        raise ValueError(f"it is {images.dtype}, and images should be uint8, from 0 to 255")
    shape = list(images.shape)
    first, last = (len(shape) == 4 and shape[axis] in (1, 3) for axis in (1, 3))
    if first and last:
        raise ValueError(f"its shape {shape} may be [N, H, W, C] or [N, C, H, W]: move an axis")
    if len(shape) != 3 and not first and not last:
        raise ValueError(
            f"its shape is {shape}, and should be [N, H, W], or [N, H, W, C] or [N, C, H, W] with "
            "C 1 or 3"
        )
    if len(shape) == 3:
        images = images[:, None]
    return np.ascontiguousarray(images if not last else images.transpose(0, 3, 1, 2))


def class_numbers(labels: Array) -> Array:
    """Return labels as int64 `[N]`."""
    if labels.dtype.kind not in "iu":
        raise ValueError(f"it is {labels.dtype}, and labels should be whole numbers")
    if labels.ndim != 1 and labels.shape[1:] != (1,):
        raise ValueError(f"its shape is {list(labels.shape)}, and should be [N] or [N, 1]")
    numbers = labels.reshape(-1).astype(np.int64)
    if (numbers < 0).any():
        raise ValueError(f"it has label {numbers.min()}, and labels count from 0")
    return numbers


def check_same_shape(place: Path, parts: Mapping[str, Resident]) -> None:
    """Refuse splits whose images have different shapes."""
    shapes = {part: list(split.images.shape[1:]) for part, split in parts.items()}
    for part, shape in shapes.items():
        if shape != shapes["train"]:
            raise ValueError(
                f"{place}: images [C, H, W] are {shapes['train']} in train and {shape} in {part}; "
                "data.image_size makes their heights and widths equal"
            )


def class_names(place: Path) -> list[str]:
    """Return the names of the classes."""
    array = read_array(place, CLASSES)
    with explained(f"{place}, {CLASSES}"):
        if array.dtype.kind not in "US" or array.ndim != 1:
            raise ValueError(f"it is {array.dtype} {list(array.shape)}, and should be [K] strings")
        names = [name.decode() if isinstance(name, bytes) else name for name in array.tolist()]
        if len(set(names)) < len(names):
            raise ValueError("it names a class twice")
    return names
