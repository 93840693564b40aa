"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file under a temporary name, and rename it once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            file = building.open("wb")
        except OSError as error:  # of which a person knows the name that was asked for
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


def plain_cell(text: str) -> str:
    """Return a cell of a CSV file that no spreadsheet takes for a formula.

    What begins as one gets an apostrophe before it, as people type it there.
    """
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
