"""Batches by keys: which samples come in which order, and what a loader makes of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from distill.data.batch import Batch
from distill.data.condition.image_corruptions import ImageCorruption
from distill.data.sources.errors import SampleBroken, ShardLost
from distill.data.sources.listing import some
from distill.data.sources.splits import Resident, Split, Streamed
from distill.data.views.draws import second_seed
from distill.data.views.order import InShards, endless_order, epoch_order
from distill.data.views.resident import class_probabilities
from distill.data.views.views import CLEAN, ResidentView, StreamedView
from distill.utils.sharing import Sharing, Streams

Key = tuple[int, Tensor]  # (epoch, positions in the split); −1 is a rank's padding


def in_shards(split: Split) -> InShards | None:
    """Return in which shards the samples of a split lie, None where they do not."""
    found = getattr(split.load, "in_shards", None) if isinstance(split, Streamed) else None
    return None if found is None else found(split.index)


class KeySampler(Sampler[Key]):
    """Draw batches of keys: the order is a pure function of (seed, epoch).

    Every rank takes its share of the same global batches. Shuffled keys leave out the ragged last
    batch; ordered ones are clean views and pad a rank's share with −1, so that all ranks step
    together and no sample is counted twice. With `balance` below 1 a shuffled key may come again.

    The last `unlabeled_per_batch` keys of a shuffled batch are those of unlabelled samples, at
    positions from `count` on. They are the next of an endless row of permutations that the seed
    decides, so that over the epochs all are shown equally often; an epoch ends with the labelled.

    Keys of samples that lie in shards come as these are read (`epoch_order`), and whoever prepares
    shards is told which ones the next two windows of keys lie in.

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
        in_shards: InShards | None = None,
    ) -> None:
        self.in_shards = in_shards
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
        order = epoch_order(self.seed, self.epoch, self.labels, self.balance, self.in_shards)
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
            self._announce(order, batch, batch == skip)
            keys = self._share(order, batch, self.labeled_per_batch)
            if len(beside):
                more = self._share(beside, batch, self.unlabeled_per_batch)
                keys = torch.cat([keys, more])
            yield epoch, keys

    def _announce(self, order: Tensor, batch: int, at_once: bool) -> None:
        """Tell, at once or once a window, which shards will be read next."""
        if self.in_shards is None or self.in_shards.ahead is None:
            return
        whole, window = self.labeled_per_batch * self.ranks, self.in_shards.window
        if at_once or batch % max(1, window // whole) == 0:
            self.in_shards.ahead(self.in_shards.shard_order(order[batch * whole :][: 2 * window]))

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
    dataset: KeyedSplit
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
        return self.dataset.named_if_stalled(self._made(skip), self.timeout)

    def _made(self, skip: int) -> Iterator[Any]:
        if not self.num_workers or not self.sharing.active:
            return super().__iter__()
        under_way = self._last_pass and self._last_pass()
        if under_way and under_way.left:  # lasting workers serve one pass at a time
            return iter(
                DataLoader(
                    self.dataset, batch_size=None, sampler=self.sampler,
                    num_workers=self.num_workers, pin_memory=self.pin_memory,
                    generator=torch.Generator(), timeout=self.timeout,
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


class Watched:
    """A loader of pictures that notes which one is being read, for whoever waits for it.

    Args:
        load: index → picture, and where its pictures are files `open`, index → file.
        note: where to write the index, int64; −1 is none.
    """

    def __init__(self, load: Any, note: Tensor) -> None:
        self.load, self.note = load, note
        if hasattr(load, "open"):
            self.open = partial(self._noted, load.open)

    def __call__(self, index: int) -> Any:
        """Return one picture."""
        return self._noted(self.load, index)

    def _noted(self, read: Callable[[int], Any], index: int) -> Any:
        self.note.fill_(index)
        read_now = read(index)
        self.note.fill_(-1)
        return read_now


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
        second: how the second view of each sample is made, where a batch shows two.
        workers: how many processes read it.

    Where shards of a training split are lost, or samples of them broken, and that is to be passed
    over (`shards`), other samples of the batch take their places.
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
        second: ResidentView | StreamedView | None = None,
        workers: int = 0,
    ) -> None:
        # What each worker is reading, in memory that they share with whoever waits for them.
        self.under_way = torch.full((workers,), -1).share_memory_()
        self.in_shards = in_shards(split)
        self.classes, self.name, self.labeled = classes, name, labeled
        self.second = second
        self.split, self.view, self.seed = split, view, seed
        self.views, self.fetch, self.corruption = views, fetch, corruption

    def named_if_stalled(self, batches: Iterator[Any], seconds: float) -> Iterator[Any]:
        """Yield batches of workers; where none comes for so long, say what they are reading.

        Raises:
            ValueError: naming the samples.
        """
        try:
            yield from batches
        except RuntimeError as error:
            if "DataLoader timed out" not in str(error):
                raise
            reading = some(map(self._name, self.under_way[self.under_way >= 0].tolist()))
            raise ValueError(
                f"no batch for {seconds:g} seconds (data.timeout) while data workers were reading "
                f"{reading or 'nothing'}: see to the disk or network, or give them longer"
            ) from error

    def _name(self, position: int) -> str:
        """Return what a person finds a sample by."""
        split = self.split
        assert isinstance(split, Streamed)
        return str(getattr(split.load, "name", split.names.__getitem__)(position))

    def __getitem__(self, key: Key) -> Batch:
        epoch, positions = key
        number = epoch if epoch == CLEAN or self.views is None else epoch % self.views
        if number == CLEAN or self.in_shards is None:
            return self._batch(number, positions)
        while True:
            present = self._present(positions)
            try:
                return self._batch(number, present)
            except (ShardLost, SampleBroken):
                if not self._loader.skips or bool(self._gone(positions).all()):
                    raise

    def _present(self, positions: Tensor) -> Tensor:
        """Return positions of which those of samples that are gone are replaced by others of them.

        Where all are gone they are returned as they are: whoever reads them says why.
        """
        gone = self._gone(positions)
        if not gone.any() or gone.all():
            return positions
        rest = positions[~gone]
        replaced = positions.clone()
        replaced[gone] = rest[torch.arange(int(gone.sum())) % len(rest)]
        return replaced

    def _gone(self, positions: Tensor) -> Tensor:
        """Return which of these positions training goes on without, bool `[n]`."""
        return cast(Tensor, self._loader.gone(self.split.index[positions]))

    @property
    def _loader(self) -> Any:
        """What reads shards."""
        assert isinstance(self.split, Streamed)
        return self.split.load

    def _batch(self, number: int, positions: Tensor) -> Batch:
        found = positions.clamp(min=0)
        index = torch.where(positions < 0, positions, self.split.index[found])
        if isinstance(self.view, StreamedView) and self.view.mixes and number != CLEAN:
            images, target = self._mixed(self.view, number, found)
            return Batch(images, target, index, number, self.name, self.labeled)
        if self.second is not None and number != CLEAN:
            return self._twice(number, found, index)
        images = self._images(number, found) if self.fetch else found
        if self.corruption is not None:
            images = self.corruption(images, index)
        return Batch(images, self.split.labels[found], index, number, self.name, self.labeled)

    def _twice(self, number: int, positions: Tensor, index: Tensor) -> Batch:
        """Return a batch of two views: all first ones, then all second."""
        images, labels = positions.repeat(2), self.split.labels[positions].repeat(2)
        if self.fetch:
            images = torch.cat(
                [self._images(number, positions, second) for second in (False, True)]
            )
        return Batch(images, labels, index.repeat(2), number, self.name, self.labeled, views=2)

    def _images(self, number: int, positions: Tensor, second: bool = False) -> Tensor:
        split = self.split
        if isinstance(split, Resident):
            return split.images.index_select(0, positions)
        view, seed = (self.second, second_seed(self.seed)) if second else (self.view, self.seed)
        assert isinstance(view, StreamedView)
        views = view.batch(self._watched(split.load), seed, number, split.index[positions])
        return cast(Tensor, views)  # which `Undecoded` becomes on its way to the model

    def _watched(self, load: Any) -> Any:
        """Return a loader that notes, in a data worker, which picture is being read."""
        worker = get_worker_info()
        if worker is None or worker.id >= len(self.under_way):
            return load
        return Watched(load, self.under_way[worker.id])

    def _partners(
        self, mixing: ResidentView, positions: Tensor, seed: int, number: int, index: Tensor
    ) -> Tensor:
        """Return with which samples these are mixed: those in shards with one of their own shard.

        It is open when it is read; partners from anywhere would each open another.
        """
        if self.in_shards is None:
            return mixing.partners(seed, number, index, len(self.split))
        places, first, count = self._shard_members
        shard = self.in_shards.numbers[positions]
        return places[first[shard] + mixing.partners(seed, number, index, count[shard])]

    @cached_property
    def _shard_members(self) -> tuple[Tensor, Tensor, Tensor]:
        """The samples by their shards, and where those of each shard begin, and how many."""
        assert self.in_shards is not None
        count = self.in_shards.numbers.bincount()
        return self.in_shards.numbers.argsort(stable=True), count.cumsum(0) - count, count

    def _mixed(self, view: StreamedView, number: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return views mixed with their partners' views of the epoch, and class probabilities."""
        split, key = self.split, (self.seed, number, self.split.index[positions])
        others = self._partners(view.mixing, positions, *key)
        if self.in_shards is not None:  # whose partner is gone stays as it is
            others = torch.where(self._gone(others), positions, others)
        own, partners = (self._images(number, places) for places in (positions, others))
        mixed, share = view.mixing.mixed(own, partners, *key)
        labels = split.labels[positions], split.labels[others]
        return mixed, class_probabilities(*labels, share, self.classes)
