"""Where the bytes of images lie: whole files, or parts of one as in a tar; as arrays for many."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distill.data.sources.listing import relative
from distill.data.sources.packed import PackedStrings

THREADS = 8
AT_ONCE = 4096  # files that a thread looks at before it hands on what it has found
Stamp = tuple[int, int, int, int]  # bytes, then ns of the last change, of that of the inode, inode
STAMP = 4  # numbers in it
GONE: Stamp = (-1, -1, -1, -1)  # of a file that is not there

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Piece:
    """The bytes of one image: a file, or a part of one.

    Args:
        path: the file.
        start: where the image begins in it.
        size: how many bytes it has; None reads to the end.
        inside: what the part is called in the file.
    """

    path: Path
    start: int = 0
    size: int | None = None
    inside: str = ""

    def read(self) -> bytes:
        """Return the bytes."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read() if self.size is None else file.read(self.size)

    def shown(self, root: Path) -> str:
        """Return what a person finds it by."""
        return "/".join(filter(None, (relative(self.path, root), self.inside)))


class Pieces:
    """Where many images lie under a root, as arrays.

    Args:
        root: the folder that files are named from.
        files: the path of each image's file from there, with `/`; whole where it lies elsewhere.
        parts: of images that are parts of files, where each begins in its file and how many bytes
            it has, int64 `[N, 2]`; None for whole files.
        inside: what each such part is called in its file.
    """

    def __init__(
        self,
        root: Path,
        files: PackedStrings,
        parts: Array | None = None,
        inside: PackedStrings | None = None,
    ) -> None:
        self.root, self.files, self.parts, self.inside = root, files, parts, inside

    @classmethod
    def of(cls, root: Path, pieces: Iterable[Piece]) -> Pieces:
        """Return these pieces as arrays: all whole files, or all parts of some."""
        pieces = list(pieces)
        files = PackedStrings.of(relative(piece.path, root) for piece in pieces)
        if all(piece.size is None for piece in pieces):
            return cls(root, files)
        parts = np.array([(piece.start, piece.size) for piece in pieces], np.int64)
        return cls(root, files, parts, PackedStrings.of(piece.inside for piece in pieces))

    @classmethod
    def joined(cls, several: Sequence[Pieces]) -> Pieces:
        """Return these, all of one root and of one kind, one after the other."""
        first = several[0]
        files = PackedStrings.joined([one.files for one in several])
        if first.parts is None or first.inside is None:
            return cls(first.root, files)
        parts = np.concatenate([one.parts for one in several if one.parts is not None])
        inside = [one.inside for one in several if one.inside is not None]
        return cls(first.root, files, parts, PackedStrings.joined(inside))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int) -> Piece:
        path = self.root / self.files[place]
        if self.parts is None or self.inside is None:
            return Piece(path)
        start, size = self.parts[place].tolist()
        return Piece(path, start, size, self.inside[place])

    @cached_property
    def names(self) -> PackedStrings:
        """What names each under the root, wherever that lies."""
        if self.parts is None:
            return self.files
        named = zip(self.files, self.parts.tolist(), strict=True)
        return PackedStrings.of(f"{file}#{start}+{size}" for file, (start, size) in named)

    def stamps(self) -> Array:
        """Return what tells a change of each one's file, int64 `[N, STAMP]`."""
        begins = range(0, len(self), AT_ONCE)
        with ThreadPoolExecutor(THREADS) as threads:
            parts = list(threads.map(self._stamps, begins))
        return np.concatenate(parts) if parts else np.empty((0, STAMP), np.int64)

    def sizes(self, stamps: Array) -> Array:
        """Return how many bytes each has, int64 `[N]`, by the stamps of their files."""
        return stamps[:, 0].clip(0) if self.parts is None else self.parts[:, 1]

    def _stamps(self, begin: int) -> Array:
        root, stamps = str(self.root), []
        before, stamp = "", GONE
        for file in self.files[begin : begin + AT_ONCE]:
            if file != before:  # the parts of a tar follow each other
                before, stamp = file, stamp_of(os.path.join(root, file))
            stamps.append(stamp)
        return np.array(stamps, np.int64)


def stamp_of(path: Path | str) -> Stamp:
    """Return what tells that a file has changed."""
    try:
        status = os.stat(path)
    except OSError:
        return GONE
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
