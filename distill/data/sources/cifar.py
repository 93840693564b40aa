"""CIFAR-10 and CIFAR-100, in whichever of the forms they are published in people have them."""

from __future__ import annotations

import gzip
import hashlib
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from filelock import FileLock

from distill.data.sources.cifar_files import (
    CHANNELS,
    Array,
    Labels,
    binary_names,
    binary_part,
    checked_names,
    checked_part,
    parquet_names,
    parquet_part,
    pickled_names,
    pickled_part,
)
from distill.data.sources.errors import explained
from distill.data.sources.images import resize
from distill.data.sources.listing import some
from distill.data.sources.splits import Resident, Source
from distill.utils.errors import printable
from distill.utils.files import resolved_path
from distill.utils.memory import bytes_text

LARGEST = 1 << 29  # bytes of a file, far more than any of a release has


@dataclass(frozen=True)
class Form:
    """The files that a release is published as.

    Args:
        folder: what its archive unpacks to.
        archive: the archive.
        train: the files of training images, in order.
        test: the file of test images.
        names: the file of class names, in which `{}` is the name of the labels.
    """

    folder: str
    archive: str
    train: tuple[str, ...]
    test: str
    names: str

    def files(self, labels: Labels) -> list[str]:
        """Return the files that images, their labels and the class names are in."""
        return [*self.train, self.test, self.names.format(labels.name)]


@dataclass(frozen=True)
class Release:
    """What a published data set of images of 32 × 32 holds.

    Args:
        name: of the data set.
        torchvision: the name of torchvision's class.
        labels: `data.labels` → which they are.
        pickled: its files for Python.
        binary: its files for C.
        train: how many training images there are, equally many in each file.
        test: how many test images.
    """

    name: str
    torchvision: str
    labels: Mapping[str, Labels]
    pickled: Form
    binary: Form
    train: int = 50_000
    test: int = 10_000


BATCHES = [f"data_batch_{number}" for number in range(1, 6)]
CIFAR10 = Release(
    "CIFAR-10",
    "CIFAR10",
    {"fine": Labels("label", 10)},
    Form(
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
        tuple(BATCHES),
        "test_batch",
        "batches.meta",
    ),
    Form(
        "cifar-10-batches-bin",
        "cifar-10-binary.tar.gz",
        tuple(f"{name}.bin" for name in BATCHES),
        "test_batch.bin",
        "batches.meta.txt",
    ),
)
CIFAR100 = Release(
    "CIFAR-100",
    "CIFAR100",
    {
        "fine": Labels("fine_label", 100, place=1, bytes=2),
        "coarse": Labels("coarse_label", 20, place=0, bytes=2),
    },
    Form("cifar-100-python", "cifar-100-python.tar.gz", ("train",), "test", "meta"),
    Form("cifar-100-binary", "cifar-100-binary.tar.gz", ("train.bin",), "test.bin", "{}_names.txt"),
)


def cifar10(root: str, image_size: int | Sequence[int] = 32, download: bool = False) -> Source:
    """Return CIFAR-10, 50,000 + 10,000 colour images of 10 classes; see `read_release`.

    Reference:
        Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
    """
    return read_release(CIFAR10, root, "fine", image_size, download)


def cifar100(
    root: str,
    image_size: int | Sequence[int] = 32,
    labels: str = "fine",
    download: bool = False,
) -> Source:
    """Return CIFAR-100, 50,000 + 10,000 colour images of 100 classes; see `read_release`.

    With `labels=coarse` they are of the 20 groups of five classes each.

    Reference:
        Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
    """
    return read_release(CIFAR100, root, labels, image_size, download)


def read_release(
    release: Release,
    root: str,
    labels: str,
    image_size: int | Sequence[int] = 32,
    download: bool = False,
) -> Source:
    """Return a release in whatever form there is a copy of, its samples in the published order.

    The forms are looked for in this order: the folder of the form for Python (pickles, read without
    running anything in them, see `read_pickle`), that of the binary form, the archive of either,
    and the Hub's parquet files.

    Args:
        release: what is to be there.
        root: the form's folder or archive, or the folder that holds it.
        labels: which labels, a key of the release's.
        image_size: side length in pixels, or height and width, the images are enlarged or reduced
            to.
        download: let torchvision fetch it into `root` where there is no copy that can be read.

    Raises:
        ValueError: for a copy that is damaged or would run code.
        FileNotFoundError: if there is none, or files of it are missing.
    """
    if labels not in release.labels:
        raise ValueError(f"data.labels must be {' or '.join(release.labels)}, got {labels!r}")
    place, wanted = resolved_path(root), release.labels[labels]
    try:
        copy = found_copy(release, wanted, place)
    except (ValueError, FileNotFoundError):
        if not download:
            raise
        fetch(release, wanted, place)
        copy = found_copy(release, wanted, place)
    train, test = (
        Resident(resize(torch.from_numpy(images), image_size), torch.from_numpy(numbers))
        for images, numbers in (copy.train, copy.test)
    )
    return Source(release.name, copy.classes, CHANNELS, train, test=test, notes=copy.notes)


@dataclass(frozen=True)
class Copy:
    """What a copy of a release holds: of each split uint8 `[N, 3, 32, 32]` and int64 `[N]`."""

    classes: list[str]
    train: tuple[Array, Array]
    test: tuple[Array, Array]
    notes: list[str] = field(default_factory=list)


def fetch(release: Release, labels: Labels, root: Path) -> None:
    """Let torchvision fetch a release that cannot be read there; of several runs the first does.

    Torchvision knows the checksum of the archive that it fetches.
    """
    from torchvision import datasets

    with explained(f"{release.name} cannot be fetched into {root}"):
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{release.torchvision}.lock"):
            try:
                found_copy(release, labels, root)  # which another run may have fetched meanwhile
            except (ValueError, FileNotFoundError):
                getattr(datasets, release.torchvision)(root, download=True)


def found_copy(release: Release, labels: Labels, root: Path) -> Copy:
    """Return the first copy of a release in a place.

    Raises:
        ValueError: if it is damaged or would run code.
        FileNotFoundError: if there is none, or files of it are missing.
    """
    for place, form in places(release, root):
        if files := held_files(place, form.files(labels)):
            return read_files(release, labels, form, place, files)
    shards = {part: own_shards(release, root, part) for part in ("train", "test")}
    if any(shards.values()):
        return read_parquet(release, labels, root, shards)
    forms = (release.pickled, release.binary)
    names = [form.folder for form in forms] + [form.archive for form in forms]
    there = "holds none of" if root.exists() else "does not exist; it should hold one of"
    raise FileNotFoundError(
        f"{root} {there} {', '.join(names)} and train-*.parquet: data.root is where {release.name} "
        "lies, and data.download=true fetches it there"
    )


def own_shards(release: Release, root: Path, part: str) -> list[Path]:
    """Return a split's parquet files; where there are several releases', those in its folder."""
    files = sorted(root.glob(f"**/{part}-*.parquet"))
    folder = release.torchvision.lower()
    own = [file for file in files if folder in file.relative_to(root).parts]
    return own or files


def places(release: Release, root: Path) -> Iterator[tuple[Path, Form]]:
    """Yield where a copy may lie, and as which files."""
    forms = (release.pickled, release.binary)
    yield from ((root / form.folder, form) for form in forms)
    yield from ((root, form) for form in forms)
    yield from ((root / form.archive, form) for form in forms)


def held_files(place: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Return name → content of the files of these names in a folder or an archive."""
    if place.is_dir():
        paths = [place / name for name in names if (place / name).is_file()]
        for path in paths:
            check_size(path, path.stat().st_size)
        return {path.name: path.read_bytes() for path in paths}
    return archived_files(place, names) if place.is_file() else {}


def archived_files(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Return name → content of the files of these names in an archive, which is read to its end."""
    files: dict[str, bytes] = {}
    with explained(str(path)), gzip.open(path) as stream, tarfile.open(fileobj=stream) as archive:
        for member in archive:
            name = PurePosixPath(member.name).name
            content = archive.extractfile(member) if name in names and member.isfile() else None
            if content is not None and name not in files:
                check_size(printable(member.name), member.size)
                files[name] = content.read()
        while stream.read(1 << 20):  # at its end is the checksum of the whole
            pass
    return files


def check_size(name: str | Path, size: int) -> None:
    """Refuse a file that is larger than any of a release, before it fills the memory."""
    if size > LARGEST:
        raise ValueError(f"{name} is no file of a release: it has {bytes_text(size)}")


def check_whole(release: Release, place: Path, lacking: Sequence[str]) -> None:
    """Refuse a copy that lacks files."""
    if lacking:
        raise FileNotFoundError(
            f"{place} lacks {some(lacking, 5)}, and so is a partial copy of {release.name}: "
            "data.download=true fetches a whole one"
        )


def read_files(
    release: Release, labels: Labels, form: Form, place: Path, files: Mapping[str, bytes]
) -> Copy:
    """Return what the files of a copy hold.

    Raises:
        ValueError: if one of them is damaged, or would run code.
        FileNotFoundError: if one is missing.
    """
    check_whole(release, place, [name for name in form.files(labels) if name not in files])
    pickled = form is release.pickled
    read_part, read_names = (
        (pickled_part, pickled_names) if pickled else (binary_part, binary_names)
    )

    def part(name: str, count: int) -> tuple[Array, Array]:
        with explained(str(place / name)):
            return checked_part(*read_part(files[name], labels), labels, count)

    def split(names: Sequence[str], count: int) -> tuple[Array, Array]:
        parts = (part(name, count // len(names)) for name in names)
        images, numbers = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return images, numbers

    names_file = form.names.format(labels.name)
    with explained(str(place / names_file)):
        classes = checked_names(read_names(files[names_file], labels), labels)
    notes = changed_notes(release, place, files) if pickled else []
    return Copy(classes, split(form.train, release.train), split([form.test], release.test), notes)


def read_parquet(
    release: Release, labels: Labels, root: Path, shards: Mapping[str, Sequence[Path]]
) -> Copy:
    """Return what the Hub's files hold.

    Raises:
        ValueError: if one of them is damaged.
        FileNotFoundError: if there are none of a split.
    """
    check_whole(release, root, [f"{part}-*.parquet" for part, paths in shards.items() if not paths])

    def part(name: str, count: int) -> tuple[Array, Array]:
        with explained(f"{root}, {name}-*.parquet"):
            return checked_part(*parquet_part(shards[name], labels), labels, count)

    with explained(str(shards["train"][0])):
        classes = checked_names(parquet_names(shards["train"][0], labels), labels)
    return Copy(classes, part("train", release.train), part("test", release.test))


def changed_notes(release: Release, place: Path, files: Mapping[str, bytes]) -> list[str]:
    """Return a note of the files that are not the published ones, byte by byte."""
    from torchvision import datasets

    published = getattr(datasets, release.torchvision)
    meta = published.meta["filename"], published.meta["md5"]
    sums = dict([*published.train_list, *published.test_list, meta])
    changed = [
        name
        for name, content in files.items()
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != sums.get(name)
    ]
    what = "is not the published file: its MD5 differs"
    if len(changed) > 1:
        what = "are not the published files: their MD5s differ"
    return [f"{some(changed, 10)} in {place} {what}"] if changed else []
