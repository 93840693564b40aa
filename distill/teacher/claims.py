"""Which process fills which file of a store: claims that also hold on a network file system.

A claim is a file that is made exclusively, which every file system grants to one process alone, on
whatever machine. It is written under another name and then linked, so that it says whose it is from
its first moment on: a process may be killed at any time. Its number says how often the work was
claimed before: who finds the last claim of a process that has ended makes the next, which again one
process alone can. So nothing is ever removed that somebody else might just have made, but for
drafts, without which their process finds that it was too late.

A claim keeps two processes from doing the same work. It protects nothing: should both do it, after
one that was thought dead wakes up, they write the same answers to the same places.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

log = logging.getLogger(__name__)

FOLDER = "claims"
STALE = 600.0  # seconds without a sign of life, after which a process of another machine has ended
BEAT = 20.0  # seconds between signs of life


@dataclass(frozen=True)
class Owner:
    """A process, so that it is told from another that was given its number later.

    Args:
        machine: where it runs, see `this_machine`.
        pid: its number there.
        started: when it began, in ticks since the machine did; None where nobody can say.
    """

    machine: str
    pid: int
    started: int | None

    @property
    def ended(self) -> bool:
        """Whether it is known to have ended: nothing is known of other machines."""
        return self.machine == this_machine() and not is_running(self.pid, self.started)


class Claims:
    """The claims of one process on the work of a folder, of which it holds one at a time.

    Args:
        folder: the store's; claims lie in a folder of their own there.
        stale: seconds without a sign of life after which work is taken over.
    """

    def __init__(self, folder: Path, stale: float = STALE) -> None:
        self.folder, self.stale = folder / FOLDER, stale
        self.held: str | None = None
        self._number = 0
        self._last_beat = 0.0

    def take(self, name: str) -> bool:
        """Claim a piece of work, and return whether it is this process's now."""
        assert self.held is None
        self.folder.mkdir(parents=True, exist_ok=True)
        before = self._latest(name)
        if before is not None and self._lives(self._path(name, before)):
            return False
        number = 0 if before is None else before + 1
        if not made(self._path(name, number)):
            return False
        self.held, self._number, self._last_beat = name, number, time.monotonic()
        if before is not None:
            log.info("teacher store: %s is taken over from a process that ended", name)
        return True

    def beat(self) -> bool:
        """Give a sign of life, and return whether the work is still this process's."""
        assert self.held is not None
        if time.monotonic() - self._last_beat < BEAT:
            return True
        self._last_beat = time.monotonic()
        try:
            os.utime(self._path(self.held, self._number))
        except FileNotFoundError:
            return False
        return self._latest(self.held) == self._number

    def release(self) -> None:
        """Let go of what is held, with what processes before have left of their claims on it."""
        if self.held is None:
            return
        for draft in self.folder.glob(f".{self.held}.[0-9]*"):
            draft.unlink(missing_ok=True)
        for number in range(self._number + 1):  # the own one last: others look for the largest
            self._path(self.held, number).unlink(missing_ok=True)
        self.held = None

    def _path(self, name: str, number: int) -> Path:
        return self.folder / f"{name}.{number:04}"

    def _latest(self, name: str) -> int | None:
        numbers = [int(path.suffix[1:]) for path in self.folder.glob(f"{name}.[0-9]*")]
        return max(numbers, default=None)

    def _lives(self, path: Path) -> bool:
        """Whether a claim's process goes on with its work, as far as can be told."""
        try:
            age = self._now() - path.stat().st_mtime
            owner = read_owner(path)
        except FileNotFoundError:  # it was just released
            return True
        return age < self.stale and not (owner is not None and owner.ended)

    def _now(self) -> float:
        """Return the time by the clock that dates files here, which may be another machine's."""
        clock = self.folder / f".clock-{socket.gethostname()}-{os.getpid()}"
        clock.touch()
        now = clock.stat().st_mtime
        clock.unlink(missing_ok=True)
        return now


def made(path: Path) -> bool:
    """Make a claim of this process, and return whether nobody else had made it before."""
    content = json.dumps({**asdict(this_process()), "time": time.strftime("%F %T %z")})
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        draft.write_text(content)
        os.link(draft, path)
    except FileExistsError:  # or it was granted, and a network has asked once more
        return are_one_file(draft, path)
    except FileNotFoundError:  # who had claimed it let go meanwhile, and cleared up
        return False
    except OSError:  # there are no links on this file system
        return made_exclusively(path, content)
    finally:
        draft.unlink(missing_ok=True)
    return True


def made_exclusively(path: Path, content: str) -> bool:
    """Make a file and then write it, and return whether it was not there before."""
    try:
        with path.open("x") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def are_one_file(one: Path, other: Path) -> bool:
    """Whether two names are those of one file."""
    try:
        return one.samefile(other)
    except FileNotFoundError:
        return False


def read_owner(path: Path) -> Owner | None:
    """Return whose a claim is; None where it was not written to its end, or by nobody here."""
    try:
        about = json.loads(path.read_text())
        return Owner(str(about["machine"]), int(about["pid"]), about["started"])
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        return None


def this_process() -> Owner:
    """Return the process that asks."""
    return Owner(this_machine(), os.getpid(), start_of(os.getpid()))


def this_machine() -> str:
    """Return a name for where a number means the same process: containers count their own."""
    try:
        processes = os.readlink("/proc/self/ns/pid")
    except OSError:
        processes = ""
    return f"{socket.gethostname()} {processes}".strip()


def is_running(pid: int, started: int | None) -> bool:
    """Whether a process of this machine goes on; where it cannot be told, it does."""
    if Path("/proc/self/stat").exists():
        now = start_of(pid)
        return now is not None and started in (None, now)
    if os.name == "nt":  # where a signal of 0 is one
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def start_of(pid: int) -> int | None:
    """Return when a process began, in ticks; None where it has ended, or nobody can say."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(rest[18])
