"""Files of shards: where they lie, local copies of those that lie elsewhere, and reading them."""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

from distill.data.sources.errors import reason
from distill.data.sources.listing import hidden, holds_images, some
from distill.data.sources.shard_remote import (
    REMOTE,
    file_system,
    if_there,
    listed,
    retried,
    unsigned,
)
from distill.data.sources.splits import meaning
from distill.utils.files import remove_stale, resolved_path, under_construction

log = logging.getLogger(__name__)

BRACES = re.compile(r"\{([^{}]*)\}")
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
OPEN = 32  # files that a process keeps open
ASKED_AT_ONCE = 16  # addresses
# What file systems of `fsspec` tell of a file's version, in the order in which it is written down.
VERSIONS = ("ETag", "etag", "md5Hash", "Content-MD5", "Last-Modified", "LastModified", "mtime",
            "last_modified", "updated", "created")  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """One tar of samples.

    Args:
        address: its path here, or where it lies elsewhere.
        name: what names it, wherever the data lie.
        part: the split that its folder or its name means; None where they mean none.
        size: its bytes.
        stamp: what changes with its content: time or version.
    """

    address: str
    name: str
    part: str | None
    size: int
    stamp: str

    @property
    def place(self) -> str:
        """Its address as people and caches know it, without what signs it for a while."""
        return unsigned(self.address)

    @property
    def remote(self) -> bool:
        """Whether it lies elsewhere, and is read from a local copy."""
        return REMOTE in self.address


def expanded(address: str) -> list[str]:
    """Return the addresses that one with ranges means: `a-{00..02}.tar`, `{a,b}.tar`."""
    pieces = BRACES.split(address)
    choices = [alternatives(text) if place % 2 else [text] for place, text in enumerate(pieces)]
    return ["".join(parts) for parts in product(*choices)]


def alternatives(text: str) -> list[str]:
    """Return what braces around a text stand for."""
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if ends is None:
        return text.split(",") if "," in text else [f"{{{text}}}"]
    first, last = int(ends[1]), int(ends[2])
    if first > last:
        raise ValueError(f"data.root: the range {{{text}}} ends before it begins")
    width = len(ends[1]) if len(ends[1]) == len(ends[2]) else 0
    return [f"{number:0{width}}" for number in range(first, last + 1)]


def shards_at(root: str | Sequence[str], retries: int = 3) -> tuple[list[Shard], list[str]]:
    """Return the shards at a place, and the addresses that were given and are not there.

    Args:
        root: a folder, which is searched to any depth; or addresses of tars, with ranges or `*`.
        retries: how often an address that does not answer is asked again.

    Raises:
        ValueError: for what is no plain tar, is there twice, or belongs to two splits.
        FileNotFoundError: for a folder without shards.
    """
    given = [root] if isinstance(root, str) else list(root)
    if not given:
        raise ValueError("data.root is an empty list: give a folder, or addresses of tars")
    places = [place for one in given for place in expanded(os.path.expandvars(one))]
    addresses: list[str] = []
    folders: list[str] = []
    for place in places:
        tars, folder = tars_at(place, retries)
        addresses += tars
        folders += [folder] * len(tars)
    unsigned_addresses = [unsigned(address) for address in addresses]
    if twice := [place for place, count in Counter(unsigned_addresses).items() if count > 1]:
        raise ValueError(f"data.root names a shard twice: {some(twice)}")
    names = names_of(unsigned_addresses)
    with ThreadPoolExecutor(ASKED_AT_ONCE) as threads:
        stamps = list(threads.map(lambda address: stamp_of(address, retries), addresses))
    shards = [
        Shard(address, name, part_of(unsigned(address), folder), *stamp)
        for address, name, folder, stamp in zip(addresses, names, folders, stamps, strict=True)
        if stamp is not None
    ]
    return shards, [
        place for place, stamp in zip(unsigned_addresses, stamps, strict=True) if stamp is None
    ]


def tars_at(place: str, retries: int) -> tuple[list[str], str]:
    """Return the tars that a path or address means, and the folder that was searched for them."""
    without_query = unsigned(place)
    if without_query.endswith(COMPRESSED):
        raise ValueError(
            f"{without_query} is compressed, and its samples cannot be reached: unpack it"
        )
    if REMOTE not in place:
        place = str(resolved_path(place))
    if without_query.endswith(".tar") and "*" not in without_query:
        return [local_path(place)], ""
    files, _ = file_system(place)
    local = is_local(files)
    if "*" in without_query:
        pattern = local_path(place)
        tars = files.glob(pattern) if local else listed(pattern, retries)
        folder = ""
    else:
        folder = local_path(place)
        tars = local_tars(folder) if local else listed(place, retries)
    tars = [tar for tar in tars if tar.endswith(".tar")]
    if not tars:
        advice = instead(place) if local else ""
        raise FileNotFoundError(f"{unsigned(place)} has no shards (*.tar){advice}")
    return sorted(tars), folder


def is_local(files: Any) -> bool:
    """Whether a file system is that of this machine."""
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(files, LocalFileSystem)


def local_path(address: str) -> str:
    """Return the path of an address that lies here after all; others are returned as they are."""
    return address.removeprefix("file://") if address.startswith("file://") else address


def local_tars(folder: str) -> list[str]:
    """Return the tars anywhere below a folder, but for hidden ones."""
    if not os.path.isdir(folder):
        exists = "" if os.path.exists(folder) else ": it does not exist"
        raise FileNotFoundError(f"{folder} is not a folder{exists}")
    tars = []
    for inside, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not hidden(name)]
        tars += [os.path.join(inside, f) for f in files if f.endswith(".tar") and not hidden(f)]
        check_compressed(inside, files)
    return tars


def check_compressed(folder: str, files: Iterable[str]) -> None:
    """Refuse compressed tars, beside which plain ones would pass for all."""
    compressed = [file for file in sorted(files) if file.endswith(COMPRESSED)]
    if compressed:
        raise ValueError(
            f"{folder}: {some(compressed)} {'is' if len(compressed) == 1 else 'are'} compressed, "
            "and samples in it cannot be reached: unpack it, or move it away"
        )


def instead(folder: str) -> str:
    """Return what reads a folder of something else, for people."""
    if not holds_images(Path(folder)):
        return ""
    return ": data=folder reads its images, and scripts/shards makes shards of them"


def names_of(addresses: Sequence[str]) -> list[str]:
    """Return what addresses are called from the folder that holds them all."""
    parents = [PurePosixPath(address).parent for address in addresses]
    try:
        common = os.path.commonpath(parents) if parents else ""
    except ValueError:  # of several drives
        return list(addresses)
    return [PurePosixPath(a).relative_to(common).as_posix() for a in addresses]


def part_of(address: str, folder: str = "") -> str | None:
    """Return which split a shard's folder or the words of its name mean, or None.

    Args:
        address: the shard's.
        folder: that was searched for shards, whose own name says nothing.
    """
    path = PurePosixPath(address)
    words = re.split(r"[-_.]", path.stem)
    own_folder = "" if folder and path.parent == PurePosixPath(folder) else path.parent.name
    parts = {part for word in (own_folder, *words) if (part := meaning(word))}
    if len(parts) > 1:
        raise ValueError(f"{address} may be {' or '.join(sorted(parts))}: rename it or its folder")
    return parts.pop() if parts else None


def time_of(status: os.stat_result) -> str:
    """Return when a file that lies here was last written to."""
    return str(status.st_mtime_ns)


def stamp_of(address: str, retries: int) -> tuple[int, str] | None:
    """Return a shard's size and what changes with its content; None where there is no such file."""
    if REMOTE not in address:
        try:
            status = os.stat(address)
        except FileNotFoundError:
            return None
        return status.st_size, time_of(status)
    files, path = file_system(address)
    facts = retried(lambda: if_there(lambda: files.info(path)), retries, unsigned(address))
    if facts is None:
        return None
    if facts.get("size") is None:
        raise ValueError(f"{unsigned(address)}: its server does not say how large it is")
    return int(facts["size"]), " ".join(f"{k}={facts[k]}" for k in VERSIONS if facts.get(k))


@dataclass
class ShardFiles:
    """Reads pieces of shards; of those that lie elsewhere, from copies that are fetched whole.

    Copies are fetched by one process at a time, and the least recently used go first where they
    would take more than `limit` bytes.

    Args:
        shards: which.
        folder: for the copies; None where there are to be none.
        limit: bytes that they may take.
        retries: how often what cannot be read is tried again.
    """

    shards: Sequence[Shard]
    folder: Path | None = None
    limit: float = 50e9
    retries: int = 3
    open_shards: OrderedDict[int, int] = field(default_factory=OrderedDict)
    _ahead: Ahead | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs: open files and threads are a process's own."""
        return {**self.__dict__, "open_shards": OrderedDict(), "_ahead": None}

    def read(self, number: int, start: int, size: int) -> bytes:
        """Return bytes of a shard.

        Raises:
            ShardLost: if it cannot be read, after `retries` more tries.
        """
        shard = self.shards[number]

        def piece() -> bytes:
            try:
                content = os.pread(self._opened(number), size, start)
                if len(content) < size:
                    raise OSError(f"it ends within the {size} bytes from {start} on")
            except BaseException:
                self._close(number)
                raise
            return content

        return retried(piece, self.retries, shard.place)

    def local(self, number: int) -> Path:
        """Return where a shard lies on this machine, fetched if need be.

        Raises:
            ShardLost: if it cannot be fetched, after `retries` more tries.
        """
        shard = self.shards[number]
        return retried(lambda: self._path(shard), self.retries, shard.place)

    def fetch_ahead(self, numbers: Sequence[int]) -> None:
        """Fetch these shards, in this order, while others are read; those that lie here need none.

        One that cannot be fetched is left to whoever reads it.
        """
        remote = [number for number in numbers if self.shards[number].remote]
        if remote:
            self._ahead = self._ahead or Ahead(self.local)
            self._ahead.want(remote)

    def _opened(self, number: int) -> int:
        shard = self.shards[number]
        if number not in self.open_shards:
            while len(self.open_shards) >= OPEN:
                self._close(next(iter(self.open_shards)))
            self.open_shards[number] = opened(self._path(shard), shard)
        self.open_shards.move_to_end(number)
        return self.open_shards[number]

    def _close(self, number: int) -> None:
        descriptor = self.open_shards.pop(number, None)
        if descriptor is not None:
            os.close(descriptor)

    def _path(self, shard: Shard) -> Path:
        return self._fetched(shard) if shard.remote else Path(shard.address)

    def _fetched(self, shard: Shard) -> Path:
        if self.folder is None:
            raise ValueError(f"{shard.place} is to be copied here: give data.cache=FOLDER")
        key = hashlib.sha256(f"{shard.place}\0{shard.stamp}\0{shard.size}".encode()).hexdigest()
        path = self.folder / f"{key[:24]}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with FileLock(f"{path}.lock"):
                if not path.exists():
                    remove_stale(path.parent, path.name)
                    make_room(self.folder, self.limit - shard.size)
                    fetch(shard, path)
        os.utime(path)  # the least recently used go first
        return path


def opened(path: Path, shard: Shard) -> int:
    """Return the descriptor of a shard that is open, and that the system is told to read ahead.

    Raises:
        OSError: if it is another than when the run began; the stamp of a copy is its original's.
    """
    descriptor = os.open(path, os.O_RDONLY)
    status = os.fstat(descriptor)
    fault = ""
    if status.st_size != shard.size:
        fault = f"it has {status.st_size} bytes, and had {shard.size} when the run began"
    elif not shard.remote and time_of(status) != shard.stamp:
        fault = "it was written to after the run began"
    if fault:
        os.close(descriptor)
        raise OSError(fault)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
    return descriptor


def fetch(shard: Shard, path: Path) -> None:
    """Copy a shard to a path, whole or not at all."""
    files, place = file_system(shard.address)
    building = under_construction(path)
    try:
        files.get_file(place, str(building))
        fetched = building.stat().st_size
        if fetched != shard.size:
            raise OSError(f"{fetched} of its {shard.size} bytes came")
        building.replace(path)
    finally:
        building.unlink(missing_ok=True)


def make_room(folder: Path, limit: float) -> None:
    """Remove the least recently used copies in a folder until they take no more than a limit."""
    with FileLock(folder / ".room.lock"):
        copies = []
        for path in folder.glob("*.tar"):
            status = path.stat()
            copies.append((status.st_mtime_ns, status.st_size, path))
        taken = sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if taken <= limit:
                break
            path.unlink(missing_ok=True)
            taken -= size


class Ahead:
    """A thread that fetches what will be wanted next."""

    def __init__(self, fetch: Callable[[int], Any]) -> None:
        self.fetch, self.queue = fetch, queue.SimpleQueue[list[int]]()
        threading.Thread(target=self._run, daemon=True, name="shards ahead").start()

    def want(self, numbers: list[int]) -> None:
        """Fetch these next, and no longer what was wanted before."""
        self.queue.put(numbers)

    def _run(self) -> None:
        wanted: list[int] = []
        while True:
            while not wanted or not self.queue.empty():
                wanted = list(self.queue.get())
            number = wanted.pop(0)
            try:
                self.fetch(number)
            except Exception as error:  # whoever reads it says so
                log.debug("shard %d is not fetched ahead: %s", number, reason(error))
