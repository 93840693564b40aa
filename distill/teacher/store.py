"""The teacher's answers on disk, so that a teacher is paid for once.

A store is a folder: `store.json` says whose answers to what they are, and `view-0003.bin` holds
the logits of view 3 as records of one size, one per sample. Each record carries a checksum that is
keyed by the store, the view and the row, so nothing else has to be kept in step: a record that is
absent, half-written, damaged or in the wrong place is a record that is not there, and is written
again. Killing a process at any moment leaves a correct store.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any
from zlib import crc32

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from distill.teacher.records import Array, Fields, Layout, ViewFile
from distill.utils.files import write_whole

log = logging.getLogger(__name__)

FORMAT = 1
ABOUT = "store.json"
SPARE_BYTES = 10**9  # of the disk, for checkpoints and whatever else a run writes
CHUNK_BYTES = 2**24


class TeacherStore:
    """The teacher's logits for every view of every sample, filled as they are computed.

    Any number of processes read a store while one writes it: whoever holds the folder's lock,
    until `close` or its end. Another's writes are skipped, and it becomes the writer at its next
    write once the lock is free. The ranks of one run answer for different samples (or, where
    classes are balanced, at most write the same answer twice), so each `rank` has a writer of its
    own; rank 0 makes the folder. How many views there are is no part of a
    store's identity: a longer run goes on where a shorter one ended.

    Args:
        folder: where the store is; made if need be. `store_folder` names one.
        facts: everything that decides an answer, as values for JSON.
        samples: rows per view.
        classes: K.
        views: views per sample.
        dtype: `float16` or `float32`.
        topk: how many of the largest logits to keep; None keeps all.
        max_gb: the most that the store may take, in 10⁹ bytes; None for as much as there is.
        rank: of this process among those of its run.

    Raises:
        ValueError: if the folder holds other answers, cannot be made, or has too little room.
    """

    def __init__(
        self,
        folder: str | Path,
        facts: Mapping[str, Any],
        samples: int,
        classes: int,
        views: int,
        dtype: str = "float16",
        topk: int | None = None,
        max_gb: float | None = None,
        rank: int = 0,
    ) -> None:
        self.folder, self.samples, self.views, self.rank = Path(folder), samples, views, rank
        self.layout = Layout(classes, dtype, topk)
        self.identity = identity(facts, samples, self.layout)
        self._size = self.layout.record.itemsize
        self._files: dict[int, ViewFile] = {}
        self._found_damaged: dict[int, set[int]] = {}
        self._lock: FileLock | None = None
        self._settled = self._said_unwritable = False
        check_counts(samples, views)
        check_size(samples, views, self.layout, max_gb)
        self._open()

    def __enter__(self) -> TeacherStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def writes(self) -> bool:
        """Whether this process is the writer now."""
        return self._lock is not None

    @property
    def damaged(self) -> int:
        """How many records this process has found damaged."""
        return sum(map(len, self._found_damaged.values()))

    @property
    def complete(self) -> bool:
        """Whether every record of every view is there and whole."""
        return all(self.filled(view) == self.samples for view in range(self.views))

    def filled(self, view: int) -> int:
        """Return how many records of a view are there; each is checked once per process."""
        step = max(1, CHUNK_BYTES // self._size)
        starts = range(0, self.samples, step)
        chunks = [np.arange(start, min(start + step, self.samples)) for start in starts]
        return sum(int(self._there(view, chunk).sum()) for chunk in chunks)

    def read(self, view: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of a view's rows, and which of them are there.

        Args:
            view: from 0 to `views` − 1.
            rows: int64 `[n]`.

        Returns:
            float32 `[n, K]`, zero for what is not there, and bool `[n]`; both on the CPU.

        Raises:
            ValueError: if there is no such view or row.
        """
        fields, there = self.read_fields(view, rows)
        return self.layout.decode(fields), there

    def read_fields(self, view: int, rows: Tensor) -> tuple[Fields, Tensor]:
        """Return what `read` decodes: fields by name, blank for what is not there, and what is."""
        places = self._places(view, rows)
        there = self._there(view, places)
        file = self._file(view)
        if file is None:
            return self.layout.blank(len(places)), torch.from_numpy(there)
        records = file.take(places, there)
        sound = self.layout.sound(self.layout.unpack(records)).numpy()
        records[~sound] = 0
        return self.layout.unpack(records), torch.from_numpy(there & sound)

    def write(self, view: int, rows: Tensor, logits: Tensor) -> Tensor:
        """Keep the logits of a view's rows that are not there yet, if this process is the writer.

        Args:
            view: from 0 to `views` − 1.
            rows: int64 `[n]`.
            logits: `[n, K]`, on any device.

        Returns:
            The logits as a later read returns them, float32 `[n, K]`, on their device.

        Raises:
            ValueError: if there is no such view or row, if the logits cannot be kept (see
                `rounded`), or if the disk is full.
        """
        places = self._places(view, rows)
        if len(places) != len(logits):
            raise ValueError(f"there are {len(places)} rows for {len(logits)} answers")
        fields = self.layout.encode(logits)
        if self._may_write():
            file = self._file(view, make=True)
            assert file is not None
            missing = ~self._there(view, places)
            file.put(places[missing], self.layout.pack(fields)[missing])
        return self.layout.decode(fields)

    def rounded(self, logits: Tensor) -> Tensor:
        """Return logits `[n, K]` as a later read would, float32, on their device.

        Raises:
            ValueError: if they are NaN, infinite, or beyond what the store's dtype holds.
        """
        return self.layout.decode(self.layout.encode(logits))

    def close(self) -> None:
        """Stop being the writer, and let go of the files."""
        self._files.clear()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _open(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"the teacher's answers cannot be kept in {self.folder}: {error.strerror}"
            ) from error
        self._elect()
        try:
            if self.writes:
                check_room(self.folder, self.samples, self.views, self.layout)
            self._settle()
        except BaseException:
            self.close()
            raise

    def _elect(self) -> None:
        """Become the writer, if there is none."""
        lock = FileLock(self.folder / f"writer-{self.rank}.lock", thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return
        except OSError as error:
            if not self._said_unwritable:
                log.warning("%s is only read: %s", self.folder, error)
            self._said_unwritable = True
            return
        self._lock = lock
        self._files.clear()  # they are mapped for reading
        self._settled = False

    def _settle(self) -> None:
        """Find out whether the folder is this store's; rank 0's writer makes it so.

        A folder that does not say what it holds is not trusted with anything.
        """
        known = read_identity(self.folder / ABOUT)
        if known is None and self.writes and self.rank == 0:
            for path in self.folder.glob("view-*.bin"):
                path.unlink()
            write_identity(self.folder / ABOUT, self.identity)
            known = self.identity
        if known is not None and known != self.identity:
            differing = difference(known, self.identity)
            raise ValueError(f"{self.folder} holds other answers of a teacher: {differing}")
        self._settled = known is not None

    def _may_write(self) -> bool:
        if not self.writes:
            self._elect()
        if self.writes and not self._settled:
            self._settle()
        return self.writes and self._settled

    def _file(self, view: int, make: bool = False) -> ViewFile | None:
        """Return a view's file, or None where there is none yet."""
        if view in self._files:
            return self._files[view]
        path, size = self.folder / f"view-{view:04}.bin", self.samples * self._size
        if path.is_symlink():
            raise ValueError(f"{path} is a link: a store's files lie in its folder")
        if make:
            reserve(path, size)
        if not path.is_file() or path.stat().st_size < size or not self._trusted():
            return None
        start = crc32(f"{store_name(self.identity)} {view}".encode())
        self._files[view] = ViewFile(path, self.samples, self._size, start, self.writes)
        return self._files[view]

    def _trusted(self) -> bool:
        if not self._settled:
            self._settle()
        return self._settled

    def _there(self, view: int, rows: Array) -> Array:
        file = self._file(view)
        if file is None:
            return np.zeros(len(rows), bool)
        there, damaged = file.check(rows)
        if damaged.any():
            self._report(view, rows[damaged])
        return there

    def _report(self, view: int, rows: Array) -> None:
        """Count damaged records, and say so once per view."""
        if view not in self._found_damaged:
            log.warning(
                "%s: view %d, row %d is damaged (%d of the rows just read): its answer is computed "
                "again",
                *(self.folder, view, rows[0], len(rows)),
            )
        self._found_damaged.setdefault(view, set()).update(rows.tolist())

    def _places(self, view: int, rows: Tensor) -> Array:
        if not 0 <= view < self.views:
            raise ValueError(f"the store has no view {view}: they go from 0 to {self.views - 1}")
        places: Array = rows.cpu().numpy()
        if len(places) and (places.min() < 0 or places.max() >= self.samples):
            worst = places.min() if places.min() < 0 else places.max()
            raise ValueError(f"the store has no row {worst}: they go from 0 to {self.samples - 1}")
        return places


def store_name(facts: Mapping[str, Any]) -> str:
    """Return 16 hex digits that change with any of the facts."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return sha256(text.encode()).hexdigest()[:16]


def store_folder(
    root: str | Path,
    facts: Mapping[str, Any],
    samples: int,
    classes: int,
    dtype: str = "float16",
    topk: int | None = None,
) -> Path:
    """Return the folder under `root` of the store of these facts, which no other store has."""
    asked = identity(facts, samples, Layout(classes, dtype, topk))
    return Path(root) / f"answers-{store_name(asked)}"


def expected_bytes(
    samples: int, classes: int, views: int, dtype: str = "float16", topk: int | None = None
) -> int:
    """Return how many bytes a complete store takes."""
    return samples * views * Layout(classes, dtype, topk).record.itemsize


def describe(
    samples: int, classes: int, views: int, dtype: str = "float16", topk: int | None = None
) -> str:
    """Return what a store holds and takes, for people."""
    kept = f"{classes:,} classes" if topk is None else f"{topk:,} of {classes:,} classes"
    plural = "" if views == 1 else "s"
    size = size_text(expected_bytes(samples, classes, views, dtype, topk))
    return f"{samples:,} images × {views:,} view{plural} × {kept} in {dtype}: {size}"


def size_text(count: int) -> str:
    """Return a number of bytes for people."""
    unit, name = next(
        (unit for unit in ((10**9, "GB"), (10**6, "MB")) if count >= unit[0]), (10**3, "kB")
    )
    return f"{count / unit:,.1f} {name}"


def identity(facts: Mapping[str, Any], samples: int, layout: Layout) -> dict[str, Any]:
    """Return what tells one store from another, as JSON gives it back."""
    whole: dict[str, Any] = {"format": FORMAT, "samples": samples, "classes": layout.classes}
    whole |= {"dtype": layout.dtype, "topk": layout.topk, "facts": facts}
    plain: dict[str, Any] = json.loads(json.dumps(whole, default=str))
    return plain


def write_identity(path: Path, about: Mapping[str, Any]) -> None:
    """Write what a store is, with its own hash."""
    text = json.dumps({"name": store_name(about), **about}, indent=2, ensure_ascii=False)
    write_whole(path, text + "\n")


def read_identity(path: Path) -> dict[str, Any] | None:
    """Return what a store says it is; None where it does not, or is damaged."""
    try:
        if path.is_symlink() or not path.is_file():
            return None
        about = json.loads(path.read_bytes())
        name = about.pop("name")
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None
    return about if name == store_name(about) else None


def difference(known: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Return the first fact that two stores do not share, for people."""
    ours, theirs = ({**about, **about["facts"], "facts": None} for about in (asked, known))
    key = next(key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key))
    return f"{key} is {theirs.get(key)!r} there, and {ours.get(key)!r} here"


def check_counts(samples: int, views: int) -> None:
    """Refuse a store of nothing."""
    for name, count in (("samples", samples), ("views", views)):
        if count < 1:
            raise ValueError(f"store.{name} must be at least 1, got {count}")


def check_size(samples: int, views: int, layout: Layout, max_gb: float | None) -> None:
    """Refuse a store that would grow larger than is allowed."""
    shape = (samples, layout.classes, views, layout.dtype, layout.topk)
    if max_gb is not None and expected_bytes(*shape) > max_gb * 1e9:
        raise ValueError(
            f"the teacher's answers ({describe(*shape)}) are more than store.max_gb={max_gb:g}: "
            "raise it, lower store.views or set store.topk"
        )


def check_room(folder: Path, samples: int, views: int, layout: Layout) -> None:
    """Refuse a store that the disk cannot hold, with as much again to spare up to a gigabyte."""
    shape = (samples, layout.classes, views, layout.dtype, layout.topk)
    taken = sum(path.stat().st_size for path in folder.glob("view-*.bin"))
    needed = max(0, expected_bytes(*shape) - taken)
    free = shutil.disk_usage(folder).free
    if free < needed + min(needed, SPARE_BYTES):
        raise ValueError(
            f"the teacher's answers ({describe(*shape)}) need {size_text(needed)} more, and "
            f"{folder} has {size_text(free)} free: lower store.views or set store.topk"
        )


def reserve(path: Path, size: int) -> None:
    """Give a file its full size, and the disk space with it.

    Where a disk is full, a process that writes through a map into a hole is killed by the system;
    here it is told.
    """
    try:
        with path.open("ab") as file:
            if os.fstat(file.fileno()).st_size >= size:
                return
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
    except OSError as error:
        raise ValueError(
            f"{path} cannot grow to {size_text(size)}: {error.strerror}; lower store.views or set "
            "store.topk"
        ) from error
