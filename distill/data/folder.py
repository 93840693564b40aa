"""Folders of image files: one folder per split, and in it one per class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from PIL import Image
from torch import Tensor

from distill.data.errors import explained
from distill.data.images import check_channels, check_image, decoded
from distill.data.listing import Seen, image_files, real_paths, some, subfolders
from distill.data.splits import PARTS, Source, Streamed, check_same_classes, with_test_split


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
    folder = Path(path).expanduser()
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
    files, labels = files_of_split(path, names)
    if verify:
        for file in files:
            check_image(file)
    return names, Streamed(FileLoader(files, channels), labels, sized_names(files, path))


def files_of_split(path: Path, classes: list[str]) -> tuple[list[Path], Tensor]:
    """Return the image files in the folders of these classes, and their labels."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    numbers = {name: number for number, name in enumerate(classes)}
    samples = make_dataset(path, numbers, IMG_EXTENSIONS, allow_empty=True)
    labels = torch.tensor([label for _, label in samples], dtype=torch.long)
    empty = torch.nonzero(torch.bincount(labels, minlength=len(classes)) == 0).flatten().tolist()
    if empty:
        raise ValueError(f"{path / classes[empty[0]]} has no images ({', '.join(IMG_EXTENSIONS)})")
    return [Path(name) for name, _ in samples], labels


def labelled_images(
    root: Path | str, classes: Sequence[str] | None = None
) -> tuple[list[str], list[Path], Tensor, list[str]]:
    """Return class names, image files, labels int64 `[N]` and notes of class folders in a folder.

    `root/CLASS/**`: images in sub-folders of a class count as that class.

    Args:
        root: the folder, of one split or of unsorted data.
        classes: the class names in label order, of which some may have no folder or no image; None
            takes the folders' own, sorted.

    Raises:
        ValueError: for no class folders, or one that is none of `classes`.
        FileNotFoundError: if there is no such folder.
    """
    base = existing_folder(root)
    seen = Seen(base)
    folders = class_folders(base, seen)
    names = list(classes) if classes else [path.name for path in folders]
    unknown = [path.name for path in folders if path.name not in names]
    if unknown:
        raise ValueError(f"{base} has folders that are no class: {some(unknown, 5)}")
    check_distinct(folders)
    seen.walked |= real_paths([base, *folders])
    files, labels = files_of(folders, names, seen)
    absent = sorted(set(range(len(names))) - set(labels.tolist()))
    notes = [f"no image of {some((names[k] for k in absent), 5)}"] if absent else []
    return names, files, labels, [*notes, *seen.notes()]


def class_folders(path: Path, seen: Seen) -> list[Path]:
    """Return the class folders of one split's folder, sorted."""
    folders = subfolders(path, seen)
    if not folders:
        raise ValueError(f"{path} has no class folders")
    return folders


def check_distinct(folders: Sequence[Path]) -> None:
    """Refuse folders that are one and the same by a link: their images would be there twice."""
    first: dict[str, Path] = {}
    for path in folders:
        other = first.setdefault(os.path.realpath(path), path)
        if other is not path:
            raise ValueError(f"{other} and {path} are the same folder")


def files_of(
    folders: Sequence[Path], names: Sequence[str], seen: Seen
) -> tuple[list[Path], Tensor]:
    """Return the image files in class folders, and their labels."""
    numbers = {name: number for number, name in enumerate(names)}
    files: list[Path] = []
    labels: list[int] = []
    for folder in folders:
        found = image_files(folder, seen)
        files += found
        labels += [numbers[folder.name]] * len(found)
    return files, torch.tensor(labels, dtype=torch.long)


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

    def open(self, position: int) -> IO[bytes]:
        """Return one image's file."""
        return self.files[position].open("rb")
