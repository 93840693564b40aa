"""Many strings as two arrays, which data workers read without copying any of their memory.

A worker that reads a list of objects writes to each, as Python counts who refers to it, and so
comes to own a copy of the page that it lies in: over an epoch, one of the whole list.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

AT_ONCE = 1 << 14  # strings that are taken together


@dataclass(frozen=True, eq=False)
class PackedStrings(Sequence[str]):
    """Strings that lie one behind the other, to be read as a list of them is.

    Args:
        text: their UTF-8 bytes, uint8 `[bytes]`; of file names also what is no UTF-8.
        ends: where each ends, int64 `[N]`.
    """

    text: npt.NDArray[np.uint8]
    ends: npt.NDArray[np.int64]

    @classmethod
    def of(cls, strings: Iterable[str]) -> PackedStrings:
        """Return these strings packed."""
        text, ends = bytearray(), array("q")
        for string in strings:
            text += string.encode(errors="surrogateescape")
            ends.append(len(text))
        return cls(np.frombuffer(text, np.uint8), np.frombuffer(ends, np.int64))

    @classmethod
    def at(cls, places: npt.NDArray[Any], strings: Sequence[str]) -> PackedStrings:
        """Return the strings at these places, int64 `[n]`, of any sequence."""
        if isinstance(strings, PackedStrings):
            return strings.take(places)
        return cls.of(strings[place] for place in places.tolist())

    @classmethod
    def joined(cls, parts: Sequence[PackedStrings]) -> PackedStrings:
        """Return the strings of these, one after the other."""
        lengths = [part.lengths for part in parts]
        none = np.empty(0, np.int64)
        text = np.concatenate([np.empty(0, np.uint8), *(part.text for part in parts)])
        return cls(text, np.concatenate([none, *lengths]).cumsum())

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """How many bytes each has, int64 `[N]`."""
        return np.diff(self.ends, prepend=0)

    @property
    def sound(self) -> bool:
        """Whether arrays that were read from a file are strings."""
        kinds = (self.text.dtype, self.ends.dtype) == (np.uint8, np.int64)
        if not kinds or self.text.ndim != 1 or self.ends.ndim != 1:
            return False
        end = int(self.ends[-1]) if len(self.ends) else 0
        return end == len(self.text) and bool((self.lengths >= 0).all())

    def same(self, other: PackedStrings) -> bool:
        """Whether others are these strings, in this order."""
        return np.array_equal(self.ends, other.ends) and np.array_equal(self.text, other.text)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> PackedStrings: ...
    def __getitem__(self, place: int | slice) -> str | PackedStrings:
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        end = self.ends[place]
        start = self.ends[place - 1] if place % len(self) else 0
        return self._decoded(int(start), int(end))

    def __iter__(self) -> Iterator[str]:
        start = 0
        for begin in range(0, len(self), AT_ONCE):
            for end in self.ends[begin : begin + AT_ONCE].tolist():
                yield self._decoded(start, end)
                start = end

    def take(self, places: npt.NDArray[Any]) -> PackedStrings:
        """Return the strings at these places, int64 `[n]`."""
        lengths = self.lengths
        starts, chosen = (self.ends - lengths)[places], lengths[places]
        text = np.empty(chosen.sum(), np.uint8)
        filled = 0
        for begin in range(0, len(chosen), AT_ONCE):  # there is a number for each of their bytes
            some = slice(begin, begin + AT_ONCE)
            ends = chosen[some].cumsum()
            # Byte j of a string lies j after its start, here as there.
            bytes_at = np.repeat(starts[some] - ends + chosen[some], chosen[some])
            bytes_at += np.arange(len(bytes_at))
            text[filled : filled + len(bytes_at)] = self.text[bytes_at]
            filled += len(bytes_at)
        return PackedStrings(text, chosen.cumsum())

    def _decoded(self, start: int, end: int) -> str:
        return self.text[start:end].tobytes().decode(errors="surrogateescape")
