"""Pictures without labels: how they are read, which are left out, and when each is shown."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from distill.data import DataModule
from distill.data.loading import KeySampler
from distill.data.sources.folder import folder
from distill.data.sources.splits import Resident, Source
from distill.data.sources.timm_data import timm_dataset
from distill.data.sources.unlabeled import per_batch
from distill.data.views.order import endless_order
from tests.data.conftest import fields, refusal, truncated, write_folder, write_image, write_tar


def photos(root, count=20):
    return write_folder(root / "photos", count=count)


def extra(root, count=10, place="extra"):
    """Pictures at several depths, their number in green."""
    for k in range(count):
        write_image(root / place / ("deep/er" if k % 2 else "") / f"{k}.png", (7, k, 99))
    return root / place


def module(root, batch_size=8, unlabeled=None, **options):
    source = options.pop("source", None) or folder(str(photos(root)))
    unlabeled = str(extra(root)) if unlabeled is None else unlabeled
    options = {"image_size": 8, "unlabeled": unlabeled, **options}
    return DataModule(source, batch_size=batch_size, **options)


def epoch_of(data, epoch=0, skip=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    loader.sampler.skip = skip
    return list(loader.sampler)


# The order


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_stretches_of_the_endless_order_are_cut_from_one_row(count, start, length, more):
    whole = endless_order(3, count, 0, start + length + more)
    assert endless_order(3, count, start, length).equal(whole[start : start + length])
    for permutation in whole.split(count):
        assert len(permutation.unique()) == len(permutation)


def test_permutations_differ_among_themselves_and_by_seed():
    rows = endless_order(0, 50, 0, 150).view(3, 50)
    assert not rows[0].equal(rows[1])
    assert not rows[1].equal(rows[2])
    assert not endless_order(1, 50, 0, 50).equal(rows[0])


@pytest.mark.parametrize(("batch", "beside", "ranks"), [(8, 4, 1), (8, 6, 1), (4, 2, 2), (6, 1, 3)])
def test_an_epoch_is_one_pass_over_the_labelled_and_all_others_come_equally_often(
    batch, beside, ranks
):
    labelled, unlabelled, epochs = 41, 23, 9
    samplers = [
        KeySampler(labelled, batch, 5, True, rank, ranks, None, 1.0, unlabelled, beside)
        for rank in range(ranks)
    ]
    alone = [KeySampler(labelled, batch - beside, 5, True, rank, ranks) for rank in range(ranks)]
    shown = Counter()
    for epoch in range(epochs):
        for sampler, plain in zip(samplers, alone, strict=True):
            sampler.set_epoch(epoch)
            plain.set_epoch(epoch)
            keys = [positions for _, positions in sampler]
            assert len(keys) == len(sampler) == labelled // ((batch - beside) * ranks)
            assert all(len(positions) == batch for positions in keys)
            own = [positions[: batch - beside] for positions in keys]
            expected = [positions for _, positions in plain]
            assert torch.cat(own).equal(torch.cat(expected))  # those of a run without the others
            others = torch.cat([positions[batch - beside :] for positions in keys])
            assert others.min() >= labelled
            assert others.max() < labelled + unlabelled
            shown.update(others.tolist())
    assert sum(shown.values()) == epochs * len(samplers[0]) * beside * ranks
    assert len(shown) == unlabelled
    assert max(shown.values()) - min(shown.values()) <= 1


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_batches_that_one_device_sees(ranks):
    def keys(rank, ranks, batch, beside):
        sampler = KeySampler(48, batch, 1, True, rank, ranks, None, 1.0, 31, beside)
        sampler.set_epoch(4)
        return [positions for _, positions in sampler]

    whole = keys(0, 1, 4 * ranks, 2 * ranks)
    shares = [keys(rank, ranks, 4, 2) for rank in range(ranks)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert batch.sort().values.equal(torch.cat(parts).sort().values)


def test_an_epoch_that_is_gone_on_with_has_the_batches_that_were_left():
    sampler = KeySampler(40, 8, 1, True, 0, 1, None, 1.0, 31, 4)
    sampler.set_epoch(3)
    whole = list(sampler)
    sampler.skip = 4
    rest = list(sampler)
    assert [p.tolist() for _, p in rest] == [p.tolist() for _, p in whole[4:]]


# What is read


def test_a_folder_is_read_to_any_depth_without_labels_and_beside_train(tmp_path):
    data = module(tmp_path, seed=3)
    write_image(tmp_path / "extra" / ".hidden" / "x.png", (1, 1, 1))
    assert len(data.unlabeled) == 10
    assert len(data.pool) == len(data.train) + 10
    assert data.pool.labels[: len(data.train)].equal(data.train.labels)
    assert data.pool.labels[len(data.train) :].tolist() == [-1] * 10
    assert data.pool.index.unique().numel() == len(data.pool)
    greens = {data.pool.load(i).getpixel((0, 0))[1] for i in data.pool.index[-10:].tolist()}
    assert greens == set(range(10))
    assert data.class_counts == [20, 20]
    loader = data.train_dataloader()
    views, target, index, _ = fields(next(iter(loader)))
    assert views.shape == (8, 3, 8, 8)
    assert (target[:4] >= 0).all()
    assert target[4:].tolist() == [-1] * 4
    assert index[4:].tolist() == data.pool.index[epoch_of(data)[0][1][4:]].tolist()
    assert len(loader) == 40 // 4
    assert data.training_keys().unlabeled_note() == (
        "each batch: 4 labelled and 4 of 10 unlabelled pictures; an epoch is one pass over the 40 "
        "labelled, and shows 40 of the unlabelled"
    )


def test_a_view_of_an_unlabelled_picture_depends_on_seed_epoch_and_index_alone(tmp_path):
    first = module(tmp_path, batch_size=8, unlabeled_share=0.75)
    second = module(tmp_path, batch_size=4, unlabeled_share=None)

    def views(data):
        found = {}
        loader = data.train_dataloader()
        loader.sampler.set_epoch(2)
        for images, target, index, _ in map(fields, loader):
            for image, label, i in zip(images, target, index.tolist(), strict=True):
                if label < 0:
                    found[i] = image
        return found

    one, other = views(first), views(second)
    assert one.keys() & other.keys()
    assert all(one[i].equal(other[i]) for i in one.keys() & other.keys())


def test_validation_and_test_never_hold_an_unlabelled_picture(tmp_path):
    data = module(tmp_path)
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert all((batch.target >= 0).all() for batch in loader)
    plain = DataModule(data.source, batch_size=8, image_size=8)
    for name in ("train", "val", "test"):
        assert getattr(data, name).index.equal(getattr(plain, name).index)


def test_images_in_memory_are_joined_by_files_read_at_their_size(tmp_path):
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    split = Resident(images, torch.arange(40) % 2)
    data = module(tmp_path, source=Source("toy", ["a", "b"], 3, split), view={"flip": True})
    first = 40
    assert data.pool.index[-10:].tolist() == list(range(first, first + 10))
    assert {int(image[1, 0, 0]) for image in data.pool.images[-10:]} == set(range(10))
    by_position = replace_fetch(data)
    for (shown, goal), (again, _) in zip(by_position, replace_fetch(data, True), strict=True):
        assert shown.equal(again)
        assert goal[4:].tolist() == [-1] * 4


def replace_fetch(data, fetch=False):
    """The views that a batch of positions becomes on the device, or a batch of images."""
    return list(map(data._shown, data._loader("train", data.pool, shuffle=True, fetch=fetch)))


def test_a_source_gives_its_training_split(tmp_path):
    other = folder(str(write_folder(tmp_path / "other", classes=("eel", "fox"), count=4)))
    data = module(tmp_path, unlabeled=other)
    assert len(data.unlabeled) == 8
    assert data.num_classes == 2
    assert data.unlabeled.labels.tolist() == [-1] * 8
    refusal(
        lambda: module(tmp_path, unlabeled=replace(other, channels=1)), "1 channels", "unlabeled"
    )
    refusal(lambda: module(tmp_path, unlabeled=5), "data.unlabeled", "5")


def test_a_twin_without_them_is_as_if_they_had_never_been_given(tmp_path):
    data = module(tmp_path)
    plain = DataModule(data.source, batch_size=4, image_size=8)
    with_them = data.fingerprint
    twin = data.with_options(seed=0, batch_size=4, unlabeled=False)
    assert twin.fingerprint == plain.fingerprint != with_them == data.fingerprint
    assert [p.tolist() for _, p in epoch_of(twin)] == [p.tolist() for _, p in epoch_of(plain)]
    assert [p[:4].tolist() for _, p in epoch_of(data)] == [p.tolist() for _, p in epoch_of(plain)]
    assert data.labeled_per_batch == 4
    assert data.with_options(seed=1, batch_size=4).unlabeled_per_batch == 2


@pytest.mark.parametrize(("views", "epochs"), [(None, 5), (2, 5), (3, 2)])
def test_what_a_run_will_show_of_a_view_is_known_ahead(tmp_path, views, epochs):
    data = module(tmp_path, views=views, unlabeled_share=0.25)
    shown = {}
    for epoch in range(epochs):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            shown.setdefault(batch.view_number, set()).update(batch.index.tolist())
    for number, indices in shown.items():
        ahead = set(
            data.pool.index[data.training_keys().shown(number, data.views, epochs)].tolist()
        )
        assert ahead >= indices
        assert {i for i in ahead if i >= 40} == {i for i in indices if i >= 40}


# What is left out, and refused


def source_of(form, root):
    """The same images as a folder, as one whose splits are cut, and as timm reads them."""
    if form == "folder":
        for k, place in enumerate(("train/a", "train/b", "val/a", "val/b", "test/a", "test/b")):
            for number in range(10):
                write_image(root / "whole" / place / f"{number}.png", (k, number, 0))
        return folder(str(root / "whole"))
    one = write_folder(root / "one", splits=("train",), count=20)
    if form == "cut":
        return folder(str(one))
    return timm_dataset(root=str(write_tar(root / "one.tar", one / "train")))


@pytest.mark.parametrize("form", ["folder", "cut", "tar"])
def test_pictures_of_validation_and_test_are_left_out_and_said(tmp_path, form):
    source, mine = source_of(form, tmp_path), extra(tmp_path)
    plain = DataModule(source, batch_size=4, image_size=8)
    for name in ("train", "val", "test"):
        split = getattr(plain, name)
        (mine / f"of-{name}.png").write_bytes(content(split, int(split.index[0])))
    data = module(tmp_path, source=source, unlabeled=str(mine))
    names = [data.unlabeled.names[i].partition(":")[0] for i in data.unlabeled.index.tolist()]
    assert data.left_out == 2
    assert len(names) == 11
    assert [name for name in names if name.startswith("of-")] == ["of-train.png"]
    assert any("2 pictures left out" in note for note in data.notes)


def content(split, index):
    if hasattr(split.load, "files"):
        return split.load.files[index].read_bytes()
    with split.load.open(index) as file:
        return file.read()


def test_equal_pixels_in_memory_are_left_out(tmp_path):
    images = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8)
    source = Source("toy", ["a", "b"], 1, Resident(images, torch.arange(60) % 2))
    plain = DataModule(source, batch_size=4)
    mine = tmp_path / "mine"
    mine.mkdir()
    for name, split in (("train", plain.train), ("test", plain.test), ("val", plain.val)):
        Image.fromarray(split.images[0, 0].numpy()).save(mine / f"{name}.png")
    data = DataModule(source, batch_size=4, unlabeled=str(mine))
    assert (data.left_out, len(data.unlabeled)) == (2, 1)
    assert data.unlabeled.images[0].equal(plain.train.images[0])


def test_what_cannot_be_used_is_refused_in_one_line(tmp_path):
    mine = extra(tmp_path)
    source = folder(str(photos(tmp_path)))

    def attempt(**options):
        return lambda: module(tmp_path, source=source, **{"unlabeled": str(mine), **options})

    refusal(attempt(unlabeled=str(tmp_path / "nowhere")), "nowhere", "does not exist")
    (tmp_path / "empty").mkdir()
    refusal(attempt(unlabeled=str(tmp_path / "empty")), "data.unlabeled", "no images")
    for share in (0, 1, -0.5, "x", True, float("nan")):
        refusal(attempt(unlabeled_share=share), "data.unlabeled_share")
    refusal(attempt(unlabeled_share=0.01), "unlabeled_share=0.01", "batch_size=8")
    refusal(attempt(unlabeled_share=0.99), "labelled image", "batch_size=8")
    clamped = attempt(batch_size=128)()
    assert (clamped.labeled_per_batch, clamped.batch_size) == (40, 80)
    assert any("40 training images, so batches are of 80" in note for note in clamped.notes)
    held = tmp_path / "held"
    held.mkdir()
    (held / "a.png").write_bytes((tmp_path / "photos/test/cat/0.png").read_bytes())
    refusal(attempt(unlabeled=str(held)), "data.unlabeled", "all its pictures")
    for k in range(5):
        truncated(mine / f"half{k}.png")
        (mine / f"half{k}.png").write_bytes(b"no image")
    refusal(attempt(), "5 broken images", *(f"half{k}.png" for k in range(5)), "data.broken=skip")
    assert len(attempt(verify="none")().unlabeled) == 15
    data = attempt(broken="skip")()
    assert len(data.unlabeled) == 10
    assert any("5 broken images are left out" in note for note in data.notes)
    assert all(data.pool.load(i) for i in data.pool.index.tolist())
    assert len(list(data.train_dataloader())) == 10


def test_labels_are_not_mixed_with_what_has_none(tmp_path):
    images = torch.zeros(40, 3, 8, 8, dtype=torch.uint8)
    source = Source("toy", ["a", "b"], 3, Resident(images, torch.arange(40) % 2))
    refusal(
        lambda: module(tmp_path, source=source, view={"cutmix": 1.0}),
        "data.view.cutmix",
        "data.unlabeled",
    )


@pytest.mark.parametrize(
    ("batch", "share", "counts", "expected"),
    [(64, 0.5, (10, 10), 32), (10, 0.25, (9, 9), 2), (128, None, (500, 4500), 115)],
)
def test_a_share_of_a_batch_is_rounded(batch, share, counts, expected):
    assert per_batch(batch, share, *counts) == expected
