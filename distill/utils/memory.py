"""Memory: how much is free, how a number of bytes is written, what a process keeps of it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # commands that need no torch start without it
    from torch import Tensor, nn

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_BLOCK, LARGEST_REST = 2**30, 2**31 - 1  # bytes


def keep_freed_memory() -> None:
    """Let the C library keep freed blocks for the next batch, where it has that option.

    glibc gives a block of more than 32 MB back to the system as soon as it is freed, and smaller
    ones where they lie at the end of the heap. A training step on a CPU then spends up to a third
    of its time on pages that the system clears again. Results are the same.

    Source: mallopt(3). Elsewhere than under glibc nothing is done.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)
    mallopt(M_TRIM_THRESHOLD, LARGEST_REST)


def available_bytes() -> int:
    """Return how much memory new data can take without swapping; 0 if that is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def held_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers, each counted once."""
    return distinct_bytes((*module.parameters(), *module.buffers()))


def distinct_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages that tensors lie in, each counted once."""
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())


def bytes_text(count: int) -> str:
    """Return a number of bytes for people."""
    unit, name = next(
        (unit for unit in ((10**9, "GB"), (10**6, "MB")) if count >= unit[0]), (10**3, "kB")
    )
    return f"{count / unit:,.1f} {name}"
