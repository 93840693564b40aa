"""Views: what a model sees of a sample, a pure function of (seed, epoch, index).

Whatever is random about a sample is drawn from a counter-based generator keyed by those numbers,
never from a shared random state. A view is therefore the same for any batch size, order, number of
workers or ranks, and after a resume. Views of data in memory are made in integers, in float64 by
single operations that IEEE 754 rounds exactly, and by tables: vectorised loops round alike then,
whether a pixel lies in the body of a loop or in its tail.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

RECIPE = 1  # of the views: raised when the same options come to show something else
CLEAN = -1  # the epoch that names the view without augmentation: evaluation

_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
_STEPS = 4096  # a table's values, drawn by the upper 12 bits of a word
_BITS = 16  # of the fraction of factors, weights and hues
_ONE = 1 << _BITS
_LANES = 0x00FF00FF

Word = TypeVar("Word", int, Tensor)


class Draw(IntEnum):
    """The number of each draw: none moves another, whichever options are on."""

    SHIFT_DOWN = 0
    SHIFT_RIGHT = 1
    FLIP = 2
    CROP_AREA = 3
    CROP_RATIO = 4
    CROP_TOP = 5
    CROP_LEFT = 6
    ROTATE = 7
    TRANSLATE_DOWN = 8
    TRANSLATE_RIGHT = 9
    ZOOM = 10
    SHEAR = 11
    BRIGHTNESS = 12
    CONTRAST = 13
    SATURATION = 14
    HUE = 15
    ERASE = 16
    ERASE_AREA = 17
    ERASE_RATIO = 18
    ERASE_TOP = 19
    ERASE_LEFT = 20
    MIX_PARTNER = 21
    MIX_KIND = 22
    MIXUP_SHARE = 23
    CUTMIX_SHARE = 24
    CUTMIX_ROW = 25
    CUTMIX_COLUMN = 26


def mix(word: Word) -> Word:
    """Scramble 32-bit words (an int, or int64), each output bit depending on every input bit.

    The finaliser of MurmurHash3 (Appleby, public domain).
    """
    word = (word ^ (word >> 16)) * 0x85EBCA6B & _WORD
    word = (word ^ (word >> 13)) * 0xC2B2AE35 & _WORD
    return word ^ (word >> 16)


def keyed_words(seed: int, epoch: int, index: Tensor, draw: int) -> Tensor:
    """Return one pseudo-random 32-bit word per index `[N]`, the same for the same key.

    Args:
        seed: the run's seed.
        epoch: the epoch, 0 or more.
        index: the samples' indices, int64 `[N]`.
        draw: which of a sample's draws this is.
    """
    return words_of(draw_word(seed, epoch, draw), index)


def draw_word(seed: int, epoch: int, draw: int) -> int:
    """Return the word that all samples' words of a draw begin from."""
    prefix = mix(mix(seed * _GOLDEN + 1 & _WORD) + epoch * _GOLDEN + 1 & _WORD)
    return mix(draw * _GOLDEN + prefix + 1 & _WORD)


def words_of(word: int | Tensor, index: Tensor) -> Tensor:
    """Return one word per index `[N]`, or per draw and index `[D, N]` of draws' words `[D, 1]`."""
    words = mix((index + word) & _WORD)
    return mix((words + (index >> 32) * _GOLDEN + 1) & _WORD)


def keyed_uniform(seed: int, epoch: int, index: Tensor, draw: int) -> Tensor:
    """Return one float32 draw in [0, 1) per index `[N]`; arguments as in `keyed_words`."""
    return (keyed_words(seed, epoch, index, draw) >> 8).float() * 2.0**-24


def keyed_integers(seed: int, epoch: int, index: Tensor, draw: int, below: int) -> Tensor:
    """Return one integer in [0, below) per index `[N]`; arguments as in `keyed_words`."""
    return keyed_words(seed, epoch, index, draw) * below >> 32


@dataclass(frozen=True)
class Draws:
    """All draws of a batch's samples, made at once because small tensors cost their launch.

    Args:
        words: row d holds the samples' words of draw d, int64 `[D, N]`.
    """

    words: Tensor

    @classmethod
    def of(cls, seed: int, epoch: int, index: Tensor) -> Draws:
        """Return the draws of these samples; arguments as in `keyed_words`."""
        return cls(words_of(draw_words(seed, epoch, index.device), index))

    def integers(self, draw: Draw, below: int | Tensor) -> Tensor:
        """Return integers in [0, below), int64 `[N]`."""
        return self.words[draw] * below >> 32

    def uniform(self, draw: Draw, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return draws from [low, high), float64 `[N]`."""
        return (self.words[draw] >> 8).double() * ((high - low) * 2.0**-24) + low

    def happens(self, draw: Draw, probability: float) -> Tensor:
        """Return events of this probability, bool `[N]`."""
        return (self.words[draw] >> 8) < math.ceil(probability * 2**24)

    def places(self, first: Draw, beyond: Tensor) -> Tensor:
        """Return integers of this draw and the next, each in [0, beyond), int64 `[2, N]`."""
        return self.words[first : first + 2] * beyond >> 32

    def lookup(self, draw: Draw, table: Tensor) -> Tensor:
        """Return equally likely values of a table of `_STEPS`, `[N]`."""
        return table[self.words[draw] >> 20]


@dataclass(frozen=True)
class ResidentView:
    """Augment whole batches of small images by tensor operations; all is off by default.

    A view is cropped, turned, shifted and mirrored in one resampling; then its colours change;
    then a box of it is erased. What is shown of beyond the image is black. `mixed` adds another
    sample's view to it.

    Args:
        pad: pixels of zero padding on each side before the crop back to size: shifts of up to
            `pad` pixels either way.
        flip: whether half of the views are mirrored left to right.
        crop_scale: least and largest share of the area that a resized crop shows, or None.
        crop_ratio: least and largest ratio of a crop's width to its height, drawn log-uniformly.
        rotate: largest turn either way in degrees.
        translate: largest shift either way as a share of the height and of the width.
        zoom: least and largest magnification, or None.
        shear: largest slant along the rows either way in degrees.
        brightness: b of a factor from [max(0, 1 − b), 1 + b] on the pixels.
        contrast: the same on their difference from the view's mean grey.
        saturation: the same on their difference from their own grey.
        hue: largest turn of the hue either way, as a share of the colour circle, at most 0.5.
        erase: probability that a box is made black.
        erase_scale: least and largest share of the area that the box covers.
        erase_ratio: least and largest ratio of its width to its height, drawn log-uniformly.
        mixup: α of the Beta(α, α) that a sample's share of a blend with another is drawn from.
        cutmix: α of the Beta(α, α) that a sample's share is drawn from where a box of it is
            replaced by another's; with `mixup` too, a fair draw decides between them.

    Reference:
        Mixup: Zhang et al., 1710.09412. Cutmix: Yun et al., 1905.04899. Erasing: Zhong et al.,
        1708.04896. Colours: torchvision's `ColorJitter`, in this order.
    """

    pad: int = 0
    flip: bool = False
    crop_scale: Sequence[float] | None = None
    crop_ratio: Sequence[float] = (3 / 4, 4 / 3)
    rotate: float = 0.0
    translate: float = 0.0
    zoom: Sequence[float] | None = None
    shear: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    erase: float = 0.0
    erase_scale: Sequence[float] = (0.02, 1 / 3)
    erase_ratio: Sequence[float] = (0.3, 10 / 3)
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        check_view(self)

    @property
    def resamples(self) -> bool:
        """Whether pixels of a view lie between pixels of the image."""
        moves = (self.rotate, self.translate, self.shear)
        return any(moves) or self.crop_scale is not None or self.zoom is not None

    @property
    def needs_colour(self) -> list[str]:
        """The names of the options in use that mean nothing for grey images."""
        return [name for name in ("saturation", "hue") if getattr(self, name)]

    @property
    def mixes(self) -> bool:
        """Whether views hold two samples, whose labels are then class probabilities."""
        return bool(self.mixup or self.cutmix)

    def __call__(self, images: Tensor, seed: int, epoch: int, index: Tensor) -> Tensor:
        """Return the unmixed views `[N, C, H, W]` of uint8 images `[N, C, H, W]`, uint8 too."""
        if epoch == CLEAN:
            return images
        draws = Draws.of(seed, epoch, index)
        placed = self._resampled(images, draws) if self.resamples else self._shifted(images, draws)
        return self._erased(self._coloured(placed, draws), draws)

    def partners(self, seed: int, epoch: int, index: Tensor, count: int) -> Tensor:
        """Return with which of `count` samples each is mixed, positions `[N]`."""
        return keyed_integers(seed, epoch, index, Draw.MIX_PARTNER, count)

    def mixed(
        self, views: Tensor, others: Tensor, seed: int, epoch: int, index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return views mixed with their partners' views, and each sample's share of its view.

        The share is that of the pixels really kept: a box is cut off at the image's edge.

        Args:
            views: the samples' own views, uint8 `[N, C, H, W]`.
            others: the partners' own views, uint8 `[N, C, H, W]`.
            seed: the run's seed.
            epoch: the epoch.
            index: the samples' indices, int64 `[N]`.

        Returns:
            Views, uint8 `[N, C, H, W]`, and shares in [0, 1], float64 `[N]`.
        """
        height, width = views.shape[-2:]
        kept = self._kept(Draws.of(seed, epoch, index), height, width)
        pixels = weighted(views.int(), others.int(), kept)
        total = kept.expand(-1, 1, height, width).sum((1, 2, 3), dtype=torch.int64)
        return pixels.to(torch.uint8), total.double() * (1 / (_ONE * height * width))

    def _shifted(self, images: Tensor, draws: Draws) -> Tensor:
        if self.pad:
            down = draws.integers(Draw.SHIFT_DOWN, 2 * self.pad + 1)
            right = draws.integers(Draw.SHIFT_RIGHT, 2 * self.pad + 1)
            images = windows(F.pad(images, (self.pad,) * 4), images.shape, down, right)
        return mirrored(images, draws.integers(Draw.FLIP, 2)) if self.flip else images

    def _resampled(self, images: Tensor, draws: Draws) -> Tensor:
        height, width = images.shape[-2:]
        down = draws.integers(Draw.SHIFT_DOWN, 2 * self.pad + 1) - self.pad
        right = draws.integers(Draw.SHIFT_RIGHT, 2 * self.pad + 1) - self.pad
        flips = draws.integers(Draw.FLIP, 1 + self.flip)
        rows = half_pixels(height, down, torch.zeros_like(flips))
        columns = half_pixels(width, right, flips)
        return bilinear(images, rows, columns, self._positions(draws, height, width))

    def _positions(self, draws: Draws, height: int, width: int) -> Tensor:
        """Return where the image is read, `[2, 3, N]`: y and x of (rows, columns, 1), in pixels.

        An output pixel is at p from the centre; its source is `crop ∘ S⁻¹ ∘ R⁻¹ (p − t) / zoom`.
        """
        sine = draws.lookup(Draw.ROTATE, between(math.sin, self.rotate, draws.words.device))
        cosine = draws.lookup(Draw.ROTATE, between(math.cos, self.rotate, draws.words.device))
        slant = draws.lookup(Draw.SHEAR, between(math.tan, self.shear, draws.words.device))
        zoom = draws.uniform(Draw.ZOOM, *(self.zoom or (1.0, 1.0)))
        top, left, crop_height, crop_width = self._crop(draws, height, width)
        y_scale, x_scale = crop_height * (1 / height) / zoom, crop_width * (1 / width) / zoom
        matrix = torch.stack([cosine, -sine, sine - slant * cosine, cosine + slant * sine])
        matrix = matrix.view(2, 2, -1) * torch.stack([y_scale, x_scale])[:, None]
        down = draws.uniform(Draw.TRANSLATE_DOWN, -self.translate, self.translate) * height
        right = draws.uniform(Draw.TRANSLATE_RIGHT, -self.translate, self.translate) * width
        moved = matrix[:, 0] * down + matrix[:, 1] * right
        middle = torch.stack([top + crop_height * 0.5, left + crop_width * 0.5]) - 0.5
        return torch.cat([matrix, (middle - moved)[:, None]], dim=1)

    def _crop(self, draws: Draws, height: int, width: int) -> tuple[Tensor, ...]:
        """Return top, left, height and width of the resized crop in pixels, float64 `[N]` each."""
        if self.crop_scale is None:
            whole = torch.zeros_like(draws.words[0], dtype=torch.float64)
            return whole, whole, whole + height, whole + width
        share = draws.uniform(Draw.CROP_AREA, *self.crop_scale)
        ratio = draws.lookup(Draw.CROP_RATIO, log_uniform(self.crop_ratio, share.device))
        sides = box_sides(share, ratio, height, width)
        top = draws.uniform(Draw.CROP_TOP) * (height - sides[0])
        return top, draws.uniform(Draw.CROP_LEFT) * (width - sides[1]), sides[0], sides[1]

    def _coloured(self, images: Tensor, draws: Draws) -> Tensor:
        changes = (
            (self.brightness, Draw.BRIGHTNESS, black),
            (self.contrast, Draw.CONTRAST, mean_grey),
            (self.saturation, Draw.SATURATION, grey),
        )
        pixels = images
        for strength, draw, reference in changes:
            if strength:
                factor = draws.uniform(draw, max(0.0, 1 - strength), 1 + strength)
                pixels = blend(pixels.int(), reference(pixels.int()), factor)
        if self.hue:
            pixels = turn_hue(pixels.int(), draws.uniform(Draw.HUE, -self.hue, self.hue))
        return pixels.to(torch.uint8)

    def _erased(self, images: Tensor, draws: Draws) -> Tensor:
        if not self.erase:
            return images
        height, width = images.shape[-2:]
        share = draws.uniform(Draw.ERASE_AREA, *self.erase_scale)
        ratio = draws.lookup(Draw.ERASE_RATIO, log_uniform(self.erase_ratio, share.device))
        sides = box_sides(share, ratio, height, width).round().long()
        sides *= draws.happens(Draw.ERASE, self.erase)
        corner = draws.places(Draw.ERASE_TOP, extent(height, width, sides.device) + 1 - sides)
        return images * outside(height, width, corner, sides)

    def _kept(self, draws: Draws, height: int, width: int) -> Tensor:
        """Return the samples' share of their pixels in 1/65,536, int32 `[N, 1, 1 | H, 1 | W]`."""
        device, kinds = draws.words.device, []
        if self.mixup:
            share = draws.lookup(Draw.MIXUP_SHARE, beta(self.mixup, device))
            kinds.append((share * _ONE).round().int()[:, None, None, None])
        if self.cutmix:
            whole = extent(height, width, device)
            share = draws.lookup(Draw.CUTMIX_SHARE, beta(self.cutmix, device))
            half = ((1 - share).sqrt() * 0.5 * whole).long()
            corner = draws.places(Draw.CUTMIX_ROW, whole) - half
            kinds.append(outside(height, width, corner, 2 * half).int() * _ONE)
        if len(kinds) == 1:
            return kinds[0]
        second = draws.integers(Draw.MIX_KIND, 2).bool()[:, None, None, None]
        return torch.where(second, kinds[1], kinds[0])


@lru_cache(maxsize=16)
def draw_words(seed: int, epoch: int, device: torch.device) -> Tensor:
    """Return the word that each draw begins from, int64 `[D, 1]`; an epoch makes them once."""
    return torch.tensor([[draw_word(seed, epoch, draw)] for draw in Draw], device=device)


@lru_cache(maxsize=64)
def table(
    function: Callable[[float], float], low: float, high: float, device: torch.device
) -> Tensor:
    """Return a function in the middle of each of `_STEPS` equal parts of [low, high], float64."""
    step = (high - low) / _STEPS
    values = [function(low + (k + 0.5) * step) for k in range(_STEPS)]
    return torch.tensor(values, dtype=torch.float64, device=device)


def between(function: Callable[[float], float], degrees: float, device: torch.device) -> Tensor:
    """Return the table of a function of angles up to so many degrees either way."""
    return table(function, -math.radians(degrees), math.radians(degrees), device)


def log_uniform(limits: Sequence[float], device: torch.device) -> Tensor:
    """Return the table of a log-uniform draw between these limits."""
    low, high = limits
    return table(math.exp, math.log(low), math.log(high), device)


@lru_cache(maxsize=16)
def beta(alpha: float, device: torch.device) -> Tensor:
    """Return the table of a draw from Beta(α, α): the quantiles of its equally likely parts."""
    from scipy.special import betaincinv

    middles = (np.arange(_STEPS) + 0.5) / _STEPS
    return torch.from_numpy(betaincinv(alpha, alpha, middles)).to(device)


def windows(padded: Tensor, shape: torch.Size, down: Tensor, right: Tensor) -> Tensor:
    """Return the window of each padded image that begins so far down and right, of that shape."""
    padded = padded.contiguous()
    count, *size = shape
    image, *strides = padded.stride()
    extent = sum((side - 1) * stride for side, stride in zip(size, strides, strict=True))
    # One row for every place at which a window can begin: selecting rows copies whole windows.
    every = padded.as_strided((max(padded.numel() - extent, 0), *size), (1, *strides))
    starts = torch.arange(count, device=down.device) * image
    return every.index_select(0, starts + down * strides[1] + right)


def mirrored(images: Tensor, flips: Tensor) -> Tensor:
    """Return images mirrored left to right where `flips`, int64 `[N]`, is 1."""
    count = len(images)
    both = torch.cat([images, images.flip(-1)])
    return both.index_select(0, torch.arange(count, device=flips.device) + flips * count)


def half_pixels(size: int, shift: Tensor, flips: Tensor) -> Tensor:
    """Return a view's pixels along one side, in half pixels from its centre, int64 `[N, size]`."""
    centred = torch.arange(size, device=shift.device) * 2 + 1 - size
    return centred * (1 - 2 * flips)[:, None] + 2 * shift[:, None]


def bilinear(images: Tensor, rows: Tensor, columns: Tensor, positions: Tensor) -> Tensor:
    """Return images read between their pixels, in integers, black outside.

    Args:
        images: uint8 `[N, C, H, W]`.
        rows: half pixels from the centre, int64 `[N, H]`.
        columns: half pixels from the centre, int64 `[N, W]`.
        positions: pixels, float64 `[2, 3, N]`; see `ResidentView._positions`.
    """
    height, width = images.shape[-2:]
    fixed = (positions * _ONE).round().long()[..., None]
    y = fixed_places(fixed[0], rows, columns, height)
    x = fixed_places(fixed[1], rows, columns, width)
    corners = gather_corners(images, (y >> _BITS).mul_(width + 2).add_(x >> _BITS))
    # Two 8-bit neighbours to a word of two 16-bit lanes, which their weighted sum does not leave.
    left, right = corners & _LANES, (corners >> 8).bitwise_and_(_LANES)
    both = right.sub_(left).mul_(x >> _BITS - 8 & 255).add_(left.mul_(256))
    upper = both & _ONE - 1
    lower = (both >> _BITS).bitwise_and_(_ONE - 1)
    total = lower.sub_(upper).mul_(y >> _BITS - 8 & 255).add_(upper.mul_(256))
    return total.add_(_ONE // 2).bitwise_right_shift_(_BITS).to(torch.uint8)


def fixed_places(fixed: Tensor, rows: Tensor, columns: Tensor, size: int) -> Tensor:
    """Return where pixels are read along one side, from a black border before the first.

    Args:
        fixed: pixels in 1/65,536 by row, by column, and in the middle, int64 `[3, N, 1]`.
        rows: half pixels from the centre, int64 `[N, H]`.
        columns: half pixels from the centre, int64 `[N, W]`.
        size: pixels of the image along this side.

    Returns:
        Pixels in 1/65,536, from 1 to size, or 0 beyond the image, int32 `[N, 1, H, W]`.
    """
    by_row, by_column, middle = fixed
    parts = (by_row * rows + 2 * (middle + _ONE), by_column * columns)
    down, right = (part.clamp(-1 << 29, 1 << 29).int() for part in parts)
    place = (down[:, None, :, None] + right[:, None, None, :]).bitwise_right_shift_(1)
    inside = place.clamp(_ONE, size << _BITS)
    # The outer half of an edge's pixels is theirs: else a crop would darken where it touches it.
    return torch.where(place.sub_(inside).abs_() <= _ONE // 2, inside, 0)


def gather_corners(images: Tensor, place: Tensor) -> Tensor:
    """Return four neighbours in one int32: a pixel, its right one, and the two below.

    Args:
        images: uint8 `[N, C, H, W]`; a border of one black pixel is put around them.
        place: which pixel, row · (W + 2) + column with the border, int32 `[N, 1, H, W]`.
    """
    pixels = F.pad(images.contiguous(), (1, 1, 1, 1)).int()
    flat = pixels.view(-1)  # contiguous slices: a neighbour's neighbour may be of another image
    flat[:-1] |= flat[1:] << 8
    below = images.shape[-1] + 2
    flat[:-below] |= flat[below:] << 16
    everywhere = place.flatten(2).long().expand(-1, images.shape[1], -1)
    return pixels.flatten(2).gather(2, everywhere).view(images.shape)


@lru_cache(maxsize=64)
def extent(height: int, width: int, device: torch.device) -> Tensor:
    """Return height and width, int64 `[2, 1]`; made once, for each costs a transfer to a GPU."""
    return torch.tensor([[height], [width]], device=device)


def box_sides(share: Tensor, ratio: Tensor, height: int, width: int) -> Tensor:
    """Return height and width in pixels of boxes of a share of the area, float64 `[2, N]`.

    A box that the image cannot hold is cut to it.
    """
    area = share * (height * width)
    sides = torch.stack([area / ratio, area * ratio]).sqrt_()
    return torch.minimum(sides, extent(height, width, share.device))


def outside(height: int, width: int, corner: Tensor, sides: Tensor) -> Tensor:
    """Return 1 outside of each box and 0 inside, uint8 `[N, 1, H, W]`.

    Args:
        height: of the image.
        width: of the image.
        corner: top and left of each box, int64 `[2, N]`.
        sides: height and width of each box, int64 `[2, N]`.
    """
    place = torch.arange(max(height, width), device=corner.device) - corner[..., None]
    rows, columns = ((place < 0) | (place >= sides[..., None])).byte()
    return torch.maximum(rows[:, None, :height, None], columns[:, None, None, :width])


def black(pixels: Tensor) -> Tensor:
    """Return black, int32 `[1]`."""
    return pixels.new_zeros(1)


def grey(pixels: Tensor) -> Tensor:
    """Return the luma (ITU-R 601) of int32 pixels, `[N, 1, H, W]`."""
    if pixels.shape[1] == 1:
        return pixels
    red, green, blue = pixels.split(1, dim=1)
    return 19595 * red + 38470 * green + 7471 * blue + _ONE // 2 >> _BITS


def mean_grey(pixels: Tensor) -> Tensor:
    """Return the mean luma of each view, int32 `[N, 1, 1, 1]`."""
    count = pixels.shape[-2] * pixels.shape[-1]
    total = grey(pixels).sum((1, 2, 3), keepdim=True, dtype=torch.int64)
    return ((2 * total + count) // (2 * count)).int()


def weighted(pixels: Tensor, others: Tensor, share: Tensor) -> Tensor:
    """Return `share·pixels + (1 − share)·others`, int32; the share is in 1/65,536."""
    total = (pixels - others).mul_(share).add_(others * _ONE + _ONE // 2)
    return total.bitwise_right_shift_(_BITS)


def blend(pixels: Tensor, reference: Tensor, factor: Tensor) -> Tensor:
    """Return `reference + factor·(pixels − reference)` within 0 and 255, int32."""
    fixed = (factor * _ONE).round().int()[:, None, None, None]
    return weighted(pixels, reference, fixed).clamp_(0, 255)


def turn_hue(pixels: Tensor, turn: Tensor) -> Tensor:
    """Return int32 pixels `[N, 3, H, W]` whose hue is turned by a share of the circle `[N]`.

    A channel is `largest − chroma·(1 − c)`, where c, within 0 and 1, is `|h − 3| − 1` for red,
    `2 − |h − 2|` for green and `2 − |h − 4|` for blue, by the hue h in sixths of the circle.
    """
    red, green, blue = channels = pixels.float().unbind(dim=1)
    largest = torch.maximum(torch.maximum(*channels[:2]), blue)
    chroma = largest - torch.minimum(torch.minimum(*channels[:2]), blue)
    is_red, is_green = largest == red, largest == green
    first = torch.where(is_red, green, torch.where(is_green, blue, red))
    second = torch.where(is_red, blue, torch.where(is_green, red, green))
    hue = (first - second) / chroma.clamp(min=1)
    hue += torch.where(is_red, 0.0, torch.where(is_green, 2.0, 4.0))
    hue += (turn * 6).float()[:, None, None]
    hue -= (hue * (1 / 6)).floor_() * 6
    parts = [(hue - 3).abs_() - 1, 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()]
    turned = [largest - chroma * (1 - part.clamp_(0, 1)) for part in parts]
    return torch.stack(turned, dim=1).round_().int()


def check_view(view: ResidentView) -> None:
    """Refuse options that are out of range."""
    if not isinstance(view.pad, int) or isinstance(view.pad, bool) or view.pad < 0:
        raise ValueError(f"data.view.pad must be whole pixels, at least 0, got {view.pad!r}")
    if not isinstance(view.flip, bool):
        raise ValueError(f"data.view.flip must be true or false, got {view.flip!r}")
    for name, (meaning, most) in NUMBERS.items():
        value = getattr(view, name)
        if not (is_number(value) and 0 <= value <= most):
            raise ValueError(f"data.view.{name} must be {meaning} from 0 to {most}, got {value!r}")
    for name, (meaning, least, largest) in RANGES.items():
        pair = getattr(view, name)
        off = pair is None and ResidentView.__dataclass_fields__[name].default is None
        if not (off or is_range(pair, least, largest)):
            raise ValueError(f"data.view.{name} must be two {meaning}, got {pair!r}")


# What each option is, and its largest value.
NUMBERS = {
    "rotate": ("degrees", 180),
    "translate": ("a share", 1),
    "shear": ("degrees", 80),
    "brightness": ("a strength", 8),
    "contrast": ("a strength", 8),
    "saturation": ("a strength", 8),
    "hue": ("a share", 0.5),
    "erase": ("a probability", 1),
    "mixup": ("the α of a Beta distribution", 100),
    "cutmix": ("the α of a Beta distribution", 100),
}
# What each option is, with its smallest and largest value.
RANGES = {
    "crop_scale": ("shares 0 < lo ≤ hi ≤ 1", 1e-6, 1),
    "crop_ratio": ("ratios 0.01 ≤ lo ≤ hi ≤ 100", 0.01, 100),
    "zoom": ("factors 0.01 ≤ lo ≤ hi ≤ 100", 0.01, 100),
    "erase_scale": ("shares 0 < lo ≤ hi ≤ 1", 1e-6, 1),
    "erase_ratio": ("ratios 0.01 ≤ lo ≤ hi ≤ 100", 0.01, 100),
}


def is_number(value: Any) -> bool:
    """Return whether a value is a number, NaN included."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_range(value: Any, least: float, most: float) -> bool:
    """Return whether a value is two numbers, least ≤ lo ≤ hi ≤ most."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        return False
    return all(map(is_number, value)) and least <= value[0] <= value[1] <= most


@dataclass(frozen=True)
class StreamedView:
    """Make any transform of one PIL image pure, by seeding every generator it may draw from.

    Args:
        train: the augmenting transform, PIL image → uint8 tensor `[C, H, W]`.
        clean: the transform of evaluation, PIL image → uint8 tensor `[C, H, W]`.
    """

    train: Callable[[Any], Tensor]
    clean: Callable[[Any], Tensor]

    def __call__(self, image: Any, seed: int, epoch: int, index: int) -> Tensor:
        """Return the view `[C, H, W]` of one image."""
        if epoch == CLEAN:
            return self.clean(image)
        word = int(keyed_words(seed, epoch, torch.tensor([index]), 0))
        state, numpy_state = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(word)  # `torch.manual_seed` reseeds GPUs too
                random.seed(word)
                np.random.seed(word)
                return self.train(image)
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)
