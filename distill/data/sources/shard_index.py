"""Where the samples of a shard lie: offsets, sizes, labels and names, found once and kept.

A sample is what WebDataset makes of a tar: the files of one name up to its first dot.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tarfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock
from torch.utils.data import DataLoader, Dataset

from distill.data.sources.contents import decoding_fault
from distill.data.sources.errors import reason
from distill.data.sources.listing import endings, hidden, some
from distill.data.sources.packed import PackedStrings
from distill.data.sources.shard_files import Shard, ShardFiles
from distill.data.sources.splits import DIGEST, Digests, digest_of
from distill.utils.files import load_arrays, remove_stale, save_arrays
from distill.utils.memory import bytes_text
from distill.utils.process import cores

log = logging.getLogger(__name__)

EVERY = 30  # seconds between two lines that say how far reading has come
FORM = 2  # of the files that keep an index
HEAD = 4096  # bytes of an image that tell it from others of its name and size
LONGEST = 1 << 20  # bytes of a member that says a label
NUMBER = re.compile(r"[+-]?[0-9]{1,18}")
LABELS = ("cls", "cls.txt", "json")  # endings of what says a label, the first of them that is there
JSON_KEYS = ("label", "cls")


@dataclass(frozen=True)
class Reading:
    """How a shard is read.

    Args:
        label_key: what the label is called in `.json`; None takes `.cls` and the usual names.
        verify: `new` or `all` read and decode images, to know what they hold and what is broken,
            `all` even if that is known; `none` does not.
    """

    label_key: str | None = None
    verify: str = "none"

    @property
    def whole(self) -> bool:
        """Whether images are read and decoded."""
        return self.verify != "none"


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The sound samples of a shard, in its order.

    Args:
        starts: where in the file each image begins, int64 `[N]`.
        sizes: its bytes, int64 `[N]`.
        labels: int64 `[N]`.
        classes: the names that labels number; none where a shard says numbers.
        names: of the images in the shard, `[N]`.
        heads: a hash of the first 4,096 bytes of each image, uint64 `[N]`.
        digests: a hash of each image, of type `DIGEST`, `[N]`; none where that was not read.
        faults: what is wrong with the others.
    """

    starts: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    classes: PackedStrings
    names: PackedStrings
    heads: npt.NDArray[np.uint64]
    digests: Digests
    faults: PackedStrings

    def __len__(self) -> int:
        return len(self.starts)


@dataclass
class Sample:
    """What was met of a sample on the way through a shard."""

    image: tarfile.TarInfo | None = None
    head: int = 0
    digest: bytes = b""
    label: int | str | None = None
    label_rank: int = len(LABELS)
    fault: str = ""
    endings: set[str] = field(default_factory=set)


def read_index(path: Path, reading: Reading) -> ShardIndex:
    """Return where the samples of a tar lie. What is wrong with it is among its faults."""
    samples: dict[str, Sample] = {}
    faults: list[str] = []
    others: list[str] = []
    with path.open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        try:
            for member in members(file, total):
                if not take(file, member, samples, reading):
                    others.append(plain_name(member))
        except tarfile.TarError as error:
            faults.append(f"it is no whole tar: {reason(error)}")
    sound: list[tuple[tarfile.TarInfo, Sample]] = []
    for key, sample in samples.items():
        fault = fault_of(sample)
        if fault:
            faults.append(f"{key}: {fault}")
        elif sample.image is not None:
            sound.append((sample.image, sample))
    if not samples and not faults:
        faults.append(f"it holds no sample{unlike(others)}")
    labels, classes, mixed = numbered([sample.label for _, sample in sound])
    return ShardIndex(
        np.array([image.offset_data for image, _ in sound], np.int64),
        np.array([image.size for image, _ in sound], np.int64),
        labels,
        PackedStrings.of(classes),
        PackedStrings.of(image.name for image, _ in sound),
        np.array([sample.head for _, sample in sound], np.uint64),
        np.array([sample.digest for _, sample in sound if sample.digest], DIGEST),
        PackedStrings.of([*faults, *mixed]),
    )


def members(file: IO[bytes], total: int) -> Iterator[tarfile.TarInfo]:
    """Yield what a tar holds, but for folders and hidden files.

    Raises:
        TarError: if it is not whole.
    """
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # which it would keep
            if member.offset_data + member.size > total:
                raise tarfile.ReadError(f"{member.name} is cut short")
            if not member.isdir() and not any(map(hidden, plain_name(member).split("/"))):
                yield member
        file.seek(tar.offset)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"it ends at byte {total} without the end of a tar")
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"the header at byte {tar.offset} is damaged")


def plain_name(member: tarfile.TarInfo) -> str:
    """Return what a file of a tar is called, also where the tar was made of the folder `.`."""
    return member.name.removeprefix("./")


def take(
    file: IO[bytes], member: tarfile.TarInfo, samples: dict[str, Sample], reading: Reading
) -> bool:
    """Add what one file of a tar says to the sample it belongs to; return whether it says any."""
    folder, _, base = plain_name(member).rpartition("/")
    key, _, ending = base.partition(".")
    ending = ending.lower()
    is_image, rank = f".{ending}" in endings(), label_rank(ending, reading)
    if not is_image and rank is None:
        return False
    sample = samples.setdefault(f"{folder}/{key}" if folder else key, Sample())
    if ending in sample.endings:
        sample.fault = sample.fault or f"{base} is there twice"
    sample.endings.add(ending)
    if not member.isreg() or member.issparse():
        sample.fault = sample.fault or f"{base} is a link, or sparse, and not a file"
    elif is_image:
        take_image(file, member, sample, reading)
    elif rank is not None and rank < sample.label_rank:
        take_label(file, member, sample, rank, reading)
    return True


def unlike(names: Sequence[str]) -> str:
    """Return why files of a tar are no samples, for people."""
    if not names:
        return ": it is empty"
    image = next((name for name in names if name.lower().endswith(endings())), None)
    if image is None:
        return f", only {some(names)}"
    ending = image.rpartition("/")[2].partition(".")[2]
    return f": {image} is none, as its ending, from the first dot on, is .{ending}"


def label_rank(ending: str, reading: Reading) -> int | None:
    """Return which of the members that may say a label one of this ending is, or None."""
    if reading.label_key is not None:
        return 0 if ending == "json" else None
    return LABELS.index(ending) if ending in LABELS else None


def take_image(file: IO[bytes], member: tarfile.TarInfo, sample: Sample, reading: Reading) -> None:
    """Add an image to its sample."""
    if sample.image is not None:
        sample.fault = sample.fault or f"{sample.image.name} and {member.name} are both its image"
        return
    sample.image = member
    file.seek(member.offset_data)
    content = file.read(member.size if reading.whole else min(member.size, HEAD))
    head = hashlib.blake2b(content[:HEAD], digest_size=8).digest()
    sample.head = int.from_bytes(head, "little")
    if reading.whole:
        sample.digest = digest_of(content)
        if broken := decoding_fault(content):
            sample.fault = sample.fault or f"broken image {member.name}: {broken}"


def take_label(
    file: IO[bytes], member: tarfile.TarInfo, sample: Sample, rank: int, reading: Reading
) -> None:
    """Add a label to its sample."""
    file.seek(member.offset_data)
    content = file.read(min(member.size, LONGEST))
    try:
        text = content.decode()
        value = (
            json_label(text, reading.label_key) if member.name.lower().endswith(".json") else text
        )
    except ValueError as error:
        sample.fault = sample.fault or f"{member.name} says no label: {reason(error)}"
        return
    value = value.strip() if isinstance(value, str) else value
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        sample.fault = sample.fault or f"{member.name} says no label, a number or a name"
        return
    whole = isinstance(value, str) and NUMBER.fullmatch(value)
    sample.label, sample.label_rank = int(value) if whole else value, rank


def json_label(text: str, key: str | None) -> Any:
    """Return what a sample's JSON says of its label."""
    facts = json.loads(text)
    if not isinstance(facts, dict):
        raise ValueError("it is no object with keys")
    keys = JSON_KEYS if key is None else (key,)
    for name in keys:
        if name in facts:
            return facts[name]
    if key is not None:
        raise ValueError(f"it has no {key} (data.label_key), only {', '.join(facts)}")
    raise ValueError(f"it has no {' or '.join(keys)}: give data.label_key, of {', '.join(facts)}")


def fault_of(sample: Sample) -> str:
    """Return what is wrong with a sample, or an empty text."""
    if sample.fault:
        return sample.fault
    if sample.image is None:
        return "it has no image" if sample.label is not None else ""
    if sample.label is None:
        return f"{sample.image.name} has no label ({', '.join('.' + name for name in LABELS)})"
    return ""


def numbered(
    labels: Sequence[int | str | None],
) -> tuple[npt.NDArray[np.int64], list[str], list[str]]:
    """Return labels as numbers, the names that they number, and what is wrong with them."""
    names = sorted({label for label in labels if isinstance(label, str)})
    if not names:
        return np.array(labels, np.int64), [], []
    faults = [] if all(isinstance(label, str) for label in labels) else [
        f"its labels are numbers and names ({names[0]})"
    ]  # fmt: skip
    numbers: dict[Any, int] = {name: number for number, name in enumerate(names)}
    return np.array([numbers.get(label, -1) for label in labels], np.int64), names, faults


@dataclass(frozen=True)
class KeptIndex:
    """The file that keeps the index of one shard.

    It lies in the cache and not beside the shard, which may be read by others, lie elsewhere, or be
    in a folder that may not be written to. It holds as long as size and time (elsewhere: size and
    version) of the shard do.

    Args:
        cache: the folder of what runs keep for each other.
        shard: which.
        reading: how it was read.
    """

    cache: Path
    shard: Shard
    reading: Reading

    @property
    def path(self) -> Path:
        """Where it lies: one for each address and key of labels."""
        place = self.shard.place if self.shard.remote else os.path.realpath(self.shard.address)
        text = f"{place}\0{self.reading.label_key}".encode(errors="surrogateescape")
        return self.cache / "shards" / f"{hashlib.sha256(text).hexdigest()[:24]}.npz"

    def load(self) -> ShardIndex | None:
        """Return what is kept, or None where there is nothing that holds."""
        if self.reading.verify == "all":
            return None
        saved = load_arrays(self.path) or {}
        try:
            if str(saved["form"]) != str(FORM) or str(saved["stamp"]) != self.stamp:
                return None
            index = unpacked(saved)
        except KeyError:
            return None
        if not well_formed(index):
            return None
        read_whole = len(index.digests) == len(index)
        return index if read_whole or not self.reading.whole else None

    def save(self, index: ShardIndex) -> None:
        """Keep an index; that it cannot be kept is said."""
        try:
            remove_stale(self.path.parent, self.path.name)
            save_arrays(self.path, packed(index) | {"form": str(FORM), "stamp": self.stamp})
        except OSError as error:
            log.info("the index of a shard is not kept: %s: %s", self.path, reason(error))

    @property
    def stamp(self) -> str:
        """What the shard was when it was read."""
        return f"{self.shard.size} {self.shard.stamp}"


def packed(index: ShardIndex) -> dict[str, Any]:
    """Return an index as arrays alone, by name."""
    arrays: dict[str, Any] = {}
    for one in fields(index):
        value = getattr(index, one.name)
        if isinstance(value, PackedStrings):
            arrays |= {f"{one.name}.text": value.text, f"{one.name}.ends": value.ends}
        else:
            arrays[one.name] = value
    return arrays


def unpacked(arrays: Mapping[str, Any]) -> ShardIndex:
    """Return an index of its arrays."""
    values: dict[str, Any] = {}
    for one in fields(ShardIndex):
        if one.name in arrays:
            values[one.name] = arrays[one.name]
        else:
            text, ends = arrays[f"{one.name}.text"], arrays[f"{one.name}.ends"]
            values[one.name] = PackedStrings(text, ends)
    return ShardIndex(**values)


def well_formed(index: ShardIndex) -> bool:
    """Whether an index from a file that anyone may have written is what it should be."""
    if not all(strings.sound for strings in (index.names, index.classes, index.faults)):
        return False
    arrays = index.starts, index.sizes, index.labels, index.heads
    kinds = [array.dtype for array in (*arrays, index.digests)]
    return (
        kinds == [np.int64, np.int64, np.int64, np.uint64, DIGEST]
        and {array.shape for array in arrays} == {(len(index.names),)}
        and index.digests.ndim == 1
    )


@dataclass(frozen=True)
class Indexer(Dataset[Any]):
    """Number of a shard → its index, or why it has none."""

    files: ShardFiles
    reading: Reading
    cache: Path | None

    def __getitem__(self, number: int) -> ShardIndex | str:
        shard = self.files.shards[number]
        if self.cache is None:
            return self.read(number)
        kept = KeptIndex(self.cache, shard, self.reading)
        try:
            kept.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{kept.path}.lock"):  # the ranks of a run come here at once
                before = kept.load()
                index = self.read(number) if before is None else before
                if before is None and isinstance(index, ShardIndex):
                    kept.save(index)
        except OSError:  # a cache that may not be written to
            return self.read(number)
        return index

    def read(self, number: int) -> ShardIndex | str:
        """Read a shard, which is fetched if it lies elsewhere."""
        try:
            return read_index(self.files.local(number), self.reading)
        except Exception as error:  # whatever it raises, a process that reads others is not to end
            return reason(error).removeprefix(f"{self.files.shards[number].place} ")


def indexed(files: ShardFiles, reading: Reading, cache: Path | None) -> list[ShardIndex | str]:
    """Return the index of each shard, or why it has none; those not read before are read now.

    They are read in as many processes as this one may use processors.

    Args:
        files: the shards.
        reading: how they are read.
        cache: where to keep what is found; None keeps nothing.
    """
    shards = files.shards
    indices: list[Any] = [
        None if cache is None else KeptIndex(cache, shard, reading).load() for shard in shards
    ]
    lacking = [number for number, index in enumerate(indices) if index is None]
    if not lacking:
        return indices
    size = sum(shards[number].size for number in lacking) / 1e9
    log.info("reading %s shards once (%.1f GB), to know where their samples lie",
             f"{len(lacking):,}", size)  # fmt: skip
    processes = min(len(lacking), cores())
    loader: DataLoader[Any] = DataLoader(
        Indexer(files, reading, cache), batch_size=None, sampler=lacking, collate_fn=unchanged,
        num_workers=processes if processes > 1 else 0,
    )  # fmt: skip
    sizes = [shards[number].size for number in lacking]
    for number, index in zip(lacking, watched(loader, sizes), strict=True):
        indices[number] = index
    return indices


def watched(indices: Iterable[Any], sizes: Sequence[int]) -> Iterator[Any]:
    """Yield the index of each shard, of so many bytes; say every half minute how far that is."""
    begin, done, ended = time.monotonic(), 0, threading.Event()

    def say() -> None:
        while not ended.wait(EVERY):
            log.info(progress(sizes, done, time.monotonic() - begin))

    arriving = iter(indices)  # whose processes are to begin before there is a thread
    thread = threading.Thread(target=say, daemon=True, name="shards read")
    thread.start()
    try:
        for index in arriving:
            done += 1
            yield index
    finally:
        ended.set()
        thread.join()


def progress(sizes: Sequence[int], done: int, seconds: float) -> str:
    """Return how far reading has come, and when it will end at this pace, for people.

    >>> progress([10**9] * 4, 1, 60.0)
    '1 of 4 shards read in 1 min: 1.0 GB of 4.0 GB, 16.7 MB/s, 3 min left'
    """
    read, total = sum(sizes[:done]), sum(sizes)
    text = f"{done:,} of {len(sizes):,} shards read in {seconds / 60:.0f} min"
    if not read:
        return text
    rate = read / seconds
    left = f"{bytes_text(int(rate))}/s, {(total - read) / rate / 60:.0f} min left"
    return f"{text}: {bytes_text(read)} of {bytes_text(total)}, {left}"


def unchanged(index: Any) -> Any:
    """Return what a worker made, as it is."""
    return index
