"""The teacher's answers on disk, so that a teacher is paid for once.

A store is a folder: `store.json` says whose answers to what they are, and `view-0003.bin` holds
the logits of view 3 as records of one size, one per sample. Each record carries a checksum that is
keyed by the store, the view and the row, so nothing else has to be kept in step: a record that is
absent, half-written, damaged or in the wrong place is a record that is not there, and is written
again. Killing a process at any moment leaves a correct store.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from distill.teacher.records import Array, Fields, Layout, ViewFile
from distill.teacher.room import check_room, check_size, reserve
from distill.teacher.store_folder import StoreFolder, identity, store_name

log = logging.getLogger(__name__)

CHUNK_BYTES = 2**24


class TeacherStore:
    """The teacher's logits for every view of every sample, filled as they are computed.

    Any number of processes read a store while one writes it: whoever holds the folder's lock,
    until `close` or its end. Another's writes are skipped, and it becomes the writer at its next
    write once the lock is free. The ranks of one run answer for different samples (or, where
    classes are balanced, at most write the same answer twice), so each `rank` has a writer of its
    own; rank 0 makes the folder. How many views there are is no part of a store's identity: a
    longer run goes on where a shorter one ended.

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
        self.samples, self.views = samples, views
        self.layout = Layout(classes, dtype, topk)
        self._size = self.layout.record.itemsize
        self._files: dict[tuple[int, bool], ViewFile] = {}
        self._found_damaged: dict[int, set[int]] = {}
        check_counts(samples, views)
        check_size(samples, views, self.layout, max_gb)
        self._folder = StoreFolder(folder, identity(facts, samples, self.layout), rank)
        try:
            if self.writes:
                check_room(self.folder, samples, views, self.layout)
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
        if self._folder.may_write():
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
        self._folder.release()

    def _file(self, view: int, make: bool = False) -> ViewFile | None:
        """Return a view's file, or None where there is none yet."""
        key = view, self.writes  # who becomes the writer maps the files anew
        if key in self._files:
            return self._files[key]
        path, size = self.folder / f"view-{view:04}.bin", self.samples * self._size
        if path.is_symlink():
            raise ValueError(f"{path} is a link: a store's files lie in its folder")
        if make:
            reserve(path, size)
        if not path.is_file() or path.stat().st_size < size or not self._folder.settle():
            return None
        start = crc32(f"{store_name(self.identity)} {view}".encode())
        self._files[key] = ViewFile(path, self.samples, self._size, start, self.writes)
        return self._files[key]

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


def check_counts(samples: int, views: int) -> None:
    """Refuse a store of nothing."""
    for name, count in (("samples", samples), ("views", views)):
        if count < 1:
            raise ValueError(f"store.{name} must be at least 1, got {count}")
