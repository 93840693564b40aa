"""How a process keeps the memory that it frees."""

from __future__ import annotations

import ctypes

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
