"""Where images come from: each source gives a `Source`, splits of uint8 images and labels."""

from __future__ import annotations

import gzip
import hashlib
import io
import logging
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import IterableDataset

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
        names: one name per sample, for the fingerprint.
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
    for part in ("train", "val", "test"):
        if (base / part).is_dir():
            names, splits[part] = image_folder(base / part, channels, verify)
            classes = classes or names
            check_same_classes(str(base), part, names, classes)
    return with_test_split(Source(base.name, classes, channels, **splits))  # type: ignore[arg-type]


def train_folder_hint(base: Path) -> str:
    """Return what was probably meant by a folder without `train`."""
    if base.name == "train":
        return f": did you mean data.root={base.parent}?"
    if any(path.is_dir() for path in base.iterdir()):
        return ": if it holds class folders, data=timm cuts the splits from it"
    return ""


def check_same_classes(label: str, part: str, names: list[str], classes: list[str]) -> None:
    """Refuse a split whose classes are not those of train: its labels would mean something else."""
    if names != classes:
        differing = sorted(set(names) ^ set(classes))
        more = " …" if len(differing) > 5 else ""
        raise ValueError(
            f"{label}: train and {part} have different classes: {', '.join(differing[:5])}{more}"
        )


def image_folder(path: Path, channels: int, verify: bool) -> tuple[list[str], Streamed]:
    """Return the class names and the images of one split's folder."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    names = sorted(d.name for d in path.iterdir() if d.is_dir() and not d.name.startswith("."))
    if not names:
        raise ValueError(f"{path} has no class folders")
    numbers = {name: number for number, name in enumerate(names)}
    samples = make_dataset(path, numbers, IMG_EXTENSIONS, allow_empty=True)
    labels = torch.tensor([label for _, label in samples], dtype=torch.long)
    empty = torch.nonzero(torch.bincount(labels, minlength=len(names)) == 0).flatten().tolist()
    if empty:
        raise ValueError(f"{path / names[empty[0]]} has no images ({', '.join(IMG_EXTENSIONS)})")
    files = [Path(name) for name, _ in samples]
    if verify:
        for file in files:
            check_image(file)
    sizes = [f"{file.relative_to(path).as_posix()}:{file.stat().st_size}" for file in files]
    return names, Streamed(FileLoader(files, channels), labels, sizes)


@dataclass(frozen=True)
class FileLoader:
    """Position → decoded image file."""

    files: Sequence[Path]
    channels: int

    def __call__(self, position: int) -> Image.Image:
        """Decode one image, naming the file if it is broken."""
        path = self.files[position]
        with naming_broken(str(path)), Image.open(path) as image:
            return upright(image, self.channels)


def check_image(path: Path) -> None:
    """Refuse a file that is no image; nothing is decoded, so a truncated JPEG passes."""
    with naming_broken(str(path)), Image.open(path) as image:
        image.verify()


@contextmanager
def naming_broken(name: str) -> Iterator[None]:
    """Name the image that cannot be read."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise ValueError(f"broken image {name}: it is not an image that Pillow reads") from error
    except Exception as error:  # decoders raise whatever they stumble on
        raise ValueError(f"broken image {name}: {reason(error)}") from error


def upright(image: Image.Image, channels: int) -> Image.Image:
    """Return the first frame in 8 bits, turned as its EXIF says, on white where transparent."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:  # what lies under transparent pixels is arbitrary
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(MODES[channels])


def timm_dataset(
    name: str = "",
    root: str | None = None,
    splits: Mapping[str, str | None] | None = None,
    channels: int = 3,
    image_size: int = 224,
    classes: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
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
        options: further keywords of `create_dataset`, such as `input_key` and `target_key`.

    Raises:
        ValueError: if timm cannot open it, or its labels are not class numbers or names.
        FileNotFoundError: if there is nothing at `root`.
    """
    check_channels(channels)
    named = {part: split for part, split in (splits or {"train": "train"}).items() if split}
    check_request(name, root, named)
    named = {part: named[part] for part in ("train", "val", "test") if part in named}
    opened = {part: open_timm(name, root, split, options or {}) for part, split in named.items()}
    label = name or str(root)
    check_apart(name, label, opened)
    names = list(classes) if classes else timm_class_names(opened["train"])
    if not classes and not name:  # each folder and each tar numbers its own classes
        for part, dataset in opened.items():
            check_same_classes(label, part, timm_class_names(dataset), names)
    parts: dict[str, Split] = {}
    for part, dataset in opened.items():
        read = timm_held if isinstance(dataset, IterableDataset) else timm_streamed
        with explained(f"{label}, split {named[part]!r}"):
            parts[part], names = read(dataset, channels, image_size, names)
    count = max(int(split.labels.max()) for split in parts.values()) + 1
    names = names or [str(k) for k in range(count)]
    short = name or Path(root or "").stem
    return with_test_split(Source(short, names, channels, **parts))  # type: ignore[arg-type]


def check_request(name: str, root: str | None, splits: Mapping[str, str]) -> None:
    """Refuse what timm would misread: it takes a name that it does not know for a folder."""
    prefix = name.partition("/")[0].lower() if "/" in name else name
    if prefix not in ("", "wds", "hfds", "hfids", "tfds", "torch"):
        raise ValueError(f"data.name={name} should begin with hfds/, hfids/, tfds/, torch/ or wds/")
    if prefix in ("", "wds", "torch") and root is None:
        raise ValueError("give data.root=PATH of a folder or tar, or data.name=hfds/ORG/NAME")
    if not prefix and root is not None and not Path(root).expanduser().exists():
        raise FileNotFoundError(f"data.root={root} does not exist")
    if "train" not in splits or set(splits) - {"train", "val", "test"}:
        raise ValueError("data.splits must name train and, if there, val and test")
    if len(set(splits.values())) < len(splits):
        raise ValueError(f"data.splits={dict(splits)} names the same split twice")


def open_timm(name: str, root: str | None, split: str, options: Mapping[str, Any]) -> Any:
    """Open one split with timm."""
    from timm.data import create_dataset

    root = root and os.path.expanduser(root)
    with explained(f"timm cannot open {name or root}, split {split!r}"):
        # Without a mode the images arrive as they are, for `upright` to convert.
        return create_dataset(
            name, root=root, split=split, **{"batch_size": 1, "input_img_mode": "", **options}
        )


@contextmanager
def explained(label: str) -> Iterator[None]:
    """Turn whatever a data set's back end raises into one line."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{label} needs pip install 'distill-kd[data]': {error}") from error
    except Exception as error:
        raise ValueError(f"{label}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Return the first line of an error, or its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def check_apart(name: str, label: str, opened: Mapping[str, Any]) -> None:
    """Refuse splits that are one place: timm takes the whole folder where a split has none."""
    if name not in ("", "torch/folder", "torch/image_folder"):
        return
    places = {part: Path(getattr(data, "reader", data).root) for part, data in opened.items()}
    for part, place in places.items():
        for other, inside in places.items():
            if part != other and inside.is_relative_to(place):
                raise ValueError(f"{label}: {part} ({place}) contains {other} ({inside})")


def timm_held(
    dataset: Any, channels: int, image_size: int, names: list[str]
) -> tuple[Streamed, list[str]]:
    """Read a timm data set that can only be iterated into memory."""
    with nothing_skipped():
        pairs = [(squared(image, channels, image_size), label) for image, label in dataset]
    labels, names = numbered([label for _, label in pairs], names)
    images = torch.stack([image for image, _ in pairs])
    hashes = [hashlib.sha256(image.numpy().tobytes()).hexdigest()[:16] for image in images]
    return Streamed(HeldLoader(images), labels, hashes), names


@dataclass(frozen=True, eq=False)
class HeldLoader:
    """Position → image held in memory, uint8 `[N, C, H, W]`."""

    images: Tensor

    def __call__(self, position: int) -> Image.Image:
        """Return one image."""
        from torchvision.transforms.v2.functional import to_pil_image

        return to_pil_image(self.images[position])


@contextmanager
def nothing_skipped() -> Iterator[None]:
    """Refuse a data set whose reader leaves out broken samples with no more than a log message."""
    skipped: list[str] = []

    def notice(record: logging.LogRecord) -> bool:
        skipped.append(record.getMessage())
        return False

    log = logging.getLogger("timm.data.readers.reader_wds")
    log.addFilter(notice)
    try:
        yield
    finally:
        log.removeFilter(notice)
    if skipped:
        raise ValueError(f"{len(skipped)} samples cannot be read, the first: {skipped[0]}")


def timm_streamed(
    dataset: Any, channels: int, image_size: int, names: list[str]
) -> tuple[Streamed, list[str]]:
    """Return a timm data set whose images can be reached by position."""
    labels, names = numbered(timm_labels(dataset), names)
    reader = getattr(dataset, "reader", dataset)
    return Streamed(
        DatasetLoader(dataset, channels), labels, timm_names(reader, len(labels))
    ), names


def timm_labels(dataset: Any) -> list[Any]:
    """Return all labels, without decoding images where the reader knows them."""
    reader = getattr(dataset, "reader", dataset)
    if hasattr(reader, "targets"):  # a tar, torchvision
        return list(reader.targets)
    if hasattr(reader, "samples"):  # a folder
        return [label for _, label in reader.samples]
    if hasattr(reader, "label_key"):  # the Hub
        check_columns(reader)
        return list(reader.dataset[reader.label_key])
    return [dataset[position][1] for position in range(len(dataset))]


def check_columns(reader: Any) -> None:
    """Refuse a data set of the Hub whose columns have other names than timm expects."""
    table = reader.dataset
    for option, key in (("input_key", reader.image_key), ("target_key", reader.label_key)):
        # timm's cast to images makes up an empty column where there is none.
        if key not in table.column_names or table[:1][key] == [None]:
            names = ", ".join(table.column_names)
            raise ValueError(
                f"column {key!r} is missing or empty: give data.options.{option}, of {names}"
            )


def timm_names(reader: Any, count: int) -> list[str]:
    """Return one name per sample that changes when the data do."""
    if in_tar(reader):
        return [f"{member.name}:{member.size}" for member, _, _ in reader.samples]
    if hasattr(reader, "samples"):
        files = [Path(sample[0]) for sample in reader.samples]
        return [f"{f.relative_to(reader.root).as_posix()}:{f.stat().st_size}" for f in files]
    version = getattr(getattr(reader, "dataset", None), "_fingerprint", "")
    return [f"{version}:{position}" for position in range(count)]


def numbered(labels: list[Any], names: list[str]) -> tuple[Tensor, list[str]]:
    """Return labels as class numbers, and the class names, found here where labels are strings."""
    if not labels:
        raise ValueError("there are no samples")
    if isinstance(labels[0], str):
        names = names or sorted(set(labels))
        numbers = {name: number for number, name in enumerate(names)}
        unknown = sorted(set(labels) - set(numbers))
        if unknown:
            raise ValueError(f"train has no class {unknown[0]!r}")
        labels = [numbers[label] for label in labels]
    found = np.array(labels)
    if found.ndim != 1 or found.dtype.kind not in "iub":
        raise ValueError(f"labels should be class numbers or names, not {labels[0]!r}")
    return torch.from_numpy(found.astype(np.int64)), names


def timm_class_names(dataset: Any) -> list[str]:
    """Return a data set's class names in label order, none where it has none."""
    reader = getattr(dataset, "reader", dataset)
    indices = getattr(reader, "class_name_to_idx", None) or getattr(reader, "class_to_idx", None)
    if indices:
        return [str(name) for name, _ in sorted(indices.items(), key=lambda item: item[1])]
    features = getattr(getattr(reader, "dataset", None), "features", None) or {}
    return list(getattr(features.get(getattr(reader, "label_key", "")), "names", None) or [])


@dataclass(frozen=True)
class DatasetLoader:
    """Position → image of a timm data set."""

    dataset: Any
    channels: int

    def __call__(self, position: int) -> Image.Image:
        """Decode one image, naming the sample if it is broken."""
        # Not by the data set's own `[position]`, which gives the next image for a broken one.
        with naming_broken(self.name(position)), self.open(position) as file:
            if isinstance(file, Image.Image):
                return upright(file, self.channels)
            with Image.open(file) as image:
                return upright(image, self.channels)

    def name(self, position: int) -> str:
        """Return what a person can find the sample by."""
        reader = getattr(self.dataset, "reader", None)
        found = reader.filename(position, absolute=True) if reader else None
        return str(found or f"{position} of {type(reader or self.dataset).__name__}")

    def open(self, position: int) -> IO[bytes] | Image.Image:
        """Return one sample's file, or its image where the data set has no files."""
        if not hasattr(self.dataset, "reader"):
            return self.dataset[position][0]
        reader = self.dataset.reader
        return open_in_tar(reader, position) if in_tar(reader) else reader[position][0]


def in_tar(reader: Any) -> bool:
    """Whether a timm reader reads from tar files."""
    return hasattr(reader, "tar_state")


def open_in_tar(reader: Any, position: int) -> IO[bytes]:
    """Read one member of a tar, or of a tar in it, by its place in the file.

    timm's reader keeps the tar open, and data workers would then share one place in it.
    """
    member, archive, inner = reader.samples[position]
    with open(os.path.join(reader.root, archive) if archive else reader.root, "rb") as file:
        file.seek(member.offset_data + (inner.offset_data if inner else 0))
        return io.BytesIO(file.read(member.size))


def with_test_split(source: Source) -> Source:
    """Let a lone held-out split be the test split, and say so."""
    if source.test is None and source.val is not None:
        source.test, source.val = source.val, None
        source.notes.append(
            "the one held-out split is the test split; validation is cut from train"
        )
    return source


def stratified(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the positions of a seeded share of every class, and of the rest, both sorted.

    The share holds at least one sample of each class.
    """
    from sklearn.model_selection import train_test_split

    positions = np.arange(len(labels))
    try:
        rest, part = train_test_split(
            positions, test_size=fraction, stratify=labels.numpy(), random_state=seed
        )
    except ValueError as error:
        raise ValueError(
            f"cannot cut {fraction:.0%} of {len(labels)} images (data.val_fraction, "
            f"data.test_fraction): {error}"
        ) from error
    _, first = np.unique(labels.numpy()[rest], return_index=True)
    lacking = ~np.isin(labels.numpy()[rest[first]], labels.numpy()[part])
    part = np.concatenate([part, rest[first[lacking]]])
    rest = np.setdiff1d(rest, part)
    return torch.from_numpy(np.sort(part)), torch.from_numpy(rest)


def resize(images: Tensor, size: int) -> Tensor:
    """Return uint8 images `[N, C, size, size]`, interpolated bilinearly."""
    if size < 1:
        raise ValueError(f"data.image_size must be at least 1 pixel, got {size}")
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

    image = tv.center_crop(tv.resize(upright(image, channels), [size]), [size, size])
    return tv.pil_to_tensor(image)


def existing_folder(path: str | Path) -> Path:
    """Return the folder, refusing what is missing or no folder."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder{'' if folder.exists() else ': it does not exist'}"
        )
    return folder


def check_channels(channels: int) -> None:
    """Refuse a number of channels that images do not come in."""
    if channels not in MODES:
        raise ValueError(f"data.channels must be 1 (grey) or 3 (colour), got {channels}")
