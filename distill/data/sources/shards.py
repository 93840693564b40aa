"""Shards: WebDataset's tars, here or elsewhere, whose samples are reached by their index."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from distill.data.sources.contents import check_broken, check_verify
from distill.data.sources.errors import SampleBroken, ShardLost, explained, reason
from distill.data.sources.images import check_channels, decoded
from distill.data.sources.listing import some
from distill.data.sources.packed import PackedStrings
from distill.data.sources.shard_classes import names_beside
from distill.data.sources.shard_files import Shard, ShardFiles, shards_at
from distill.data.sources.shard_index import Reading, ShardIndex, indexed
from distill.data.sources.shard_remote import unsigned
from distill.data.sources.sizes import SAMPLED, Header, opened_header
from distill.data.sources.splits import (
    DIGEST,
    PARTS,
    Digests,
    Source,
    Split,
    Streamed,
    named_classes,
    with_test_split,
)
from distill.data.views.order import InShards
from distill.utils.files import resolved_path
from distill.utils.memory import bytes_text

log = logging.getLogger(__name__)

LOOKED_AT = 4  # shards from which the sizes of images are sampled
SAID = 5  # broken images, of which each has a line; all are counted


def shards(
    root: str | Sequence[str],
    channels: int = 3,
    classes: Sequence[str] | None = None,
    label_key: str | None = None,
    verify: str = "none",
    broken: str = "refuse",
    cache: str | None = None,
    cache_gb: float = 50.0,
    retries: int = 3,
    shuffle_window: int = 16_384,
) -> Source:
    """Return the samples of tars as WebDataset's conventions have them.

    A sample is the files of one name up to its first dot: an image, and a label in `.cls` (a number
    or a class's name), `.cls.txt` or `.json`. Which split a shard belongs to its folder's name or a
    word of its own says (`MEANINGS`): `val/0000.tar`, `imagenet-train-0000.tar`. Where none says,
    all are train, from which the splits are cut; a lone held-out one is the test split.

    A sample is known by its name, its size and the first 4,096 bytes of its image, wherever the
    shards lie; where it is verified by all of its bytes, so that images in train and held out are
    found.

    Shards that lie elsewhere are copied whole before they are read. Each machine copies all that it
    trains on, once where `cache_gb` holds them all, else once in every epoch.

    A shard that cannot be read in the course of a run ends it, in a line that names the shard, as a
    view of a sample is a function of its index and there is no picture to make it of; so does an
    image that cannot be decoded. With `broken=skip` training goes on: in the place of the lost
    samples other samples of their batch are shown again, under their own index and label, so that
    batches keep their size and what is kept of a view stays true. Which those are depends on when
    the shard was lost, and a run that is resumed with the shard there again is not the one that
    went on without it. Validation and test end the run in any case: their numbers would be those of
    other data.

    Args:
        root: a folder of tars, a path or an address of any protocol of `fsspec`; or addresses, with
            ranges such as `train-{0000..0146}.tar`.
        channels: 3 for colour, 1 for grey.
        classes: the class names in label order; None takes those that lie beside the shards
            (`classes.txt`, or `_info.json` and `dataset_info.json`), or that samples say, or
            numbers.
        label_key: what the label is called in `.json`; None takes `.cls` where there is one.
        verify: `none`, or `new` to read and decode each image when a shard is first seen or has
            changed, to know what it holds, or `all` to do so each time.
        broken: `refuse` shards and samples that are not as they should be, or `skip` them.
        cache: where to keep the index, and copies; None reads shards anew each time.
        cache_gb: gigabytes (10⁹ bytes) that copies may take.
        retries: how often what cannot be read is tried again, after 0.1 s, 0.4 s, 1.6 s, ….
        shuffle_window: samples of an epoch's order that are shuffled among each other.

    Raises:
        ValueError: for broken samples, labels that no class has, or too small a cache.
        FileNotFoundError: if there are no shards.
    """
    splits, names, said = read_shards(
        root, channels, classes, label_key, verify, broken, cache, cache_gb, retries,
        shuffle_window,
    )  # fmt: skip
    if "train" not in splits:
        raise FileNotFoundError(f"there is no shard of train, only of {', '.join(splits)}")
    source = with_test_split(label_of(root), names, channels, splits)
    source.notes = [*said, *source.notes]
    return source


def read_shards(
    root: str | Sequence[str],
    channels: int,
    classes: Sequence[str] | None,
    label_key: str | None,
    verify: str,
    broken: str,
    cache: str | None,
    cache_gb: float,
    retries: int,
    shuffle_window: int,
) -> tuple[dict[str, Split], list[str], list[str]]:
    """Return the splits that shards have, class names, and what is to be said; see `shards`."""
    check_channels(channels)
    check_broken(broken)
    check_verify(verify)
    found, missing = shards_at(root, retries)
    if missing and (broken == "refuse" or not found):
        what = "shard is" if len(missing) == 1 else "shards are"
        raise FileNotFoundError(
            f"{len(missing)} {what} missing ({some(missing)}); data.broken=skip leaves them out"
        )
    parts = parts_of(found)
    kept = None if cache is None else resolved_path(cache)
    check_room(found, kept, cache_gb)
    files = ShardFiles(found, kept and kept / "shards" / "copies", cache_gb * 1e9, retries)
    results = indexed(files, Reading(label_key, verify), kept)
    indices, left_out = sound(found, results, broken)
    check_kinds(found, indices)
    given, where = names_beside(root, found, retries) if classes is None else (list(classes), [])
    names = class_names(label_of(root), found, indices, given)
    window_bytes(found, indices, shuffle_window, cache_gb)
    splits: dict[str, Split] = {}
    for part, numbers in parts.items():
        place = Layout.of(found, indices, numbers, names)
        if not len(place.labels):
            raise ValueError(f"{label_of(root)}: the shards of {part} hold no sample")
        load = ShardLoader(files, place, channels, shuffle_window, broken == "skip")
        digests = None if verify == "none" else place.digests
        splits[part] = Streamed(load, place.labels, place.names, digests=digests)
    said = [*notes(found, parts, missing, splits), *where, *left_out]
    return splits, names, [*said, *([UNKNOWN] if verify == "none" else [])]


UNKNOWN = (
    "what the images hold was not read: one that is in train and held out, too, is not noticed "
    "(data.verify=new looks)"
)


def label_of(root: str | Sequence[str]) -> str:
    """Return what the data are called."""
    first = root if isinstance(root, str) else root[0]
    return PurePosixPath(unsigned(first)).stem or first


def parts_of(found: Sequence[Shard]) -> dict[str, list[int]]:
    """Return the numbers of the shards of each split; without names of splits all are train.

    Raises:
        ValueError: if some say which split they are, and others do not.
    """
    parts: dict[str | None, list[int]] = {}
    for number, shard in enumerate(found):
        parts.setdefault(shard.part, []).append(number)
    if set(parts) == {None}:
        return {"train": parts[None]}
    if None in parts:
        says, says_not = (
            next(s.name for s in found if (s.part is None) == silent) for silent in (False, True)
        )
        raise ValueError(
            f"{says} says which split it is, and {says_not} does not: call it, or its folder, "
            "train, val or test"
        )
    return {part: parts[part] for part in PARTS if part in parts}


def notes(
    found: Sequence[Shard],
    parts: dict[str, list[int]],
    missing: Sequence[str],
    splits: dict[str, Split],
) -> list[str]:
    """Return what is said of shards: how many each split has, and which are not there."""
    counts = [
        f"{part} {len(splits[part]):,} images in {len(numbers):,} "
        f"shard{'' if len(numbers) == 1 else 's'}"
        for part, numbers in parts.items()
    ]
    lines = [f"{', '.join(counts)} ({bytes_text(sum(shard.size for shard in found))})"]
    if missing:
        what = "shard is" if len(missing) == 1 else "shards are"
        lines.append(f"{len(missing)} {what} missing, and left out ({some(missing)})")
    return lines


def sound(
    found: Sequence[Shard], results: Sequence[ShardIndex | str], broken: str
) -> tuple[list[ShardIndex | None], list[str]]:
    """Return the index of each shard that can be read, and a note of what is left out.

    Raises:
        ValueError: for the first fault, if they are to be refused.
    """
    faults = [
        f"{shard.place}: {fault}"
        for shard, one in zip(found, results, strict=True)
        for fault in ([one] if isinstance(one, str) else one.faults)
    ]
    indices = [None if isinstance(one, str) else one for one in results]
    if not faults:
        return indices, []
    what = "fault" if len(faults) == 1 else "faults"
    if broken == "refuse" or not any(indices):
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ValueError(f"{faults[0]}{more}; data.broken=skip leaves out what is broken")
    return indices, [f"{len(faults)} {what} in shards, left out ({some(faults)})"]


def check_kinds(found: Sequence[Shard], indices: Sequence[ShardIndex | None]) -> None:
    """Refuse shards of which some say labels as names and others as numbers."""
    kinds: dict[bool, str] = {}
    for shard, index in zip(found, indices, strict=True):
        if index is not None and len(index):
            kinds.setdefault(bool(len(index.classes)), shard.name)
    if len(kinds) > 1:
        raise ValueError(
            f"the labels of {kinds[True]} are names, and those of {kinds[False]} are numbers"
        )


def class_names(
    label: str,
    found: Sequence[Shard],
    indices: Sequence[ShardIndex | None],
    given: Sequence[str] | None,
) -> list[str]:
    """Return the class names in label order: those given, those that samples say, or numbers.

    Raises:
        ValueError: if samples say a name that is not among those given, or a number beyond them; or
            held-out samples one that train lacks.
    """
    said: dict[str, str] = {}
    trained: set[str] = set()
    split = "train" if any(shard.part == "train" for shard in found) else None
    most = -1
    for shard, index in zip(found, indices, strict=True):
        if index is None or not len(index):
            continue
        most = max(most, int(index.labels.max()))
        said |= {name: shard.name for name in index.classes if name not in said}
        trained |= set(index.classes) if split in (None, shard.part) else set()
    if not said:
        return named_classes(Path(label), given, most + 1)
    names = sorted(trained) if given is None else list(given)
    if unknown := sorted(set(said) - set(names)):
        of = "train" if given is None else "the class names"
        raise ValueError(f"{said[unknown[0]]} has {some(unknown)}, which {of} lacks")
    return names


def check_room(found: Sequence[Shard], cache: Path | None, cache_gb: float) -> None:
    """Refuse shards that lie elsewhere where there is no folder, or no room, for a copy."""
    remote = [shard for shard in found if shard.remote]
    if remote and cache is None:
        raise ValueError(f"{remote[0].place} is to be copied here: give data.cache=FOLDER")
    largest = max((shard.size for shard in remote), default=0)
    if 2 * largest > cache_gb * 1e9:
        raise ValueError(
            f"data.cache_gb={cache_gb:g} holds fewer than two shards of {bytes_text(largest)}"
        )


def window_bytes(
    found: Sequence[Shard],
    indices: Sequence[ShardIndex | None],
    window: int,
    cache_gb: float,
) -> None:
    """Refuse a cache in which the shards of two windows have no room.

    They would be copied again and again. A cache that has room for all is large enough.
    """
    remote = [
        (shard.size, len(index))
        for shard, index in zip(found, indices, strict=True)
        if shard.remote and index is not None and len(index)
    ]
    each = min((count for _, count in remote), default=0)
    if not each:
        return
    largest = max(size for size, _ in remote)
    spanned = min(len(remote), 2 * (window // each + 2))
    needed = min(spanned * largest, sum(size for size, _ in remote))
    if needed > cache_gb * 1e9:
        raise ValueError(
            f"data.cache_gb={cache_gb:g}: two windows of data.shuffle_window={window} samples lie "
            f"in up to {spanned} shards, {bytes_text(needed)}, which would be copied again and "
            "again: raise the one or lower the other"
        )


@dataclass(frozen=True, eq=False)
class ShardNames(Sequence[str]):
    """Names of samples, which tell them apart wherever shards lie: shard, image, bytes, hash.

    Args:
        shards: what the shards are called.
        numbers: of the shard of each sample, int64 `[N]`.
        images: what each image is called in its shard.
        sizes: its bytes, int64 `[N]`.
        heads: a hash of its first bytes, uint64 `[N]`.
    """

    shards: Sequence[str]
    numbers: npt.NDArray[np.int64]
    images: PackedStrings
    sizes: npt.NDArray[np.int64]
    heads: npt.NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[one] for one in range(len(self))[place]]
        return f"{self.shown(place)} {self.sizes[place]} {int(self.heads[place]):016x}"

    def shown(self, place: int) -> str:
        """Return what a person finds a sample by."""
        return f"{self.shards[self.numbers[place]]}/{self.images[place]}"


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the samples of a split lie, one shard after the other.

    Args:
        numbers: of the shard of each, int64 `[N]`.
        starts: where in it the image begins, int64 `[N]`.
        sizes: its bytes, int64 `[N]`.
        labels: int64 `[N]`.
        names: what tells them apart.
        digests: a hash of each image; none where that was not read.
    """

    numbers: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    labels: Tensor
    names: ShardNames
    digests: Digests

    @classmethod
    def of(
        cls,
        found: Sequence[Shard],
        indices: Sequence[ShardIndex | None],
        numbers: Sequence[int],
        classes: Sequence[str],
    ) -> Layout:
        """Return the layout of the shards of these numbers, their labels by the class names."""
        rows = [(n, index) for n in numbers if (index := indices[n]) is not None and len(index)]

        def together(name: str, kind: Any) -> npt.NDArray[Any]:
            return np.concatenate([np.empty(0, kind), *(getattr(one, name) for _, one in rows)])

        counts = [len(index) for _, index in rows]
        shard = np.repeat(np.array([n for n, _ in rows], np.int64), counts)
        places = {name: number for number, name in enumerate(classes)}
        labels = [
            np.array([places[name] for name in one.classes])[one.labels]
            if len(one.classes) else one.labels
            for _, one in rows
        ]  # fmt: skip
        sizes = together("sizes", np.int64)
        images = PackedStrings.joined([index.names for _, index in rows])
        names = ShardNames(
            [one.name for one in found], shard, images, sizes, together("heads", np.uint64)
        )
        return cls(
            shard, together("starts", np.int64), sizes,
            torch.from_numpy(np.concatenate([np.empty(0, np.int64), *labels])),
            names, together("digests", DIGEST),
        )  # fmt: skip


class ShardLoader:
    """Position → decoded image of a shard.

    Args:
        files: reads the shards.
        layout: where the samples lie.
        channels: 3 for colour, 1 for grey.
        window: how many samples of an order are shuffled among each other.
        skips: whether training goes on without shards that are lost and images that are broken.
    """

    def __init__(
        self, files: ShardFiles, layout: Layout, channels: int, window: int, skips: bool
    ) -> None:
        self.files, self.layout, self.channels, self.window = files, layout, channels, window
        self.skips = skips
        # In memory that data workers share: what one of them has lost the others do not wait for.
        self.lost = torch.zeros(len(files.shards), dtype=torch.bool).share_memory_()
        self.broken = torch.zeros(len(layout.labels), dtype=torch.bool).share_memory_()

    def __call__(self, position: int) -> Image.Image:
        """Decode one image.

        Raises:
            SampleBroken: naming shard and image, if that cannot be done.
            ShardLost: if it cannot be read, after all retries.
        """
        content = self.open(position)
        try:
            with explained(f"broken image {self.name(position)}"):
                return decoded(content, self.channels)
        except ValueError as error:
            if self.skips and not self.broken[position]:
                self.broken[position] = True
                if int(self.broken.sum()) <= SAID:
                    log.warning(
                        "%s: in training, another of its batch is shown again in its place "
                        "(data.broken=skip)", reason(error),
                    )  # fmt: skip
            raise SampleBroken(str(error)) from error.__cause__

    def open(self, position: int) -> BytesIO:
        """Return the bytes of one image's file.

        Raises:
            ShardLost: if they cannot be read, after all retries.
        """
        where = self.layout
        number = int(where.numbers[position])
        try:
            content = self.files.read(
                number, int(where.starts[position]), int(where.sizes[position])
            )
        except ShardLost as error:
            if self.skips and not self.lost[number]:
                self.lost[number] = True
                count = int((where.numbers == number).sum())
                log.warning(
                    "%s: in training, its %s images are left out from here on, and others of their "
                    "batches shown again (data.broken=skip)", reason(error), f"{count:,}",
                )  # fmt: skip
            raise
        return BytesIO(content)

    def lost_note(self, index: Tensor) -> str | None:
        """Return what of these positions, int64 `[n]`, training went without; None if nothing."""
        numbers = torch.from_numpy(self.layout.numbers)[index]
        lost = self.lost[numbers]
        broken = self.broken[index] & ~lost
        shards = [self.files.shards[i].name for i in numbers[lost].unique().tolist()]
        images = [self.name(position) for position in index[broken].tolist()]
        without = [
            f"{int(missed.sum()):,} of its {len(index):,} images {which}"
            for missed, which in (
                (lost, f"from when {some(shards)} could not be read"),
                (broken, f"that cannot be decoded ({some(images)})"),
            )
            if missed.any()
        ]
        if not without:
            return None
        return f"training went without {' and without '.join(without)} (data.broken=skip)"

    def missed(self) -> dict[str, list[int]]:
        """Return what training went without, by name; what was all there has no name."""
        both = {"shards": self.lost, "images": self.broken}
        return {name: flags.nonzero()[:, 0].tolist() for name, flags in both.items() if flags.any()}

    def miss(self, missed: Mapping[str, Sequence[int]]) -> None:
        """Go on without what another process went without, see `missed`, where that may be."""
        if self.skips:
            self.lost[list(missed.get("shards", ()))] = True
            self.broken[list(missed.get("images", ()))] = True

    def gone(self, index: Tensor) -> Tensor:
        """Return which of these positions, int64 `[n]`, training goes on without, bool `[n]`."""
        return self.lost[torch.from_numpy(self.layout.numbers)[index]] | self.broken[index]

    @cached_property
    def headers(self) -> list[Header]:
        """The headers of some images, of a few shards: others need not be opened, or copied."""
        shards = np.unique(self.layout.numbers)
        chosen = shards[:: -(-len(shards) // LOOKED_AT)]
        places = np.flatnonzero(np.isin(self.layout.numbers, chosen))
        spread = places[:: -(-len(places) // SAMPLED)]
        headers = [opened_header(self, position) for position in spread.tolist()]
        return [header for header in headers if header is not None]

    def name(self, position: int) -> str:
        """Return what a person can find a sample by."""
        return self.layout.names.shown(position)

    def in_shards(self, index: Tensor) -> InShards:
        """Return in which shards the samples of these positions, int64 `[n]`, lie."""
        numbers = torch.from_numpy(self.layout.numbers)[index]
        return InShards(numbers, self.window, self.files.fetch_ahead)
