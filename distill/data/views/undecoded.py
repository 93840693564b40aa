"""Training views whose JPEG files are decoded on the device that they are shown on."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.data.sources.decoders import Box, Decoder
from distill.data.sources.images import MODES
from distill.data.views.crop import Drawn, ResizedCrop
from distill.utils.errors import first_line


class Crop(NamedTuple):
    """What is shown of one picture: a box of it, resized and mirrored as drawn."""

    box: Box
    drawn: Drawn


@dataclass(eq=False)
class Undecoded:
    """A batch's views before they are made; `to` makes them.

    Attributes:
        crop: how.
        files: the bytes of plain JPEG files, one after the other, uint8 `[B]`.
        lengths: of each file in bytes; 0 is a picture that a data worker has decoded.
        crops: of each file.
        views: of the other pictures, uint8 `[M, C, H, W]`.
    """

    crop: ResizedCrop
    files: Tensor
    lengths: Sequence[int]
    crops: Sequence[Crop]
    views: Tensor

    @classmethod
    def read(
        cls,
        crop: ResizedCrop,
        load: Any,
        indices: Sequence[int],
        draws: Sequence[Drawn],
        channels: int,
        decoder: Decoder,
    ) -> Undecoded:
        """Read the files of pictures; see `ResizedCrop.read` for the arguments."""
        files: list[bytes] = []
        crops: list[Crop] = []
        views: list[Tensor] = []
        for index, drawn in zip(indices, draws, strict=True):
            content, box = crop.unread(load, index, drawn) or (b"", None)
            files.append(content)
            if box is None:
                views.append(crop.read(load, index, drawn, channels, decoder))
            else:
                crops.append(Crop(box, drawn))
        return cls(
            crop,
            torch.from_numpy(np.frombuffer(bytearray(b"".join(files)), np.uint8)),
            [len(content) for content in files],
            crops,
            torch.stack(views) if views else torch.empty((0, channels, *crop.size)).byte(),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def pin_memory(self) -> Undecoded:
        """Return the same in memory that a GPU can read by itself."""
        return replace(self, files=self.files.pin_memory(), views=self.views.pin_memory())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Tensor:
        """Return the views, uint8 `[N, C, H, W]`, made on a device."""
        here = torch.device(device)
        views = self.views.to(here, non_blocking=non_blocking)
        files = [one for one in self.files.split(list(self.lengths)) if len(one)]
        pictures = decoded_on(here, files, views.shape[1])
        shown = iter(
            self.crop.on_device(picture, *crop)
            for picture, crop in zip(pictures, self.crops, strict=True)
        )
        rest = iter(views)
        return torch.stack([next(shown if length else rest) for length in self.lengths])


def decoded_on(device: torch.device, files: Sequence[Tensor], channels: int) -> list[Tensor]:
    """Decode whole JPEG files on a device: by nvJPEG on a GPU, by Pillow elsewhere.

    A file that nvJPEG refuses is decoded by Pillow, and the first is said.

    Args:
        device: where pixels are wanted.
        files: bytes, uint8 `[B]` on the CPU.
        channels: 3 for colour, 1 for grey.

    Returns:
        Pixels, uint8 `[channels, H, W]` each.
    """
    if device.type != "cuda":
        return [by_pillow(file, channels).to(device) for file in files]
    try:
        return by_nvjpeg(device, files, channels) if files else []
    except RuntimeError as error:
        if len(files) > 1:
            return [one for file in files for one in decoded_on(device, [file], channels)]
        warnings.warn(  # once for each error
            f"data.decoder=gpu: Pillow decodes what nvJPEG refuses ({first_line(error)})",
            stacklevel=2,
        )
        return [by_pillow(files[0], channels).to(device)]


def by_nvjpeg(device: torch.device, files: Sequence[Tensor], channels: int) -> list[Tensor]:
    """Decode whole JPEG files on a GPU."""
    from torchvision.io import ImageReadMode, decode_jpeg

    mode = ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY
    decoded: list[Tensor] = decode_jpeg(list(files), mode, device=device)
    return decoded


def by_pillow(file: Tensor, channels: int) -> Tensor:
    """Decode a whole JPEG file on the CPU."""
    with Image.open(io.BytesIO(file.numpy().tobytes())) as picture:
        pixels = np.array(picture.convert(MODES[channels]))
    return torch.from_numpy(pixels).view(*pixels.shape[:2], channels).permute(2, 0, 1)
