"""Resized crops and flips of pictures on disk, drawn by key, decoded no larger than they show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from distill.data.sources.decoders import SHRINKS, Box, Decoder, region, region_of
from distill.data.sources.sizes import Size
from distill.data.views.draws import Draw, Draws

ATTEMPTS = 10  # at a crop that a picture can hold, as in torchvision and timm
INTERPOLATIONS = ("bilinear", "bicubic")


class Drawn(NamedTuple):
    """What is drawn for one sample.

    Args:
        shares: of the picture's area, one for each attempt.
        logs: of the ratio of width to height, one for each attempt.
        top: a word, for where the crop begins.
        left: a word, for where the crop begins.
        mirrored: left to right.
        upside_down: mirrored top to bottom.
        interpolation: of the crop's pixels.
    """

    shares: list[float]
    logs: list[float]
    top: int
    left: int
    mirrored: bool
    upside_down: bool
    interpolation: str


@dataclass(frozen=True)
class ResizedCrop:
    """Show a random part of a picture at one size, perhaps mirrored.

    A crop of h × w pixels covers the share a of the picture's area, with `a ~ U(scale)` and
    `log(w/h) ~ U(log ratio)`; it lies anywhere with equal probability. What the picture cannot
    hold is drawn again, up to ten times; then it is the middle, as much of it as `ratio` allows.

    It is decoded at 1/s of the picture's size, s the largest of 1, 2, 4 and 8 for which the crop
    still has at least the pixels that are shown, and its sides and place are whole multiples of s:
    so that they are the same for a decoder which does not shrink.

    Args:
        size: height and width of the view.
        scale: least and largest share of the area.
        ratio: least and largest ratio of width to height.
        hflip: probability of being mirrored left to right.
        vflip: probability of being mirrored top to bottom.
        interpolation: `bilinear`, `bicubic`, both with antialiasing, or `random`: either.

    Reference:
        Szegedy et al., 1409.4842, section 6; the attempts and the rounding are torchvision's.
    """

    size: Size
    scale: Sequence[float] = (0.08, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    interpolation: str = "bilinear"

    def drawn(self, seed: int, epoch: int, index: Tensor) -> list[Drawn]:
        """Return what is drawn for samples, whose indices are int64 `[N]`."""
        draws = Draws.of(seed, epoch, index)
        low, high = map(math.log, self.ratio)
        kinds = INTERPOLATIONS if self.interpolation == "random" else (self.interpolation,)
        columns: tuple[Tensor, ...] = (
            draws.attempts(Draw.CROP_AREA, ATTEMPTS, *self.scale),
            draws.attempts(Draw.CROP_RATIO, ATTEMPTS, low, high),
            draws.words[Draw.CROP_TOP],
            draws.words[Draw.CROP_LEFT],
            draws.happens(Draw.FLIP, self.hflip),
            draws.happens(Draw.FLIP_DOWN, self.vflip),
        )
        named = [kinds[kind] for kind in draws.integers(Draw.INTERPOLATION, len(kinds)).tolist()]
        rows = zip(*(column.tolist() for column in columns), named, strict=True)
        return [Drawn(*row) for row in rows]

    def box(self, drawn: Drawn, height: int, width: int) -> Box:
        """Return what is shown of a picture of this height and width."""
        top, left, tall, wide = self.place(drawn, height, width)
        shrink = next(
            s for s in SHRINKS if s == 1 or (tall >= s * self.size[0] and wide >= s * self.size[1])
        )
        rows, columns = on_grid(top, tall, height, shrink), on_grid(left, wide, width, shrink)
        return Box(rows[0], columns[0], rows[1], columns[1], shrink)

    def place(self, drawn: Drawn, height: int, width: int) -> tuple[int, int, int, int]:
        """Return top, left, height and width of the crop in pixels."""
        for share, log in zip(drawn.shares, drawn.logs, strict=True):
            area, ratio = share * height * width, math.exp(log)
            tall, wide = (max(1, round(math.sqrt(x))) for x in (area / ratio, area * ratio))
            if tall <= height and wide <= width:
                top, left = drawn.top * (height - tall + 1), drawn.left * (width - wide + 1)
                return top >> 32, left >> 32, tall, wide
        narrowest, widest = self.ratio
        tall = min(height, max(1, round(width / narrowest)))
        wide = min(width, max(1, round(height * widest)))
        return (height - tall) // 2, (width - wide) // 2, tall, wide

    def shown(self, picture: Image.Image, drawn: Drawn) -> Tensor:
        """Return the view of a decoded picture, uint8 `[C, H, W]`."""
        return self.resized(region_of(picture, partial(self.box, drawn)), drawn)

    def read(
        self,
        load: Any,
        index: int,
        drawn: Drawn,
        channels: int,
        decoder: Decoder,
        content: bytes | None = None,
    ) -> Tensor:
        """Return the view of a loader's picture, uint8 `[C, H, W]`; arguments as of `region`."""
        place = partial(self.box, drawn)
        return self.resized(region(load, index, place, channels, decoder, content), drawn)

    def resized(self, pixels: np.ndarray[Any, Any], drawn: Drawn) -> Tensor:
        """Return a crop's pixels, uint8 `[H, W, C]`, at the size of views, uint8 `[C, H, W]`.

        Of four channels the last means nothing.
        """
        given = pixels if pixels.flags.writeable else pixels.copy()  # or torch would warn of it
        # The batch's stride, too, says that channels are last: else torch resizes them as planes,
        # which takes 1.6 times as long.
        crop = torch.from_numpy(given)[None].permute(0, 3, 1, 2)
        view = F.interpolate(crop, self.size, mode=drawn.interpolation, antialias=True)
        return turned(view[0, :3].contiguous(), drawn)

    def on_device(self, picture: Tensor, drawn: Drawn) -> Tensor:
        """Return the view of a whole picture, uint8 `[C, H, W]`, on the device where this lies.

        A device has no arithmetic of bytes for it: pixels are float32 until they are rounded, and
        may differ from those of `resized` by a grey level. Where others decode at 1/s of the size,
        here the means of s × s pixels are taken: a GPU cannot resize by more than about 47.
        """
        box = self.box(drawn, *picture.shape[1:])
        top, left, height, width, _ = box.at(1)
        crop = picture[None, :, top : top + height, left : left + width].float()
        if box.shrink > 1:
            crop = F.avg_pool2d(crop, box.shrink)
        view = F.interpolate(crop, self.size, mode=drawn.interpolation, antialias=True)[0]
        return turned(view.round_().clamp_(0, 255).to(torch.uint8), drawn)


def turned(view: Tensor, drawn: Drawn) -> Tensor:
    """Return a view `[C, H, W]` mirrored as it was drawn."""
    sides = [side for side, on in ((-1, drawn.mirrored), (-2, drawn.upside_down)) if on]
    return view.flip(sides) if sides else view


def on_grid(start: int, length: int, whole: int, step: int) -> tuple[int, int]:
    """Return where a part of a side begins and how long it is, rounded to whole steps.

    Args:
        start: of the part in pixels.
        length: of the part in pixels, at least a step.
        whole: pixels of the side, at least the part's.
        step: pixels.
    """
    steps = round(length / step)
    steps = min(steps, whole // step)
    return min(round(start / step), whole // step - steps), steps
