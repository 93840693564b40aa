"""Folders of image files: one folder per split, and in it one per class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from distill.data.errors import explained
from distill.data.images import check_channels, check_image, decoded
from distill.data.splits import PARTS, Source, Streamed, check_same_classes, with_test_split
from distill.files import resolved_path


def folder(root: str, channels: int = 3, verify: bool = True) -> Source:
    """Return an image folder: `train/CLASS/*`, `val/CLASS/*` and, if there, `test/CLASS/*`.

    With `train` and one held-out folder only, that one is the test split and validation is cut from
    train: no decision may see the images that the final numbers come from.

    Args:
        root: the folder.
        channels: 3 for colour, 1 for grey.
        verify: open each file once to find broken images before training does.

    Raises:
        ValueError: for an empty folder, classes that differ between splits, or a broken image.
        FileNotFoundError: if the folder or `train` is missing.
    """
    check_channels(channels)
    base = existing_folder(root)
    if not (base / "train").is_dir():
        raise FileNotFoundError(f"{base} has no folder 'train'{train_folder_hint(base)}")
    splits: dict[str, Streamed] = {}
    classes: list[str] = []
    for part in PARTS:
        if (base / part).is_dir():
            names, splits[part] = image_folder(base / part, channels, verify)
            classes = classes or names
            check_same_classes(str(base), part, names, classes)
    return with_test_split(base.name, classes, channels, splits)


def existing_folder(path: str | Path) -> Path:
    """Return the folder, refusing what is missing or no folder."""
    folder = resolved_path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder{'' if folder.exists() else ': it does not exist'}"
        )
    return folder


def train_folder_hint(base: Path) -> str:
    """Return what was probably meant by a folder without `train`."""
    if base.name == "train":
        return f": did you mean data.root={base.parent}?"
    if any(path.is_dir() for path in base.iterdir()):
        return ": if it holds class folders, data=timm cuts the splits from it"
    return ""


def image_folder(path: Path, channels: int, verify: bool) -> tuple[list[str], Streamed]:
    """Return the class names and the images of one split's folder."""
    names = sorted(d.name for d in path.iterdir() if d.is_dir() and not d.name.startswith("."))
    if not names:
        raise ValueError(f"{path} has no class folders")
    files, labels = image_files(path, names)
    if verify:
        for file in files:
            check_image(file)
    return names, Streamed(FileLoader(files, channels), labels, sized_names(files, path))


def image_files(path: Path, classes: list[str]) -> tuple[list[Path], Tensor]:
    """Return the image files in the folders of these classes, and their labels."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    numbers = {name: number for number, name in enumerate(classes)}
    samples = make_dataset(path, numbers, IMG_EXTENSIONS, allow_empty=True)
    labels = torch.tensor([label for _, label in samples], dtype=torch.long)
    empty = torch.nonzero(torch.bincount(labels, minlength=len(classes)) == 0).flatten().tolist()
    if empty:
        raise ValueError(f"{path / classes[empty[0]]} has no images ({', '.join(IMG_EXTENSIONS)})")
    return [Path(name) for name, _ in samples], labels


def sized_names(files: Sequence[Path], root: Path) -> list[str]:
    """Return one name per file, which is not the same once the file has another size."""
    return [f"{file.relative_to(root).as_posix()}:{file.stat().st_size}" for file in files]


@dataclass(frozen=True)
class FileLoader:
    """Position → decoded image file."""

    files: Sequence[Path]
    channels: int

    def __call__(self, position: int) -> Image.Image:
        """Decode one image, naming the file if it is broken."""
        path = self.files[position]
        with explained(f"broken image {path}"):
            return decoded(path, self.channels)
