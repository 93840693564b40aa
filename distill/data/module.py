"""The Lightning data module: splits, keys, loaders, and views made on the device."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from hashlib import sha256
from inspect import signature
from typing import Any

import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from distill.data.batch import Batch
from distill.data.condition.corrupt import CUT, OWN, Altered, altered, build_condition
from distill.data.condition.image_corruptions import ImageCorruption
from distill.data.sources.images import MODES
from distill.data.sources.judged import Judged, opened, with_validation
from distill.data.sources.listing import some
from distill.data.sources.sizes import (
    ModelSize,
    Size,
    as_size,
    chosen_size,
    grey_note,
    sampled_headers,
    size_note,
)
from distill.data.sources.splits import Resident, Source, Split, Streamed, stratified
from distill.data.sources.unlabeled import Reading, check_share, joined, per_batch, read, without
from distill.data.views.erasing import MODES as MODES_OF_ERASING
from distill.data.views.erasing import Erasing
from distill.data.views.order import endless_order, epoch_order
from distill.data.views.views import CLEAN, ResidentView, StreamedView, is_range
from distill.utils.numbers import is_number
from distill.utils.sharing import Recent, Sharing, Streams

Key = tuple[int, Tensor]  # (epoch, positions in the split); −1 is a rank's padding

# The keywords of timm.data.create_transform that mean something for views of uint8 pixels.
TRAINING = (
    *("scale", "ratio", "hflip", "vflip", "color_jitter", "color_jitter_prob", "grayscale_prob"),
    *("gaussian_blur_prob", "auto_augment", "interpolation", "train_crop_mode", "no_aug"),
)
PROBABILITIES = (
    *("hflip", "vflip", "re_prob"),
    *("color_jitter_prob", "grayscale_prob", "gaussian_blur_prob"),
)
EVALUATION = ("crop_pct", "crop_mode")  # what timm's configurations record, and so a bundle does
CROP_MODES = ("center", "squash", "border")
CLEAN_VIEW = {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}
ERASING = {"re_prob": 0.0, "re_mode": "const", "re_count": 1}  # timm's, and its defaults
MIXING = ("mixup", "cutmix")  # as of views of images in memory
# What timm's transforms take, or views of images in memory do, and what to give in its place.
INSTEAD = {
    "input_size": "give data.image_size",
    "is_training": "training views are augmented, and those of evaluation are not",
    **dict.fromkeys(("normalize", "mean", "std"), "each model normalises the shared view itself"),
    **dict.fromkeys(("use_prefetcher", "separate"), "views are whole, and made by data workers"),
    **dict.fromkeys(
        ("naflex", "patch_size", "max_seq_len", "patchify", "patchify_channels_last",
         "patchify_flatten"),
        "views are pictures of one size, data.image_size",
    ),
    "tf_preprocessing": "TensorFlow draws by itself, and not by sample; leave it out",
    "crop_border_pixels": "no bundle records it; crop_pct below 1 crops as well",
    "re_num_splits": "a view does not depend on its batch; lower re_prob",
    "pad": "give scale and ratio",
    "flip": "give hflip=0.5",
    "crop_scale": "give scale",
    "crop_ratio": "give ratio",
    "erase": "give re_prob",
    **dict.fromkeys(("erase_scale", "erase_ratio"), "give re_prob, re_mode and re_count"),
    **dict.fromkeys(
        ("brightness", "contrast", "saturation", "hue"),
        "give color_jitter=[brightness,contrast,saturation,hue]",
    ),
    **dict.fromkeys(
        ("rotate", "translate", "zoom", "shear"), "give auto_augment, such as rand-m5-n2"
    ),
}  # fmt: skip


class DataModule(pl.LightningDataModule):
    """Serve a source's splits as batches, see `distill.data.batch.Batch`.

    Views are un-normalised: teacher and student each normalise them their own way. Targets are
    labels `[N]`, or class probabilities `[N, K]` of training views that mix two samples
    (`soft_targets`). A training batch's unlabelled samples are its last. Where the source has no
    validation or test split, one is cut from train, stratified and seeded by `split_seed`.

    Args:
        source: where the images come from.
        view: how training views are made; a mapping is keywords of `ResidentView` for data in
            memory, and those of `timm.data.create_transform` named in `TRAINING` and
            `EVALUATION` for streamed data.
        image_size: side length of streamed views in pixels, or height and width; None lets the
            model's own size and the pictures' decide, see `chosen_size`.
        batch_size: samples per step and device.
        num_workers: processes that decode streamed images.
        val_fraction: share of train cut for validation where there is none.
        test_fraction: share of train cut for the test where there is none.
        split_seed: seed of those cuts; apart from `seed`, so that seeds share their splits.
        seed: seed of the order of samples and of their views.
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
        verify: whether each picture of an unlabelled folder is decoded once to find broken ones.
        broken: `refuse` broken pictures of such a folder, or `skip` them.
        cache: where to keep what its files hold; None reads them anew each time.
        model_size: what the model says of its images' size.
        preprocessing: how a trained model is shown pictures, as timm's configurations say it: what
            `view` leaves open of clean views.
        duplicates: what becomes of training images that are in validation or test, too: `keep` or
            `drop`. Both are said.
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
        verify: bool = True,
        broken: str = "refuse",
        cache: str | None = None,
        model_size: ModelSize | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        duplicates: str = "keep",
    ) -> None:
        super().__init__()
        check_numbers(batch_size, num_workers, val_fraction, test_fraction)
        if image_size is not None:
            as_size(image_size)
        check_views(views)
        check_balance(balance)
        self.source, self.seed, self.views, self.balance = source, seed, views, balance
        self.batch_size, self.num_workers = batch_size, num_workers
        self.train, self.val, self.test, self.notes = cut_splits(
            source, val_fraction, test_fraction, split_seed
        )
        self.train, told = apart(self.train, self.val, self.test, duplicates)
        self.notes += told
        check_labels(self)
        self.notes += absent_classes(self)
        check_share(unlabeled_share)
        self.unlabeled_share, self.left_out = unlabeled_share, 0
        self.unlabeled = self._unlabeled(unlabeled, Reading(verify, broken, cache))
        self.image_size = self._image_size(image_size, model_size)
        self.condition = build_condition(condition)
        self.altered = self._altered()
        for name, one in self.altered.items():
            setattr(self, name, one.split)
            self.notes.append(one.told(name))
        self.pool = self._pool()
        self.view = build_view(
            self.train, view or {}, self.image_size, source.channels, preprocessing
        )
        check_mixing(self)
        self._copies: dict[torch.device, Resident] = {}
        self.sharing = Sharing()  # with nobody: whoever runs several at a time gives them theirs
        self._streams, self._recent = Streams(), Recent()
        if len(self.train):
            self.batch_size = self._fitting(batch_size)
            if self.batch_size < batch_size:
                self.notes.append(
                    clamped("data.batch_size", batch_size, len(self.train), self.batch_size)
                )
            self._keys(self.pool, shuffle=True)

    def _altered(self) -> dict[str, Altered]:
        """Return the splits that the condition changes, by name."""
        condition = self.condition
        if condition is None:
            return {}
        if not len(self.train):
            raise ValueError(f"condition: {self.source.name} has no training images to make hard")
        found = {"train": altered(self.train, condition, self.classes, CUT, training=True)}
        if not condition.clean_validation:
            where = CUT if self.source.val is None else OWN
            found["val"] = altered(self.val, condition, self.classes, where, training=False)
        return found

    def _unlabeled(self, where: str | Source | None, reading: Reading) -> Split | None:
        """Return the unlabelled pictures but for those held out, and say how many those are."""
        if where is None:
            return None
        found, notes = read(where, self.source, reading)
        self.notes += [f"data.unlabeled: {note}" for note in notes]
        found, left_out = without(found, (self.val, self.test))
        if left_out is None:
            self.notes.append(
                "data.unlabeled: its pictures cannot be compared with those of validation and test"
            )
        elif left_out:
            self.notes.append(
                f"data.unlabeled: {left_out} pictures left out, which are also in validation or "
                f"test; {len(found)} are used"
            )
        self.left_out = left_out or 0
        return found

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
        counts = len(self.train), len(self.unlabeled)
        return per_batch(self.batch_size, self.unlabeled_share, *counts)

    @property
    def labeled_per_batch(self) -> int:
        """How many of a training batch's samples, its first ones, are labelled."""
        return self.batch_size - self.unlabeled_per_batch

    def unlabeled_note(self, ranks: int = 1) -> str | None:
        """Return what an epoch shows of the unlabelled pictures, for people; None without any."""
        if self.unlabeled is None:
            return None
        keys = self._sampler(self.pool, True, 0, ranks)
        each = " on each device" if ranks > 1 else ""
        return (
            f"each batch{each}: {self.labeled_per_batch:,} labelled and "
            f"{self.unlabeled_per_batch:,} of {len(self.unlabeled):,} unlabelled pictures; an "
            f"epoch is one pass over the {len(self.train):,} labelled, and shows "
            f"{keys.unlabeled_per_epoch:,} of the unlabelled"
        )

    def shown(self, number: int, epochs: int, ranks: int = 1) -> Tensor:
        """Return which samples of the pool a run of so many epochs may show in a view.

        Args:
            number: the view's, 0 or more.
            epochs: how many epochs the run has.
            ranks: on how many devices it is.

        Returns:
            Positions in the pool, int64 `[n]`, sorted: all labelled ones, and the unlabelled that
            come up in an epoch which shows this view.
        """
        labelled = torch.arange(len(self.train))
        if self.unlabeled is None:
            return labelled
        keys = self._sampler(self.pool, True, 0, ranks)
        every = self.views or epochs
        drawn = [keys.unlabeled_order(epoch) for epoch in range(number, epochs, every)]
        return torch.cat([labelled, *drawn]).unique()

    def _image_size(self, asked: Any, model: ModelSize | None) -> Size:
        """Return the size of the views, noting what is done to the pictures for it."""
        if isinstance(self.train, Resident):
            return self.train.images.shape[-2], self.train.images.shape[-1]
        shown = self.train if len(self.train) else self.test
        headers = sampled_headers(shown)
        size = chosen_size(asked, model, headers)
        told = size_note(len(shown), headers, size), grey_note(headers, self.in_chans)
        self.notes += filter(None, told)
        return size

    def _fitting(self, batch_size: int) -> int:
        """Return a batch size, less where train has fewer images than a batch has labelled ones."""
        if self.unlabeled is None:
            return min(batch_size, len(self.train))
        counts = len(self.train), len(self.unlabeled)
        while batch_size > 2:
            beside = per_batch(batch_size, self.unlabeled_share, *counts)
            if batch_size - beside <= len(self.train):
                break
            batch_size -= 1
        return batch_size

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
    def soft_targets(self) -> bool:
        """Whether training targets are class probabilities `[N, K]` rather than labels `[N]`."""
        return self.view.mixes

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How images become the views of evaluation, as timm's configurations say it."""
        own = self.view.preprocessing if isinstance(self.view, StreamedView) else CLEAN_VIEW
        return {"input_size": (self.in_chans, *self.image_size), **own}

    @cached_property
    def class_counts(self) -> list[int]:
        """The number of training samples of each class, by the labels they are given."""
        return torch.bincount(self.train.labels, minlength=self.num_classes).tolist()

    @property
    def image_counts(self) -> list[int]:
        """The number of training samples of each class, by their true labels where known."""
        change = self.altered.get("train")
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
        held = [c for split in (self.train, self.val, self.test) for c in split.contents()]
        return sha256(repr(sorted(held)).encode()).hexdigest() if held else None

    def with_options(
        self, *, seed: int, batch_size: int, views: int | None = None, unlabeled: bool = True
    ) -> DataModule:
        """Return the same splits under another seed, batch size and number of views.

        Without `unlabeled` they are those of a run that learns from labels alone. A batch is never
        larger than the training split.
        """
        twin = copy.copy(self)
        twin.trainer = None
        twin.seed, twin.batch_size, twin.views = seed, batch_size, views
        if not unlabeled and self.unlabeled is not None:
            twin.unlabeled, twin.pool = None, self.train
            twin._copies = {}
            twin.__dict__.pop("fingerprint", None)
        if len(twin.train):
            twin.batch_size = twin._fitting(batch_size)
            twin._keys(twin.pool, shuffle=True)
        return twin

    def train_dataloader(self) -> KeyLoader:
        """Return shuffled batches of augmented views, without a ragged last batch."""
        loader = self._loader("train", self.pool, shuffle=True, fetch=not self._on_gpu())
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

        Mixed views are shown mixed, uint8 `[n, C, H, W]`.
        """
        split = KeyedSplit(self.train, self.view, self.seed, self.views, classes=self.num_classes)
        return self._shown(split[epoch, rows])[0]

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
            split, self.view, self.seed, self.views, True, corruption, self.num_classes, name
        )
        loader: DataLoader[Any] = DataLoader(
            keyed,
            batch_size=None,
            sampler=[(number, batch) for batch in positions],
            num_workers=self.num_workers if isinstance(split, Streamed) else 0,
        )
        for batch in loader:
            yield self._with_views(batch.to(device))

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Move a batch, which runs that share their batches do once."""

        def move() -> Batch:
            return super(DataModule, self).transfer_batch_to_device(batch, device, dataloader_idx)

        return self._made_once(batch, "moved", move)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Make the views, on the device."""
        return self._made_once(batch, "shown", lambda: self._with_views(batch))

    def _made_once(self, batch: Batch, what: str, make: Callable[[], Batch]) -> Batch:
        return self._recent.answer(batch.index, what, make) if self.sharing.active else make()

    def _with_views(self, batch: Batch) -> Batch:
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
        if images.ndim == 1:
            images = self._train_on(images.device).images.index_select(0, images)
        if self.view.mixes:
            return self._mixed(self.view, images, target, index, number)
        return self.view(images, self.seed, number, index), target

    def _mixed(
        self, view: ResidentView, images: Tensor, target: Tensor, index: Tensor, number: int
    ) -> tuple[Tensor, Tensor]:
        train = self._train_on(images.device)
        others = view.partners(self.seed, number, index, len(train))
        # One call for both halves: a view is the same in any batch.
        images = torch.cat([images, train.images.index_select(0, others)])
        views = view(images, self.seed, number, torch.cat([index, train.index[others]]))
        own, partners = views.chunk(2)
        mixed, share = view.mixed(own, partners, self.seed, number, index)
        return mixed, class_probabilities(target, train.labels[others], share, self.num_classes)

    def _train_on(self, device: torch.device) -> Resident:
        """Return what training shows on a device, to which it is sent once."""
        pool = self.pool
        assert isinstance(pool, Resident)
        if pool.images.device == device:
            return pool
        if device not in self._copies:
            parts = (pool.images, pool.labels, pool.index)
            self._copies[device] = Resident(*(part.to(device) for part in parts))
        return self._copies[device]

    def _on_gpu(self) -> bool:
        """Whether training images lie on a GPU, so that batches need only say which they are."""
        if not isinstance(self.trainer, pl.Trainer) or not isinstance(self.train, Resident):
            return False
        return self.trainer.strategy.root_device.type == "cuda"

    def _keys(self, split: Split, shuffle: bool) -> KeySampler:
        rank = self.trainer.global_rank if self.trainer else 0
        ranks = self.trainer.world_size if self.trainer else 1
        return self._sampler(split, shuffle, rank, ranks)

    def _sampler(self, split: Split, shuffle: bool, rank: int, ranks: int) -> KeySampler:
        beside = (len(self.unlabeled or ()), self.unlabeled_per_batch) if shuffle else (0, 0)
        batches = (len(split) - beside[0], self.batch_size, self.seed, shuffle, rank, ranks)
        return KeySampler(*batches, split.labels[: batches[0]], self.balance, *beside)

    def _batches_done(self) -> int:
        """Return how many batches of the current epoch are trained: none, but after a resume."""
        if not isinstance(self.trainer, pl.Trainer):
            return 0
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def _loader(
        self, name: str, split: Split, shuffle: bool = False, fetch: bool = True
    ) -> KeyLoader:
        streamed = isinstance(split, Streamed)
        labeled = self.labeled_per_batch if shuffle and self.unlabeled_per_batch else None
        return KeyLoader(
            KeyedSplit(
                split, self.view, self.seed, self.views, fetch,
                classes=self.num_classes, name=name, labeled=labeled,
            ),
            batch_size=None,
            sampler=self._keys(split, shuffle),
            num_workers=self.num_workers if streamed else 0,
            persistent_workers=streamed and self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else each pass would draw from the run's own
            streams=self._streams,
            sharing=self.sharing,
            name=f"{id(split)} {self.views} {fetch}",
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

    def _batches(self, epoch: int, order: Tensor) -> Iterator[Key]:
        skip, self.skip = self.skip, 0
        beside = self.unlabeled_order(epoch) if self.shuffle else order[:0]
        for batch in range(skip, len(self)):
            own = self._share(order, batch, self.labeled_per_batch)
            yield epoch, torch.cat([own, self._share(beside, batch, self.unlabeled_per_batch)])

    def _share(self, order: Tensor, batch: int, size: int) -> Tensor:
        """Return this rank's share, of that size, of a batch of all ranks."""
        whole = order[batch * size * self.ranks :][: size * self.ranks]
        padding = torch.full((-len(whole) % self.ranks,), -1)
        return torch.cat([whole, padding])[self.rank :: self.ranks]


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
        indices = split.index[positions].tolist()
        return torch.stack([view(split.load(i), self.seed, number, i) for i in indices])

    def _mixed(self, view: StreamedView, number: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return views mixed with their partners' views of the epoch, and class probabilities."""
        split, key = self.split, (self.seed, number, self.split.index[positions])
        others = view.mixing.partners(*key, len(split))
        own, partners = (self._images(number, places) for places in (positions, others))
        mixed, share = view.mixing.mixed(own, partners, *key)
        labels = split.labels[positions], split.labels[others]
        return mixed, class_probabilities(*labels, share, self.classes)


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


def cut_splits(
    source: Source, val_fraction: float, test_fraction: float, seed: int
) -> tuple[Split, Split, Split, list[str]]:
    """Return train, validation and test, cutting from train what the source lacks.

    Classes of too few images to be in each of them stay in train.
    """
    train, val, test = source.train, source.val, source.test
    notes = list(source.notes)
    if test is not None and not len(train):  # nothing to cut from
        return train, train if val is None else val, test, notes
    rare = [] if test is not None and val is not None else too_rare(source)
    if test is None:
        positions, rest = stratified(train.labels, test_fraction, seed, rare)
        train, test = train.subset(rest), train.subset(positions)
        notes.append(f"no test split: {len(test)} images cut from train (split_seed={seed})")
    if val is None:
        positions, rest = stratified(train.labels, val_fraction, seed, rare)
        train, val = train.subset(rest), train.subset(positions)
        notes.append(f"no validation split: {len(val)} images cut from train (split_seed={seed})")
    if rare:
        names = some((source.classes[k] for k in rare), 5)
        notes.append(f"too few images to be in each split, and so only in train: {names}")
    return train, val, test, notes


def clamped(key: str, asked: int, count: int, given: int | None = None) -> str:
    """Return what is said of a batch that is larger than the training split."""
    return f"{key}={asked}: there are {count} training images, so batches are of {given or count}"


def too_rare(source: Source) -> list[int]:
    """Return the classes with too few images to be in train and in each split cut from it.

    Raises:
        ValueError: if no class has enough.
    """
    needed = 1 + (source.val is None) + (source.test is None)
    labels = source.train.labels
    labels = labels[(labels >= 0) & (labels < len(source.classes))]
    found = torch.bincount(labels, minlength=len(source.classes))
    if not bool((found >= needed).any()):
        raise ValueError(
            f"{source.name}: train has {int(found.max())} images of "
            f"{source.classes[int(found.argmax())]}, and {needed} are needed where splits are cut "
            "from it; no class has more"
        )
    return torch.nonzero((found > 0) & (found < needed)).flatten().tolist()


def apart(train: Split, val: Split, test: Split, duplicates: str) -> tuple[Split, list[str]]:
    """Return train, if asked without the images that are held out too, and what is to be said.

    Images are the same if they hold the same bytes: files byte for byte, images in memory pixel for
    pixel. Where a source does not know what its images hold, nothing is found.

    Args:
        train: the training split.
        val: the validation split.
        test: the test split.
        duplicates: `keep` or `drop`.
    """
    if duplicates not in ("keep", "drop"):
        raise ValueError(f"data.duplicates must be keep or drop, got {duplicates!r}")
    learned, notes = train.contents(), []
    held_out = {"val": set(val.contents()), "test": set(test.contents())}
    both = sum(content in held_out["val"] for content in test.contents())
    if both:
        notes.append(f"{images(both)} of test {are(both)} in val, too")
    twice = {name: sum(c in found for c in learned) for name, found in held_out.items()}
    among = torch.tensor([content in held_out["val"] | held_out["test"] for content in learned])
    if not bool(among.any()):
        return train, notes
    where = " and ".join(f"{count} of them in {name}" for name, count in twice.items() if count)
    count = int(among.sum())
    told = f"{images(count)} of train {are(count)} held out, too ({where})"
    if duplicates == "keep":
        return train, [*notes, f"{told}; data.duplicates=drop takes them out of train"]
    return train.subset(torch.nonzero(~among).flatten()), [
        *notes,
        f"{told}, and dropped from train",
    ]


def images(count: int) -> str:
    """Return so many images in words."""
    return f"{count} image{'' if count == 1 else 's'}"


def are(count: int) -> str:
    """Return the verb of so many things."""
    return "is" if count == 1 else "are"


def build_view(
    split: Split,
    options: Mapping[str, Any],
    image_size: int | Sequence[int],
    channels: int,
    preprocessing: Mapping[str, Any] | None = None,
) -> ResidentView | StreamedView:
    """Return how views of this split are made."""
    resident = isinstance(split, Resident)
    known = (
        [f.name for f in fields(ResidentView)]
        if resident
        else [*TRAINING, *EVALUATION, *ERASING, *MIXING]
    )
    for name in options:
        if not resident and name in INSTEAD:
            raise ValueError(f"data.view.{name} is not taken: {INSTEAD[name]}")
        if name not in known:
            raise ValueError(f"data.view has no option {name}; there are {', '.join(known)}")
    if resident:
        return resident_view(options, channels)
    return streamed_view(options, as_size(image_size), channels, preprocessing or {})


def resident_view(options: Mapping[str, Any], channels: int) -> ResidentView:
    """Return the view of these options, which images of so many channels must allow."""
    view = ResidentView(**options)
    if channels != 3 and view.needs_colour:
        raise ValueError(
            f"data.view.{view.needs_colour[0]} needs colours (3 channels), and these images have "
            f"{channels}"
        )
    return view


def streamed_view(
    options: Mapping[str, Any], size: Size, channels: int, preprocessing: Mapping[str, Any]
) -> StreamedView:
    """Return timm's transforms, tried on a blank image so that mistakes show before training."""
    from timm.data import create_transform

    check_streamed(options)
    height, width = size
    # Of a square timm is told the side: a pair it would squash where nothing is augmented.
    common: dict[str, Any] = {"input_size": height if height == width else size, "normalize": False}
    if channels == 1:
        common["mean"] = (0.5,)  # what is uncovered by turning or shifting is filled with this
    shares: dict[str, Any] = {name: options[name] or 0.0 for name in MIXING if name in options}
    mixing = ResidentView(**shares)
    training = {name: value for name, value in options.items() if name in TRAINING}
    asked = {k: v for k, v in options.items() if k in EVALUATION and v is not None}
    known = {key: preprocessing[key] for key in CLEAN_VIEW if key in preprocessing}
    clean = {**CLEAN_VIEW, **known, **asked}
    if options.get("interpolation", "random") != "random":
        clean["interpolation"] = options["interpolation"]
    try:
        train = create_transform(is_training=True, **common, **training)
        if training.get("no_aug") and height != width:  # timm would squash
            train = create_transform(is_training=False, crop_pct=1.0, **common)
        view = StreamedView(
            train=erased(train, options, channels),
            clean=create_transform(
                is_training=False, **{**common, "mean": border(channels)}, **clean
            ),
            preprocessing={key: clean[key] for key in CLEAN_VIEW},
            mixing=mixing,
        )
        blank = Image.new(MODES[channels], (width + 3, height))
        views = [view(blank, 0, epoch, 0) for epoch in (CLEAN, 0)]
    except Exception as error:  # timm asserts, looks up and calls without checking
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"data.view={dict(options)} was refused: {why}") from error
    assert all(v.shape == (channels, height, width) for v in views)
    assert all(v.dtype == torch.uint8 for v in views)
    return view


def erased(train: Any, options: Mapping[str, Any], channels: int) -> Any:
    """Return a transform whose views are erased afterwards, where the options say so."""
    from timm.data.constants import IMAGENET_DEFAULT_STD
    from torchvision.transforms import Compose

    chosen = {**ERASING, **{k: v for k, v in options.items() if k in ERASING and v is not None}}
    probability, mode, count = chosen.values()
    if not probability:
        return train
    std = sum(IMAGENET_DEFAULT_STD) / 3
    stds = IMAGENET_DEFAULT_STD if channels == 3 else (std,) * channels
    return Compose([train, Erasing(probability, mode, count, border(channels), stds)])


def border(channels: int) -> tuple[float, ...]:
    """Return the colour that clean views of `crop_mode=border` are padded with, each from 0 to 1.

    It is the mean that most of timm's models normalise with, for grey images averaged as
    `normalization` does.
    """
    from timm.data.constants import IMAGENET_DEFAULT_MEAN as MEAN

    return MEAN if channels == len(MEAN) else (sum(MEAN) / len(MEAN),) * channels


def check_streamed(options: Mapping[str, Any]) -> None:
    """Refuse what timm takes and draws nonsense with."""
    for name in (
        "hflip",
        "vflip",
        "re_prob",
        "color_jitter_prob",
        "grayscale_prob",
        "gaussian_blur_prob",
    ):
        share = options.get(name)
        if share is not None and not (is_number(share) and 0 <= share <= 1):
            raise ValueError(f"data.view.{name} must be a probability, got {share!r}")
    for name, most in (("scale", 1.0), ("ratio", math.inf)):
        pair = options.get(name)
        if pair is not None and not (is_range(pair, 0, most) and pair[0] > 0):
            raise ValueError(f"data.view.{name} must be two numbers, 0 < lo ≤ hi, got {pair!r}")
    crop = options.get("crop_pct")
    if crop is not None and not (is_number(crop) and 0 < crop <= 1):
        raise ValueError(f"data.view.crop_pct must be a share above 0, got {crop!r}")
    check_erasing(options.get("re_mode"), options.get("re_count"))
    mode = options.get("crop_mode")
    if mode is not None and mode not in CROP_MODES:
        raise ValueError(
            f"data.view.crop_mode must be one of {', '.join(CROP_MODES)}, got {mode!r}"
        )


def check_numbers(
    batch_size: int, num_workers: int, val_fraction: float, test_fraction: float
) -> None:
    """Refuse numbers that are out of range."""
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("num_workers", num_workers, 0),
    ):
        if value < least:
            raise ValueError(f"data.{name} must be at least {least}, got {value}")
    for name, share in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 < share < 1:
            raise ValueError(f"data.{name} must lie between 0 and 1, got {share}")


def check_erasing(mode: Any, count: Any) -> None:
    """Refuse ways of erasing that timm has not."""
    if mode is not None and mode not in MODES_OF_ERASING:
        known = ", ".join(MODES_OF_ERASING)
        raise ValueError(f"data.view.re_mode must be one of {known}, got {mode!r}")
    if count is not None and (type(count) is not int or count < 1):
        raise ValueError(f"data.view.re_count must be a number of boxes, got {count!r}")


def check_views(views: Any) -> None:
    """Refuse a number of views per sample that is not one."""
    if views is not None and (not isinstance(views, int) or isinstance(views, bool) or views < 1):
        raise ValueError(
            f"data.views must be how many views each sample has, at least 1, or null, got {views!r}"
        )


def check_balance(balance: Any) -> None:
    """Refuse an exponent of class sizes that is none."""
    if not (is_number(balance) and 0 <= balance <= 1):
        raise ValueError(
            "data.balance is the power of a class's size by which it is drawn: from 0, all classes "
            f"equally often, to 1, every image once, got {balance!r}"
        )


def check_mixing(data: DataModule) -> None:
    """Refuse to mix labels where there are samples without."""
    if data.unlabeled is not None and data.soft_targets:
        names = [name for name in MIXING if getattr(data.view, name)]
        raise ValueError(
            f"data.view.{names[0]} mixes labels, and the pictures of data.unlabeled have none: "
            "leave one of the two out"
        )


def check_labels(data: DataModule) -> None:
    """Refuse splits whose labels cannot be learned or judged."""
    if data.num_classes < 2:
        raise ValueError(f"{data.source.name} has {data.num_classes} class: nothing to tell apart")
    judged = data.source.judged
    for name, split in (("train", data.train), ("val", data.val), ("test", data.test)):
        if not len(split) and judged and name != "test":
            continue
        if not len(split):
            raise ValueError(f"{data.source.name}: the {name} split is empty")
        low, high = int(split.labels.min()), int(split.labels.max())
        if low < 0 or high >= data.num_classes:
            raise ValueError(
                f"{data.source.name}: {name} has label {low if low < 0 else high}, but labels of "
                f"{data.num_classes} classes go from 0 to {data.num_classes - 1}"
            )
    if (missing := lacking(data, data.train)) and not judged:
        raise ValueError(f"{data.source.name}: train has no image of {some(missing, 5)}")


def lacking(data: DataModule, split: Split) -> list[str]:
    """Return the names of the classes that a split has no image of."""
    found = torch.bincount(split.labels, minlength=data.num_classes)
    return [data.classes[k] for k in torch.nonzero(found == 0).flatten().tolist()]


def absent_classes(data: DataModule) -> list[str]:
    """Return what is to be said of classes that cannot be judged, or that nothing is fitted on."""
    return [
        f"{name} has no image of {some(missing, 5)}"
        for name, split in (("val", data.val), ("test", data.test))
        if len(split) and (missing := lacking(data, split))
    ]
