"""The Lightning data module: splits, keys, loaders, and views made on the device."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from hashlib import sha256
from inspect import signature
from typing import Any, TypeVar

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from distill.data.batch import Batch
from distill.data.checks import (
    absent_notes,
    check_balance,
    check_labels,
    check_mixing,
    check_numbers,
    check_streams,
    check_timeout,
    check_views,
)
from distill.data.condition.corrupt import build_condition, corrupt_splits
from distill.data.condition.image_corruptions import ImageCorruption
from distill.data.cutting import apart, clamped, cut_splits
from distill.data.loading import KeyedSplit, KeyLoader, KeySampler, in_shards
from distill.data.sources.judged import Judged, opened, with_validation
from distill.data.sources.sizes import ModelSize, as_size, view_size
from distill.data.sources.splits import Resident, Source, Split, Streamed
from distill.data.sources.unlabeled import (
    Reading,
    check_share,
    fitting_batch,
    joined,
    per_batch,
    read_beside,
)
from distill.data.views.build import CLEAN_VIEW, build_second_view, build_view, unlike_notes
from distill.data.views.draws import second_seed
from distill.data.views.resident import ResidentViews, TwoResidentViews
from distill.data.views.views import CLEAN, ResidentView, StreamedView
from distill.utils.sharing import Recent, Sharing, Streams

log = logging.getLogger(__name__)

T = TypeVar("T")


class DataModule(pl.LightningDataModule):
    """Serve a source's splits as batches, see `distill.data.batch.Batch`.

    Views are un-normalised: teacher and student each normalise them their own way. Targets are
    labels `[N]`, or class probabilities `[N, K]` of training views that mix two samples
    (`soft_targets`). A training batch's unlabelled samples are its last. Where the source has no
    validation or test split, one is cut from train, stratified and seeded by `split_seed`.

    Args:
        source: where the images come from.
        view: how training views are made; a mapping is keywords of `ResidentView` for data in
            memory, which may have timm's names (`distill.data.views.timm_names`), and those of
            `timm.data.create_transform` named in `TRAINING` and `EVALUATION` for streamed data.
        image_size: side length of streamed views in pixels, or height and width; None lets the
            model's own size and the pictures' decide, see `chosen_size`.
        batch_size: samples per step and device.
        num_workers: processes that decode streamed images.
        val_fraction: share of train cut for validation where there is none.
        test_fraction: share of train cut for the test where there is none.
        split_seed: seed of those cuts; apart from `seed`, so that seeds share their splits.
        seed: seed of the order of samples and of their views.
        views_per_step: 2 shows each sample of a training batch twice: by `view`, and by
            `strong_view` with draws of its own; rows are all first views, then all second.
        strong_view: what `view` becomes for the second: options that take the place of its own.
        views: how many views each sample has, epoch e showing view `e mod views`; None is a new
            one every epoch. The order of samples is new every epoch in any case.
        balance: an epoch draws class k in proportion to `n_k^balance`, n_k its training samples: 1
            is every sample once, 0 all classes equally often, ½ between them. A sample that is
            drawn again in an epoch shows the same view. What mixed views add is not balanced.
            Below 1 labels decide the order, also under an objective that reads none.
        condition: keywords of `distill.data.condition.corrupt.Condition`: wrong labels, rare
            classes or few images, in train and, unless it is to stay clean, in validation; never
            in the test.
        unlabeled: pictures that a teacher teaches on too: a folder, which is searched to any depth,
            or a source, whose train split is taken. An epoch stays one pass over the labelled
            images; beside them the unlabelled are drawn from an endless row of permutations.
        unlabeled_share: the share of each batch that is unlabelled; None is that of all pictures.
        verify: which pictures of an unlabelled folder are opened before training, to find broken
            ones: `new`, `all` or `none`; see `read_splits`.
        broken: `refuse` broken pictures of such a folder, or `skip` them.
        cache: where to keep what its files hold; None reads them anew each time.
        model_size: what the model says of its images' size.
        preprocessing: how a trained model is shown pictures, as timm's configurations say it: what
            `view` leaves open of clean views.
        timeout: seconds without a batch after which data workers count as stalled; 0 waits on.
        duplicates: what becomes of training images that are in validation or test, too: `keep` or
            `drop`. Both are said.
        decoder: what decodes JPEG files for training views: `auto`, `pil`, `simplejpeg`,
            `torchvision` or `gpu`, see `chosen_decoder`.
    """

    def __init__(
        self,
        source: Source,
        view: Mapping[str, Any] | None = None,
        image_size: int | Sequence[int] | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        seed: int = 0,
        views: int | None = None,
        balance: float = 1.0,
        condition: Mapping[str, Any] | None = None,
        unlabeled: str | Source | None = None,
        unlabeled_share: float | None = 0.5,
        verify: str = "new",
        broken: str = "refuse",
        cache: str | None = None,
        model_size: ModelSize | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        duplicates: str = "keep",
        views_per_step: int = 1,
        strong_view: Mapping[str, Any] | None = None,
        timeout: float = 300,
        decoder: str = "auto",
    ) -> None:
        super().__init__()
        check_numbers(batch_size, num_workers, val_fraction, test_fraction)
        check_timeout(timeout)
        if image_size is not None:
            as_size(image_size)
        check_views(views)
        check_balance(balance)
        self.source, self.seed, self.views, self.balance = source, seed, views, balance
        self.num_workers = num_workers
        self.train, self.val, self.test, self.notes = cut_splits(
            source, val_fraction, test_fraction, split_seed
        )
        self.train, told = apart(self.train, self.val, self.test, duplicates)
        self.notes += told
        splits = {"train": self.train, "val": self.val, "test": self.test}
        check_labels(source, splits)
        self.notes += absent_notes(self.classes, splits)
        check_share(unlabeled_share)
        self.unlabeled_share = unlabeled_share
        held_out, reading = (self.val, self.test), Reading(verify, broken, cache)
        self.unlabeled, self.left_out, said = read_beside(unlabeled, source, held_out, reading)
        shown = self.train if len(self.train) else self.test
        self.image_size, resized = view_size(shown, image_size, model_size, source.channels)
        self.notes += [*said, *resized, *unlike_notes(shown, preprocessing)]
        self._corrupt(condition)
        self.pool = self._pool()
        shape = self.image_size, source.channels
        self.view = build_view(self.train, view or {}, *shape, preprocessing, decoder)
        check_mixing(self.view, self.unlabeled)
        options = view or {}, strong_view or {}
        self.second_view = build_second_view(
            views_per_step, self.train, self.view, *options, *shape, decoder
        )
        if self.second_view is not None:
            self.notes.append(
                "each step shows every picture twice, by data.view and by data.strong_view, and "
                "takes about twice as long"
            )
        check_streams(self.unlabeled)
        self.timeout = timeout
        self._copies: dict[torch.device, Resident] = {}
        self.views_by_step = False  # whether the training step makes them, as a captured one does
        self.sharing = Sharing()  # with nobody: whoever runs several at a time gives them theirs
        self._streams, self._recent = Streams(), Recent()
        self._fit_batch(batch_size)
        if self.batch_size < batch_size:
            self.notes.append(
                clamped("data.batch_size", batch_size, len(self.train), self.batch_size)
            )

    def _corrupt(self, condition: Mapping[str, Any] | None) -> None:
        """Change the labels and the number of the samples as a condition says, and say it."""
        self.condition = build_condition(condition)
        self.corrupted = corrupt_splits(self.source, self.train, self.val, self.condition)
        for name, one in self.corrupted.items():
            setattr(self, name, one.split)
            self.notes.append(one.described(name))

    def _fit_batch(self, batch_size: int) -> None:
        """Take a batch size, or the largest below it that the training split fills.

        Raises:
            ValueError: where none can be filled.
        """
        self.batch_size = batch_size
        if len(self.train):
            self.batch_size = fitting_batch(batch_size, self.unlabeled_share, *self._counts)
            self.training_keys()

    def _pool(self) -> Split:
        """Return what training shows: train, and after it the unlabelled pictures."""
        if self.unlabeled is None:
            return self.train
        return joined(self.train, self.unlabeled, int(self.source.train.index.max()) + 1)

    @property
    def unlabeled_per_batch(self) -> int:
        """How many of a training batch's samples, its last ones, are unlabelled."""
        if self.unlabeled is None:
            return 0
        return per_batch(self.batch_size, self.unlabeled_share, *self._counts)

    @property
    def views_per_step(self) -> int:
        """How many views of each sample a training batch shows."""
        return 1 if self.second_view is None else 2

    @property
    def labeled_per_batch(self) -> int:
        """How many of a training batch's samples, its first ones, are labelled."""
        return self.batch_size - self.unlabeled_per_batch

    @property
    def _counts(self) -> tuple[int, int]:
        """How many labelled and unlabelled pictures training has."""
        return len(self.train), len(self.unlabeled or ())

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

    @property
    def shuffle_window(self) -> int | None:
        """How many samples of an epoch's order are shuffled among each other; None is all."""
        lie = in_shards(self.train)
        return None if lie is None else lie.window

    @property
    def lost_note(self) -> str | None:
        """What of the training images was lost on the way, for people; None if nothing was."""
        noted = getattr(self._load, "lost_note", None)
        return None if noted is None else noted(self.train.index)

    def state_dict(self) -> dict[str, Any]:
        """Return what training went without, which a run that goes on does not try again."""
        missed: dict[str, Any] = getattr(self._load, "missed", dict)()
        return {"data": self.fingerprint, **missed} if missed else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on without what was lost before, and say so; of other data nothing was."""
        if state_dict.get("data") != self.fingerprint:
            return
        self._load.miss(state_dict)
        if self.lost_note:
            log.warning("before it was interrupted, %s: it goes on without them", self.lost_note)

    @property
    def _load(self) -> Any:
        """What reads the training images; None of those in memory."""
        return getattr(self.train, "load", None)

    @property
    def soft_targets(self) -> bool:
        """Whether training targets are class probabilities `[N, K]` rather than labels `[N]`."""
        return self.view.mixes

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How images become the views of evaluation, as timm's configurations say it."""
        own = self.view.preprocessing if isinstance(self.view, StreamedView) else CLEAN_VIEW
        return {"input_size": (self.in_chans, *self.image_size), **own}

    def decoded_by(self, split: str) -> str | None:
        """Return what decodes JPEG files for a split's views; None of images in memory."""
        view = self.view
        return view.decoded_by(split != "train") if isinstance(view, StreamedView) else None

    @cached_property
    def class_counts(self) -> list[int]:
        """The number of training samples of each class, by the labels they are given."""
        return torch.bincount(self.train.labels, minlength=self.num_classes).tolist()

    @property
    def image_counts(self) -> list[int]:
        """The number of training samples of each class, by their true labels where known."""
        change = self.corrupted.get("train")
        return change.counts()["kept"] if change else self.class_counts

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what the splits hold."""
        splits = [self.train, self.val, self.test]
        splits += [] if self.unlabeled is None else [self.unlabeled]
        parts = [split.fingerprint() for split in splits]
        return sha256(repr((parts, self.classes)).encode()).hexdigest()

    @cached_property
    def pictures(self) -> str | None:
        """A hash of what the images of all splits hold, in any order; None if that is not known."""
        held = np.concatenate([one.contents() for one in (self.train, self.val, self.test)])
        return sha256(np.sort(held).data).hexdigest() if len(held) else None

    def with_options(
        self,
        *,
        seed: int,
        batch_size: int,
        views: int | None = None,
        unlabeled: bool = True,
        two_views: bool = True,
    ) -> DataModule:
        """Return the same splits under another seed, batch size and number of views.

        Without `unlabeled` they are those of a run that learns from labels alone, without
        `two_views` those of one that shows each sample once in a step. A batch is never larger than
        the training split.
        """
        twin = copy.copy(self)
        twin.trainer, twin.views_by_step = None, False
        if not two_views:
            twin.second_view = None
        twin.seed, twin.views = seed, views
        if not unlabeled and self.unlabeled is not None:
            twin.unlabeled, twin.pool = None, self.train
            twin._copies = {}
            twin.__dict__.pop("fingerprint", None)
        twin._fit_batch(batch_size)
        return twin

    def train_dataloader(self) -> KeyLoader:
        """Return shuffled batches of augmented views, without a ragged last batch."""
        loader = self._loader("train", self.pool, shuffle=True, fetch=not self._by_position())
        loader.position = self._batches_done
        return loader

    def val_dataloader(self) -> KeyLoader:
        """Return the validation split in order."""
        return self._loader("val", self.val)

    def test_dataloader(self) -> KeyLoader:
        """Return the test split in order."""
        return self._loader("test", self.test)

    def predict_dataloader(self) -> list[KeyLoader]:
        """Return validation, if there is one, and test: what is fitted on one is judged on it."""
        fitted = [self.val_dataloader()] if len(self.val) else []
        return [*fitted, self.test_dataloader()]

    def clean_test_images(self, rows: Tensor) -> Tensor:
        """Return uint8 images `[n, C, H, W]` of rows of the test split, without augmentation."""
        return KeyedSplit(self.test, self.view, self.seed)[CLEAN, rows].view

    def training_views(self, epoch: int, rows: Tensor) -> Tensor:
        """Return what an epoch (or CLEAN) shows of rows of the training split.

        Mixed views are shown mixed, uint8 `[n, C, H, W]`; where a step shows two of each sample,
        `[2n, C, H, W]`, all first ones first.
        """
        split = KeyedSplit(
            self.train, self.view, self.seed, self.views, classes=self.num_classes,
            second=self.second_view,
        )  # fmt: skip
        return self._shown(split[epoch, rows].to("cpu"))[0]

    def in_order(
        self,
        split: Split,
        number: int,
        positions: Sequence[Tensor],
        device: torch.device,
        corruption: ImageCorruption | None = None,
        name: str | None = None,
    ) -> Iterator[Batch]:
        """Yield one view of a split's samples, made on a device.

        Args:
            split: one of the splits.
            number: which of its views, or CLEAN.
            positions: of the samples in the split, int64 `[N]` for each batch.
            device: where views are made.
            corruption: of the images, where they are to be judged under one.
            name: what the split is called in its batches.
        """
        keyed = KeyedSplit(
            split, self.view, self.seed, self.views, True, corruption, self.num_classes, name,
            workers=self.num_workers,
        )  # fmt: skip
        loader: DataLoader[Any] = DataLoader(
            keyed,
            batch_size=None,
            sampler=[(number, batch) for batch in positions],
            num_workers=self.num_workers if isinstance(split, Streamed) else 0,
            timeout=self.timeout if isinstance(split, Streamed) and self.num_workers else 0,
        )
        for batch in keyed.named_if_stalled(iter(loader), self.timeout):
            yield self.with_views(batch.to(device))

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Move a batch, which runs that share their batches do once."""

        def move(batch: Batch) -> Batch:
            return super(DataModule, self).transfer_batch_to_device(batch, device, dataloader_idx)

        return self.once(batch, "moved", move)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Make the views, on the device."""
        if self.views_by_step and batch.split == "train":
            return batch
        return self.once(batch, "shown", self.with_views)

    def once(self, batch: Batch, what: Hashable, make: Callable[[Batch], T]) -> T:
        """Return what is made of a batch, once for all runs that take turns and want the same."""
        if not self.sharing.active:
            return make(batch)
        return self._recent.answer(batch.index, what, lambda: make(batch))

    def with_views(self, batch: Batch) -> Batch:
        """Return a batch with its views made, float32 in [0, 1], and their targets."""
        view, target = self._shown(batch)
        return replace(batch, view=view.float().div_(255), target=target)

    def _shown(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return a batch's uint8 views and its targets; its images may be positions in the pool."""
        images, target, number = batch.view, batch.target, batch.view_number
        assert batch.index is not None
        assert number is not None
        if number == CLEAN or not isinstance(self.view, ResidentView):
            return images, target
        index = batch.index.to(images.device, non_blocking=True)
        if batch.views > 1 and images.ndim > 1:
            return self._twice(images, number, index), target
        if images.ndim == 1 or self.view.mixes:
            resident = self.resident_on(images.device)
            words = resident.words(number)
            if images.ndim == 1:
                return resident(images, words)
            assert isinstance(resident, ResidentViews)
            return resident.mixed(images, target, index, words)
        return self.view(images, self.seed, number, index), target

    def _twice(self, images: Tensor, number: int, index: Tensor) -> Tensor:
        """Return the views of uint8 images `[2N, C, H, W]`: N first ones, then N second."""
        first, second = self.view, self.second_view
        assert isinstance(first, ResidentView)
        assert isinstance(second, ResidentView)
        (images, others), (index, same) = images.chunk(2), index.chunk(2)
        beside = second(others, second_seed(self.seed), number, same)
        return torch.cat([first(images, self.seed, number, index), beside])

    def resident_on(self, device: torch.device) -> ResidentViews | TwoResidentViews:
        """Return what training shows of images on a device, to which they are sent once."""
        pool = self.pool
        assert isinstance(pool, Resident)
        assert isinstance(self.view, ResidentView)
        if pool.images.device != device:
            if device not in self._copies:
                images, labels = pool.images.to(device), pool.labels.to(device)
                self._copies[device] = Resident(images, labels, pool.index.to(device))
            pool = self._copies[device]
        shown = ResidentViews(pool, self.view, self.seed, self.num_classes)
        if self.second_view is None:
            return shown
        assert isinstance(self.second_view, ResidentView)
        own = second_seed(self.seed)
        return TwoResidentViews(shown, ResidentViews(pool, self.second_view, own, self.num_classes))

    def _by_position(self) -> bool:
        """Whether training images lie where it trains, so that batches need only say which."""
        if not isinstance(self.trainer, pl.Trainer) or not isinstance(self.train, Resident):
            return False
        return self.views_by_step or self.trainer.strategy.root_device.type == "cuda"

    def training_keys(self, rank: int = 0, ranks: int = 1) -> KeySampler:
        """Return which samples of the pool training shows on a rank, in which order."""
        return self._keys(self.pool, True, rank, ranks)

    def _keys(self, split: Split, shuffle: bool, rank: int, ranks: int) -> KeySampler:
        beside = (len(self.unlabeled or ()), self.unlabeled_per_batch) if shuffle else (0, 0)
        batches = (len(split) - beside[0], self.batch_size, self.seed, shuffle, rank, ranks)
        lie = in_shards(self.train if shuffle else split)
        return KeySampler(*batches, split.labels[: batches[0]], self.balance, *beside, lie)

    def _batches_done(self) -> int:
        """Return how many batches of the current epoch are trained: none, but after a resume."""
        if not isinstance(self.trainer, pl.Trainer):
            return 0
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def _loader(
        self, name: str, split: Split, shuffle: bool = False, fetch: bool = True
    ) -> KeyLoader:
        streamed = isinstance(split, Streamed)
        ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        labeled = self.labeled_per_batch if shuffle and self.unlabeled_per_batch else None
        return KeyLoader(
            KeyedSplit(
                split, self.view, self.seed, self.views, fetch,
                classes=self.num_classes, name=name, labeled=labeled,
                second=self.second_view if shuffle else None,
                workers=self.num_workers if streamed else 0,
            ),
            batch_size=None,
            sampler=self._keys(split, shuffle, *ranks),
            num_workers=self.num_workers if streamed else 0,
            timeout=self.timeout if streamed and self.num_workers else 0,
            persistent_workers=streamed and self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else each pass would draw from the run's own
            streams=self._streams,
            sharing=self.sharing,
            name=f"{id(split)} {self.views} {self.views_per_step} {fetch}",
        )  # fmt: skip


def configured(
    source: Callable[..., Source], judged: Judged | None = None, **group: Any
) -> DataModule:
    """Return the data module of a config group, whose keys go to the source and module they fit.

    So it is `data.root=` on a command line; a key that fits neither, the module refuses.

    Args:
        source: what opens the data.
        judged: what a trained model brings, where it is to be judged on them.
        **group: the keys.
    """
    own, shared = signature(source).parameters, signature(DataModule).parameters
    rest = {key: group[key] for key in group if key not in own or key in shared}
    options = {key: group[key] for key in group if key in own}
    if judged is None:
        return DataModule(source(**options), **rest)
    found = opened(source, options, judged)
    if judged.refit:
        found = with_validation(found, group["val_fraction"], group["split_seed"])
    return DataModule(found, preprocessing=judged.preprocessing, **rest)
