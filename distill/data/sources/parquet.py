"""Labelled pictures in parquet files as the Hub has them."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from distill.data.sources.errors import explained
from distill.data.sources.images import decoded

Array = np.ndarray[Any, Any]
PICTURES = ("img", "image")  # what the column of pictures is called


def labelled_pictures(path: Path, column: str, side: int) -> tuple[Array, Array]:
    """Return pictures, uint8 `[N, 3, side, side]`, and labels, int64 `[N]`, of a file of the Hub's.

    Args:
        path: a parquet file with encoded pictures in a column `img` or `image`.
        column: that of the labels.
        side: of the square pictures in pixels.

    Raises:
        ValueError: for a file that is damaged or has other columns, a picture that is broken or of
            another size, and where pyarrow is not installed.
    """
    with explained(str(path)):
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            pictures = next((name for name in PICTURES if name in names), None)
            if pictures is None or column not in names:
                raise ValueError(f"it has no column img or image, or {column}: {', '.join(names)}")
            table = file.read(columns=[pictures, column])
        cells, labels = (table.column(name).to_pylist() for name in (pictures, column))
        if not all(type(label) is int for label in labels):
            raise ValueError(f"column {column} does not hold whole numbers")
        images = [picture(row, cell, side) for row, cell in enumerate(cells)]
    stacked = np.stack(images) if images else np.empty((0, 3, side, side), np.uint8)
    return stacked, np.array(labels, np.int64)


def picture(row: int, cell: Any, side: int) -> Array:
    """Return the picture of one row, uint8 `[3, side, side]`."""
    with explained(f"row {row}"):
        content = cell.get("bytes") if isinstance(cell, dict) else None
        if not content:
            raise ValueError("its picture is not in the file")
        image = decoded(BytesIO(content), 3)
        if image.size != (side, side):
            raise ValueError(
                f"its picture is of {image.height} × {image.width}, not {side} × {side}"
            )
        return np.asarray(image).transpose(2, 0, 1)


def class_names(path: Path, column: str) -> list[str] | None:
    """Return the names that a file of the Hub's gives the labels of a column, or None."""
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_schema(path).metadata or {}
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[column]["names"]]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
