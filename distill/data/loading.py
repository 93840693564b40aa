"""Batches by keys: which samples come in which order, and what a loader makes of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from distill.data.batch import Batch
from distill.data.condition.image_corruptions import ImageCorruption
from distill.data.sources.splits import Resident, Split
from distill.data.views.order import endless_order, epoch_order
from distill.data.views.resident import class_probabilities
from distill.data.views.views import CLEAN, ResidentView, StreamedView
from distill.utils.sharing import Sharing, Streams

Key = tuple[int, Tensor]  # (epoch, positions in the split); −1 is a rank's padding


class KeySampler(Sampler[Key]):
    """Draw batches of keys: the order is a pure function of (seed, epoch).

    Every rank takes its share of the same global batches. Shuffled keys leave out the ragged last
    batch; ordered ones are clean views and pad a rank's share with −1, so that all ranks step
    together and no sample is counted twice. With `balance` below 1 a shuffled key may come again.

    The last `unlabeled_per_batch` keys of a shuffled batch are those of unlabelled samples, at
    positions from `count` on. They are the next of an endless row of permutations that the seed
    decides, so that over the epochs all are shown equally often; an epoch ends with the labelled.

    Raises:
        ValueError: if no shuffled batch can be filled.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        ranks: int = 1,
        labels: Tensor | None = None,
        balance: float = 1.0,
        unlabeled: int = 0,
        unlabeled_per_batch: int = 0,
    ) -> None:
        self.count, self.batch_size, self.seed, self.shuffle = count, batch_size, seed, shuffle
        self.unlabeled, self.unlabeled_per_batch = unlabeled, unlabeled_per_batch
        self.labels = torch.zeros(count, dtype=torch.long) if labels is None else labels
        self.balance = balance
        self.rank, self.ranks = rank, ranks
        self.epoch = 0
        self.skip = 0
        if shuffle and not len(self):
            each = f" on each of {ranks} devices" if ranks > 1 else ""
            but = f" of which {self.labeled_per_batch} are labelled" if unlabeled else ""
            raise ValueError(
                f"data.batch_size={batch_size}{each}{but} is larger than the {count} training "
                "images"
            )

    def __len__(self) -> int:
        whole = self.labeled_per_batch * self.ranks
        return self.count // whole if self.shuffle else -(-self.count // whole)

    @property
    def labeled_per_batch(self) -> int:
        """How many keys of a rank's batch are not those of unlabelled samples."""
        return self.batch_size - self.unlabeled_per_batch

    @property
    def unlabeled_per_epoch(self) -> int:
        """How many keys of an epoch, on all ranks, are those of unlabelled samples."""
        return len(self) * self.unlabeled_per_batch * self.ranks

    def set_epoch(self, epoch: int) -> None:
        """Name the epoch that comes next (Lightning calls this)."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Key]:
        if not self.shuffle:
            return self._batches(CLEAN, torch.arange(self.count))
        order = epoch_order(self.seed, self.epoch, self.labels, self.balance)
        return self._batches(self.epoch, order)

    def unlabeled_order(self, epoch: int) -> Tensor:
        """Return the positions of the unlabelled samples that an epoch shows, in order."""
        length = self.unlabeled_per_epoch
        if not length:
            return torch.empty(0, dtype=torch.long)
        return self.count + endless_order(self.seed, self.unlabeled, epoch * length, length)

    def shown(self, number: int, views: int | None, epochs: int) -> Tensor:
        """Return which samples a run may show in a view.

        Args:
            number: the view's, 0 or more.
            views: how many a sample has; None is a new one every epoch.
            epochs: how many the run has.

        Returns:
            Positions, int64 `[n]`, sorted: all labelled ones, and the unlabelled that come up in
            an epoch which shows this view.
        """
        shown_in = range(number, epochs, views or epochs)
        drawn = [self.unlabeled_order(epoch) for epoch in shown_in]
        return torch.cat([torch.arange(self.count), *drawn]).unique()

    def unlabeled_note(self) -> str | None:
        """Return what an epoch shows of the unlabelled samples, for people; None without any."""
        if not self.unlabeled:
            return None
        each = " on each device" if self.ranks > 1 else ""
        return (
            f"each batch{each}: {self.labeled_per_batch:,} labelled and "
            f"{self.unlabeled_per_batch:,} of {self.unlabeled:,} unlabelled pictures; an epoch is "
            f"one pass over the {self.count:,} labelled, and shows {self.unlabeled_per_epoch:,} of "
            "the unlabelled"
        )

    def _batches(self, epoch: int, order: Tensor) -> Iterator[Key]:
        skip, self.skip = self.skip, 0
        beside = self.unlabeled_order(epoch) if self.shuffle else order[:0]
        for batch in range(skip, len(self)):
            keys = self._share(order, batch, self.labeled_per_batch)
            if len(beside):
                more = self._share(beside, batch, self.unlabeled_per_batch)
                keys = torch.cat([keys, more])
            yield epoch, keys

    def _share(self, order: Tensor, batch: int, size: int) -> Tensor:
        """Return this rank's share, of that size, of a batch of all ranks."""
        whole = order[batch * size * self.ranks :][: size * self.ranks]
        if missing := -len(whole) % self.ranks:
            whole = torch.cat([whole, torch.full((missing,), -1)])
        return whole[self.rank :: self.ranks]


class Pass(Iterator[Any]):
    """The batches of one pass, and how many are left: a trainer does not ask for their end."""

    def __init__(self, batches: Iterator[Any], left: int) -> None:
        self.batches, self.left = batches, left

    def __next__(self) -> Any:
        batch = next(self.batches)
        self.left -= 1
        return batch


class KeyLoader(DataLoader[Any]):
    """A loader that can begin in the middle of an epoch.

    `position` is asked, at the first batch of each epoch, how many batches of it are done. Only
    then is the iterator made: before, a resumed trainer has not restored where it was, Lightning
    has not named the epoch, and workers would prefetch the keys of another.
    """

    sampler: KeySampler
    position: Callable[[], int] = staticmethod(lambda: 0)

    def __init__(
        self, *given: Any, streams: Streams, sharing: Sharing, name: str, **options: Any
    ) -> None:
        super().__init__(*given, **options)
        self.streams, self.sharing, self.name = streams, sharing, name
        self._last_pass: weakref.ref[Pass] | None = None

    def __iter__(self) -> Any:
        done, keys = self.position() % len(self), self.sampler
        sequence = (self.name, keys.epoch, keys.seed, keys.batch_size, keys.shuffle, done)
        yield from self.streams.through(sequence, lambda at: self._batches(done + at), self.sharing)

    def _batches(self, skip: int) -> Iterator[Any]:
        self.sampler.skip = skip
        if not self.num_workers or not self.sharing.active:
            return super().__iter__()
        under_way = self._last_pass and self._last_pass()
        if under_way and under_way.left:  # lasting workers serve one pass at a time
            return iter(
                DataLoader(
                    self.dataset, batch_size=None, sampler=self.sampler,
                    num_workers=self.num_workers, pin_memory=self.pin_memory,
                    generator=torch.Generator(),
                )
            )  # fmt: skip
        found = Pass(super().__iter__(), len(self) - skip)
        self._last_pass = weakref.ref(found)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: that this is here tells Lightning that the loader can be resumed.

        It would not do to keep the position here: Lightning 2.6 does not hand it back to a loader
        that was asked for its length before the loops were restored, as schedules do.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back nothing; see `state_dict`."""


class KeyedSplit(Dataset[Any]):
    """A split read by batches of keys.

    Args:
        split: the samples.
        view: how streamed views are made; those of images in memory are made later.
        seed: the seed of the views.
        views: how many views each sample has, or None for a new one every epoch.
        fetch: whether to return images, rather than the positions of those that are in memory.
        corruption: what is done to clean views, for evaluation.
        classes: K, of the probabilities that are the targets of streamed views which mix two
            samples; those of images in memory are mixed later.
        name: `train`, `val` or `test`, of its batches.
        labeled: how many samples of each batch, the first ones, have a label; None is all.
    """

    def __init__(
        self,
        split: Split,
        view: ResidentView | StreamedView,
        seed: int,
        views: int | None = None,
        fetch: bool = True,
        corruption: ImageCorruption | None = None,
        classes: int = 0,
        name: str | None = None,
        labeled: int | None = None,
    ) -> None:
        self.classes, self.name, self.labeled = classes, name, labeled
        self.split, self.view, self.seed = split, view, seed
        self.views, self.fetch, self.corruption = views, fetch, corruption

    def __getitem__(self, key: Key) -> Batch:
        epoch, positions = key
        number = epoch if epoch == CLEAN or self.views is None else epoch % self.views
        found = positions.clamp(min=0)
        index = torch.where(positions < 0, positions, self.split.index[found])
        if isinstance(self.view, StreamedView) and self.view.mixes and number != CLEAN:
            images, target = self._mixed(self.view, number, found)
            return Batch(images, target, index, number, self.name, self.labeled)
        images = self._images(number, found) if self.fetch else found
        if self.corruption is not None:
            images = self.corruption(images, index)
        return Batch(images, self.split.labels[found], index, number, self.name, self.labeled)

    def _images(self, number: int, positions: Tensor) -> Tensor:
        split, view = self.split, self.view
        if isinstance(split, Resident):
            return split.images.index_select(0, positions)
        assert isinstance(view, StreamedView)
        return view.batch(split.load, self.seed, number, split.index[positions])

    def _mixed(self, view: StreamedView, number: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return views mixed with their partners' views of the epoch, and class probabilities."""
        split, key = self.split, (self.seed, number, self.split.index[positions])
        others = view.mixing.partners(*key, len(split))
        own, partners = (self._images(number, places) for places in (positions, others))
        mixed, share = view.mixing.mixed(own, partners, *key)
        labels = split.labels[positions], split.labels[others]
        return mixed, class_probabilities(*labels, share, self.classes)
