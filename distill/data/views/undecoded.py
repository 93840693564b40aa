"""Training views whose JPEG files are decoded on the device that they are shown on."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.data.sources.decoders import Decoder, encoded, plain_jpeg, small_jpeg
from distill.data.sources.images import decoded
from distill.data.views.crop import Drawn, ResizedCrop
from distill.utils.errors import first_line

AT_ONCE = 2**27  # pixels of whole pictures that lie on a device together
NOT_THE_FILES = ("out of memory", "CUDA error")  # in an error that is not about a file


class File(NamedTuple):
    """A picture whose file is yet to be decoded.

    Args:
        number: in its batch.
        sample: its index in the source.
        length: of the file in bytes.
        pixels: how many the picture has.
        drawn: what is shown of it.
    """

    number: int
    sample: int
    length: int
    pixels: int
    drawn: Drawn


class Undecoded:
    """A batch's views before they are made; `to` makes them.

    It is no dataclass: Lightning looks into these for floats to convert.

    Args:
        crop: how.
        files: plain JPEG files.
        content: their bytes, one after the other, uint8 `[B]`.
        views: of the other pictures, which a data worker has decoded, uint8 `[M, C, H, W]`.
    """

    def __init__(
        self, crop: ResizedCrop, files: Sequence[File], content: Tensor, views: Tensor
    ) -> None:
        self.crop, self.files, self.content, self.views = crop, files, content, views

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
        files: list[File] = []
        contents: list[bytes] = []
        views: list[Tensor] = []
        for number, (index, drawn) in enumerate(zip(indices, draws, strict=True)):
            content = encoded(load, index)
            picture = None if content is None else plain_jpeg(content)
            if content is None or picture is None:
                views.append(crop.read(load, index, drawn, channels, decoder, content))
            else:
                pixels = picture.width * picture.height
                files.append(File(number, index, len(content), pixels, drawn))
                contents.append(content)
        return cls(
            crop,
            files,
            torch.from_numpy(np.frombuffer(bytearray(b"".join(contents)), np.uint8)),
            torch.stack(views) if views else torch.empty((0, channels, *crop.size)).byte(),
        )

    def __len__(self) -> int:
        return len(self.files) + len(self.views)

    def pin_memory(self) -> Undecoded:
        """Return the same; its views are in memory that a GPU can read by itself."""
        return Undecoded(self.crop, self.files, self.content, self.views.pin_memory())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Tensor:
        """Return the views, uint8 `[N, C, H, W]`, made on a device.

        On a GPU that is beside its other work, in memory of a stream of its own: nvJPEG's binding
        writes without regard to what is queued, so that this has to be waited for, and no more.
        """
        here = torch.device(device)
        if here.type != "cuda":
            return self._made(here)
        beside = stream_beside(here)
        with torch.cuda.stream(beside):
            views = self._made(here)
        now = torch.cuda.current_stream(here)
        now.wait_stream(beside)
        views.record_stream(now)
        return views

    def _made(self, device: torch.device) -> Tensor:
        shape = len(self), *self.views.shape[1:]
        made = torch.empty(shape, dtype=torch.uint8, device=device)
        sent = {file.number for file in self.files}
        made[[number for number in range(len(self)) if number not in sent]] = self.views.to(device)
        contents = iter(self.content.split([file.length for file in self.files]))
        for group in groups(self.files):
            given = [next(contents) for _ in group]
            pictures = decoded_on(device, given, [file.sample for file in group], shape[1])
            for file, picture in zip(group, pictures, strict=True):
                made[file.number] = self.crop.on_device(picture, file.drawn)
        return made


def groups(files: Sequence[File]) -> Iterator[list[File]]:
    """Yield, in order, files that are decoded together: no more than a device should hold."""
    group: list[File] = []
    pixels = 0
    for file in files:
        if group and pixels + file.pixels > AT_ONCE:
            yield group
            group, pixels = [], 0
        group.append(file)
        pixels += file.pixels
    if group:
        yield group


def decoded_on(
    device: torch.device, contents: Sequence[Tensor], indices: Sequence[int], channels: int
) -> list[Tensor]:
    """Decode whole JPEG files on a device: by nvJPEG on a GPU, by Pillow elsewhere.

    A file that nvJPEG refuses is decoded by Pillow, which is said.

    Args:
        device: where pixels are wanted.
        contents: files, uint8 `[B]` on the CPU.
        indices: the pictures', by which one that is broken is named.
        channels: 3 for colour, 1 for grey.

    Returns:
        Pixels, uint8 `[channels, H, W]` each.

    Raises:
        ValueError: for a broken file, and a GPU that can decode none.
    """
    if device.type != "cuda":
        pairs = zip(contents, indices, strict=True)
        return [whole_picture(*pair, channels).to(device) for pair in pairs]
    try_nvjpeg(device)
    try:
        return by_nvjpeg(device, contents, channels)
    except RuntimeError as error:
        if any(words in str(error) for words in NOT_THE_FILES):
            raise
        if half := len(contents) // 2:
            return [
                *decoded_on(device, contents[:half], indices[:half], channels),
                *decoded_on(device, contents[half:], indices[half:], channels),
            ]
        warnings.warn(  # once for each error
            f"data.decoder=gpu: Pillow decodes what nvJPEG refuses ({first_line(error)})",
            stacklevel=2,
        )
        return [whole_picture(contents[0], indices[0], channels).to(device)]


@lru_cache(maxsize=64)
def stream_beside(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of a GPU on which pictures are decoded."""
    return torch.cuda.Stream(device)


@lru_cache(maxsize=64)
def try_nvjpeg(device: torch.device) -> None:
    """Decode a small picture, which shows a GPU, or a torchvision, that can decode none.

    Raises:
        ValueError: if that fails.
    """
    try:
        by_nvjpeg(device, [torch.frombuffer(bytearray(small_jpeg()), dtype=torch.uint8)], 3)
    except RuntimeError as error:
        raise ValueError(
            f"data.decoder=gpu cannot decode JPEG files on {device} ({first_line(error)}): give "
            "data.decoder=auto"
        ) from error


def by_nvjpeg(device: torch.device, contents: Sequence[Tensor], channels: int) -> list[Tensor]:
    """Decode whole JPEG files on a GPU.

    The current stream is waited for: the binding takes its memory for pixels, and writes there at
    once (pytorch/vision, pull request 9606).
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    mode = ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY
    torch.cuda.current_stream(device).synchronize()
    pictures: list[Tensor] = decode_jpeg(list(contents), mode, device=device)
    return pictures


def whole_picture(content: Tensor, index: int, channels: int) -> Tensor:
    """Decode a whole JPEG file by Pillow, uint8 `[channels, H, W]`.

    Raises:
        ValueError: for a broken one.
    """
    from torchvision.transforms.v2.functional import pil_to_tensor

    try:
        pixels: Tensor = pil_to_tensor(decoded(io.BytesIO(content.numpy().tobytes()), channels))
    except Exception as error:  # whatever Pillow stumbles on
        raise ValueError(
            f"broken image, index {index} of the data ({first_line(error)}): data.verify=all names "
            "its file"
        ) from error
    return pixels
