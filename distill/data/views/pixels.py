"""Images moved, mixed and coloured in integers, a batch at a time.

Integers, float64 by single operations that IEEE 754 rounds exactly, and tables: vectorised loops
round alike then, whether a pixel lies in the body of a loop or in its tail.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_BITS = 16  # of the fraction of factors, weights and hues
ONE = 1 << _BITS
_LANES = 0x00FF00FF


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
    fixed = (positions * ONE).round().long()[..., None]
    y = fixed_places(fixed[0], rows, columns, height)
    x = fixed_places(fixed[1], rows, columns, width)
    corners = gather_corners(images, (y >> _BITS).mul_(width + 2).add_(x >> _BITS))
    # Two 8-bit neighbours to a word of two 16-bit lanes, which their weighted sum does not leave.
    left, right = corners & _LANES, (corners >> 8).bitwise_and_(_LANES)
    both = right.sub_(left).mul_(x >> _BITS - 8 & 255).add_(left.mul_(256))
    upper = both & ONE - 1
    lower = (both >> _BITS).bitwise_and_(ONE - 1)
    total = lower.sub_(upper).mul_(y >> _BITS - 8 & 255).add_(upper.mul_(256))
    return total.add_(ONE // 2).bitwise_right_shift_(_BITS).to(torch.uint8)


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
    parts = (by_row * rows + 2 * (middle + ONE), by_column * columns)
    down, right = (part.clamp(-1 << 29, 1 << 29).int() for part in parts)
    place = (down[:, None, :, None] + right[:, None, None, :]).bitwise_right_shift_(1)
    inside = place.clamp(ONE, size << _BITS)
    # The outer half of an edge's pixels is theirs: else a crop would darken where it touches it.
    return torch.where(place.sub_(inside).abs_() <= ONE // 2, inside, 0)


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
    return 19595 * red + 38470 * green + 7471 * blue + ONE // 2 >> _BITS


def mean_grey(pixels: Tensor) -> Tensor:
    """Return the mean luma of each view, int32 `[N, 1, 1, 1]`."""
    count = pixels.shape[-2] * pixels.shape[-1]
    total = grey(pixels).sum((1, 2, 3), keepdim=True, dtype=torch.int64)
    return ((2 * total + count) // (2 * count)).int()


def weighted(pixels: Tensor, others: Tensor, share: Tensor) -> Tensor:
    """Return `share·pixels + (1 − share)·others`, int32; the share is in 1/65,536."""
    total = (pixels - others).mul_(share).add_(others * ONE + ONE // 2)
    return total.bitwise_right_shift_(_BITS)


def blend(pixels: Tensor, reference: Tensor, factor: Tensor) -> Tensor:
    """Return `reference + factor·(pixels − reference)` within 0 and 255, int32."""
    fixed = (factor * ONE).round().int()[:, None, None, None]
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
