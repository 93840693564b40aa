"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two runs apart
    fcntl = None  # type: ignore[assignment]

PART = ".part"  # ends the names of what is being written
LOCK = ".lock"
TRIES, PAUSE = 5, 0.05  # seconds: whoever only asks (`held_elsewhere`) holds a lock for a moment
COMMAND = ExitStack()  # what a command holds until its end
_locks: dict[Path, IO[str]] = {}  # folders that this process holds → their open locks
_holders: Counter[Path] = Counter()  # how often it has requested each


def resolved_path(path: str | Path, base: str | Path | None = None) -> Path:
    """Return a path as it is meant: `~` and `$NAME` resolved, a relative one from `base` on.

    This is the one place where that is decided: what is checked is what is used.

    Args:
        path: as a person, a file or an environment variable gives it.
        base: the folder that a relative path counts from; None leaves it relative.

    Raises:
        ValueError: if `~` stands for a home that nobody knows.
    """
    try:
        expanded = Path(os.path.expandvars(path)).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: there is no home folder: set HOME, or write it out") from error
    return expanded if base is None else Path(base, expanded)


def under_construction(path: Path) -> Path:
    """Return the name beside a file or folder under which this process writes it."""
    return path.with_name(f".{path.name}.{os.getpid()}{PART}")


def remove_stale(folder: Path, name: str = "*") -> None:
    """Remove what writers that were killed have left of files (or of one) in a folder.

    Whoever calls holds the lock without which nobody writes there.
    """
    for path in folder.glob(f".{name}.*{PART}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes that ask for it here.

    The lock is the process's own (`fcntl`): the system releases it at its end, whatever end that
    is, and data workers that outlive it for a moment do not keep it, as they would `flock`. A
    process may request again what it holds: it is let go with the last request.

    Raises:
        ValueError: if another process holds it.
        OSError: if the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key = folder.resolve()
    if not _holders[key]:  # opened and closed once more, the system would let go of it
        _locks[key] = locked(folder)
    _holders[key] += 1
    try:
        yield
    finally:
        _holders[key] -= 1
        if not _holders[key]:
            _locks.pop(key).close()


def locked(folder: Path) -> IO[str]:
    """Return a folder's lock, taken and open."""
    file = (folder / LOCK).open("a+")
    for left in reversed(range(TRIES)):
        if taken(file, exclusive=True):
            break
        if not left:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            raise ValueError(
                f"{folder}: another run (process {owner}) is writing there: wait for it, or give "
                "another directory"
            )
        time.sleep(PAUSE)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def taken(file: IO[str], exclusive: bool) -> bool:
    """Lock an open file, unless another process has; say so where nothing can be locked."""
    if fcntl is None:
        return True
    try:
        fcntl.lockf(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        return True
    return True


def held_elsewhere(folder: Path) -> bool:
    """Whether another process holds a folder; checked without changing anything there."""
    if folder.resolve() in _locks:
        return False
    try:
        with (folder / LOCK).open() as file:
            return not taken(file, exclusive=False)
    except OSError:  # nobody has ever held it, or it is not for this user to know
        return False


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file under a temporary name, and rename it once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    building = under_construction(path)
    try:
        try:
            file = building.open("wb")
        except OSError as error:  # of which a person knows the name that was requested
            raise type(error)(error.errno, error.strerror, str(path)) from None
        with file:
            yield file
        building.replace(path)
    finally:
        building.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file as UTF-8, its line ends as they are."""
    with writing(path) as file:
        file.write(text.encode("utf-8"))


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write named arrays or tensors on the CPU as an uncompressed `.npz`."""
    import numpy as np  # commands that need none start without it

    with writing(path) as file:
        content: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items()}
        np.savez(file, **content)


def load_arrays(path: Path) -> dict[str, Any] | None:
    """Return the arrays of an `.npz`, by name; None where there is none, or it is damaged.

    Nothing is unpickled.
    """
    import numpy as np

    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
            return {name: saved[name] for name in saved.files}
    except Exception:  # archives that are damaged fail in whatever way
        return None


def plain_cell(text: str) -> str:
    """Return a cell of a CSV file that no spreadsheet takes for a formula.

    What begins as one gets an apostrophe before it, as people type it there.
    """
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
