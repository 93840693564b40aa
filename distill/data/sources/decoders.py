"""Which library decodes the JPEG files of training views, and only as much of them as is shown."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, features

from distill.data.sources.errors import ShardLost, explained
from distill.data.sources.images import MODES, decoded, orientation, upright
from distill.data.sources.sizes import TURNED
from distill.utils.arrow import lent_pixels
from distill.utils.errors import first_line

Pixels = np.ndarray[Any, Any]
SHRINKS = (8, 4, 2, 1)  # what a JPEG's blocks of 8 × 8 can be decoded to, as a divisor of its size
JPEG, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"  # how such a file begins, and how it ends
CHOICES = ("auto", "pil", "simplejpeg", "torchvision", "gpu")


class Box(NamedTuple):
    """A part of a picture of 1/`shrink` of the size, in its pixels."""

    top: int
    left: int
    height: int
    width: int
    shrink: int = 1

    def at(self, shrink: int) -> Box:
        """Return the same part of a picture that was decoded at a scale at least as large."""
        factor = self.shrink // shrink
        top, left, height, width = (factor * side for side in self[:4])
        return Box(top, left, height, width, shrink)

    def of(self, array: Pixels) -> Pixels:
        """Return this part of pixels `[H, W]` or `[H, W, C]`."""
        return array[self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True)
class Decoder:
    """A library that decodes JPEG files.

    Args:
        name: the library.
        build: what else decides its pixels' bits.
        decode: the file's bytes, the picture as Pillow has opened and not decoded it, and the box →
            the box's pixels, uint8 `[H, W]`, `[H, W, 3]`, or `[H, W, 4]` with a last channel that
            means nothing.
        on_device: whether plain JPEG files are not decoded so in data workers, but go to where the
            model is as they are, see `distill.data.views.undecoded`.
    """

    name: str
    build: str
    decode: Callable[[bytes, Image.Image, Box], Pixels]
    on_device: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({self.build})"


def by_pillow(content: bytes, picture: Image.Image, box: Box) -> Pixels:
    """Decode a part of a JPEG file with Pillow."""
    return part_of(shrunk(picture, box.shrink), box)


def by_simplejpeg(content: bytes, picture: Image.Image, box: Box) -> Pixels:
    """Decode a part of a JPEG file with libjpeg-turbo, by simplejpeg."""
    from simplejpeg import decode_jpeg

    height, width = (-(-side // box.shrink) for side in (picture.height, picture.width))
    colours = "GRAY" if picture.mode == "L" else "RGB"
    pixels = decode_jpeg(content, colours, min_height=height, min_width=width)
    if pixels.shape[:2] != (height, width):
        raise ValueError(f"simplejpeg gave {pixels.shape[:2]} instead of {(height, width)} pixels")
    return box.of(pixels[..., 0] if picture.mode == "L" else pixels)


def by_torchvision(content: bytes, picture: Image.Image, box: Box) -> Pixels:
    """Decode a part of a JPEG file with torchvision, which does not shrink it."""
    from torchvision.io import ImageReadMode, decode_jpeg

    grey = picture.mode == "L"
    mode = ImageReadMode.GRAY if grey else ImageReadMode.RGB
    pixels = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode)
    return box.at(1).of((pixels[0] if grey else pixels.permute(1, 2, 0)).numpy())


def pillow() -> Decoder:
    """Return Pillow's decoder, which is always there."""
    turbo = features.version("libjpeg_turbo")
    library = f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {features.version('jpg')}"
    return Decoder("pil", library, by_pillow)


def simplejpeg() -> Decoder:
    """Return simplejpeg's decoder."""
    with explained("simplejpeg"):
        import_module("simplejpeg")
    return Decoder("simplejpeg", version("simplejpeg"), by_simplejpeg)


def torchvision() -> Decoder:
    """Return torchvision's decoder."""
    return Decoder("torchvision", version("torchvision"), by_torchvision)


def gpu() -> Decoder:
    """Return nvJPEG's decoder, of which torchvision has the binding.

    Only the binding is tried here: a GPU would be taken by processes that do not use it.

    Raises:
        RuntimeError: where there is no GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device")
    try_out(torchvision())
    build = f"torchvision {version('torchvision')}, CUDA {torch.version.cuda}"
    return Decoder("gpu", build, by_pillow, on_device=True)


def chosen_decoder(name: str) -> Decoder:
    """Return the decoder of a name, tried on a small picture.

    `auto` is simplejpeg where it loads, else Pillow: both decode a JPEG file at 1/2, 1/4 and 1/8 of
    its size, and torchvision does not.

    Raises:
        ValueError: for another name, or a library that cannot decode here.
    """
    if name not in CHOICES:
        raise ValueError(f"data.decoder must be one of {', '.join(CHOICES)}, got {name!r}")
    if name == "pil":
        return pillow()
    try:
        decoder = {"torchvision": torchvision, "gpu": gpu}.get(name, simplejpeg)()
        try_out(decoder)
    except Exception as error:  # whatever a library that is not there, or broken, raises
        if name == "auto":
            return pillow()
        why = first_line(error)
        raise ValueError(
            f"data.decoder={name} cannot decode JPEG files here ({why}): give auto or pil"
        ) from error
    return decoder


def try_out(decoder: Decoder) -> None:
    """Decode a small picture, which shows a library that is not there or broken."""
    content = small_jpeg()
    decoder.decode(content, Image.open(io.BytesIO(content)), Box(0, 0, 8, 8, 2))


def small_jpeg() -> bytes:
    """Return a JPEG file on which a decoder can be tried."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    return file.getvalue()


def corners(box: Box) -> tuple[int, int, int, int]:
    """Return a box as Pillow says it: left, top, right, bottom."""
    return box.left, box.top, box.left + box.width, box.top + box.height


def part_of(picture: Image.Image, box: Box) -> Pixels:
    """Return a part of a grey or colour picture, without a copy of it where Pillow lends it."""
    pixels = lent_pixels(picture)
    return np.asarray(picture.crop(corners(box))) if pixels is None else box.of(pixels)


def shrunk(picture: Image.Image, shrink: int) -> Image.Image:
    """Return an opened JPEG file that will be decoded at 1/`shrink` of its size."""
    picture.draft(None, (picture.width // shrink, picture.height // shrink))
    return picture


def opened_jpeg(content: bytes) -> Image.Image | None:
    """Return a JPEG file opened and not decoded; None of what is no plain grey or colour JPEG."""
    if not content.startswith(JPEG):
        return None
    picture = Image.open(io.BytesIO(content), formats=("JPEG",))  # else it tries three others first
    if picture.format != "JPEG" or picture.mode not in MODES.values():
        return None
    picture.decodermaxblock = len(content)  # else what lies across two pieces is decoded twice
    return picture


def encoded(load: Any, index: int) -> bytes | None:
    """Return the bytes of a loader's picture, or None of a loader that has no files.

    Raises:
        ValueError: for a file that cannot be read, as the loader says it.
    """
    if not hasattr(load, "open"):
        return None
    try:
        with load.open(index) as file:
            return None if isinstance(file, Image.Image) else file.read()
    except ShardLost:  # which has been tried again, and says so
        raise
    except Exception:
        load(index)
        raise


def plain_jpeg(content: bytes) -> Image.Image | None:
    """Return an opened JPEG file that any decoder shows alike; None of another or a broken one.

    It is whole, upright, and grey or of colours that are stored as brightness and differences.
    """
    if not content.rstrip(b"\0\r\n ").endswith(JPEG_END):
        return None
    try:
        picture = opened_jpeg(content)
    except Exception:  # whatever a file raises that is none
        return None
    if picture is None or orientation(picture) != 1 or picture.info.get("adobe_transform") == 0:
        return None
    return picture


def region(
    load: Any,
    index: int,
    place: Callable[[int, int], Box],
    channels: int,
    decoder: Decoder,
    content: bytes | None = None,
) -> Pixels:
    """Return a part of a loader's picture, uint8 `[H, W, C]`, of colours perhaps a fourth channel.

    A plain JPEG file is decoded at the smallest scale that the box admits; any other, and one that
    the decoder refuses, is decoded whole.

    Args:
        load: index → picture; where it has `open`, index → file.
        index: the picture's.
        place: height and width of the upright picture → the box.
        channels: 3 for colour, 1 for grey.
        decoder: of JPEG files.
        content: the picture's file, where it has been read.

    Raises:
        ValueError: for a broken picture, as the loader says it.
    """
    content = encoded(load, index) if content is None else content
    if content is None:
        return region_of(load(index), place)
    try:
        picture = opened_jpeg(content)
        if picture is None:
            return region_of(decoded(io.BytesIO(content), channels), place)
        return region_of_jpeg(content, picture, place, channels, decoder)
    except Exception:  # decoders raise whatever they stumble on; the loader names the picture
        return region_of(load(index), place)


def region_of(picture: Image.Image, place: Callable[[int, int], Box]) -> Pixels:
    """Return a part of a decoded and upright picture, uint8 `[H, W, C]`."""
    box = place(picture.height, picture.width)
    return with_channels(part_of(picture, box.at(1)))


def region_of_jpeg(
    content: bytes,
    picture: Image.Image,
    place: Callable[[int, int], Box],
    channels: int,
    decoder: Decoder,
) -> Pixels:
    """Return a part of a plain JPEG file that Pillow has opened, uint8 `[H, W, C]`."""
    height, width, turned = picture.height, picture.width, orientation(picture)
    if turned == 1:
        return in_channels(decoder.decode(content, picture, place(height, width)), channels)
    box = place(*((width, height) if turned in TURNED else (height, width)))
    # Turning puts another edge first, from which shrunk pixels count only where they fill it.
    shrink = 1 if height % box.shrink or width % box.shrink else box.shrink
    whole = upright(shrunk(picture, shrink), channels)
    return with_channels(part_of(whole, box.at(shrink)))


def in_channels(pixels: Pixels, channels: int) -> Pixels:
    """Return pixels of a JPEG file as `[H, W, C]`, converted as Pillow does."""
    if channels == 1 and pixels.ndim == 3:
        colours = Image.fromarray(np.ascontiguousarray(pixels[..., :3]))
        pixels = np.asarray(colours.convert(MODES[1]))
    grey = pixels.ndim == 2
    return with_channels(pixels).repeat(channels, axis=2) if grey else pixels


def with_channels(pixels: Pixels) -> Pixels:
    """Return pixels `[H, W]` or `[H, W, C]` as `[H, W, C]`."""
    return pixels[:, :, None] if pixels.ndim == 2 else pixels
