"""How many bytes a store takes, and whether there is room for them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from distill.teacher.records import Layout
from distill.utils.memory import bytes_text

SPARE_BYTES = 10**9  # of the disk, for checkpoints and whatever else a run writes
FILE_BYTES = 2**30  # the most that a file holds
FILE_SAMPLES, SHARED_FILES = 2**16, 32  # more samples are divided among so many files, to be shared


def expected_bytes(
    samples: int, classes: int, views: int, dtype: str = "float16", topk: int | None = None
) -> int:
    """Return how many bytes a complete store takes."""
    return samples * views * Layout(classes, dtype, topk).record.itemsize


def files_of_view(samples: int, size: int) -> int:
    """Return in how many files a view is kept, each of which one process fills at a time.

    There is one up to 65,536 samples; beyond, one for each as many, up to 32, so that several
    processes can share the work. None is larger than 1 GiB.

    Args:
        samples: records of a view.
        size: bytes of a record.
    """
    shared = min(-(-samples // FILE_SAMPLES), SHARED_FILES)
    return min(max(shared, -(-samples // max(1, FILE_BYTES // size))), samples)


def describe(
    samples: int, classes: int, views: int, dtype: str = "float16", topk: int | None = None
) -> str:
    """Return what a store holds and takes, for people."""
    kept = f"{classes:,} classes" if topk is None else f"{topk:,} of {classes:,} classes"
    plural = "" if views == 1 else "s"
    size = bytes_text(expected_bytes(samples, classes, views, dtype, topk))
    return f"{samples:,} images × {views:,} view{plural} × {kept} in {dtype}: {size}"


def check_size(samples: int, views: int, layout: Layout, max_gb: float | None) -> None:
    """Refuse a store that would grow larger than is allowed."""
    shape = (samples, layout.classes, views, layout.dtype, layout.topk)
    if max_gb is not None and expected_bytes(*shape) > max_gb * 1e9:
        raise ValueError(
            f"the teacher's answers ({describe(*shape)}) are more than store.max_gb={max_gb:g}: "
            "raise it, lower store.views or set store.topk"
        )


def check_room(folder: Path, samples: int, views: int, layout: Layout) -> None:
    """Refuse a store that the disk cannot hold, with as much again to spare up to a gigabyte."""
    shape = (samples, layout.classes, views, layout.dtype, layout.topk)
    taken = sum(path.stat().st_size for path in folder.glob("view-*.bin"))
    needed = max(0, expected_bytes(*shape) - taken)
    free = shutil.disk_usage(folder).free
    if free < needed + min(needed, SPARE_BYTES):
        raise ValueError(
            f"the teacher's answers ({describe(*shape)}) need {bytes_text(needed)} more, and "
            f"{folder} has {bytes_text(free)} free: lower store.views or set store.topk"
        )


def reserve(path: Path, size: int) -> None:
    """Give a file its full size, and the disk space with it.

    Where a disk is full, a process that writes through a map into a hole is killed by the system;
    here it is told.
    """
    try:
        with path.open("ab") as file:
            if os.fstat(file.fileno()).st_size >= size:
                return
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
    except OSError as error:
        raise ValueError(
            f"{path} cannot grow to {bytes_text(size)}: {error.strerror}; lower store.views or set "
            "store.topk"
        ) from error
