"""What a cluster says before it takes a machine away: SIGTERM and SIGUSR1 end a command tidily.

Outside training a command ends at once. A run that keeps checkpoints asks for time (`deferred`),
writes one after the batch it is at, and then ends (`Preempted`).

Ctrl-C ends a command at once too. Python forgets the exception that it raises while it finalises an
object, which a training loop does much of the time: it is remembered here (`raise_lost_interrupt`).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Preempted(BaseException):
    """The command was told to end; a `BaseException`, as no `except Exception` may keep it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.advice = ""  # how to go on, for people


class _State:
    owner: int | None = None  # the process that listens
    received: str | None = None
    deferrals = 0
    interrupted = False


@contextmanager
def heeded() -> Iterator[None]:
    """Listen inside; what was there before is there again afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    _State.owner, _State.received, _State.deferrals = os.getpid(), None, 0
    _State.interrupted = False
    if (ctrl_c := signal.getsignal(signal.SIGINT)) is signal.default_int_handler:
        before[signal.SIGINT] = ctrl_c
        signal.signal(signal.SIGINT, _interrupt)
    listen()
    try:
        yield
    finally:
        _State.owner = _State.received = None
        for number, handler in before.items():
            signal.signal(number, handler)


def listen() -> None:
    """Take the signals back from a library that has put its own handlers in our handlers' place."""
    if _State.owner == os.getpid():
        for number in SIGNALS:
            signal.signal(number, _receive)


@contextmanager
def deferred(needed: bool = True) -> Iterator[None]:
    """Let what runs inside end by itself, where it asks `pending`."""
    if not needed:
        yield
        return
    _State.deferrals += 1
    try:
        yield
    finally:
        _State.deferrals -= 1


def pending() -> bool:
    """Return whether the process has been told to end."""
    return _State.received is not None


def stop_if_told() -> None:
    """End here, if the process has been told to.

    Raises:
        Preempted: then.
        KeyboardInterrupt: after a Ctrl-C that Python has forgotten.
    """
    raise_lost_interrupt()
    if _State.received is not None:
        raise Preempted(_State.received)


def raise_lost_interrupt() -> None:
    """Raise the `KeyboardInterrupt` of a Ctrl-C that Python has forgotten."""
    if _State.interrupted and _State.owner == os.getpid():
        raise KeyboardInterrupt


def _interrupt(number: int, frame: FrameType | None) -> None:
    _State.interrupted = True
    signal.default_int_handler(number, frame)


def _receive(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _State.owner:  # a forked data worker, whose parent will end it
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    first = _State.received is None
    _State.received = _State.received or signal.Signals(number).name
    if first and not _State.deferrals:
        stop_if_told()
