"""The data module: cut splits, keys over ranks, loaders that resume, and what it refuses."""

import io
import multiprocessing
import pickle
import tarfile
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException
from PIL import Image

import distill.config.resolvers  # noqa: F401  (the configuration files call them)
from distill.config.build import build_data
from distill.config.overrides import CONF
from distill.data import DataModule
from distill.data.loading import KeySampler
from distill.data.module import configured
from distill.data.sources.folder import folder
from distill.data.sources.splits import Resident, Source, Streamed
from distill.data.sources.timm_data import timm_dataset
from distill.data.views.build import build_view
from distill.data.views.resident import class_probabilities
from distill.data.views.views import CLEAN, ResidentView, StreamedView
from distill.sweep.lockstep import in_turns
from tests.data.conftest import fields, write_folder, write_tar


def resident(count=60, classes=3, offset=0):
    """Images that say which sample they are: the index in two bytes."""
    index = torch.arange(offset, offset + count)
    images = torch.stack([index % 256, index // 256], 1).to(torch.uint8)[:, None, :, None]
    return Resident(images.expand(-1, 1, -1, 4).contiguous(), index % classes, index)


def identity(images):
    """The index that an image of `resident` carries, from a float view."""
    values = (images * 255).round().long()
    return values[:, 0, 0, 0] + 256 * values[:, 0, 1, 0]


def source(train=None, val=None, test=None, classes=3, **options):
    names = [f"class {k}" for k in range(classes)]
    train = resident() if train is None else train
    return Source("toy", names, 1, train, val, test, **options)


def module(batch_size=4, **options):
    return DataModule(options.pop("source", None) or source(), batch_size=batch_size, **options)


class Painted:
    """Position → an image in one colour per position; pickles into workers."""

    def __call__(self, position):
        return Image.new("RGB", (20, 16), (position, 100, 0))


def streamed(count=40, classes=2, load=None):
    labels = torch.arange(count) % classes
    return Streamed(load or Painted(), labels, [f"{k}" for k in range(count)])


def streamed_module(batch_size=4, workers=0, load=None, **options):
    split = Source("painted", ["even", "odd"], 3, streamed(load=load))
    return DataModule(split, batch_size=batch_size, image_size=8, num_workers=workers, **options)


def batches(loader, epoch=0):
    loader.sampler.set_epoch(epoch)
    return list(loader)


def same(first, second):
    return len(first) == len(second) and all(
        a.view_number == b.view_number
        and all(torch.equal(x, y) for x, y in zip(fields(a)[:3], fields(b)[:3], strict=True))
        for a, b in zip(first, second, strict=True)
    )


def names_and_values(data):
    return [
        (split.index.tolist(), split.labels.tolist()) for split in (data.train, data.val, data.test)
    ]


# Splits


def test_cut_splits_are_disjoint_stratified_and_complete():
    data = module(source=source(resident(300)), val_fraction=0.1, test_fraction=0.2)
    splits = [data.train, data.val, data.test]
    assert [len(split) for split in splits] == [216, 24, 60]
    together = torch.cat([split.index for split in splits])
    assert together.sort().values.equal(torch.arange(300))
    for split in splits:
        assert torch.bincount(split.labels).tolist() == [len(split) // 3] * 3
        assert torch.equal(split.labels, split.index % 3)
        assert torch.equal(identity(split.images.float() / 255), split.index)
    assert len(data.notes) == 2


def test_cuts_follow_split_seed_and_nothing_else():
    first = names_and_values(module(split_seed=1))
    assert names_and_values(module(split_seed=1, seed=9, batch_size=7)) == first
    assert names_and_values(module(split_seed=2)) != first


def test_splits_that_are_there_are_left_alone():
    val, test = resident(9, offset=100), resident(12, offset=200)
    data = module(source=source(val=val, test=test))
    assert data.train.index.equal(torch.arange(60))
    assert data.val is val
    assert data.test is test
    assert data.notes == []
    data = module(source=source(test=test))
    assert data.test is test
    assert torch.cat([data.train.index, data.val.index]).sort().values.equal(torch.arange(60))


def test_the_modules_facts():
    data = module()
    assert (data.num_classes, data.in_chans, data.image_size) == (3, 1, (2, 4))
    assert data.classes == ["class 0", "class 1", "class 2"]
    assert streamed_module().image_size == (8, 8)


def test_the_fingerprint_is_of_pixels_labels_and_names_but_not_of_the_run():
    first = module().fingerprint
    assert module(seed=5, batch_size=9, view={"pad": 1}).fingerprint == first
    pixel, label = resident(), resident()
    pixel.images[7, 0, 1, 3] += 1
    label.labels[0], label.labels[1] = 1, 0
    others = [
        module(source=source(pixel)),
        module(source=source(label)),
        module(source=replace(source(), classes=["class 0", "class 1", "class two"])),
        module(source=replace(source(), classes=["class 0", "class 1cl", "ass 2"])),
        module(source=replace(source(), classes=["class 0", "class 1c", "lass 2"])),
        module(split_seed=1),
    ]
    assert len({first, *(other.fingerprint for other in others)}) == 7


def test_options_of_a_twin_leave_the_splits_and_the_original_alone():
    data = module(seed=1, batch_size=4)
    data.trainer = SimpleNamespace(global_rank=1, world_size=2)
    twin = data.with_options(seed=2, batch_size=6)
    assert (twin.seed, twin.batch_size, twin.trainer) == (2, 6, None)
    assert (data.seed, data.batch_size) == (1, 4)
    assert twin.train is data.train
    assert twin.fingerprint == data.fingerprint
    assert data.with_options(seed=2, batch_size=1000).batch_size == len(data.train)


# Keys


@given(
    count=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    ranks=st.integers(1, 4),
)
def test_ordered_keys_cover_each_sample_once_over_any_ranks(count, batch_size, ranks):
    shares = [list(KeySampler(count, batch_size, 0, False, rank, ranks)) for rank in range(ranks)]
    lengths = {len(share) for share in shares}
    assert lengths == {len(KeySampler(count, batch_size, 0, False, 0, ranks))}
    keys = torch.cat([keys for share in shares for _, keys in share])
    assert keys[keys >= 0].sort().values.equal(torch.arange(count))
    assert {epoch for share in shares for epoch, _ in share} == {CLEAN}
    for together in zip(*shares, strict=True):
        assert len({len(keys) for _, keys in together}) == 1
        assert all(len(keys) <= batch_size for _, keys in together)
    if ranks == 1:
        assert keys.equal(torch.arange(count))


@given(
    count=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    ranks=st.integers(1, 4),
    epoch=st.integers(0, 500),
)
def test_shuffled_keys_give_full_batches_of_distinct_samples(count, batch_size, ranks, epoch):
    if count < batch_size * ranks:
        with pytest.raises(ValueError, match="larger than"):
            KeySampler(count, batch_size, 0, True, 0, ranks)
        return
    shares = []
    for rank in range(ranks):
        sampler = KeySampler(count, batch_size, 0, True, rank, ranks)
        sampler.set_epoch(epoch)
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler) == count // (batch_size * ranks)
    keys = torch.cat([keys for share in shares for _, keys in share])
    assert len(torch.unique(keys)) == len(keys) == count - count % (batch_size * ranks)
    assert keys.min() >= 0
    assert keys.max() < count
    assert all(len(keys) == batch_size and e == epoch for share in shares for e, keys in share)


def order(epoch=0, seed=0, count=100, batch_size=10, **options):
    sampler = KeySampler(count, batch_size, seed, True, **options)
    sampler.set_epoch(epoch)
    return [keys for _, keys in sampler]


def test_the_order_is_a_function_of_seed_and_epoch_only():
    first = torch.cat(order(3, 7))
    torch.manual_seed(123)
    assert torch.cat(order(3, 7)).equal(first)
    assert torch.cat(order(3, 7, batch_size=4)).equal(first)
    assert not torch.cat(order(4, 7)).equal(first)
    assert not torch.cat(order(3, 8)).equal(first)
    again = KeySampler(100, 10, 7, True)
    for epoch in (0, 3, 1, 3):  # whatever was asked before
        again.set_epoch(epoch)
        keys = torch.cat([keys for _, keys in again])
    assert keys.equal(first)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_the_global_batches_of_one_process(ranks):
    together = order(2, count=103, batch_size=12)
    shares = [
        order(2, count=103, batch_size=12 // ranks, rank=r, ranks=ranks) for r in range(ranks)
    ]
    for whole, *parts in zip(together, *shares, strict=True):
        assert torch.cat(parts).sort().values.equal(whole.sort().values)


def test_each_position_is_equally_likely_anywhere_in_the_order():
    first = torch.stack([torch.cat(order(epoch, count=20, batch_size=5)) for epoch in range(2000)])
    for column in first.T:
        counts = torch.bincount(column, minlength=20).float()
        chi_square = ((counts - 100) ** 2 / 100).sum()
        assert chi_square < 60  # 19 degrees of freedom: p < 5e-6


# Loaders


def test_training_batches_are_full_shuffled_and_of_their_epoch():
    data = module(batch_size=7)
    loader = data.train_dataloader()
    epochs = [batches(loader, epoch) for epoch in (0, 1)]
    for epoch, found in enumerate(epochs):
        assert [len(b) for b in found] == [7] * (len(data.train) // 7) == [7] * len(loader)
        index = torch.cat([b.index for b in found])
        assert len(torch.unique(index)) == len(index)
        assert set(index.tolist()) <= set(data.train.index.tolist())
        assert index.tolist() != sorted(index.tolist())
        assert {b.view_number for b in found} == {epoch}
        for images, target, where, _ in map(fields, found):
            assert torch.equal(identity(images.float() / 255), where)
            assert torch.equal(target, where % 3)
    assert not same(epochs[0], epochs[1])
    assert same(epochs[1], batches(data.train_dataloader(), 1))


def test_evaluation_is_in_order_complete_and_clean():
    data = module(batch_size=4, view={"pad": 1, "flip": True})
    loaders = (data.val_dataloader(), data.test_dataloader(), *data.predict_dataloader())
    for split, loader in zip((data.val, data.test) * 2, loaders, strict=True):
        found = [data.on_after_batch_transfer(b, 0) for b in batches(loader, epoch=3)]
        assert torch.cat([b.index for b in found]).equal(split.index)
        assert torch.cat([b.target for b in found]).equal(split.labels)
        assert {b.view_number for b in found} == {CLEAN}
        assert {b.split for b in found} == {"val" if split is data.val else "test"}
        assert torch.equal(torch.cat([b.view for b in found]), split.images.float() / 255)


def test_views_are_made_after_the_transfer_and_are_floats_up_to_one():
    data = module(source=source(resident(600)), batch_size=8, view={"pad": 1}, seed=4)
    batch = batches(data.train_dataloader(), 2)[0]
    view, target, index, number = fields(data.on_after_batch_transfer(batch, 0))
    assert number == 2
    assert view.dtype == torch.float32
    assert torch.equal(view, ResidentView(pad=1)(batch.view, 4, 2, batch.index).float() / 255)
    assert torch.equal(target, batch.target)
    assert torch.equal(index, batch.index)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_see_the_views_of_one_process(ranks):
    def views(rank, ranks, batch_size):
        data = module(batch_size=batch_size, view={"pad": 1, "flip": True}, seed=1)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=ranks)
        found = [data.on_after_batch_transfer(b, 0) for b in batches(data.train_dataloader(), 5)]
        return {int(i): v for b in found for v, i in zip(b.view, b.index, strict=True)}

    alone = views(0, 1, 12)
    together = [views(rank, ranks, 12 // ranks) for rank in range(ranks)]
    assert sum(map(len, together)) == len(alone)
    for share in together:
        assert all(torch.equal(view, alone[index]) for index, view in share.items())


def test_padding_of_ranks_keeps_the_index_minus_one():
    data = module(batch_size=4)
    data.trainer = SimpleNamespace(global_rank=3, world_size=4)
    data.val = data.val.subset(torch.arange(5))
    [(images, target, index, epoch)] = map(fields, batches(data.val_dataloader()))
    assert index.tolist() == [int(data.val.index[3]), -1]
    assert (len(images), len(target), epoch) == (2, 2, CLEAN)


def resumed_at(data, position):
    """A loader whose trainer has done some batches of its first epoch, and none of the next."""
    loader = data.train_dataloader()
    done = iter([position])
    loader.position = lambda: next(done, 0)
    return loader


@pytest.mark.parametrize("done", [0, 1, 5, 10])
def test_a_loader_begins_in_the_middle_of_an_epoch(done):
    data = module(view={"pad": 1})
    whole = batches(data.train_dataloader(), 6)
    assert len(whole) == 10
    resumed = resumed_at(data, done)
    if done == len(whole):  # the epoch is over: the next one is whole
        assert same(batches(resumed, 7), batches(data.train_dataloader(), 7))
        return
    assert same(batches(resumed, 6), whole[done:])
    assert same(batches(resumed, 7), batches(data.train_dataloader(), 7))


def test_a_loader_left_early_starts_the_next_epoch_from_its_beginning():
    data = module()
    loader = data.train_dataloader()
    loader.sampler.set_epoch(0)
    next(iter(loader))
    assert same(batches(loader, 1), batches(data.train_dataloader(), 1))


# A number of views


@pytest.mark.parametrize("make", [module, streamed_module])
def test_views_come_again_while_the_order_is_new(make):
    options = {"view": {"pad": 1}} if make is module else {"view": AUGMENTED}

    def shown(epoch, views):
        data = make(views=views, **options)
        found = batches(data.train_dataloader(), epoch)
        found = [data.on_after_batch_transfer(batch, 0) for batch in found]
        assert {b.view_number for b in found} == {epoch % views if views else epoch}
        index = torch.cat([b.index for b in found])
        rows = torch.cat([b.view for b in found])
        return index.tolist(), dict(zip(index.tolist(), rows, strict=True))

    order, first = shown(1, 3)
    again_order, again = shown(4, 3)
    fresh_order, fresh = shown(4, None)
    assert again_order != order
    assert again_order == fresh_order  # the order has nothing to do with how many views there are
    both = first.keys() & again.keys()
    assert len(both) > len(order) // 2
    assert all(torch.equal(first[index], again[index]) for index in both)
    assert any(not torch.equal(fresh[index], again[index]) for index in both)
    assert torch.equal(next(iter(shown(1, 2)[1].values())), next(iter(shown(1, None)[1].values())))


@pytest.mark.parametrize("views", [0, -1, 1.5, "2", True, float("nan")])
def test_a_number_of_views_that_is_none_is_refused(views):
    with pytest.raises(ValueError, match=r"data\.views must be how many"):
        module(views=views)


# Mixed views


def photos(count=90, classes=3):
    """Colour noise in which no two samples are alike."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return Resident(images, torch.arange(count) % classes)


def mixing(batch_size=8, seed=3, **options):
    names = ["red", "green", "blue"]
    view = {"pad": 1, "flip": True, **(options.pop("view", None) or {"mixup": 1.0, "cutmix": 1.0})}
    made = Source("photos", names, 3, photos())
    return DataModule(made, view, batch_size=batch_size, seed=seed, **options)


def shown(data, epoch=2):
    found = [data.on_after_batch_transfer(b, 0) for b in batches(data.train_dataloader(), epoch)]
    return [torch.cat(part) for part in list(zip(*map(fields, found), strict=True))[:3]]


def test_a_mixed_view_is_its_own_with_its_partners_view_of_the_epoch():
    data, plain = mixing(), mixing(view={"mixup": 0.0})
    assert data.soft_targets
    assert not plain.soft_targets
    views, target, index = shown(data)
    rows = (data.train.index == index[:, None]).int().argmax(1)
    others = data.view.partners(3, 2, index, len(data.train))
    own, partner = plain.training_views(2, rows), plain.training_views(2, others)
    expected, share = data.view.mixed(own, partner, 3, 2, index)
    assert torch.equal((views * 255).round().byte(), expected)
    assert target.dtype == torch.float32
    assert torch.allclose(target.sum(1), torch.ones(len(target)))
    for row, probabilities in enumerate(target):
        wanted = torch.zeros(3)
        wanted[data.train.labels[rows[row]]] += share[row].float()
        wanted[data.train.labels[others[row]]] += 1 - share[row].float()
        assert torch.allclose(probabilities, wanted)


@pytest.mark.parametrize("batch_size", [1, 5, 30])
def test_mixed_views_and_their_targets_do_not_depend_on_the_batch(batch_size):
    def by_index(size):
        return {int(i): (v, t) for v, t, i in zip(*shown(mixing(size)), strict=True)}

    expected, found = by_index(7), by_index(batch_size)
    both = expected.keys() & found.keys()
    assert len(both) > 50
    for index in both:
        assert all(map(torch.equal, expected[index], found[index]))


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_mix_as_one_process_does(ranks):
    def by_index(rank, ranks, size):
        data = mixing(size)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=ranks)
        return {int(i): (v, t) for v, t, i in zip(*shown(data), strict=True)}

    alone = by_index(0, 1, 12)
    together = [by_index(rank, ranks, 12 // ranks) for rank in range(ranks)]
    assert sum(map(len, together)) == len(alone)
    for share in together:
        assert all(all(map(torch.equal, found, alone[index])) for index, found in share.items())


@pytest.mark.parametrize("view", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 1, "cutmix": 1}])
def test_a_mixed_streamed_view_is_its_own_with_its_partners_view_of_the_epoch(view):
    data, plain = streamed_module(seed=3, view=view), streamed_module(seed=3)
    assert data.soft_targets
    assert not plain.soft_targets
    views, target, index = shown(data)
    rows = (data.train.index == index[:, None]).int().argmax(1)
    others = ResidentView(**view).partners(3, 2, index, len(data.train))
    own, partner = plain.training_views(2, rows), plain.training_views(2, others)
    expected, share = ResidentView(**view).mixed(own, partner, 3, 2, index)
    assert torch.equal((views * 255).round().byte(), expected)
    assert torch.equal(data.training_views(2, rows), expected)
    labels = data.train.labels[rows], data.train.labels[others]
    assert torch.equal(target, class_probabilities(*labels, share, 2))
    stored = [b.view for b in data.in_order(data.train, 2, [rows], torch.device("cpu"))]
    assert torch.equal(torch.cat(stored), views)  # what a teacher is asked ahead of training
    clean = next(iter(data.val_dataloader()))
    assert torch.equal(clean.target, data.val.labels[:4])


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (5, 0), (14, 2)])
def test_mixed_streamed_views_do_not_depend_on_batch_and_workers(batch_size, workers):
    def by_index(size, workers):
        data = streamed_module(size, workers, seed=3, view={"mixup": 1.0, "cutmix": 1.0})
        return {int(i): (v, t) for v, t, i in zip(*shown(data), strict=True)}

    expected, found = by_index(7, 0), by_index(batch_size, workers)
    both = expected.keys() & found.keys()
    assert len(both) >= 25
    for index in both:
        assert all(map(torch.equal, expected[index], found[index]))


def test_a_batch_larger_than_train_is_clamped_and_said():
    data = module(batch_size=64)
    assert data.batch_size == len(data.train) < 64
    (note,) = [note for note in data.notes if "batch_size" in note]
    assert note == "data.batch_size=64: there are 43 training images, so batches are of 43"
    (batch,) = data.train_dataloader()
    assert batch.index.sort().values.tolist() == data.train.index.sort().values.tolist()
    assert data.with_options(seed=0, batch_size=99).batch_size == 43
    assert not any("batch_size" in note for note in module(batch_size=43).notes)


def test_evaluation_is_not_mixed():
    data = mixing()
    for split, loader in ((data.val, data.val_dataloader()), (data.test, data.test_dataloader())):
        found = [data.on_after_batch_transfer(b, 0) for b in batches(loader)]
        assert torch.equal(torch.cat([b.view for b in found]), split.images.float() / 255)
        assert torch.equal(torch.cat([b.target for b in found]), split.labels)


def test_the_same_class_twice_is_sure():
    labels, share = torch.tensor([0, 1]), torch.tensor([0.3, 1.0]).double()
    found = class_probabilities(labels, torch.tensor([0, 2]), share, 3)
    assert found.tolist() == [[1, 0, 0], [0, 1, 0]]
    found = class_probabilities(labels, torch.tensor([2, 2]), torch.tensor([0.25, 0.5]).double(), 3)
    assert found.tolist() == [[0.25, 0, 0.75], [0, 0.5, 0.5]]


def test_training_views_are_what_training_shows():
    for data in (module(view={"pad": 1}), mixing(), streamed_module(view=AUGMENTED, views=2)):
        views, _, index = shown(data, 3)
        rows = (data.train.index == index[:, None]).int().argmax(1)
        assert torch.equal(data.training_views(3, rows), (views * 255).round().byte())
        clean = data.training_views(CLEAN, rows)
        assert clean.dtype == torch.uint8
        assert not torch.equal(clean, data.training_views(3, rows))


class Watcher(pl.LightningModule):
    """Write down what a trainer hands to its module."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.train_batches, self.val_batches = [], []

    def training_step(self, batch, batch_idx):
        self.train_batches.append((self.current_epoch, batch))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.val_batches.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("make", [mixing, streamed_module])
def test_a_trainer_hands_on_views_targets_indices_and_the_number_of_the_view(make, tmp_path):
    data, watcher = make(views=2), Watcher()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=3, limit_train_batches=2, num_sanity_val_steps=0,
        use_distributed_sampler=False, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(watcher, datamodule=data)
    numbers = [(epoch, batch.view_number) for epoch, batch in watcher.train_batches]
    assert numbers == [(0, 0), (0, 0), (1, 1), (1, 1), (2, 0), (2, 0)]
    for _, batch in watcher.train_batches:
        view, target, index, number = fields(batch)
        rows = (data.train.index == index[:, None]).int().argmax(1)
        assert torch.equal((view * 255).round().byte(), data.training_views(number, rows))
        assert target.ndim == 1 + data.soft_targets
    assert {batch.view_number for batch in watcher.val_batches} == {CLEAN}
    assert {batch.target.dtype for batch in watcher.val_batches} == {torch.int64}


# Data on the device


@pytest.mark.parametrize("make", [module, mixing])
def test_batches_of_positions_become_the_same_views(make, monkeypatch):
    expected = shown(make())
    monkeypatch.setattr(DataModule, "_by_position", lambda self: True)
    data = make()
    positions = batches(data.train_dataloader(), 2)[0].view
    assert (positions.ndim, positions.dtype) == (1, torch.int64)  # all that travels
    assert all(map(torch.equal, shown(data), expected))


def test_the_training_split_is_sent_to_a_device_once_and_shared_with_twins():
    data = mixing()
    assert data.resident_on(torch.device("cpu")).pool is data.train
    meta = data.resident_on(torch.device("meta")).pool
    assert meta.images.device.type == meta.index.device.type == "meta"
    assert data.with_options(seed=1, batch_size=4).resident_on(torch.device("meta")).pool is meta


# Streamed data and workers

AUGMENTED = {"scale": [0.3, 1.0], "color_jitter": 0.4, "auto_augment": "rand-m9-mstd0.5"}


@pytest.mark.parametrize("on_gpu", [False, True])
def test_workers_of_streamed_data_stay_and_read_ahead(monkeypatch, on_gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    loader = streamed_module(workers=2).train_dataloader()
    assert loader.persistent_workers
    assert loader.prefetch_factor == 2  # batches that each worker has ready
    assert loader.pin_memory == on_gpu
    assert module().train_dataloader().num_workers == 0


@pytest.mark.slow
def test_workers_change_nothing_and_resume_in_mid_epoch():
    expected = [batches(streamed_module(view=AUGMENTED).train_dataloader(), e) for e in (0, 1)]
    data = streamed_module(workers=2, view=AUGMENTED)
    loader = data.train_dataloader()
    assert all(same(batches(loader, epoch), expected[epoch]) for epoch in (0, 1))
    assert not same(*expected)
    resumed = resumed_at(data, 3)
    assert same(batches(resumed, 1), expected[1][3:])
    assert same(batches(resumed, 0), expected[0])


@pytest.mark.slow
@pytest.mark.parametrize("turns", [{"first": 0, "second": 9}, {"first": 9, "second": 0}])
def test_runs_that_share_keep_their_workers_and_one_that_falls_behind_has_its_own(turns):
    expected = [batches(streamed_module(view=AUGMENTED).train_dataloader(), e) for e in (0, 1)]
    data = streamed_module(workers=1, view=AUGMENTED)
    seen, workers = {name: [] for name in turns}, {name: [] for name in turns}

    def run(name, sharing):
        twin = data.with_options(seed=0, batch_size=4)
        twin.sharing = sharing
        loader = twin.train_dataloader()
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            shown = []
            for batch in loader:
                shown.append(batch)
                for _ in range(turns[name]):
                    sharing.next_turn()
            seen[name].append(shown)
            made = loader._iterator and [worker.pid for worker in loader._iterator._workers]
            workers[name].append(made)

    in_turns([partial(run, name) for name in turns])
    for name in seen:
        assert all(same(*pair) for pair in zip(seen[name], expected, strict=True)), name
    kept = [made for made in workers["first"] if made]
    assert kept
    assert all(made == kept[0] for made in kept)


@pytest.mark.slow
def test_spawned_workers_change_nothing(tmp_path):
    write_folder(tmp_path, ("train",), count=8)
    data = DataModule(folder(str(tmp_path)), image_size=8, batch_size=4, view=AUGMENTED)
    expected = batches(data.train_dataloader())
    data.num_workers = 1
    loader = data.train_dataloader()
    loader.multiprocessing_context = multiprocessing.get_context("spawn")
    assert same(batches(loader), expected)


def test_data_sets_of_timm_can_be_sent_to_workers(tmp_path):
    write_folder(tmp_path, ("train",), count=8)
    tar = write_tar(tmp_path / "x.tar", tmp_path / "train")
    for root in (tmp_path, tar):
        data = DataModule(timm_dataset(root=str(root)), image_size=8, batch_size=4, view=AUGMENTED)
        loader = data.train_dataloader()
        expected = batches(loader)
        sent = pickle.loads(pickle.dumps(loader.dataset))
        assert same([sent[key] for key in loader.sampler], expected)


def test_streamed_views_do_not_depend_on_the_batch():
    def views(batch_size):
        data = streamed_module(batch_size, view=AUGMENTED, seed=3)
        found = batches(data.train_dataloader(), 2)
        return {int(i): v for b in found for i, v in zip(b.index, b.view, strict=True)}

    small, large = views(1), views(14)
    assert set(large) <= set(small)
    assert all(torch.equal(view, small[index]) for index, view in large.items())


def test_streamed_views_are_uint8_of_their_sample():
    data = streamed_module()
    for images, target, index, _ in map(fields, batches(data.test_dataloader())):
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, 8, 8)
        assert torch.equal(images[:, 0, 0, 0].long(), index)
        assert torch.equal(target, index % 2)


@pytest.mark.slow  # torch waits five seconds for a worker that has failed
def test_a_broken_image_in_a_worker_is_named(tmp_path):
    path = write_folder(tmp_path, ("train",), count=8) / "train" / "cat" / "5.png"
    path.write_bytes(path.read_bytes()[:60])
    found = folder(str(tmp_path), verify="none")
    found.val = found.test = found.train
    data = DataModule(found, image_size=8, batch_size=4, num_workers=1)
    with pytest.raises(ValueError, match="broken image") as caught:
        batches(data.train_dataloader())
    last = str(caught.value).splitlines()[-1]  # the line that the command prints
    assert last.startswith(f"ValueError: broken image {path}: ")


@pytest.mark.slow
def test_workers_read_one_tar_together(tmp_path):
    rng = np.random.default_rng(0)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for k in range(40):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "PNG")
            member = tarfile.TarInfo(f"{k % 2}/{k}.png")
            member.size = file.tell()
            file.seek(0)
            tar.addfile(member, file)
    data = DataModule(timm_dataset(root=str(tmp_path / "x.tar")), image_size=8, batch_size=2)
    expected = batches(data.train_dataloader())  # the parent has read from the tar already
    data.num_workers = 2
    assert same(batches(data.train_dataloader()), expected)


# Views by name


def test_views_in_memory_are_built_from_their_options():
    view = build_view(resident(), {"pad": 2, "flip": True}, 32, 1)
    assert view == ResidentView(pad=2, flip=True)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": [0.35, 1.0], "hflip": 0.5, "color_jitter": 0.0, "crop_pct": 1.0},
        {"interpolation": "random"},
        {"interpolation": "bicubic", "auto_augment": "rand-m9-mstd0.5"},
        {"auto_augment": "augmix-m3-w3"},
        {"train_crop_mode": "rkrc", "crop_mode": "border"},
        {"no_aug": True, "crop_mode": "squash"},
        {"grayscale_prob": 0.5, "gaussian_blur_prob": 0.5, "vflip": 0.5},
    ],
)
def test_streamed_views_are_uint8_of_the_size_and_channels(options, channels):
    view = build_view(streamed(), options, 32, channels)
    assert isinstance(view, StreamedView)
    image = Image.effect_noise((50, 41), 60).convert({1: "L", 3: "RGB"}[channels])
    for epoch in (CLEAN, *range(6)):
        found = view(image, 0, epoch, 1)
        assert (found.dtype, tuple(found.shape)) == (torch.uint8, (channels, 32, 32))
        assert found.float().std() > 0


def test_the_scale_of_a_crop_is_its_share_of_the_area():
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1)))
    options = {"ratio": [1, 1], "hflip": 0, "color_jitter": 0, "interpolation": "bilinear"}
    for scale, width in ((1.0, 64), (0.25, 32)):
        view = build_view(streamed(), {**options, "scale": [scale, scale]}, 32, 1)
        row = view(ramp, 0, 0, 0)[0, 16].float()
        # A view of 32 pixels on `width` pixels of a ramp of 4 a pixel climbs 4·width/32 a pixel.
        assert (row.diff()[2:-2] - 4 * width / 32).abs().max() <= 1


def test_enlarged_and_reduced_clean_views_are_not_aliased():
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (64, 32)))
    clean = build_view(streamed(), {"crop_pct": 1.0}, 32, 1)(stripes, 0, CLEAN, 0)
    assert (clean[0, :, 2:-2].float() - 127.5).abs().max() <= 1
    flat = Image.new("L", (9, 9), 80)
    assert build_view(streamed(), {}, 32, 1)(flat, 0, CLEAN, 0).unique().tolist() == [80]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"pda": 1}, "data.view has no option pda; there are pad, flip"),
        ({"pad": -1}, "data.view.pad"),
        ({"pad": "wide"}, "data.view.pad"),
        ({"hflip": 0.3}, "data.view.hflip=0.3 is not taken for images in memory: give 0 or 0.5"),
        ({"hue": 0.1}, r"data\.view\.hue needs colours \(3 channels\), and these images have 1"),
        ({"saturation": 0.1}, "saturation needs colours"),
        ({"crop_scale": [0.5]}, "data.view.crop_scale must be two shares"),
    ],
)
def test_wrong_options_of_views_in_memory_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        module(view=options)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"hfilp": 0.5}, "data.view has no option hfilp; there are scale"),
        ({"pad": 2}, "pad is not taken: give scale"),
        ({"mixup": -0.2}, "data.view.mixup must be"),
        ({"cutmix": "much"}, "data.view.cutmix must be"),
        ({"re_num_splits": 2}, "re_num_splits is not taken: .* lower re_prob"),
        ({"tf_preprocessing": True}, "tf_preprocessing is not taken"),
        ({"separate": True}, "separate is not taken"),
        ({"normalize": True}, "normalize is not taken: each model normalises"),
        ({"interpolation": "cubist"}, "cubist"),
        ({"scale": 1}, "scale"),
        ({"hflip": "often"}, "often"),
        ({"auto_augment": "nothing"}, "nothing"),
        ({"crop_pct": "all"}, "all"),
        ({"train_crop_mode": "x"}, "train_crop_mode"),
        ({"crop_mode": "sqush"}, "crop_mode must be one of center, squash, border, got 'sqush'"),
        ({"crop_border_pixels": 4}, "crop_border_pixels is not taken: no bundle"),
    ],
)
def test_wrong_options_of_streamed_views_are_named(options, word):
    with pytest.raises(ValueError, match=word) as caught:
        streamed_module(view=options)
    assert len(str(caught.value).splitlines()) == 1


# Refusals


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"batch_size": 0}, r"data\.batch_size must be at least 1, got 0"),
        ({"num_workers": -1}, r"data\.num_workers must be at least 0"),
        ({"image_size": 0}, r"data\.image_size must be at least 1"),
        ({"val_fraction": 0}, r"data\.val_fraction must lie between 0 and 1"),
        ({"val_fraction": 1.0}, r"data\.val_fraction"),
        ({"test_fraction": -0.1}, r"data\.test_fraction"),
        ({"test_fraction": 20}, r"data\.test_fraction"),
        ({"val_fraction": 0.01}, "cannot cut 1% of 48 images"),
    ],
)
def test_numbers_out_of_range_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        module(**options)


def test_a_batch_for_each_device_must_be_filled():
    data = module(batch_size=30)
    data.trainer = SimpleNamespace(global_rank=0, world_size=2)
    with pytest.raises(ValueError, match="30 on each of 2 devices is larger than the 43"):
        data.train_dataloader()


def labelled(labels):
    labels = torch.tensor(labels, dtype=torch.long)
    return Resident(torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8), labels)


def distinct(labels, start=0):
    """Images of these labels, each its own number."""
    images = torch.arange(start, start + len(labels)).to(torch.uint8)
    return Resident(images[:, None, None, None].repeat(1, 1, 2, 2), torch.tensor(labels))


@pytest.mark.parametrize(
    ("train", "val", "test", "word"),
    [
        ([], [0, 1], [0, 1], "the train split is empty"),
        ([0, 1], [], [0, 1], "the val split is empty"),
        ([0, 1], [0, 1], [], "the test split is empty"),
        ([], None, None, "train has 0 images of class 0, and 3 are needed"),
        ([0, 0], [0, 1], [0, 1], "train has no image of class 1"),
        ([0, 1, 2], [0, 1], [0, 1], "train has label 2, but labels of 2 classes go from 0 to 1"),
        ([0, 1], [0, 1, -1], [0, 1], "val has label -1"),
        ([0, 1], [0, 1], [0, 1, 10**12], "test has label 1000000000000"),
        ([0, 1] * 9 + [-1], None, None, "label -1|cannot cut"),
        ([0, 1, 10**12] * 9, None, None, "label 1000000000000"),
        ([0, 0, 1, 1], None, None, "2 images of class 0, and 3 are needed"),
        ([0, 1], None, [0, 1], "1 images of class 0, and 2 are needed"),
    ],
)
def test_splits_that_cannot_be_learned_or_judged(train, val, test, word):
    splits = [labels if labels is None else labelled(labels) for labels in (train, val, test)]
    with pytest.raises(ValueError, match=word) as caught:
        module(1, source=source(*splits, classes=2))
    assert len(str(caught.value).splitlines()) == 1
    assert "toy" in str(caught.value) or "cannot cut" in str(caught.value)


def test_one_class_is_nothing_to_tell_apart():
    with pytest.raises(ValueError, match="toy has 1 class"):
        module(source=source(labelled([0] * 60), classes=1))


def test_many_missing_classes_are_named_in_a_short_line():
    splits = (labelled(range(10)), labelled(range(10)), labelled(range(10)))
    with pytest.raises(ValueError, match="train has no image of class 10, class 11") as caught:
        module(source=source(*splits, classes=5000))
    assert len(str(caught.value)) < 200


def test_held_out_splits_may_lack_rare_classes_and_that_is_said():
    splits = (distinct([0, 1, 2] * 4), distinct([0, 1], 20), distinct([1, 1], 30))
    data = module(source=source(*splits))
    assert data.notes == [
        "val has no image of class 2",
        "test has no image of class 0, class 2",
    ]


@pytest.mark.parametrize(("count", "val", "test"), [(1, None, None), (2, None, None), (1, None, 1)])
def test_classes_too_rare_to_be_cut_stay_in_train_and_that_is_said(count, val, test):
    given = None if test is None else distinct([0, 1], 200)
    labels = [0] * 50 + [1] * count
    data = module(source=source(distinct(labels), val, given, classes=2))
    assert int((data.train.labels == 1).sum()) == count
    assert not bool((data.val.labels == 1).any())
    assert "too few images to be in each split, and so only in train: class 1" in data.notes
    assert "val has no image of class 1" in data.notes


def test_a_class_that_a_large_cut_leaves_one_image_of_keeps_it_in_train():
    labels = [0] * 50 + [1] * 3
    data = module(source=source(distinct(labels), classes=2), test_fraction=0.6)
    assert bool((data.train.labels == 1).any())


# The same image twice


def test_images_in_two_splits_are_counted_said_and_dropped_on_request():
    train, val, test = distinct([0, 1] * 8), distinct([0, 1] * 2, 3), distinct([0, 1] * 2, 5)
    data = module(source=source(train, val, test, classes=2))
    assert data.train is train
    assert data.notes == [
        "2 images of test are in val, too",
        "6 images of train are held out, too (4 of them in val and 4 of them in test); "
        "data.duplicates=drop takes them out of train",
    ]
    dropped = module(source=source(train, val, test, classes=2), duplicates="drop")
    assert dropped.train.index.tolist() == [0, 1, 2, *range(9, 16)]
    assert (dropped.val, dropped.test) == (val, test)
    assert "dropped from train" in dropped.notes[1]
    assert dropped.fingerprint != data.fingerprint
    with pytest.raises(ValueError, match=r"data\.duplicates must be keep or drop"):
        module(duplicates="refuse")


def test_the_same_image_may_not_straddle_splits_that_are_cut_here_unsaid():
    train = distinct([0, 1] * 30)
    train.images[1::2] = train.images[0::2]  # each image twice
    data = module(source=source(train, classes=2))
    held_out = {bytes(i.numpy().data) for s in (data.val, data.test) for i in s.images}
    straddling = sum(bytes(image.numpy().data) in held_out for image in data.train.images)
    assert straddling
    assert any(note.startswith(f"{straddling} images of train") for note in data.notes)
    dropped = module(source=source(train, classes=2), duplicates="drop")
    assert len(dropped.train) == len(data.train) - straddling


def test_the_same_file_in_two_splits_is_known_by_its_bytes(tmp_path):
    write_folder(tmp_path, ("train",), count=8)
    write_folder(tmp_path, ("val", "test"), count=1)
    group_of = (f"root={tmp_path}", "batch_size=4")
    assert any(
        "2 images of train are held out, too" in note for note in group("folder", *group_of).notes
    )
    assert len(group("folder", *group_of, "duplicates=drop").train) == 14


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(3, 40), min_size=1, max_size=6), st.integers(0, 99))
def test_classes_of_three_images_among_larger_ones_can_be_cut(counts, seed):
    counts = [*counts, 200]
    labels = [k for k, count in enumerate(counts) for _ in range(count)]
    data = DataModule(
        source(labelled(labels), classes=len(counts)),
        batch_size=1, split_seed=seed,
    )  # fmt: skip
    together = torch.cat([data.train.index, data.val.index, data.test.index])
    assert together.sort().values.equal(torch.arange(len(labels)))


# The configuration groups


def group(name, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        named = [f"{'+' * (o[0] == '+')}data.{o.removeprefix('+')}" for o in overrides]
        return build_data(compose("train", [f"data={name}", *named]))


def test_config_groups_build_what_their_command_names(tmp_path):
    write_folder(tmp_path, ("train",), count=8)
    root = f"root={tmp_path}"
    for name in ("folder", "timm"):
        data = group(name, root, "batch_size=4", "channels=1", "image_size=16")
        assert (data.in_chans, data.image_size, data.classes) == (1, (16, 16), ["cat", "dog"])
        assert len(data.train) + len(data.val) + len(data.test) == 16
        data.num_workers = 0
        images = batches(data.train_dataloader())[0].view
        assert images.shape == (4, 1, 16, 16)
    assert group("digits", "image_size=8").image_size == (8, 8)


def test_a_config_groups_keys_go_to_the_source_and_the_module_that_they_fit():
    def opened(root, image_size):
        return replace(source(streamed(classes=3)), name=f"{root} {image_size}")

    options = {"root": "here", "image_size": 16, "batch_size": 2}
    data = configured(opened, **options)
    assert (data.source.name, data.image_size, data.batch_size) == ("here 16", (16, 16), 2)
    for extra in ({"channels": 3}, {"rot": "there"}):
        with pytest.raises(TypeError, match=next(iter(extra))):
            configured(opened, **options, **extra)


def test_views_of_data_in_memory_take_their_options_from_the_command_line():
    told = ("view.crop_scale=[0.5,1]", "view.zoom=[0.9,1.1]", "view.mixup=0.2")
    data = group("digits", *told, "views=3")
    assert data.views == 3
    options = {"crop_ratio": [0.75, 1.3333], "erase_scale": [0.02, 0.3333]}
    assert data.view == ResidentView(pad=1, crop_scale=[0.5, 1], zoom=[0.9, 1.1], mixup=0.2,
                                     erase_ratio=[0.3, 3.3333], **options)  # fmt: skip
    target = shown(data)[1]
    assert target.shape[1] == 10


def test_a_folder_in_memory_takes_the_recipe_of_small_images(tmp_path):
    write_folder(tmp_path, ("train",), count=8)
    common = (f"root={tmp_path}", "batch_size=4", "resident=true")
    data = group("folder", *common, "view.scale=null", "+view.pad=4")
    assert data.view == ResidentView(pad=4, flip=True)
    assert (data.image_size, data.train.images.shape[1:]) == ((16, 20), (3, 16, 20))
    assert shown(data)[0].shape[1:] == (3, 16, 20)
    assert group("folder", *common).view == ResidentView(crop_scale=[0.35, 1], flip=True)
    assert group("folder", *common, "image_size=8").image_size == (8, 8)


def test_options_of_a_source_are_keys_of_its_config_group(tmp_path):
    path = write_folder(tmp_path, ("train",), count=8) / "train" / "cat" / "5.png"
    path.write_bytes(b"")
    common = (f"root={tmp_path}", "batch_size=4")
    assert len(group("folder", *common, "verify=none").source.train) == 16
    found = group("timm", *common, "classes=[feline,canine]", "broken=skip")
    assert len(found.source.train) == 15
    assert found.classes == ["feline", "canine"]


@pytest.mark.parametrize(
    ("name", "overrides", "word"),
    [
        ("folder", [], "data.root"),
        ("idx", [], "data.root"),
        ("timm", [], "give data.root="),
        ("folder", ["root=nowhere"], "nowhere is not a folder"),
        ("idx", ["root=nowhere"], "nowhere is not a folder"),
        ("timm", ["root=nowhere.tar"], "nowhere.tar does not exist"),
        ("folder", ["root=HERE/train"], "did you mean data.root="),
        ("idx", ["root=HERE"], "has no train-images-idx3-ubyte"),
        ("folder", ["root=HERE", "channels=2"], "data.channels"),
        ("folder", ["root=HERE", "image_size=0"], "data.image_size"),
        ("folder", ["root=HERE", "view.scale=[1]"], "data.view.scale must be two numbers"),
        ("timm", ["root=HERE", "splits.test=tset"], "contains train"),
        ("timm", ["root=HERE", "name=cifar10"], "data.name=cifar10"),
        ("folder", ["root=HERE", "resident=true", "view.pad=x"], "data.view.pad must be whole"),
        ("folder", ["root=HERE", "resident=true", "view.hflip=1"], "data.view.hflip=1 is not"),
        ("cifar10", [], "data.root"),
        ("cifar100", ["root=nowhere"], "data.download=true fetches it"),
        ("cifar100", ["root=HERE", "labels=both"], "data.labels must be fine or coarse"),
        ("arrays", ["root=nowhere.npz"], "nowhere.npz does not exist"),
        ("digits", ["view.pad=-1"], "data.view.pad"),
        ("digits", ["+view.crop_scale=[1,0.5]"], "data.view.crop_scale must be two shares"),
        ("digits", ["+view.zoom=[nan,1]"], "data.view.zoom must be two factors"),
        ("digits", ["view.hue=0.1"], "data.view.hue needs colours"),
        ("digits", ["views=0"], "data.views must be how many"),
        ("digits", ["image_size=0"], "data.image_size"),
        ("digits", ["val_fraction=2"], "data.val_fraction"),
    ],
)
def test_the_first_mistakes_are_one_line(tmp_path, name, overrides, word):
    write_folder(tmp_path, ("train",), count=8)
    overrides = [override.replace("HERE", str(tmp_path)) for override in overrides]
    with pytest.raises((ValueError, OSError, OmegaConfBaseException)) as caught:
        group(name, *overrides)
    assert word in str(caught.value)
    if not isinstance(caught.value, OmegaConfBaseException):
        assert len(str(caught.value).splitlines()) == 1
