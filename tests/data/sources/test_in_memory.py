"""Pictures that are kept in memory are those that would be decoded, split and named alike."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from distill.data import DataModule
from distill.data.loading import KeyedSplit
from distill.data.module import configured
from distill.data.sources import digits, in_memory
from distill.data.sources.folder import folder
from distill.data.sources.judged import Judged
from distill.data.sources.sizes import ModelSize
from distill.data.sources.splits import Resident
from distill.data.sources.table import table
from distill.data.views.views import CLEAN
from tests.data.conftest import refusal, truncated, write_folder

RESIDENT = {"resident": True}


def write_noise(root, parts=("train", "test"), count=6, size=(12, 12), ext="png", mode="RGB",
                seed=0, **how):  # fmt: skip
    """Write class folders of noise, each image other than any other."""
    rng = np.random.default_rng([seed, len(list(root.rglob("*")))])
    for part in parts:
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for k in range(count):
                pixels = rng.integers(0, 256, (size[0], size[1], 3), dtype=np.uint8)
                image = Image.fromarray(pixels).convert(mode)
                image.save(root / part / name / f"{k}.{ext}", **how)
    return root


def both(root, source=folder, image_size=None, options=None, **given):
    """Return the data module of streamed pictures, and that of the same in memory."""
    options, place = options or {}, {"root": str(root)}
    view = {"image_size": image_size, "batch_size": 2}
    return [
        configured(source, **place, **view, **options, **given, resident=r) for r in (False, True)
    ]


def clean(data, split):
    return KeyedSplit(split, data.view, 0)[CLEAN, torch.arange(len(split))].view


def check_same(streamed, kept):
    assert kept.classes == streamed.classes
    for name in ("train", "val", "test"):
        one, other = getattr(streamed, name), getattr(kept, name)
        assert isinstance(other, Resident)
        assert other.index.tolist() == one.index.tolist()
        assert other.labels.tolist() == one.labels.tolist()
        assert other.contents().tolist() == one.contents().tolist()
        assert not len(one) or torch.equal(clean(kept, other), clean(streamed, one))
    assert (kept.image_size, kept.pictures) == (streamed.image_size, streamed.pictures)
    assert sum(note.startswith("kept in memory: ") for note in kept.notes) == 1
    sizes = ("shown at", "kept in memory: ")
    others = [{note for note in data.notes if not any(word in note for word in sizes)}
              for data in (streamed, kept)]  # fmt: skip
    assert others[0] == others[1]


@pytest.mark.parametrize("ext", ["png", "jpg", "bmp", "webp", "tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_in_memory_are_the_clean_views_of_streamed_ones(tmp_path, ext, channels):
    write_noise(tmp_path, size=(32, 32), ext=ext)
    check_same(*both(tmp_path, channels=channels))


@pytest.mark.parametrize("size", [8, 24])
@pytest.mark.parametrize("shape", [(12, 12), (12, 19), (19, 12)])
def test_pictures_resized_to_a_square_are_the_clean_views_too(tmp_path, shape, size):
    write_noise(tmp_path, size=shape)
    check_same(*both(tmp_path, image_size=size))


@pytest.mark.parametrize("parts", [("",), ("train",), ("train", "val"), ("train", "val", "test")])
def test_splits_are_those_of_the_streamed_folder(tmp_path, parts):
    write_noise(tmp_path, parts, count=10, size=(32, 32))
    check_same(*both(tmp_path, options={"split_seed": 3}))


def test_turned_transparent_and_deep_pictures_are_shown_as_streamed(tmp_path):
    write_noise(tmp_path, size=(32, 32), mode="RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6
    write_noise(tmp_path, ("val",), size=(32, 32), ext="jpg", exif=exif)
    deep = (np.arange(1024, dtype=np.uint16) * 64).reshape(32, 32)
    Image.fromarray(deep).save(tmp_path / "train" / "cat" / "deep.png")
    check_same(*both(tmp_path))


def test_broken_pictures_and_those_held_out_too_are_met_alike(tmp_path):
    write_noise(tmp_path, count=8, size=(32, 32))
    truncated(tmp_path / "train" / "cat" / "3.png")
    refusal(lambda: folder(str(tmp_path), **RESIDENT), "broken image", "3.png")
    first = tmp_path / "train" / "dog" / "0.png"
    (tmp_path / "test" / "dog" / "same.png").write_bytes(first.read_bytes())
    Image.open(first).save(tmp_path / "test" / "dog" / "same pixels.png", compress_level=0)
    for duplicates in ("keep", "drop"):
        streamed, kept = both(tmp_path, options={"duplicates": duplicates}, broken="skip")
        check_same(streamed, kept)
        assert any("1 image of train is held out, too" in note for note in kept.notes)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_that_nobody_looked_for_is_one_line(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(in_memory, "AT_ONCE", 4)
    path = write_noise(tmp_path, count=9) / "test" / "cat" / "5.png"
    truncated(path)
    options = {"verify": "none", "num_workers": workers, **RESIDENT}
    refusal(lambda: folder(str(tmp_path), **options), "broken image", path, error=ValueError)


@pytest.mark.parametrize("count", [1, 4, 9])
def test_workers_change_nothing_and_nothing_is_drawn(tmp_path, monkeypatch, count):
    monkeypatch.setattr(in_memory, "AT_ONCE", 4)
    write_noise(tmp_path, count=count)
    state = torch.get_rng_state()
    alone, together = (folder(str(tmp_path), num_workers=n, **RESIDENT) for n in (0, 2))
    assert torch.equal(torch.get_rng_state(), state)
    for part in ("train", "test"):
        assert torch.equal(getattr(alone, part).images, getattr(together, part).images)


def test_the_fingerprint_is_of_pixels_and_labels(tmp_path):
    def fingerprint():
        return folder(str(tmp_path), **RESIDENT).train.fingerprint()

    write_folder(tmp_path, ("train",))
    first = fingerprint()
    path = tmp_path / "train" / "cat" / "2.png"
    path = path.rename(path.with_name("9.png"))
    assert fingerprint() == first
    with Image.open(path) as image:
        image.putpixel((0, 0), (1, 2, 3))
        image.save(path)
    assert fingerprint() != first


# Sizes


def test_the_size_is_what_the_pictures_have_in_common(tmp_path):
    write_noise(tmp_path, size=(28, 20))
    source = folder(str(tmp_path), **RESIDENT)
    assert source.train.images.shape == (12, 3, 28, 20)
    assert "24 pictures of 28 × 20 shown at 28 × 20 (height × width)" in source.notes
    assert "kept in memory: 24 pictures in 40.3 kB" in source.notes
    model = ModelSize((64, 64))
    assert folder(str(tmp_path), model_size=model, **RESIDENT).train.images.shape[2:] == (28, 20)
    exact = ModelSize((64, 64), exact=True)
    assert folder(str(tmp_path), model_size=exact, **RESIDENT).train.images.shape[2:] == (64, 64)
    sized = folder(str(tmp_path), model_size=exact, image_size=16, **RESIDENT)
    assert sized.test.images.shape[2:] == (16, 16)


def test_without_a_common_size_it_is_that_of_streamed_pictures(tmp_path):
    write_noise(tmp_path, count=12, size=(90, 90))
    write_noise(tmp_path, count=9, size=(70, 70))
    streamed, kept = both(tmp_path)
    assert kept.image_size == streamed.image_size == (64, 64)
    check_same(streamed, kept)


def test_more_than_half_of_the_free_memory_is_refused_with_the_numbers(tmp_path, monkeypatch):
    write_noise(tmp_path)
    taken = 24 * 3 * 12 * 12
    monkeypatch.setattr(in_memory, "available_bytes", lambda: 2 * taken - 1)
    refusal(lambda: folder(str(tmp_path), **RESIDENT), "24 pictures of 12 × 12 would take 10.4 kB",
            "more than half of the 20.7 kB", "data.resident", error=ValueError)  # fmt: skip
    folder(str(tmp_path), image_size=8, **RESIDENT)
    for free in (2 * taken, 0):  # as where it is not known
        monkeypatch.setattr(in_memory, "available_bytes", lambda free=free: free)
        folder(str(tmp_path), **RESIDENT)


# Other sources, and data that are only judged


def test_pictures_of_a_table_are_kept_in_memory(tmp_path):
    write_noise(tmp_path, count=10, size=(32, 32))
    files = sorted(tmp_path.rglob("*.png"))
    lines = [f"{p.relative_to(tmp_path)},{p.parent.name},{p.parts[-3]}" for p in files]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label,split", *lines]))
    check_same(*both(tmp_path, table, file="labels.csv"))


@pytest.mark.parametrize("parts", [("",), ("test",), ("test", "val")])
def test_pictures_that_are_only_judged_are_kept_in_memory(tmp_path, parts):
    write_noise(tmp_path, parts, size=(32, 32))
    judged = Judged("a bundle", ["dog", "cat", "eel"])
    streamed, kept = both(tmp_path, judged=judged)
    check_same(streamed, kept)
    assert len(kept.train) == 0
    assert kept.test.labels.unique().tolist() == [0, 1]


def test_it_is_said_where_a_model_was_shown_pictures_otherwise(tmp_path):
    write_noise(tmp_path, ("test",), size=(32, 32))
    shown = {"interpolation": "bilinear", "crop_pct": 0.9, "crop_mode": "center"}
    streamed, kept = both(tmp_path, judged=Judged("a bundle", ["cat", "dog"], shown))
    note = "the model was shown pictures with crop_pct=0.9; those in memory are shown whole"
    assert [sum(note in one for one in data.notes) for data in (streamed, kept)] == [0, 1]


def test_pictures_without_labels_are_told_apart_by_their_files(tmp_path):
    write_noise(tmp_path / "photos", count=9, size=(32, 32))
    more = write_noise(tmp_path / "more", ("",), size=(32, 32), seed=1) / "cat"
    held_out = tmp_path / "photos" / "test" / "dog" / "1.png"
    (more / "same.png").write_bytes(held_out.read_bytes())
    Image.open(held_out).save(more / "same pixels.png", compress_level=0)
    given = {"unlabeled": str(tmp_path / "more"), "batch_size": 4}
    for source in (folder(str(tmp_path / "photos"), resident=r) for r in (False, True)):
        data = DataModule(source, image_size=32, **given)
        assert data.left_out == 1
        assert len(data.unlabeled) == 13
    source = folder(str(tmp_path / "more"), channels=1, image_size=32, **RESIDENT)
    data = DataModule(digits(), unlabeled=source)
    assert any("cannot be compared with those of validation" in note for note in data.notes)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files by /proc")
def test_no_file_is_left_open(tmp_path):
    write_noise(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    folder(str(tmp_path), **RESIDENT)
    assert len(os.listdir("/proc/self/fd")) == before
