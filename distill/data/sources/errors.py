"""One line for whatever decoders and the back ends of data sets raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from PIL import UnidentifiedImageError

from distill.utils.errors import first_line


class ShardLost(ValueError):
    """A shard, or what says which there are, cannot be read."""


class SampleBroken(ValueError):
    """An image of a shard cannot be decoded."""


@contextmanager
def explained(label: str) -> Iterator[None]:
    """Turn any error into one line that begins with what it is about."""
    try:
        yield
    except Exception as error:  # decoders and back ends raise whatever they stumble on
        raise ValueError(f"{label}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Return the first line of an error, or its name where it says nothing."""
    if isinstance(error, UnidentifiedImageError):  # which says no more than `<_io.BytesIO …>`
        return "it is not an image that Pillow reads"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    first = first_line(error)
    if isinstance(error, ImportError):
        return f"it needs pip install 'distill-kd[data]' ({first})"
    return first
