"""The folder of a store: whose answers it holds, and which process writes them."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from distill.teacher.records import Layout
from distill.utils.files import write_whole

log = logging.getLogger(__name__)

FORMAT, IN_FILES = 1, 2  # of a view in one file, and in several
ABOUT = "store.json"
PATIENCE, PAUSE = 60.0, 0.05  # seconds, for another process that makes a folder


class StoreFolder:
    """A folder that says what it holds, and has one writer for each rank of a run.

    Args:
        path: the folder; made if need be.
        identity: what it is to hold, see `identity`.
        rank: of this process among those of its run; rank 0's writer says what the folder holds.

    Raises:
        ValueError: if the folder cannot be made.
    """

    def __init__(self, path: str | Path, identity: Mapping[str, Any], rank: int = 0) -> None:
        self.path, self.identity, self.rank = Path(path), dict(identity), rank
        self._lock: FileLock | None = None
        self._settled = self._said_unwritable = False
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"the teacher's answers cannot be kept in {self.path}: {error.strerror}"
            ) from error
        self._elect()

    @property
    def writes(self) -> bool:
        """Whether this process is the writer now."""
        return self._lock is not None

    def share(self) -> None:
        """Make the folder this store's, or wait until another process has, and let others write.

        Raises:
            ValueError: if it holds something else, or cannot be made.
        """
        deadline = time.monotonic() + PATIENCE
        while not self.settle():
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{self.path} does not say what it holds, and this process may not make it: "
                    "see that store.path can be written to, and that files can be locked there"
                )
            time.sleep(PAUSE)
            self._elect()
        self.release()

    def may_write(self) -> bool:
        """Become the writer if there is none, and return whether this process may write."""
        if not self.writes:
            self._elect()
        return self.writes and self.settle()

    def settle(self) -> bool:
        """Return whether the folder is known to be this store's; rank 0's writer makes it so.

        A folder that does not say what it holds is not trusted with anything.

        Raises:
            ValueError: if it holds something else.
        """
        if self._settled:
            return True
        held = read_identity(self.path / ABOUT)
        if held is None and self.writes and self.rank == 0:
            for path in self.path.glob("view-*.bin"):
                path.unlink()
            write_identity(self.path / ABOUT, self.identity)
            held = self.identity
        if held is not None and held != self.identity:
            differing = difference(held, self.identity)
            raise ValueError(f"{self.path} holds other answers of a teacher: {differing}")
        self._settled = held is not None
        return self._settled

    def release(self) -> None:
        """Stop being the writer."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _elect(self) -> None:
        """Become the writer, if there is none."""
        lock = FileLock(self.path / f"writer-{self.rank}.lock", thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return
        except OSError as error:
            if not self._said_unwritable:
                log.warning("%s is only read: %s", self.path, error)
            self._said_unwritable = True
            return
        self._lock = lock
        self._settled = False  # what the last writer made of the folder is looked at again


def store_name(facts: Mapping[str, Any]) -> str:
    """Return 16 hex digits that change with any of the facts."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return sha256(text.encode()).hexdigest()[:16]


def identity(
    facts: Mapping[str, Any], samples: int, layout: Layout, files: int = 1
) -> dict[str, Any]:
    """Return what tells one store from another, as JSON gives it back."""
    form = {"format": FORMAT} if files == 1 else {"format": IN_FILES, "files": files}
    whole: dict[str, Any] = {**form, "samples": samples, "classes": layout.classes}
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
