"""The Lightning data module: splits, keys, loaders, and views made on the device."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import cached_property
from hashlib import sha256
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from distill.data.sources import Resident, Source, Split, Streamed, stratified
from distill.data.views import CLEAN, ResidentView, StreamedView, keyed_words

Key = tuple[int, Tensor]  # (epoch, positions in the split); −1 is a rank's padding


class DataModule(pl.LightningDataModule):
    """Serve a source's splits as batches `(view, target, index)`.

    Views are float32 `[N, C, H, W]` in [0, 1], un-normalised: teacher and student each normalise
    them their own way. Where the source has no validation or test split, one is cut from train,
    stratified and seeded by `split_seed`.

    Args:
        source: where the images come from.
        view: how training views are made; a mapping is keywords of `ResidentView` for data in
            memory, and of `timm.data.create_transform` for streamed data.
        image_size: side length of streamed views in pixels.
        batch_size: samples per step and device.
        num_workers: processes that decode streamed images.
        val_fraction: share of train cut for validation where there is none.
        test_fraction: share of train cut for the test where there is none.
        split_seed: seed of those cuts; apart from `seed`, so that seeds share their splits.
        seed: seed of the order of samples and of their views.
    """

    def __init__(
        self,
        source: Source,
        view: Mapping[str, Any] | None = None,
        image_size: int = 32,
        batch_size: int = 128,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise ValueError("data.batch_size must be at least 1 and data.num_workers at least 0")
        self.source, self.seed = source, seed
        self.batch_size, self.num_workers = batch_size, num_workers
        self.train, self.val, self.test, self.notes = cut_splits(
            source, val_fraction, test_fraction, split_seed
        )
        self.view = build_view(self.train, view or {}, image_size)
        self.image_size = sample_size(self.train, image_size)
        check_labels(self)
        if len(self.train) < batch_size:
            raise ValueError(
                f"data.batch_size={batch_size} is larger than the {len(self.train)} training images"
            )

    @property
    def classes(self) -> list[str]:
        """The class names, in label order."""
        return self.source.classes

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return len(self.source.classes)

    @property
    def in_chans(self) -> int:
        """The number of colour channels."""
        return self.source.channels

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what the splits hold."""
        parts = [split.fingerprint() for split in (self.train, self.val, self.test)]
        return sha256("".join([*parts, *self.classes]).encode()).hexdigest()

    def with_options(self, *, seed: int, batch_size: int) -> DataModule:
        """Return the same splits under another seed and batch size."""
        twin = copy.copy(self)
        twin.trainer = None
        twin.seed, twin.batch_size = seed, batch_size
        return twin

    def train_dataloader(self) -> KeyLoader:
        """Return shuffled batches of augmented views, without a ragged last batch."""
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> KeyLoader:
        """Return the validation split in order."""
        return self._loader(self.val)

    def test_dataloader(self) -> KeyLoader:
        """Return the test split in order."""
        return self._loader(self.test)

    def predict_dataloader(self) -> list[KeyLoader]:
        """Return validation and test: a temperature is fitted on one and judged on the other."""
        return [self.val_dataloader(), self.test_dataloader()]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> list[Tensor]:
        """Make the views, on the device."""
        images, target, index, epoch = batch
        if isinstance(self.view, ResidentView):
            images = self.view(images, self.seed, epoch, index)
        return [images.float().div(255), target, index]

    def _loader(self, split: Split, shuffle: bool = False) -> KeyLoader:
        keys = KeySampler(
            len(split),
            self.batch_size,
            self.seed,
            shuffle,
            rank=self.trainer.global_rank if self.trainer else 0,
            ranks=self.trainer.world_size if self.trainer else 1,
        )
        streamed = isinstance(split, Streamed)
        return KeyLoader(
            KeyedSplit(split, self.view, self.seed),
            batch_size=None,
            sampler=keys,
            num_workers=self.num_workers if streamed else 0,
            persistent_workers=streamed and self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


class KeySampler(Sampler[Key]):
    """Draw batches of keys: the order is a pure function of (seed, epoch).

    Every rank takes its share of the same global batches. Shuffled keys leave out the ragged last
    batch; ordered ones are clean views and pad a rank's share with −1, so that all ranks step
    together and no sample is counted twice.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, shuffle: bool, rank: int = 0, ranks: int = 1
    ) -> None:
        self.count, self.batch_size, self.seed, self.shuffle = count, batch_size, seed, shuffle
        self.rank, self.ranks = rank, ranks
        self.epoch = 0
        self.skip = 0

    def __len__(self) -> int:
        whole = self.batch_size * self.ranks
        return self.count // whole if self.shuffle else -(-self.count // whole)

    def set_epoch(self, epoch: int) -> None:
        """Name the epoch that comes next (Lightning calls this)."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Key]:
        if not self.shuffle:
            return self._batches(CLEAN, torch.arange(self.count))
        word = int(keyed_words(self.seed, self.epoch, torch.tensor([self.count]), 0))
        generator = torch.Generator().manual_seed(word)
        return self._batches(self.epoch, torch.randperm(self.count, generator=generator))

    def _batches(self, epoch: int, order: Tensor) -> Iterator[Key]:
        skip, self.skip = self.skip, 0
        for batch in range(skip, len(self)):
            whole = order[batch * self.batch_size * self.ranks :][: self.batch_size * self.ranks]
            padding = torch.full((-len(whole) % self.ranks,), -1)
            yield epoch, torch.cat([whole, padding])[self.rank :: self.ranks]


class KeyLoader(DataLoader[Any]):
    """A loader that can continue in the middle of an epoch.

    Lightning stores `state_dict` in its checkpoints and calls `load_state_dict` on resume. The
    iterator is made on the first batch, because workers would otherwise prefetch keys of the epoch
    before the one that Lightning is about to name.
    """

    sampler: KeySampler
    served = 0

    def __iter__(self) -> Any:
        self.served = self.sampler.skip
        for batch in super().__iter__():
            self.served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return how many batches of this epoch have been served."""
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the batches that had been served."""
        self.sampler.skip = state["served"] % len(self)


class KeyedSplit(Dataset[Any]):
    """A split read by batches of keys."""

    def __init__(self, split: Split, view: ResidentView | StreamedView, seed: int) -> None:
        self.split, self.view, self.seed = split, view, seed

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor, Tensor, int]:
        epoch, positions = key
        found = positions.clamp(min=0)
        index = torch.where(positions < 0, positions, self.split.index[found])
        return self._images(epoch, found), self.split.labels[found], index, epoch

    def _images(self, epoch: int, positions: Tensor) -> Tensor:
        split, view = self.split, self.view
        if isinstance(split, Resident):
            return split.images[positions]
        assert isinstance(view, StreamedView)
        indices = split.index[positions].tolist()
        return torch.stack([view(split.load(i), self.seed, epoch, i) for i in indices])


def cut_splits(
    source: Source, val_fraction: float, test_fraction: float, seed: int
) -> tuple[Split, Split, Split, list[str]]:
    """Return train, validation and test, cutting from train what the source lacks."""
    train, val, test = source.train, source.val, source.test
    notes = list(source.notes)
    if test is None:
        positions, rest = stratified(train.labels, test_fraction, seed)
        train, test = train.subset(rest), train.subset(positions)
        notes.append(f"no test split: {len(test)} images cut from train (split_seed={seed})")
    if val is None:
        positions, rest = stratified(train.labels, val_fraction, seed)
        train, val = train.subset(rest), train.subset(positions)
        notes.append(f"no validation split: {len(val)} images cut from train (split_seed={seed})")
    return train, val, test, notes


def build_view(
    split: Split, options: Mapping[str, Any], image_size: int
) -> ResidentView | StreamedView:
    """Return how views of this split are made."""
    try:
        if isinstance(split, Resident):
            return ResidentView(**options)
        from timm.data import create_transform

        common: dict[str, Any] = {"input_size": image_size, "normalize": False}
        clean = {k: options[k] for k in ("interpolation", "crop_pct") if k in options}
        training = {k: v for k, v in options.items() if k != "crop_pct"}
        return StreamedView(
            train=create_transform(is_training=True, **common, **training),
            clean=create_transform(is_training=False, **common, **clean),
        )
    except TypeError as error:
        raise ValueError(f"data.view={dict(options)} was refused: {error}") from error


def sample_size(split: Split, image_size: int) -> tuple[int, int]:
    """Return the height and width of the views in pixels."""
    if isinstance(split, Resident):
        return split.images.shape[-2], split.images.shape[-1]
    return image_size, image_size


def check_labels(data: DataModule) -> None:
    """Refuse splits whose labels cannot be learned or judged."""
    for name, split in (("train", data.train), ("val", data.val), ("test", data.test)):
        if not len(split):
            raise ValueError(f"{data.source.name}: the {name} split is empty")
        if int(split.labels.min()) < 0 or int(split.labels.max()) >= data.num_classes:
            raise ValueError(f"{data.source.name}: {name} has labels beyond its classes")
        found = torch.bincount(split.labels, minlength=data.num_classes)
        missing = [data.classes[k] for k in torch.nonzero(found == 0).flatten().tolist()]
        if missing:
            raise ValueError(f"{data.source.name}: {name} has no image of {', '.join(missing[:5])}")
    if data.num_classes < 2:
        raise ValueError(f"{data.source.name} has {data.num_classes} class: nothing to tell apart")
