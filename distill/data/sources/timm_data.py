"""Data sets that timm opens: folders, tars, webdatasets, the Hub, torchvision's own."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from operator import length_hint
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from distill.data.sources.contents import Listed, read_splits
from distill.data.sources.errors import explained
from distill.data.sources.images import check_channels, cropped
from distill.data.sources.in_memory import AT_ONCE, checked_bytes
from distill.data.sources.listing import Seen, folders_in, some
from distill.data.sources.pieces import Pieces
from distill.data.sources.sizes import SAMPLED, Header, ModelSize, Size, chosen_size, header_of
from distill.data.sources.splits import (
    PARTS,
    Source,
    Split,
    Streamed,
    check_same_classes,
    pixel_digests,
    with_test_split,
)
from distill.data.sources.timm_reader import (
    DatasetLoader,
    class_names,
    reader_of,
    sample_digests,
    sample_labels,
    sample_names,
    sample_pieces,
    without_hidden,
)
from distill.utils.files import resolved_path
from distill.utils.memory import available_bytes

TOO_LARGE = (
    "lower data.image_size, or let data=shards read them where they lie (webdataset's tars as they "
    "are, an image folder once scripts/shards has packed it)"
)


def timm_dataset(
    name: str = "",
    root: str | None = None,
    splits: Mapping[str, str | None] | None = None,
    channels: int = 3,
    image_size: int | Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    model_size: ModelSize | None = None,
    verify: str = "new",
    broken: str = "refuse",
    cache: str | None = None,
) -> Source:
    """Return anything `timm.data.create_dataset` opens: a folder, a tar, `wds/…`, `hfds/…`.

    Data sets that can only be iterated are read once and kept in memory at `image_size`, because a
    view must be reachable by its index. Of those, `data=shards` reads webdataset's tars where they
    lie.

    Args:
        name: timm's data set name, such as `hfds/ORG/NAME`; empty for a folder or tar at `root`.
        root: where the data lie.
        splits: `train`, `val`, `test` → timm's split names; leave out what is not there.
        channels: 3 for colour, 1 for grey.
        image_size: side length in pixels, or height and width, for data that must be held in
            memory; None lets the model decide, see `chosen_size`.
        classes: the class names in label order; None takes the data set's, or numbers.
        options: further keywords of `create_dataset`, such as `input_key` and `target_key`.
        model_size: what the model says of its images' size.
        verify: which files of a folder or tar are opened before training, to find broken ones:
            `new`, `all` or `none`; see `read_splits`.
        broken: `refuse` broken images, or `skip` them.
        cache: where to keep what the files hold; None reads them anew each time.

    Raises:
        ValueError: if timm cannot open it, its labels are not class numbers or names, images are
            broken, or what must be held would take more than half of the free memory.
        FileNotFoundError: if there is nothing at `root`.
    """
    check_channels(channels)
    check_place(name, root)
    label, chosen = name or str(root), requested(splits or {"train": "train"})
    opened = {part: open_timm(name, root, split, options or {}) for part, split in chosen.items()}
    check_apart(name, label, opened)
    place = resolved_path(root or ".")
    base = place if place.is_dir() else place.parent
    seen = Seen(place)
    for dataset in opened.values():
        without_hidden(dataset, seen)
    own = class_names(opened["train"])
    if not name:  # each folder and each tar numbers its own classes
        for part, dataset in opened.items():
            check_same_classes(label, part, class_names(dataset), own)
    names = list(classes or own)
    parts: dict[str, Split] = {}
    listed: dict[str, Listed] = {}
    size: Size | None = None  # of what is held: that of train
    for part, dataset in opened.items():  # train first: it names the classes
        with explained(f"{label}, split {chosen[part]!r}"):
            if isinstance(dataset, IterableDataset):
                headers = first_headers(dataset)
                size = size or chosen_size(image_size, model_size, headers)
                parts[part], names = held(dataset, channels, size, names, headers)
                continue
            labels, names = numbered(sample_labels(dataset), names)
            labels = labels if name else renumbered(labels, class_names(dataset), own)
            split = opened_split(dataset, labels, channels, base)
            if isinstance(split, Listed):
                listed[part] = split
            else:
                parts[part] = split
    read, left_out = read_splits(listed, names, verify, broken, cache)
    parts |= read
    count = max(int(split.labels.max()) for split in parts.values()) + 1
    names = names or [str(k) for k in range(count)]
    source = with_test_split(name or Path(label).stem, names, channels, parts)
    source.notes += [*beside(name, place, opened), *left_out, *seen.notes()]
    return source


def beside(name: str, place: Path, opened: Mapping[str, Any]) -> list[str]:
    """Return a note of the folders beside those of the splits, which timm does not open."""
    roots = {Path(os.path.abspath(getattr(reader_of(d), "root", place))) for d in opened.values()}
    if name or not place.is_dir() or Path(os.path.abspath(place)) in roots:
        return []
    unused = sorted(p.name for p in folders_in(place) if Path(os.path.abspath(p)) not in roots)
    note = f"beside the splits, and not used: {some(unused, 10)}; data.splits names what is"
    return [note] if unused else []


def check_place(name: str, root: str | None) -> None:
    """Refuse what timm would misread: it takes a name that it does not know for a folder."""
    prefix = name.partition("/")[0].lower() if "/" in name else name
    if prefix not in ("", "wds", "hfds", "hfids", "tfds", "torch"):
        raise ValueError(f"data.name={name} should begin with hfds/, hfids/, tfds/, torch/ or wds/")
    if prefix in ("", "wds", "torch") and root is None:
        raise ValueError("give data.root=PATH of a folder or tar, or data.name=hfds/ORG/NAME")
    if not prefix and root is not None and not resolved_path(root).exists():
        raise FileNotFoundError(f"data.root={root} does not exist")


def requested(splits: Mapping[str, str | None]) -> dict[str, str]:
    """Return timm's names of the splits that have one, train first."""
    chosen = {part: split for part, split in splits.items() if split}
    if "train" not in chosen or set(chosen) - set(PARTS):
        raise ValueError("data.splits must name train and, if there, val and test")
    if len(set(chosen.values())) < len(chosen):
        raise ValueError(f"data.splits={chosen} names the same split twice")
    return {part: chosen[part] for part in PARTS if part in chosen}


def open_timm(name: str, root: str | None, split: str, options: Mapping[str, Any]) -> Any:
    """Open one split with timm."""
    from timm.data import create_dataset

    root = root and str(resolved_path(root))
    with explained(f"timm cannot open {name or root}, split {split!r}"):
        # Without a mode the images arrive as they are, for `upright` to convert.
        return create_dataset(
            name, root=root, split=split, **{"batch_size": 1, "input_img_mode": "", **options}
        )


def check_apart(name: str, label: str, opened: Mapping[str, Any]) -> None:
    """Refuse splits that are one place: timm takes the whole folder where a split has none."""
    if name not in ("", "torch/folder", "torch/image_folder"):
        return
    places = {part: Path(reader_of(data).root) for part, data in opened.items()}
    for part, place in places.items():
        for other, inside in places.items():
            if part != other and inside.is_relative_to(place):
                raise ValueError(f"{label}: {part} ({place}) contains {other} ({inside})")


def opened_split(dataset: Any, labels: Tensor, channels: int, base: Path) -> Streamed | Listed:
    """Return a timm data set whose images can be reached by position, or lie in files."""
    loader, pieces = DatasetLoader(dataset, channels), sample_pieces(dataset)
    names = sample_names(dataset, len(labels))
    if pieces is not None:
        return Listed(loader, labels, Pieces.of(base, pieces), names)
    assert names is not None
    return Streamed(loader, labels, names, digests=sample_digests(dataset, len(labels)))


def renumbered(labels: Tensor, names: Sequence[str], classes: Sequence[str]) -> Tensor:
    """Return labels that number `names` as numbers of `classes`, which have them all."""
    if list(names) == list(classes):
        return labels
    return torch.tensor([classes.index(name) for name in names])[labels]


def first_headers(dataset: Any) -> list[Header]:
    """Return the headers of a data set's first pictures."""
    with nothing_skipped():
        return [header_of(image) for image, _ in islice(dataset, SAMPLED)]


def held(
    dataset: Any, channels: int, size: Size, names: list[str], headers: Sequence[Header]
) -> tuple[Streamed, list[str]]:
    """Read a timm data set that can only be iterated into memory.

    Raises:
        ValueError: as soon as it would take more than half of what was free.
    """
    free, shape = available_bytes(), (channels, *size)
    checked_bytes(length_hint(dataset), shape, free, TOO_LARGE)  # 0 where it does not say
    blocks: list[Tensor] = []
    targets: list[Any] = []
    with nothing_skipped():
        pairs = ((cropped(image, channels, size), label) for image, label in dataset)
        while block := list(islice(pairs, AT_ONCE)):
            blocks.append(torch.stack([image for image, _ in block]))
            targets += [label for _, label in block]
            checked_bytes(len(targets), shape, free, TOO_LARGE)
    labels, names = numbered(targets, names)
    hashes = np.concatenate([pixel_digests(block) for block in blocks])
    positions = [str(position) for position in range(len(hashes))]
    return Streamed(HeldLoader(blocks, headers), labels, positions, digests=hashes), names


@dataclass(frozen=True, eq=False)
class HeldLoader:
    """Position → image held in memory.

    Args:
        blocks: uint8 `[n, C, H, W]` of `AT_ONCE` images each, the last of what is left: as one
            tensor they would be there twice while it is made.
        headers: of some originals.
    """

    blocks: Sequence[Tensor]
    headers: Sequence[Header] = ()

    def __call__(self, position: int) -> Image.Image:
        """Return one image."""
        from torchvision.transforms.v2.functional import to_pil_image

        return to_pil_image(self.blocks[position // AT_ONCE][position % AT_ONCE])


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
    array = np.array(labels)
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise ValueError(f"labels should be class numbers or names, not {labels[0]!r}")
    return torch.from_numpy(array.astype(np.int64)), names
