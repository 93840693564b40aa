"""Folders of image files: one folder per split, and in it one per class."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO

import torch
from PIL import Image
from torch import Tensor

from distill.data.sources.contents import Listed, read_splits
from distill.data.sources.errors import explained
from distill.data.sources.images import check_channels, decoded
from distill.data.sources.in_memory import in_memory
from distill.data.sources.listing import (
    Seen,
    endings,
    folders_in,
    holds_images,
    image_files,
    loose_images,
    real_paths,
    some,
    subfolders,
)
from distill.data.sources.packed import PackedStrings
from distill.data.sources.pieces import Pieces
from distill.data.sources.sizes import ModelSize
from distill.data.sources.splits import PARTS, Source, check_same_classes, meaning, with_test_split
from distill.utils.files import resolved_path


def folder(
    root: str,
    channels: int = 3,
    verify: str = "new",
    broken: str = "refuse",
    cache: str | None = None,
    resident: bool = False,
    image_size: int | Sequence[int] | None = None,
    model_size: ModelSize | None = None,
    num_workers: int = 0,
) -> Source:
    """Return an image folder: `train/CLASS/*`, `val/CLASS/*` and `test/CLASS/*`, or `CLASS/*`.

    The folders of splits may have the other names that are in use (`MEANINGS`). With `train` and
    one held-out folder only, that one is the test split and validation is cut from train: no
    decision may see the images that the final numbers come from. Without folders of splits all
    images are train, from which the splits are cut.

    Args:
        root: the folder.
        channels: 3 for colour, 1 for grey.
        verify: which images are opened before training, to find broken ones: `new`, `all` or
            `none`; see `read_splits`.
        broken: `refuse` broken images, or `skip` them.
        cache: where to keep what the files hold; None reads them anew each time.
        resident: decode all images once and keep them in memory, see `in_memory`, which takes
            `image_size`, `model_size` and `num_workers`.
        image_size: side length in pixels, or height and width, of images that are kept in memory.
        model_size: what the model says of its images' size.
        num_workers: processes that decode images which are kept in memory.

    Raises:
        ValueError: for an empty folder, a layout that may mean two things, held-out classes that
            train lacks, broken images, or more than memory has room for.
        FileNotFoundError: if the folder or `train` is missing.
    """
    check_channels(channels)
    base = existing_folder(root)
    seen = Seen(base)
    layout = layout_of(base, seen)
    classes = [path.name for path in layout.classes["train"]]
    seen.walked |= real_paths([*layout.places.values(), *chain(*layout.classes.values())])
    listed = {part: listed_split(layout, part, classes, channels, seen) for part in layout.places}
    splits, left_out = read_splits(listed, classes, verify, broken, cache)
    source = with_test_split(base.name, classes, channels, splits)
    source.notes = [*layout.notes, *source.notes, *left_out, *seen.notes()]
    return in_memory(source, image_size, model_size, num_workers) if resident else source


@dataclass
class Layout:
    """Where the splits of a folder lie, their class folders, and what is to be said of it."""

    places: dict[str, Path]
    classes: dict[str, list[Path]]
    notes: list[str]


def layout_of(base: Path, seen: Seen) -> Layout:
    """Return the layout of a folder: of splits, or flat class folders.

    Raises:
        ValueError: if it may be read in two ways.
        FileNotFoundError: if it is neither.
    """
    folders = subfolders(base, seen)
    parts: dict[str, list[Path]] = {}
    for path in folders:
        if part := meaning(path.name):
            parts.setdefault(part, []).append(path)
    others = [path for path in folders if meaning(path.name) is None]
    if not parts:
        return flat_layout(base, others, seen)
    check_not_classes(base, parts, others)
    if "train" not in parts:
        held_out = ", ".join(path.name for paths in parts.values() for path in paths)
        raise FileNotFoundError(f"{base} has no folder 'train', only {held_out}")
    for part, paths in parts.items():
        if len(paths) > 1:
            names = " and ".join(path.name for path in paths)
            raise ValueError(f"{base}: {names} both mean {part}: keep one of them")
    places = {part: parts[part][0] for part in PARTS if part in parts}
    check_distinct(list(places.values()))
    classes = {part: class_folders(path, seen) for part, path in places.items()}
    return Layout(places, classes, split_notes(places, others))


def split_notes(places: Mapping[str, Path], others: Sequence[Path]) -> list[str]:
    """Return what is to be said of folders of splits, and of those beside them."""
    renamed = [f"{path.name} is {part}" for part, path in places.items() if path.name != part]
    notes = [f"by its name, {text}" for text in renamed]
    if others:
        names = some((path.name for path in others), 10)
        notes.append(f"beside the splits, and not used: {names}")
    return notes


def check_not_classes(
    base: Path, parts: Mapping[str, Sequence[Path]], others: Sequence[Path]
) -> None:
    """Refuse folders that are called like splits where they look like classes among others."""
    paths = [path for group in parts.values() for path in group]
    if any(has_folders(path) for path in paths):
        return
    beside = [path.name for path in others if holds_images(path)]
    if beside and any(holds_images(path) for path in paths):
        raise ValueError(
            f"{base}: {some(path.name for path in paths)} may be a split without class folders, or "
            f"a class beside {some(beside)}: rename it, or give the labels in a table (data=csv)"
        )


def flat_layout(base: Path, folders: Sequence[Path], seen: Seen) -> Layout:
    """Return the layout of class folders without splits.

    Raises:
        ValueError: if each holds the same folders, which may be the classes.
        FileNotFoundError: if there are none, or the splits lie elsewhere.
    """
    missing = f"{base} has no folder 'train'"
    classes = [path for path in folders if holds_images(path)]
    if meaning(base.name) == "train" or (meaning(base.name) and others_mean_splits(base)):
        raise FileNotFoundError(f"{missing}: did you mean data.root={base.parent}?")
    if not classes:
        raise FileNotFoundError(f"{missing} and no class folders with images")
    if len(classes) == 1 and has_folders(classes[0]):
        raise FileNotFoundError(f"{missing}: did you mean data.root={classes[0]}?")
    check_not_splits(base, classes)
    check_distinct(classes)
    seen.loose += loose_images(base)
    notes = [f"no folders of splits: its {len(classes)} folders are classes"]
    if len(classes) < len(folders):
        empty = some((path.name for path in folders if path not in classes), 10)
        notes.append(f"without images, and not used: {empty}")
    return Layout({"train": base}, {"train": classes}, notes)


def check_not_splits(base: Path, classes: Sequence[Path]) -> None:
    """Refuse folders of which each holds the same folders: they look like splits."""
    inside = [tuple(sorted(path.name for path in folders_in(place))) for place in classes]
    if len(set(inside)) == 1 and len(inside[0]) > 1:
        raise ValueError(
            f"{base}: {some(path.name for path in classes)} each hold {some(inside[0])}: if these "
            "are the classes, call the others train, val and test"
        )


def others_mean_splits(base: Path) -> bool:
    """Whether folders beside this one are called like other splits."""
    parts = {meaning(path.name) for path in folders_in(base.absolute().parent)}
    return bool(parts - {None, meaning(base.name)})


def has_folders(path: Path) -> bool:
    """Whether a folder holds others that are not hidden."""
    return bool(folders_in(path))


def listed_split(
    layout: Layout, part: str, classes: Sequence[str], channels: int, seen: Seen
) -> Listed:
    """Return the images of one split.

    Raises:
        ValueError: for a class that train lacks, or that has no images in it.
    """
    folders = layout.classes[part]
    check_same_classes(str(seen.root), part, [path.name for path in folders], classes)
    files, labels = files_of(folders, classes, seen)
    counts = torch.bincount(labels, minlength=len(classes))
    if part == "train" and not bool(counts.all()):
        empty = folders[int(counts.argmin())]
        raise ValueError(f"{empty} has no images ({', '.join(endings())})")
    return listed_files(Pieces(seen.root, files), labels, channels)


def listed_files(pieces: Pieces, labels: Tensor, channels: int) -> Listed:
    """Return the images of a split that are whole files."""
    return Listed(FileLoader(pieces, channels), labels, pieces)


def existing_folder(path: str | Path) -> Path:
    """Return the folder, refusing what is missing or no folder."""
    folder = resolved_path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder{'' if folder.exists() else ': it does not exist'}"
        )
    return folder


def labelled_images(
    root: Path | str, classes: Sequence[str] | None = None
) -> tuple[list[str], Pieces, Tensor, list[str]]:
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
    seen.walked |= real_paths([base, *folders])
    files, labels = files_of(folders, names, seen)
    return names, Pieces(base, files), labels, seen.notes()


def class_folders(path: Path, seen: Seen) -> list[Path]:
    """Return the class folders of one split's folder, sorted."""
    folders = subfolders(path, seen)
    if not folders:
        raise ValueError(f"{path} has no class folders; labels in a table are read by data=csv")
    check_distinct(folders)
    seen.loose += loose_images(path)
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
) -> tuple[PackedStrings, Tensor]:
    """Return the image files in class folders, from `seen.root` on, and their labels."""
    numbers = {name: number for number, name in enumerate(names)}
    files = [PackedStrings.of(image_files(folder, seen)) for folder in folders]
    labels = torch.tensor([numbers[folder.name] for folder in folders], dtype=torch.long)
    return PackedStrings.joined(files), labels.repeat_interleave(torch.tensor([*map(len, files)]))


@dataclass(frozen=True)
class FileLoader:
    """Position → decoded image file."""

    pieces: Pieces
    channels: int

    def __call__(self, position: int) -> Image.Image:
        """Decode one image, naming the file if it is broken."""
        path = self.pieces[position].path
        with explained(f"broken image {path}"):
            return decoded(path, self.channels)

    def open(self, position: int) -> IO[bytes]:
        """Return one image's file."""
        return self.pieces[position].path.open("rb")
