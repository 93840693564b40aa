"""Where images come from: each source gives a `Source`, splits of uint8 images and labels."""

from __future__ import annotations

import gzip
import hashlib
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

MODES = {1: "L", 3: "RGB"}


class Resident:
    """A split that fits in memory.

    Args:
        images: uint8 `[N, C, H, W]`.
        labels: int64 `[N]`.
        index: the samples' indices in the source, int64 `[N]`; None counts from 0.
    """

    def __init__(self, images: Tensor, labels: Tensor, index: Tensor | None = None) -> None:
        self.images, self.labels = images, labels
        self.index = torch.arange(len(labels)) if index is None else index

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, positions: Tensor) -> Resident:
        """Return the samples at these positions, which keep their index."""
        return Resident(self.images[positions], self.labels[positions], self.index[positions])

    def fingerprint(self) -> str:
        """Return a hash of the pixels and labels."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        for part in (self.images, self.labels, self.index):
            digest.update(np.ascontiguousarray(part.numpy()).data)
        return digest.hexdigest()


class Streamed:
    """A split whose images are decoded when they are asked for.

    Args:
        load: position in the source → PIL image.
        labels: int64 `[N]`.
        names: one name per sample, for messages and the fingerprint.
        index: the samples' positions in the source, int64 `[N]`; None counts from 0.
    """

    def __init__(
        self,
        load: Callable[[int], Image.Image],
        labels: Tensor,
        names: Sequence[str],
        index: Tensor | None = None,
    ) -> None:
        self.load, self.labels, self.names = load, labels, names
        self.index = torch.arange(len(labels)) if index is None else index

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, positions: Tensor) -> Streamed:
        """Return the samples at these positions, which keep their index."""
        return Streamed(self.load, self.labels[positions], self.names, self.index[positions])

    def fingerprint(self) -> str:
        """Return a hash of the names and labels."""
        digest = hashlib.sha256()
        for index, label in zip(self.index.tolist(), self.labels.tolist(), strict=True):
            digest.update(f"{index}\0{self.names[index]}\0{label}\n".encode(errors="replace"))
        return digest.hexdigest()


Split = Resident | Streamed


@dataclass
class Source:
    """Images with their splits and class names; a missing split is cut from `train` later."""

    name: str
    classes: list[str]
    channels: int
    train: Split
    val: Split | None = None
    test: Split | None = None
    notes: list[str] = field(default_factory=list)


def digits(image_size: int = 32, test_size: int = 800) -> Source:
    """Return scikit-learn's 1,797 handwritten digits, enlarged to `image_size` pixels.

    The test split is stratified and always the same. Source: UCI, Alpaydin and Kaynak 1998.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float().mul(255 / 16).round().to(torch.uint8)
    split = Resident(resize(images[:, None], image_size), torch.from_numpy(data.target).long())
    test, train = stratified(split.labels, test_size / len(split), seed=0)
    classes = [str(name) for name in data.target_names]
    return Source("digits", classes, 1, split.subset(train), test=split.subset(test))


def idx(root: str, image_size: int = 32, classes: Sequence[str] | None = None) -> Source:
    """Return a data set in MNIST's format: `train-*` and `t10k-*` idx files, plain or gzipped.

    Args:
        root: the folder of the four `*-images-idx3-ubyte` and `*-labels-idx1-ubyte` files.
        image_size: side length in pixels the images are enlarged or reduced to.
        classes: the class names in label order; None numbers them.

    Raises:
        ValueError: for files that are truncated, of another format or inconsistent.
        FileNotFoundError: if one is missing.
    """
    folder = existing_folder(root)
    train, test = (read_idx_split(folder, part, image_size) for part in ("train", "t10k"))
    count = int(max(train.labels.max(), test.labels.max())) + 1
    names = list(classes) if classes else [str(k) for k in range(count)]
    if len(names) < count:
        raise ValueError(
            f"{folder}: labels go up to {count - 1}, but {len(names)} classes are named"
        )
    return Source(folder.name, names, 1, train, test=test)


def read_idx_split(folder: Path, part: str, image_size: int) -> Resident:
    """Read one part of an idx data set."""
    images = read_idx(find_idx(folder, f"{part}-images-idx3-ubyte"), dimensions=3)
    labels = read_idx(find_idx(folder, f"{part}-labels-idx1-ubyte"), dimensions=1)
    if len(images) != len(labels) or not len(labels):
        raise ValueError(f"{folder}: {len(images)} {part} images but {len(labels)} labels")
    return Resident(resize(images[:, None], image_size), labels.long())


def find_idx(folder: Path, stem: str) -> Path:
    """Return the idx file of that name, plain or gzipped."""
    for name in (stem, f"{stem}.gz"):
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
    base = existing_folder(root)
    splits: dict[str, Streamed] = {}
    classes: list[str] = []
    for part in ("train", "val", "test"):
        if part != "train" and not (base / part).is_dir():
            continue
        names, splits[part] = image_folder(existing_folder(base / part), channels, verify)
        classes = classes or names
        if names != classes:
            differing = ", ".join(sorted(set(names) ^ set(classes)))
            raise ValueError(f"{base}: train and {part} have different classes: {differing}")
    source = Source(base.name, classes, channels, **splits)  # type: ignore[arg-type]
    return with_test_split(source)


def image_folder(path: Path, channels: int, verify: bool) -> tuple[list[str], Streamed]:
    """Return the class names and the images of one split's folder."""
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: {error}") from error
    files = [Path(name) for name, _ in found.samples]
    if verify:
        for file in files:
            open_image(file)
    names = [f"{file.relative_to(path)}:{file.stat().st_size}" for file in files]
    labels = torch.tensor([label for _, label in found.samples])
    return found.classes, Streamed(FileLoader(files, channels), labels, names)


@dataclass(frozen=True)
class FileLoader:
    """Position → decoded image file."""

    files: Sequence[Path]
    channels: int

    def __call__(self, position: int) -> Image.Image:
        """Decode one image, naming the file if it is broken."""
        with open_image(self.files[position]) as image:
            try:
                return image.convert(MODES[self.channels])
            except (OSError, SyntaxError, ValueError) as error:
                raise ValueError(f"broken image {self.files[position]}: {error}") from error


def open_image(path: Path) -> Image.Image:
    """Open an image file without decoding it."""
    try:
        return Image.open(path)
    except (UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise ValueError(f"broken image {path}: it is not an image that Pillow reads") from error


def timm_dataset(
    name: str = "",
    root: str | None = None,
    splits: dict[str, str] | None = None,
    channels: int = 3,
    image_size: int = 224,
    classes: Sequence[str] | None = None,
) -> Source:
    """Return anything `timm.data.create_dataset` opens: a folder, a tar, `wds/…`, `hfds/…`.

    Data sets that can only be iterated are read once and kept in memory at `image_size`, because a
    view must be reachable by its index.

    Args:
        name: timm's data set name, such as `hfds/ORG/NAME`; empty for a folder or tar at `root`.
        root: where the data lie.
        splits: `train`, `val`, `test` → timm's split names; leave out what is not there.
        channels: 3 for colour, 1 for grey.
        image_size: side length in pixels for data that must be held in memory.
        classes: the class names in label order; None takes the data set's, or numbers.

    Raises:
        ValueError: if timm cannot open it, or its labels are not class numbers.
    """
    named = {part: split for part, split in (splits or {"train": "train"}).items() if split}
    if "train" not in named:
        raise ValueError("data.splits must name the train split")
    opened = {part: open_timm(name, root, split) for part, split in named.items()}
    parts = {part: timm_split(dataset, channels, image_size) for part, dataset in opened.items()}
    count = max(int(split.labels.max()) for split in parts.values()) + 1
    names = list(classes) if classes else timm_class_names(opened["train"], count)
    label = name or Path(root or "").stem
    return with_test_split(Source(label, names, channels, **parts))  # type: ignore[arg-type]


def open_timm(name: str, root: str | None, split: str) -> Any:
    """Open one split with timm."""
    from timm.data import create_dataset

    try:
        return create_dataset(name, root=root, split=split, is_training=False, batch_size=1)
    except ImportError as error:
        raise ValueError(
            f"data set {name!r} needs a package: pip install 'distill-kd[data]' ({error})"
        ) from error
    except Exception as error:  # timm's readers raise whatever their back ends do
        raise ValueError(f"timm cannot open {name or root!r}, split {split!r}: {error}") from error


def timm_split(dataset: Any, channels: int, image_size: int) -> Split:
    """Return a timm data set as a split, held in memory if it can only be iterated."""
    if not hasattr(dataset, "__getitem__"):
        pairs = [(squared(image, channels, image_size), int(label)) for image, label in dataset]
        if not pairs:
            raise ValueError("the data set has no samples")
        return Resident(torch.stack([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs]))
    labels = torch.as_tensor(timm_labels(dataset)).long()
    if not len(labels):
        raise ValueError("the data set has no samples")
    names = [str(dataset.filename(i)) for i in range(len(labels))]
    return Streamed(DatasetLoader(dataset, channels), labels, names)


def timm_labels(dataset: Any) -> list[int]:
    """Return all labels, without decoding images where the reader knows them."""
    reader = dataset.reader
    if hasattr(reader, "samples"):
        return [sample[1] for sample in reader.samples]
    if hasattr(reader, "label_key"):
        return list(reader.dataset[reader.label_key])
    return [int(dataset[i][1]) for i in range(len(dataset))]


def timm_class_names(dataset: Any, count: int) -> list[str]:
    """Return the reader's class names, or numbers where it has none."""
    reader = dataset.reader
    indices = getattr(reader, "class_to_idx", None) or {}
    features = getattr(getattr(reader, "dataset", None), "features", None) or {}
    if len(indices) >= count:
        return [str(name) for name, _ in sorted(indices.items(), key=lambda item: item[1])]
    names = getattr(features.get(getattr(reader, "label_key", ""), None), "names", None)
    return list(names) if names else [str(k) for k in range(count)]


@dataclass(frozen=True)
class DatasetLoader:
    """Position → image of a timm data set."""

    dataset: Any
    channels: int

    def __call__(self, position: int) -> Image.Image:
        """Decode one image, naming the sample if it is broken."""
        try:
            image = self.dataset[position][0]
        except (OSError, SyntaxError) as error:
            raise ValueError(f"broken image {self.dataset.filename(position)}: {error}") from error
        return image.convert(MODES[self.channels])


def with_test_split(source: Source) -> Source:
    """Let a lone held-out split be the test split, and say so."""
    if source.test is None and source.val is not None:
        source.test, source.val = source.val, None
        source.notes.append(
            "the one held-out split is the test split; validation is cut from train"
        )
    return source


def stratified(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the positions of a seeded share of every class, and of the rest, both sorted."""
    from sklearn.model_selection import train_test_split

    positions = np.arange(len(labels))
    try:
        rest, part = train_test_split(
            positions, test_size=fraction, stratify=labels.numpy(), random_state=seed
        )
    except ValueError as error:
        raise ValueError(f"cannot cut {fraction:.0%} of {len(labels)} images: {error}") from error
    return torch.from_numpy(np.sort(part)), torch.from_numpy(np.sort(rest))


def resize(images: Tensor, size: int) -> Tensor:
    """Return uint8 images `[N, C, size, size]`, interpolated bilinearly."""
    if images.shape[-2:] == (size, size):
        return images
    parts = [
        F.interpolate(part.float(), size=(size, size), mode="bilinear", antialias=True)
        for part in images.split(1024)
    ]
    return torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in parts])


def squared(image: Image.Image, channels: int, size: int) -> Tensor:
    """Return an image as uint8 `[C, size, size]`: shorter side resized, centre cropped."""
    from torchvision.transforms.v2 import functional as tv

    image = tv.center_crop(tv.resize(image.convert(MODES[channels]), [size]), [size, size])
    return tv.pil_to_tensor(image)


def existing_folder(path: str | Path) -> Path:
    """Return the folder, refusing what is missing or no folder."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    return folder
