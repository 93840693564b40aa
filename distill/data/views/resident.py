"""Training views of images that lie on a device, made from positions alone."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.data.sources.splits import Resident
from distill.data.views.draws import Draw, Draws, draw_words, words_of
from distill.data.views.views import ResidentView


class ResidentViews:
    """What training shows of images on a device: a function of positions and of a view's words.

    Nothing of it waits for the device or depends on a number of the host, so that it can be part of
    a captured step.

    Args:
        pool: the images, labels and indices, on the device.
        view: how their views are made.
        seed: the seed of the views.
        classes: K, of the targets of views that mix two samples.
    """

    def __init__(self, pool: Resident, view: ResidentView, seed: int, classes: int) -> None:
        self.pool, self.view, self.seed, self.classes = pool, view, seed, classes

    def words(self, view_number: int) -> Tensor:
        """Return what the draws of a view of all samples begin from, int64 `[D, 1]`."""
        return draw_words(self.seed, view_number, self.pool.images.device)

    def __call__(self, positions: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Return uint8 views `[N, C, H, W]`, and labels `[N]` or probabilities `[N, K]`.

        Args:
            positions: of the samples in the pool, int64 `[N]`.
            words: see `words`.
        """
        images, pool = self.pool.images.index_select(0, positions), self.pool
        target, index = pool.labels[positions], pool.index[positions]
        if self.view.mixes:
            return self.mixed(images, target, index, words)
        return self.view.shown(images, Draws(words_of(words, index))), target

    def mixed(
        self, images: Tensor, target: Tensor, index: Tensor, words: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return images' views mixed with those of their partners in the pool, and their targets.

        Args:
            images: uint8 `[N, C, H, W]`.
            target: their labels, int64 `[N]`.
            index: which samples these are, int64 `[N]`.
            words: see `words`.
        """
        draws, pool = Draws(words_of(words, index)), self.pool
        others = draws.integers(Draw.MIX_PARTNER, len(pool))
        # One call for both halves: a view is the same in any batch.
        images = torch.cat([images, pool.images.index_select(0, others)])
        both = torch.cat([index, pool.index[others]])
        own, partners = self.view.shown(images, Draws(words_of(words, both))).chunk(2)
        mixed, share = self.view.blended(own, partners, draws)
        return mixed, class_probabilities(target, pool.labels[others], share, self.classes)


class TwoResidentViews:
    """Two views of each sample that lies on a device: rows are all first views, then all second.

    Args:
        first: what is shown first.
        second: what is shown beside it.
    """

    def __init__(self, first: ResidentViews, second: ResidentViews) -> None:
        self.both = first, second

    def words(self, view_number: int) -> Tensor:
        """Return what the draws of both views begin from, int64 `[D, 2]`."""
        return torch.cat([one.words(view_number) for one in self.both], dim=1)

    def __call__(self, positions: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Return uint8 views `[2N, C, H, W]` and labels `[2N]`.

        Args:
            positions: of the samples in the pool, twice, int64 `[2N]`.
            words: see `words`.
        """
        halves = zip(self.both, positions.chunk(2), words.chunk(2, dim=1), strict=True)
        shown = [one(places, begin) for one, places, begin in halves]
        views, labels = zip(*shown, strict=True)
        return torch.cat(views), torch.cat(labels)


def class_probabilities(target: Tensor, other: Tensor, share: Tensor, classes: int) -> Tensor:
    """Return `share·[target = k] + (1 − share)·[other = k]`, float32 `[N, K]`.

    Args:
        target: the samples' labels, int64 `[N]`.
        other: their partners' labels, int64 `[N]`.
        share: the samples' shares in [0, 1], float64 `[N]`.
        classes: K.
    """
    names = torch.arange(classes, device=target.device)
    own, partners = ((labels[:, None] == names).double() for labels in (target, other))
    return (own * share[:, None] + partners * (1 - share)[:, None]).float()
