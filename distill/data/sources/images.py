"""Pixels: decoding image files, their conversion to 8 bits, and resizing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from distill.data.sources.sizes import ORIENTATION, as_size

MODES = {1: "L", 3: "RGB"}


def check_channels(channels: int) -> None:
    """Refuse a number of channels that images do not come in."""
    if channels not in MODES:
        raise ValueError(f"data.channels must be 1 (grey) or 3 (colour), got {channels}")


def check_mode(image: Image.Image) -> None:
    """Refuse pixels that do not come to 8 bits in one way."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")


def decoded(file: Path | IO[bytes], channels: int) -> Image.Image:
    """Decode an image file."""
    # Pillow loads its rarer formats at first need, and a thread that looks meanwhile finds none.
    Image.init()
    with Image.open(file) as image:
        return upright(image, channels)


def upright(image: Image.Image, channels: int) -> Image.Image:
    """Return the first frame in 8 bits, turned as its EXIF says, on white where transparent."""
    image.load()  # of a file that its reader closes; and a PNG may say only behind its pixels
    if orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    check_mode(image)
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:  # what lies under transparent pixels is arbitrary
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = MODES[channels]
    return image if image.mode == mode else image.convert(mode)  # which would copy it


def orientation(image: Image.Image) -> int:
    """Return how an image is to be turned, as EXIF numbers it; 1 is upright."""
    turned: Any = image.getexif().get(ORIENTATION)
    return turned if turned in range(2, 9) else 1


def cropped(image: Image.Image, channels: int, size: tuple[int, int]) -> Tensor:
    """Return an image as uint8 `[C, H, W]`: upright, and of H × W, see `covering`."""
    return covering(upright(image, channels), size)


def covering(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Return an upright image as uint8 `[C, H, W]`: resized to cover H × W, centre cropped."""
    from torchvision.transforms.v2 import functional as tv

    scale = max(size[0] / image.height, size[1] / image.width)
    own = image.height, image.width
    sides = [max(least, int(scale * side)) for least, side in zip(size, own, strict=True)]
    return tv.pil_to_tensor(tv.center_crop(tv.resize(image, sides), list(size)))


def resize(images: Tensor, size: int | Sequence[int]) -> Tensor:
    """Return uint8 images `[N, C, H, W]` of a square's side or of height and width, bilinearly."""
    height, width = as_size(size)
    if images.shape[-2:] == (height, width):
        return images
    parts = [
        F.interpolate(part.float(), size=(height, width), mode="bilinear", antialias=True)
        for part in images.split(1024)
    ]
    return torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in parts])
