"""What lies elsewhere: how it is reached, and asked again where it does not answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from distill.data.sources.errors import reason

T = TypeVar("T")
REMOTE = "://"
PAUSE, LONGER = 0.1, 4  # seconds before the first retry, and how many times longer each next one


class ShardLost(ValueError):
    """A shard that was there at the start cannot be read."""


def file_system(address: str) -> tuple[Any, str]:
    """Return what reads an address, and what it calls the place."""
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:  # a protocol that needs a package, or is none
        raise ValueError(f"data.root={address}: {reason(ValueError(error))}") from error
    return files, str(path)


def retried(action: Callable[[], T], retries: int, place: str) -> T:
    """Return what an action returns that may fail a few times, with longer pauses between.

    Raises:
        ShardLost: naming the place, if it fails once more.
    """
    for attempt in range(retries + 1):
        try:
            return action()
        except Exception as error:  # back ends raise whatever they stumble on
            if attempt == retries:
                tried = f", tried {attempt + 1} times" if attempt else ""
                raise ShardLost(f"{place} cannot be read: {reason(error)}{tried}") from error
            time.sleep(PAUSE * LONGER**attempt)
    raise AssertionError
