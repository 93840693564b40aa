"""The teacher's answers on disk, so that a teacher is paid for once.

A store is a folder: `store.json` says whose answers to what they are, and `view-0003.bin` holds
the logits of view 3 as records of one size, one per sample. A view of many samples is divided among
several files, `view-0003-part-0000.bin` and so on, see `room.files_of_view`. Each record carries a
checksum that is keyed by the store, the view and the row, so nothing else has to be kept in step: a
record that is absent, half-written, damaged or in the wrong place is a record that is not there,
and is written again. Killing a process at any moment leaves a correct store.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from distill.teacher.claims import STALE, Claims
from distill.teacher.records import Array, Fields, Layout, ViewFile
from distill.teacher.room import check_room, check_size, files_of_view, reserve
from distill.teacher.store_folder import (
    ABOUT,
    StoreFolder,
    identity,
    read_identity,
    store_name,
)

log = logging.getLogger(__name__)

CHUNK_BYTES = 2**24
MOST_OPEN = 256  # files, each of which takes one of the process's file descriptors


@dataclass(frozen=True)
class Part:
    """What one file of a store holds, and one process fills at a time.

    Args:
        view: whose answers.
        number: of the file among those of its view.
        rows: of the view.
    """

    view: int
    number: int
    rows: range


class TeacherStore:
    """The teacher's logits for every view of every sample, filled as they are computed.

    Any number of processes read a store while one writes it: whoever holds the folder's lock,
    until `close` or its end. Another's writes are skipped, and it becomes the writer at its next
    write once the lock is free. The ranks of one run answer for different samples (or, where
    classes are balanced, at most write the same answer twice), so each `rank` has a writer of its
    own; rank 0 makes the folder. How many views there are is no part of a store's identity: a
    longer run goes on where a shorter one ended.

    To fill a store ahead of its use any number of processes of any machines open it as `shared`:
    none is the writer, and each writes the files that it has claimed, one at a time (`claim`).

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
        files: in how many files a view is kept; None decides by `files_of_view`, but leaves a
            folder that has one as it is.
        shared: whether processes fill it together, each what it has claimed.
        stale: seconds without a sign of life after which a claim is taken over.

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
        files: int | None = None,
        shared: bool = False,
        stale: float = STALE,
    ) -> None:
        self.samples, self.views = samples, views
        self.layout = Layout(classes, dtype, topk)
        self._size = self.layout.record.itemsize
        self._files: dict[tuple[int, int, bool], ViewFile] = {}
        self._found_damaged: dict[int, set[int]] = {}
        check_counts(samples, views)
        check_size(samples, views, self.layout, max_gb)
        self.files = files or files_there(Path(folder), facts, samples, self.layout)
        self._rows_per_file = -(-samples // self.files)
        about = identity(facts, samples, self.layout, self.files)
        self._folder = StoreFolder(folder, about, rank)
        self._claims = Claims(self.folder, stale) if shared else None
        self._claimed: Part | None = None
        try:
            if self.writes or shared:
                check_room(self.folder, samples, views, self.layout)
            if shared:
                self._folder.share()
            else:
                self._folder.settle()
        except BaseException:
            self.close()
            raise

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
    def folder(self) -> Path:
        """Where the store is."""
        return self._folder.path

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this store from others."""
        return self._folder.identity

    @property
    def writes(self) -> bool:
        """Whether this process is the writer now."""
        return self._folder.writes

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
        there = np.zeros(len(places), bool)
        records = np.zeros((len(places), self._size), np.uint8)
        for number, here in self._by_file(places):
            if (file := self._file(view, number)) is not None:
                there[here] = self._checked(view, number, file, places[here])
                records[here] = file.take(places[here] - self._first(number), there[here])
        sound = self.layout.sound(self.layout.unpack(records)).numpy()
        records[~sound] = 0
        return self.layout.unpack(records), torch.from_numpy(there & sound)

    def parts(self, view: int) -> list[Part]:
        """Return what each file of a view holds."""
        starts = range(0, self.samples, self._rows_per_file)
        stops = (min(start + self._rows_per_file, self.samples) for start in starts)
        return [
            Part(view, number, range(*ends))
            for number, ends in enumerate(zip(starts, stops, strict=True))
        ]

    def claim(self, part: Part) -> bool:
        """Claim a file of a shared store, and return whether this process may write it now."""
        assert self._claims is not None
        if not self._claims.take(self._path(part.view, part.number).stem):
            return False
        self._claimed = part
        return True

    def still_claimed(self) -> bool:
        """Give a sign of life, and return whether what was claimed is still this process's."""
        assert self._claims is not None
        return self._claims.beat()

    def release(self) -> None:
        """Let go of what was claimed, and of the file."""
        assert self._claims is not None
        if self._claimed is not None:
            self._files.pop((self._claimed.view, self._claimed.number, True), None)
            self._claims.release()
            self._claimed = None

    def write(self, view: int, rows: Tensor, logits: Tensor) -> Tensor:
        """Keep the logits of a view's rows that are not there yet, if this process is the writer.

        Of a shared store those are kept that lie in the file which was claimed.

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
        writable = [(n, here) for n, here in self._by_file(places) if self._may_write(view, n)]
        records = self.layout.pack(fields) if writable else None
        for number, here in writable:
            file = self._file(view, number, make=True)
            assert file is not None
            assert records is not None
            missing = ~self._checked(view, number, file, places[here])
            rows_of_file = places[here] - self._first(number)
            file.put(rows_of_file[missing], records[here][missing])
        return self.layout.decode(fields)

    def rounded(self, logits: Tensor) -> Tensor:
        """Return logits `[n, K]` as a later read would, float32, on their device.

        Raises:
            ValueError: if they are NaN, infinite, or beyond what the store's dtype holds.
        """
        return self.layout.decode(self.layout.encode(logits))

    def close(self) -> None:
        """Stop being the writer, and let go of the files."""
        if self._claims is not None:
            self.release()
        self._files.clear()
        self._folder.release()

    def _may_write(self, view: int, number: int) -> bool:
        if self._claims is None:
            return self._folder.may_write()
        claimed = self._claimed
        return claimed is not None and (claimed.view, claimed.number) == (view, number)

    def _by_file(self, places: Array) -> Iterator[tuple[int, Any]]:
        """Yield the number of each file that holds some of the rows, and which of them it does."""
        if self.files == 1:
            yield 0, slice(None)
            return
        numbers = places // self._rows_per_file
        for number in np.unique(numbers).tolist():
            yield number, np.flatnonzero(numbers == number)

    def _first(self, number: int) -> int:
        """Return the first row of a file."""
        return number * self._rows_per_file

    def _path(self, view: int, number: int) -> Path:
        part = "" if self.files == 1 else f"-part-{number:04}"
        return self.folder / f"view-{view:04}{part}.bin"

    def _file(self, view: int, number: int, make: bool = False) -> ViewFile | None:
        """Return a file of a view, or None where there is none yet."""
        # Who becomes the writer maps the files anew.
        key = view, number, self._may_write(view, number) if self._claims else self.writes
        if key in self._files:
            return self._files[key]
        first = self._first(number)
        count = min(self._rows_per_file, self.samples - first)
        path, size = self._path(view, number), count * self._size
        if path.is_symlink():
            raise ValueError(f"{path} is a link: a store's files lie in its folder")
        if make:
            reserve(path, size)
        if not path.is_file() or path.stat().st_size < size or not self._folder.settle():
            return None
        start = crc32(f"{store_name(self.identity)} {view}".encode()) + first
        while len(self._files) >= max(MOST_OPEN, self.files):
            self._files.pop(next(iter(self._files)))
        self._files[key] = ViewFile(path, count, self._size, start, key[2])
        return self._files[key]

    def _there(self, view: int, rows: Array) -> Array:
        there = np.zeros(len(rows), bool)
        for number, here in self._by_file(rows):
            if (file := self._file(view, number)) is not None:
                there[here] = self._checked(view, number, file, rows[here])
        return there

    def _checked(self, view: int, number: int, file: ViewFile, rows: Array) -> Array:
        """Return which rows of a view, all of one file, are there; bool `[n]`."""
        there, damaged = file.check(rows - self._first(number))
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


def store_folder(
    root: str | Path,
    facts: Mapping[str, Any],
    samples: int,
    classes: int,
    dtype: str = "float16",
    topk: int | None = None,
) -> Path:
    """Return the folder under `root` of the store of these facts, which no other store has.

    One that was made when views had one file each is that store, too.
    """
    layout = Layout(classes, dtype, topk)
    counts = (1, files_of_view(samples, layout.record.itemsize))
    before, now = (
        Path(root) / f"answers-{store_name(identity(facts, samples, layout, files))}"
        for files in counts
    )
    return before if (before / ABOUT).is_file() else now


def files_there(folder: Path, facts: Mapping[str, Any], samples: int, layout: Layout) -> int:
    """Return in how many files a folder keeps each view, or will where it is new."""
    if read_identity(folder / ABOUT) == identity(facts, samples, layout):
        return 1
    return files_of_view(samples, layout.record.itemsize)


def check_counts(samples: int, views: int) -> None:
    """Refuse a store of nothing."""
    for name, count in (("samples", samples), ("views", views)):
        if count < 1:
            raise ValueError(f"store.{name} must be at least 1, got {count}")
