"""Random numbers that are pure functions of (seed, epoch, index), and tables to draw from.

They come from a counter-based generator keyed by those numbers, never from a shared random state:
so they are the same for any batch size, order, number of workers or ranks, and after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
_STEPS = 4096  # a table's values, drawn by the upper 12 bits of a word

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
    FLIP_DOWN = 27
    INTERPOLATION = 28


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


def second_seed(seed: int) -> int:
    """Return the seed of the second views that a step shows beside those of a seed."""
    return mix(seed * _GOLDEN + 2 & _WORD)


def words_of(word: int | Tensor, index: Tensor) -> Tensor:
    """Return one word per index `[N]`, or per draw and index `[D, N]` of draws' words `[D, 1]`."""
    words = mix((index + word) & _WORD)
    return mix((words + (index >> 32) * _GOLDEN + 1) & _WORD)


def keyed_uniform(seed: int, epoch: int, index: Tensor, draw: int) -> Tensor:
    """Return one float32 draw in [0, 1) per index `[N]`; arguments as in `keyed_words`."""
    return (keyed_words(seed, epoch, index, draw) >> 8).float() * 2.0**-24


def keyed_integers(seed: int, epoch: int, index: Tensor, draw: int, below: int | Tensor) -> Tensor:
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

    def attempts(self, draw: Draw, count: int, low: float, high: float) -> Tensor:
        """Return so many draws from [low, high) for each sample, float64 `[N, count]`."""
        steps = torch.arange(count, device=self.words.device) * _GOLDEN
        words = mix(self.words[draw][:, None] + steps & _WORD)
        return (words >> 8).double() * ((high - low) * 2.0**-24) + low

    def happens(self, draw: Draw, probability: float) -> Tensor:
        """Return events of this probability, bool `[N]`."""
        return (self.words[draw] >> 8) < math.ceil(probability * 2**24)

    def places(self, first: Draw, beyond: Tensor) -> Tensor:
        """Return integers of this draw and the next, each in [0, beyond), int64 `[2, N]`."""
        return self.words[first : first + 2] * beyond >> 32

    def lookup(self, draw: Draw, table: Tensor) -> Tensor:
        """Return equally likely values of a table of `_STEPS`, `[N]`."""
        return table[self.words[draw] >> 20]


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
