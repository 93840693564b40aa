"""Test images as a worse camera would give them: eight corruptions at five severities.

They are those of CIFAR-10-C that need nothing but arithmetic, with its severities (Hendrycks and
Dietterich, arXiv:1903.12261), for batches of uint8 images of any size; those severities are meant
for images of about 32 pixels. What is random is a function of (seed, index, pixel) alone.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from distill.data.views.draws import keyed_words, mix

DRAW = 2000  # the first number of these draws, apart from those of views and conditions
SEVERITIES = (1, 2, 3, 4, 5)
_WORD = 0xFFFFFFFF
_QUANTILES = 4096

Uniform = Callable[[int], Tensor]  # which draw → uniform draws in (0, 1), float64 like the images


@dataclass(frozen=True)
class ImageCorruption:
    """One corruption at one severity.

    Args:
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: of what is random.
    """

    name: str
    severity: int
    seed: int = 0

    def __call__(self, images: Tensor, index: Tensor) -> Tensor:
        """Return corrupted images.

        Args:
            images: uint8 `[N, C, H, W]` on the CPU.
            index: the samples' indices, int64 `[N]`.
        """
        function, strengths = CORRUPTIONS[self.name]

        def uniform(draw: int) -> Tensor:
            return pixel_uniform(images.shape, self.seed, index, DRAW + draw)

        return function(images, strengths[self.severity - 1], uniform)


def pixel_uniform(shape: torch.Size, seed: int, index: Tensor, draw: int) -> Tensor:
    """Return a uniform draw in (0, 1) for every value of every image, float64 of that shape."""
    first, second = (keyed_words(seed, part, index, draw)[:, None] for part in (0, 1))
    places = torch.arange(math.prod(shape[1:]))
    mixed = mix((mix((first + places * 0x9E3779B9) & _WORD) + second) & _WORD)
    return (mixed.double().add_(0.5) / 2**32).view(shape)


def pixels_of(values: Tensor) -> Tensor:
    """Return values in [0, 1] as uint8, rounded, what is outside cut off."""
    return (values * 255).round_().clamp_(0, 255).to(torch.uint8)


def gaussian_noise(images: Tensor, deviation: float, uniform: Uniform) -> Tensor:
    """`x + σ·n`, n from a normal distribution, x in [0, 1]."""
    return pixels_of(images.double() / 255 + deviation * torch.special.ndtri(uniform(0)))


def shot_noise(images: Tensor, photons: float, uniform: Uniform) -> Tensor:
    """`Poisson(c·x) / c`: as many photons as c at white."""
    place = (uniform(0) * _QUANTILES).long()
    return pixels_of(poisson_quantiles(photons)[images.long(), place] / photons)


@lru_cache(maxsize=8)
def poisson_quantiles(photons: float) -> Tensor:
    """Return equally likely numbers of photons for each value of a pixel, float64 `[256, Q]`."""
    from scipy.stats import poisson

    middles = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    means = np.arange(256)[:, None] / 255 * photons
    return torch.from_numpy(np.maximum(poisson.ppf(middles, means), 0.0))


def impulse_noise(images: Tensor, share: float, uniform: Uniform) -> Tensor:
    """A share of the values is black or white, equally likely (salt and pepper)."""
    draw = uniform(0)
    noisy = images.masked_fill(draw < share / 2, 0)
    return noisy.masked_fill(draw >= 1 - share / 2, 255)


def gaussian_blur(images: Tensor, deviation: float, uniform: Uniform) -> Tensor:
    """Convolved with a Gaussian of σ pixels, cut off at 4σ; edges are repeated outwards."""
    reach = int(4 * deviation + 0.5)
    places = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (places / deviation) ** 2)
    kernel /= kernel.sum()
    flat = images.double().flatten(0, 1)[:, None] / 255
    padded = F.pad(flat, (reach,) * 4, mode="replicate")
    blurred = F.conv2d(F.conv2d(padded, kernel[None, None, :, None]), kernel[None, None, None])
    return pixels_of(blurred.view(images.shape))


def contrast(images: Tensor, factor: float, uniform: Uniform) -> Tensor:
    """`m + c·(x − m)`, m the mean of each channel of each image."""
    values = images.double() / 255
    mean = values.mean((2, 3), keepdim=True)
    return pixels_of((values - mean) * factor + mean)


def brightness(images: Tensor, added: float, uniform: Uniform) -> Tensor:
    """The HSV value raised by c: channels are scaled so that the largest grows by c, up to 1."""
    values = images.double() / 255
    largest = values.amax(1, keepdim=True)
    raised = (largest + added).clamp(max=1)
    # Black has no hue: it becomes grey.
    scaled = torch.where(largest > 0, values * raised / largest.clamp(min=1 / 255), raised)
    return pixels_of(scaled)


def pixelate(images: Tensor, share: float, uniform: Uniform) -> Tensor:
    """Reduced to a share of its sides and enlarged again, both by box filters."""
    height, width = images.shape[-2:]
    small = (max(int(width * share), 1), max(int(height * share), 1))
    box = Image.Resampling.BOX
    return by_pillow(images, lambda image: image.resize(small, box).resize((width, height), box))


def jpeg_compression(images: Tensor, quality: float, uniform: Uniform) -> Tensor:
    """Compressed as JPEG of this quality."""

    def compressed(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(quality))
        return Image.open(file)

    return by_pillow(images, compressed)


def by_pillow(images: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Return uint8 images `[N, C, H, W]`, grey or colour, that Pillow changes one by one."""
    arrays = images.permute(0, 2, 3, 1).contiguous().numpy()
    single = arrays.shape[-1] == 1
    changed = [
        np.asarray(change(Image.fromarray(array[..., 0] if single else array))) for array in arrays
    ]
    return torch.from_numpy(np.stack(changed)).view(arrays.shape).permute(0, 3, 1, 2).contiguous()


Corrupt = Callable[[Tensor, float, Uniform], Tensor]
# Each with its five severities, those of CIFAR-10-C.
CORRUPTIONS: dict[str, tuple[Corrupt, Sequence[float]]] = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "gaussian_blur": (gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (jpeg_compression, (80, 65, 58, 50, 40)),
}


def chosen(corruptions: bool | str | Sequence[str]) -> list[str]:
    """Return the corruptions that `corruptions=` asks for: true is all of them, false none.

    Raises:
        ValueError: if there is none of that name.
    """
    if not isinstance(corruptions, bool | str | list | None):
        raise ValueError(f"corruptions must be true, false or a list of names, got {corruptions!r}")
    names = [corruptions] if isinstance(corruptions, str) else corruptions or []
    names = list(CORRUPTIONS) if names is True else list(names)
    for name in names:
        if name not in CORRUPTIONS:
            raise ValueError(f"corruptions: there is no {name}; there are {', '.join(CORRUPTIONS)}")
    return list(dict.fromkeys(names))
