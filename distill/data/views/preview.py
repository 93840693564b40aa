"""A picture of what training sees of one sample."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from distill.data.module import DataModule
from distill.data.views.views import CLEAN
from distill.utils.files import writing

GAP = 2  # pixels of white between and around the tiles
LEAST = 96  # pixels of a tile's shorter side, by whole multiples so that pixels stay square


def contact_sheet(data: DataModule, row: int, epochs: int, path: Path | str) -> None:
    """Write a PNG of one training sample, clean and then as epochs 0, 1, … show it, row by row.

    Args:
        data: the data and its views; mixed views are shown mixed, two views of a step both.
        row: which sample, its row in the training split.
        epochs: how many epochs to show.
        path: the file, written whole or not at all.

    Raises:
        ValueError: if there is no such row, or nothing to show.
    """
    if not 0 <= row < len(data.train):
        raise ValueError(
            f"there is no training image {row}; they go from 0 to {len(data.train) - 1}"
        )
    if epochs < 1:
        raise ValueError(f"give at least 1 epoch to show, got {epochs}")
    rows = torch.tensor([row])
    views = [view for epoch in (CLEAN, *range(epochs)) for view in data.training_views(epoch, rows)]
    with writing(Path(path)) as file:
        tiled(views).save(file, "PNG")


def tiled(views: list[Tensor]) -> Image.Image:
    """Return views, uint8 `[C, H, W]`, as tiles of one nearly square picture, row by row."""
    tiles = [tile(view) for view in views]
    columns = math.ceil(math.sqrt(len(tiles)))
    width, height = (side + GAP for side in tiles[0].size)
    size = (GAP + columns * width, GAP + math.ceil(len(tiles) / columns) * height)
    sheet = Image.new(tiles[0].mode, size, "white")
    for place, picture in enumerate(tiles):
        row, column = divmod(place, columns)
        sheet.paste(picture, (GAP + column * width, GAP + row * height))
    return sheet


def tile(view: Tensor) -> Image.Image:
    """Return a view, uint8 `[C, H, W]`, enlarged by a whole number where it is small."""
    channels, height, width = view.shape
    pixels = view.permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(pixels if channels > 1 else pixels[..., 0])
    factor = max(1, math.ceil(LEAST / min(height, width)))
    return picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)
