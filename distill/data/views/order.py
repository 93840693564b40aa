"""The order of an epoch's training samples: a pure function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.data.views.draws import keyed_words

LABELLED, UNLABELLED = 0, 1  # which of a seed's draws an order comes from


@dataclass(frozen=True)
class InShards:
    """Where samples lie that can only be read quickly one after the other.

    Args:
        numbers: of the file that each lies in, int64 `[n]`, from 0 on.
        window: how many samples of an order are shuffled among each other, 1 or more.
        ahead: is told which files an order reads next; None where nothing is to be prepared.
    """

    numbers: Tensor
    window: int
    ahead: Callable[[Sequence[int]], None] | None = None

    def shard_order(self, order: Tensor) -> list[int]:
        """Return the shards that an order of samples reads, each once, by when it is first read."""
        shards, inverse = self.numbers[order].unique(return_inverse=True)
        places = torch.arange(len(order))
        first = torch.full_like(shards, len(order)).scatter_reduce(0, inverse, places, "amin")
        return shards[first.argsort()].tolist()


def epoch_order(
    seed: int, epoch: int, labels: Tensor, balance: float = 1.0, in_shards: InShards | None = None
) -> Tensor:
    """Return the positions that an epoch draws, as many as there are samples, int64 `[n]`.

    Class k is drawn in proportion to `n_k^balance`: 1 is a permutation of the samples, 0 draws all
    classes equally often. An image is drawn as often as its share `r = n·n_k^(balance−1)/Σ_j
    n_j^balance` says, rounded down or up so that its mean is r; a class's images in all, to within
    one, likewise.

    What is drawn of samples that lie in shards comes shard by shard, these in a random order, and
    is shuffled within windows: any `window` draws in a row lie in two windows at most, and a window
    in as few shards as hold it. Of one shard, or with a window of all samples, it is the order of
    samples that lie anywhere, but for the draws.

    Args:
        seed: the run's seed.
        epoch: the epoch, 0 or more.
        labels: the samples' labels `[n]`.
        balance: the exponent in [0, 1].
        in_shards: where the samples lie; None is anywhere.

    Reference:
        Kang et al., 1910.09217, §4.1; drawn systematically instead of independently, so that no
        image of a frequent class comes twice while another is left out.
    """
    generator = seeded(seed, epoch, len(labels), LABELLED)
    order = torch.randperm(len(labels), generator=generator)
    drawn = order if balance == 1 else _balanced(order, labels, balance, generator)
    return drawn if in_shards is None else _by_shard(drawn, in_shards, generator)


def endless_order(seed: int, count: int, start: int, length: int) -> Tensor:
    """Return a stretch of an endless row of permutations of `count` samples, int64 `[length]`.

    Any stretch holds each sample equally often, to within one, but for what it cuts off at its
    ends.

    Args:
        seed: the run's seed.
        count: how many samples there are, 1 or more.
        start: the stretch's first place in the row, 0 or more.
        length: its length, 0 or more.
    """
    first, beyond = start // count, -(-(start + length) // count)
    row = [
        torch.randperm(count, generator=seeded(seed, number, count, UNLABELLED))
        for number in range(first, max(beyond, first + 1))
    ]
    return torch.cat(row)[start - first * count :][:length]


def seeded(seed: int, number: int, count: int, draw: int) -> torch.Generator:
    """Return a generator for an order of so many samples, a pure function of these numbers."""
    word = int(keyed_words(seed, number, torch.tensor([count]), draw))
    return torch.Generator().manual_seed(word)


def _by_shard(drawn: Tensor, in_shards: InShards, generator: torch.Generator) -> Tensor:
    ranks = torch.randperm(int(in_shards.numbers.max()) + 1, generator=generator)
    streamed = drawn[ranks[in_shards.numbers[drawn]].argsort(stable=True)]
    places = torch.randperm(len(drawn), generator=generator)
    return streamed[places[(places // in_shards.window).argsort(stable=True)]]


def _balanced(order: Tensor, labels: Tensor, balance: float, generator: torch.Generator) -> Tensor:
    by_class = order[labels[order].argsort(stable=True)]
    counts = torch.bincount(labels).double()
    ends = (counts ** (balance - 1))[labels[by_class]].cumsum(0)
    # One point in each n-th of the whole: a stretch is met by its length, rounded down or up.
    start = torch.rand(1, generator=generator, dtype=torch.float64)
    points = (torch.arange(len(order)) + start) * (ends[-1] / len(order))
    found = torch.searchsorted(ends, points, right=True).clamp(max=len(order) - 1)
    return by_class[found][torch.randperm(len(order), generator=generator)]
