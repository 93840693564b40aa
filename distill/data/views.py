"""Views: what a model sees of a sample, a pure function of (seed, epoch, index).

Whatever is random about a sample is drawn from a counter-based generator keyed by those numbers,
never from a shared random state. A view is therefore the same for any batch size, order, number of
workers or ranks, and after a resume.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CLEAN = -1  # the epoch that names the view without augmentation: evaluation

_WORD = 0xFFFFFFFF


def mix(word: Tensor) -> Tensor:
    """Scramble 32-bit words held in int64, each output bit depending on every input bit.

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
    word = torch.zeros_like(index)
    for part in (seed, epoch, draw):
        word = mix((word + (part * 0x9E3779B9 + 1 & _WORD)) & _WORD)
    word = mix((word + index) & _WORD)
    return mix((word + (index >> 32) * 0x9E3779B9 + 1) & _WORD)


def keyed_uniform(seed: int, epoch: int, index: Tensor, draw: int) -> Tensor:
    """Return one float32 draw in [0, 1) per index `[N]`; arguments as in `keyed_words`."""
    return (keyed_words(seed, epoch, index, draw) >> 8).float() * 2.0**-24


def keyed_integers(seed: int, epoch: int, index: Tensor, draw: int, below: int) -> Tensor:
    """Return one integer in [0, below) per index `[N]`; arguments as in `keyed_words`."""
    return keyed_words(seed, epoch, index, draw) * below >> 32


@dataclass(frozen=True)
class ResidentView:
    """Augment whole batches of small images by tensor operations: shift, then flip.

    Args:
        pad: pixels of zero padding on each side before the crop back to size: shifts of up to
            `pad` pixels either way.
        flip: whether half of the views are mirrored left to right.
    """

    pad: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.pad, int) or self.pad < 0:
            raise ValueError(f"data.view.pad must be whole pixels, at least 0, got {self.pad!r}")
        if not isinstance(self.flip, bool):
            raise ValueError(f"data.view.flip must be true or false, got {self.flip!r}")

    def __call__(self, images: Tensor, seed: int, epoch: int, index: Tensor) -> Tensor:
        """Return the views `[N, C, H, W]` of uint8 images `[N, C, H, W]`, uint8 too."""
        if epoch == CLEAN or not (self.pad or self.flip):
            return images
        height, width = images.shape[-2:]
        rows = torch.arange(height, device=images.device).expand(len(images), -1)
        columns = torch.arange(width, device=images.device).expand(len(images), -1)
        if self.flip:
            mirrored = keyed_integers(seed, epoch, index, 2, 2).bool()[:, None]
            columns = torch.where(mirrored, columns.flip(1), columns)
        if self.pad:
            rows = rows + keyed_integers(seed, epoch, index, 0, 2 * self.pad + 1)[:, None]
            columns = columns + keyed_integers(seed, epoch, index, 1, 2 * self.pad + 1)[:, None]
            images = F.pad(images, (self.pad,) * 4)
        sample = torch.arange(len(images), device=images.device)[:, None, None, None]
        channel = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
        return images[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


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
