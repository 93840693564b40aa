"""What runs in one process share, and whose turn it is.

Runs of a fused sweep (`distill.sweep.lockstep`) take turns, batch by batch: whatever is the same
for all of them is made by the first that asks. What is shared is looked up by what it was made
from, never by whose turn it is, so that a run gets what it would have made alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
WINDOW = 4  # batches that a stream keeps, and answers that are kept: runs are at most one apart


class Sharing:
    """A run's part in what runs of one process share; that of a run that is alone is empty.

    Args:
        switch: lets the other runs have their turns, and returns when it is this one's again; None
            for a run that is alone.
        made: what the runs have made once, the same object for all of them.
    """

    def __init__(
        self, switch: Callable[[], None] | None = None, made: dict[Hashable, Any] | None = None
    ) -> None:
        self.switch = switch
        self.made = {} if made is None else made
        self.held = 0  # how many have requested that the turn does not end
        self.away = 0.0  # seconds spent waiting for the other runs

    @property
    def active(self) -> bool:
        """Whether there are others to share with."""
        return self.switch is not None

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what `make` returns, made once for all runs that ask with the same key."""
        if not self.active:
            return make()
        if key not in self.made:
            with self.hold_turn():
                self.made[key] = make()
        return self.made[key]

    @contextmanager
    def hold_turn(self) -> Iterator[None]:
        """Keep the turn, as a run must while it holds a lock that the others will ask for."""
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1

    def next_turn(self) -> None:
        """Let the other runs do as much as this one has done since its last turn."""
        if self.switch is None or self.held:
            return
        left = time.perf_counter()
        self.switch()
        self.away += time.perf_counter() - left

    def clock(self) -> float:
        """Return a time in seconds that stands still while others have their turns."""
        return time.perf_counter() - self.away


class Recent:
    """The last few answers to objects that runs which share ask about one after the other.

    An object is identified by what it is, not by what it equals: comparing two batches would cost
    more than it saves, and on a GPU would wait for it.
    """

    def __init__(self) -> None:
        self.kept: deque[tuple[object, Hashable, Any]] = deque(maxlen=WINDOW)

    def answer(self, subject: object, detail: Hashable, make: Callable[[], T]) -> T:
        """Return what `make` returns, or has returned for this object and detail."""
        for other, extra, answer in self.kept:
            if other is subject and extra == detail:
                return answer
        answer = make()
        self.kept.append((subject, detail, answer))
        return answer


class Streams:
    """Sequences that several runs go through at nearly the same time, each made once."""

    def __init__(self) -> None:
        self.open: dict[Hashable, _Stream] = {}

    def through(
        self, key: Hashable, begin: Callable[[int], Iterator[T]], sharing: Sharing
    ) -> Iterator[T]:
        """Yield the items of a sequence, beginning each in a turn of its own.

        Args:
            key: names the sequence.
            begin: position → the items from there on. A run that has fallen behind the others
                goes on by itself.
            sharing: the part of the run that goes through it.
        """
        if not sharing.active:
            yield from begin(0)
            return
        sharing.next_turn()
        stream = self.open.get(key)
        if stream is None or stream.first > 0:
            stream = self.open[key] = _Stream(begin(0), 0)
            while len(self.open) > WINDOW:
                self.open.pop(next(iter(self.open)))
        position = 0
        while True:
            if position < stream.first:
                stream = _Stream(begin(position), position)
            try:
                item = stream.item(position)
            except StopIteration:
                return
            yield item
            position += 1
            sharing.next_turn()


class _Stream:
    def __init__(self, items: Iterator[Any], first: int) -> None:
        self.items, self.first = items, first
        self.kept: deque[Any] = deque()
        self.error: Exception | None = None

    def item(self, position: int) -> Any:
        while self.first + len(self.kept) <= position:
            if self.error is not None:  # a run alone would have met it here too
                raise self.error
            try:
                self.kept.append(next(self.items))
            except StopIteration:
                raise
            except Exception as error:
                self.error = error
                raise
            if len(self.kept) > WINDOW:
                self.kept.popleft()
                self.first += 1
        return self.kept[position - self.first]
