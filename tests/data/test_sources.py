"""Sources read what is on disk, and refuse in one line what cannot be learned from."""

import gc
import gzip
import io
import json
import os
import struct
import tarfile
import warnings
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # read when first imported

from distill.data.sources import (
    Resident,
    Source,
    Streamed,
    digits,
    existing_folder,
    folder,
    idx,
    resize,
    stratified,
    timm_dataset,
)

COLOURS = {"cat": (200, 0, 0), "dog": (0, 200, 0), "eel": (0, 0, 200)}


def write_image(path, colour, size=(20, 16), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


def write_folder(root, splits=("train", "val", "test"), classes=("cat", "dog"), count=3, ext="png"):
    """Write a folder whose images have the colour of their class, and their number in blue."""
    for split in splits:
        for name in classes:
            for k in range(count):
                red, green, blue = COLOURS.get(name, (9, 9, 9))
                write_image(root / split / name / f"{k}.{ext}", (red, green, blue + k))
    return root


def colour(image):
    return np.asarray(image).reshape(-1, len(image.getbands()))[0].tolist()


def colours(split):
    return [colour(split.load(i)) for i in split.index.tolist()]


def refusal(action, *words, error=(ValueError, OSError)):
    """Return the message of a refusal: one line, a ValueError or OSError, with these words."""
    with pytest.raises(error) as caught:
        action()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    for word in words:
        assert str(word) in message
    return message


# Splits


def test_subsets_keep_images_labels_and_indices_together():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1)
    split = Resident(images, torch.arange(6) * 10)
    part = split.subset(torch.tensor([4, 1, 5])).subset(torch.tensor([2, 0]))
    assert part.images.flatten().tolist() == [5, 4]
    assert part.labels.tolist() == [50, 40]
    assert part.index.tolist() == [5, 4]


def test_the_fingerprint_of_images_in_memory_is_of_pixels_labels_and_indices():
    images = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    labels = torch.tensor([0, 1, 0, 1])
    first = Resident(images, labels).fingerprint()
    assert Resident(images.clone(), labels.clone()).fingerprint() == first
    pixel, label = images.clone(), labels.clone()
    pixel[3, 0, 1, 1], label[0] = 1, 1
    others = [
        Resident(pixel, labels),
        Resident(images, label),
        Resident(images, labels, torch.arange(1, 5)),
        Resident(images.view(4, 1, 1, 4), labels),
    ]
    assert len({first, *(other.fingerprint() for other in others)}) == 5


def test_the_fingerprint_of_streamed_images_is_of_names_labels_and_indices():
    labels, names = torch.tensor([0, 1]), ["a:1", "b:2"]
    first = Streamed(str, labels, names).fingerprint()
    assert Streamed(repr, labels.clone(), list(names)).fingerprint() == first
    others = [
        Streamed(str, labels, ["a:1", "b:3"]),
        Streamed(str, labels.flip(0), names),
        Streamed(str, labels, names, torch.tensor([1, 0])),
    ]
    assert len({first, *(other.fingerprint() for other in others)}) == 4


def test_stratified_takes_the_share_of_every_class():
    labels = torch.tensor([0] * 100 + [1] * 60 + [2] * 40)[torch.randperm(200)]
    part, rest = stratified(labels, 0.1, seed=3)
    assert torch.cat([part, rest]).sort().values.equal(torch.arange(200))
    assert torch.bincount(labels[part]).tolist() == [10, 6, 4]
    assert part.equal(part.sort().values)
    assert rest.equal(rest.sort().values)
    assert part.equal(stratified(labels, 0.1, seed=3)[0])
    assert not part.equal(stratified(labels, 0.1, seed=4)[0])


@pytest.mark.parametrize("seed", range(5))
def test_stratified_gives_rare_classes_one_sample_each(seed):
    labels = torch.tensor([0] * 200 + [1] * 2 + [2] * 3)
    part, rest = stratified(labels, 0.1, seed)
    assert torch.cat([part, rest]).sort().values.equal(torch.arange(205))
    assert torch.bincount(labels[part]).tolist()[1:] == [1, 1]
    assert torch.bincount(labels[rest]).tolist()[1:] == [1, 2]


def test_a_share_smaller_than_the_classes_cannot_be_stratified():
    refusal(lambda: stratified(torch.arange(100) // 2, 0.05, 0), "cannot cut 5% of 100 images")


# Digits and resizing


def test_digits_are_those_of_scikit_learn():
    source = digits(image_size=8)
    data = load_digits()
    assert source.classes == [str(k) for k in range(10)]
    assert (len(source.train), len(source.test), source.channels) == (997, 800, 1)
    for split in (source.train, source.test):
        expected = np.rint(data.images[split.index] * 255 / 16)
        assert np.array_equal(split.images[:, 0].numpy(), expected)
        assert np.array_equal(split.labels.numpy(), data.target[split.index])
    together = torch.cat([source.train.index, source.test.index])
    assert together.sort().values.equal(torch.arange(1797))
    shares = torch.bincount(source.test.labels) / torch.bincount(torch.tensor(data.target))
    assert (shares - 800 / 1797).abs().max() < 0.01


def test_digits_come_in_any_size():
    assert digits(image_size=5).train.images.shape[1:] == (1, 5, 5)
    refusal(lambda: digits(image_size=0), "data.image_size")


def test_resizing_keeps_constants_corners_and_ramps():
    images = torch.full((2, 1, 4, 4), 77, dtype=torch.uint8)
    assert resize(images, 9).unique().tolist() == [77]
    assert resize(images, 4) is images
    ramp = torch.arange(0, 160, 10, dtype=torch.uint8).expand(1, 1, 16, 16)
    half = torch.arange(0, 160, 10).float().view(8, 2).mean(1)  # away from the edges: the mean
    assert (resize(ramp, 8)[0, 0, 3, 1:-1].float() - half[1:-1]).abs().max() <= 0.5


# The idx format


def idx_bytes(array, kind=8):
    header = bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_idx(root, gzipped=False, count=12, classes=3, size=6, dotted=False):
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    arrays = {}
    for part in ("train", "t10k"):
        images = rng.integers(0, 256, (count, size, size), dtype=np.uint8)
        labels = np.arange(count) % classes
        for stem, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
            name = stem.replace("-idx", ".idx") if dotted else stem
            data = idx_bytes(array)
            path = root / f"{part}-{name}{'.gz' if gzipped else ''}"
            path.write_bytes(gzip.compress(data) if gzipped else data)
            arrays[part, stem[:6]] = array
    return arrays


@pytest.mark.parametrize("options", [{}, {"gzipped": True}, {"dotted": True}])
def test_idx_files_give_their_bytes(tmp_path, options):
    arrays = write_idx(tmp_path, **options)
    source = idx(str(tmp_path), image_size=6)
    for split, part in ((source.train, "train"), (source.test, "t10k")):
        assert np.array_equal(split.images[:, 0].numpy(), arrays[part, "images"])
        assert np.array_equal(split.labels.numpy(), arrays[part, "labels"])
    assert source.classes == ["0", "1", "2"]
    assert (source.val, source.channels) == (None, 1)
    assert idx(str(tmp_path), image_size=12).train.images.shape == (12, 1, 12, 12)


def test_idx_classes_are_named(tmp_path):
    write_idx(tmp_path)
    assert idx(str(tmp_path), classes=["a", "b", "c"]).classes == ["a", "b", "c"]
    refusal(lambda: idx(str(tmp_path), classes=["a", "b"]), tmp_path, "up to 2", "2 classes")


TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize("keep", [0, 3, 10, 16, 40, -1])
def test_a_truncated_idx_file_is_refused(tmp_path, keep):
    write_idx(tmp_path)
    path = tmp_path / TRAIN_IMAGES
    path.write_bytes(path.read_bytes()[:keep])
    refusal(lambda: idx(str(tmp_path)), path)


@pytest.mark.parametrize("keep", [0, 5, 40, -1, -9])
def test_a_truncated_gzipped_idx_file_is_refused(tmp_path, keep):
    write_idx(tmp_path, gzipped=True)
    path = tmp_path / f"{TRAIN_IMAGES}.gz"
    path.write_bytes(path.read_bytes()[:keep])
    refusal(lambda: idx(str(tmp_path)), path)


def test_a_damaged_gzipped_idx_file_is_refused(tmp_path):
    write_idx(tmp_path, gzipped=True)
    path = tmp_path / f"{TRAIN_IMAGES}.gz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))
    refusal(lambda: idx(str(tmp_path)), path, "truncated or damaged")


def test_what_is_no_idx_file_is_refused(tmp_path):
    array = np.zeros((12, 6, 6))
    for content in (b"<html>404</html>" * 9, idx_bytes(array, kind=13), idx_bytes(array[:, 0])):
        write_idx(tmp_path)
        (tmp_path / TRAIN_IMAGES).write_bytes(content)
        refusal(lambda: idx(str(tmp_path)), tmp_path / TRAIN_IMAGES, "not an idx file")
    write_idx(tmp_path, gzipped=True)
    (tmp_path / TRAIN_IMAGES).unlink()
    (tmp_path / f"{TRAIN_IMAGES}.gz").write_bytes(idx_bytes(array))  # named .gz, but plain
    refusal(lambda: idx(str(tmp_path)), f"{TRAIN_IMAGES}.gz", "damaged")


def test_idx_files_that_do_not_belong_together_are_refused(tmp_path):
    write_idx(tmp_path)
    (tmp_path / TRAIN_LABELS).write_bytes(idx_bytes(np.zeros(11)))
    refusal(lambda: idx(str(tmp_path)), tmp_path, "12 train images but 11 labels")
    (tmp_path / TRAIN_LABELS).write_bytes(idx_bytes(np.zeros(0)))
    (tmp_path / TRAIN_IMAGES).write_bytes(idx_bytes(np.zeros((0, 6, 6))))
    refusal(lambda: idx(str(tmp_path)), tmp_path, "empty")
    write_idx(tmp_path)
    (tmp_path / TRAIN_IMAGES).write_bytes(idx_bytes(np.zeros((12, 0, 6))))
    refusal(lambda: idx(str(tmp_path)), tmp_path, "empty")


def test_missing_idx_files_and_folders_are_named(tmp_path):
    write_idx(tmp_path)
    (tmp_path / TRAIN_LABELS).unlink()
    refusal(lambda: idx(str(tmp_path)), tmp_path, TRAIN_LABELS, error=FileNotFoundError)
    refusal(lambda: idx(str(tmp_path / "no")), "does not exist", error=FileNotFoundError)
    refusal(lambda: idx(str(tmp_path / TRAIN_IMAGES)), "not a folder", error=FileNotFoundError)


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    assert existing_folder("~/data") == tmp_path / "data"


# Image folders


def test_a_folder_with_three_splits(tmp_path):
    source = folder(str(write_folder(tmp_path, classes=("eel", "cat"), ext="png")))
    assert source.classes == ["cat", "eel"]
    for split in (source.train, source.val, source.test):
        assert split.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert colours(split) == [[200, 0, k] for k in range(3)] + [
            [0, 0, 200 + k] for k in (0, 1, 2)
        ]
    assert (source.name, source.notes) == (tmp_path.name, [])


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_a_lone_held_out_split_is_the_test_split(tmp_path, held_out):
    write_folder(tmp_path, ("train",))
    write_folder(tmp_path, (held_out,), count=2)
    source = folder(str(tmp_path))
    assert source.val is None
    assert len(source.test) == 4
    assert len(source.train) == 6
    assert bool(source.notes) == (held_out == "val")


def test_a_folder_with_train_only(tmp_path):
    source = folder(str(write_folder(tmp_path, ("train",))))
    assert (source.val, source.test) == (None, None)


def test_folders_are_read_in_one_channel_or_three(tmp_path):
    write_folder(tmp_path)
    grey = folder(str(tmp_path), channels=1)
    assert grey.channels == 1
    assert grey.train.load(0).mode == "L"
    assert colour(grey.train.load(0)) == [round(0.299 * 200)]
    refusal(lambda: folder(str(tmp_path), channels=2), "data.channels", "got 2")


def test_names_beyond_ascii_and_nested_folders(tmp_path):
    for name in ("Ñandú", "狐", "a b'c"):
        write_image(tmp_path / "train" / name / "été" / "œil.PNG", (1, 2, 3))
    write_image(tmp_path / "train" / ".ipynb_checkpoints" / "x.png", 0, mode="L")
    (tmp_path / "train" / "notes.txt").write_text("not a class")
    (tmp_path / "train" / "狐" / "Thumbs.db").write_text("not an image")
    source = folder(str(tmp_path))
    assert source.classes == sorted(["Ñandú", "狐", "a b'c"])
    assert colours(source.train) == [[1, 2, 3]] * 3
    assert source.train.fingerprint()


def truncated(path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BREAK = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<html>not found</html>"),
    "truncated": truncated,
}


@pytest.mark.parametrize("ext", ["png", "jpg", "bmp", "tif", "webp"])
@pytest.mark.parametrize("damage", BREAK)
def test_a_broken_image_is_named_when_it_is_decoded(tmp_path, damage, ext):
    write_folder(tmp_path, ("train",), ext=ext)
    path = tmp_path / "train" / "dog" / f"1.{ext}"
    BREAK[damage](path)
    split = folder(str(tmp_path), verify=False).train
    refusal(lambda: split.load(4), "broken image", path, error=ValueError)
    split.load(3)


@pytest.mark.parametrize(
    ("damage", "ext"), [("empty", "jpg"), ("text", "jpg"), ("empty", "png"), ("truncated", "png")]
)
def test_a_broken_image_is_named_before_training(tmp_path, damage, ext):
    write_folder(tmp_path, ("train", "val"), ext=ext)
    path = tmp_path / "val" / "dog" / f"1.{ext}"
    BREAK[damage](path)
    refusal(lambda: folder(str(tmp_path)), "broken image", path, error=ValueError)


def test_a_decompression_bomb_and_a_vanished_file_are_refused(tmp_path, monkeypatch):
    write_folder(tmp_path, ("train",))
    split = folder(str(tmp_path)).train
    path = tmp_path / "train" / "cat" / "0.png"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    refusal(lambda: split.load(0), path, error=ValueError)
    path.unlink()
    refusal(lambda: split.load(0), path, error=ValueError)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files by /proc")
def test_no_file_is_left_open(tmp_path):
    write_folder(tmp_path, ("train",), count=20)
    before = len(os.listdir("/proc/self/fd"))
    source = folder(str(tmp_path))
    images = [source.train.load(i) for i in range(40)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(images) == 40


def test_wrong_roots_are_refused_with_what_was_meant(tmp_path):
    root = write_folder(tmp_path / "photos")
    refusal(lambda: folder(str(tmp_path / "fotos")), "fotos is not a folder: it does not exist")
    refusal(lambda: folder(str(root / "train" / "cat" / "0.png")), "is not a folder")
    refusal(lambda: folder(str(root / "train")), "no folder 'train'", f"data.root={root}?")
    refusal(lambda: folder(str(root / "val")), "no folder 'train'", "data=timm")
    (tmp_path / "empty").mkdir()
    refusal(lambda: folder(str(tmp_path / "empty")), "empty has no folder 'train'")
    (tmp_path / "empty" / "train").mkdir()
    refusal(lambda: folder(str(tmp_path / "empty")), "no class folders")
    write_image(tmp_path / "empty" / "train" / "flat.png", 0)
    refusal(lambda: folder(str(tmp_path / "empty")), "no class folders")


def test_empty_and_missing_classes_are_named(tmp_path):
    root = write_folder(tmp_path)
    (root / "train" / "eel").mkdir()
    refusal(lambda: folder(str(root)), root / "train" / "eel", "no images")
    write_image(root / "train" / "eel" / "0.png", 0)
    refusal(lambda: folder(str(root)), root, "train and val have different classes: eel")


def test_ten_thousand_classes_are_refused_in_a_short_line(tmp_path):
    write_folder(tmp_path, ("val",))
    for k in range(2000):
        (tmp_path / "train" / f"class{k}").mkdir(parents=True)
    assert len(refusal(lambda: folder(str(tmp_path)), "no images")) < 300
    for k in range(2000):
        (tmp_path / "train" / f"class{k}" / "0.png").touch()
    message = refusal(lambda: folder(str(tmp_path), verify=False), "different classes")
    assert len(message) < 300


def test_the_fingerprint_of_a_folder_is_of_names_sizes_and_labels(tmp_path):
    def fingerprint(root=tmp_path / "a"):
        return folder(str(root)).train.fingerprint()

    write_folder(tmp_path / "a", ("train",))
    write_folder(tmp_path / "elsewhere", ("train",))
    first = fingerprint()
    assert fingerprint(tmp_path / "elsewhere") == first
    (tmp_path / "a" / "train" / "cat" / "0.png").rename(tmp_path / "a" / "train" / "cat" / "00.png")
    second = fingerprint()
    write_image(tmp_path / "a" / "train" / "cat" / "1.png", 0, size=(90, 90))
    assert len({first, second, fingerprint()}) == 3


# What an image file may hold


def loaded(path, channels=3):
    write_image(path.parent.parent / "b" / "x.png", 0)
    source = folder(str(path.parent.parent.parent), channels)
    return np.asarray(source.train.load(0))


@pytest.fixture
def path(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    return tmp_path / "train" / "a" / "x.png"


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_images_keep_their_range(path, channels):
    values = np.array([[0, 257, 257 * 128, 65535]], np.uint16)
    Image.fromarray(values).save(path)
    pixels = loaded(path, channels).reshape(4, channels)
    assert pixels.tolist() == [[v] * channels for v in (0, 1, 128, 255)]


def test_transparent_pixels_are_white_and_half_transparent_ones_half(path):
    values = np.array([[[9, 9, 9, 0], [100, 0, 0, 255], [0, 0, 0, 127]]], np.uint8)
    Image.fromarray(values).save(path)
    assert loaded(path).tolist() == [[[255] * 3, [100, 0, 0], [128] * 3]]


def test_palettes_with_and_without_transparency(path):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    image.save(path)
    assert loaded(path).tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    image.save(path, transparency=bytes([255, 0, 255]))
    assert loaded(path).tolist() == [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]


def test_black_and_white_and_cmyk(path):
    Image.fromarray(np.array([[True, False]])).save(path)
    assert loaded(path, 1).tolist() == [[255, 0]]
    path.unlink()
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(path.with_suffix(".jpg"))
    assert (loaded(path.with_suffix(".jpg")) > 250).all()


def test_the_first_frame_of_an_animation(path):
    frames = [Image.new("RGB", (4, 4), c) for c in ("#0a141e", "#ff0000")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert loaded(path)[0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_says(path, orientation):
    upright = np.zeros((3, 5, 3), np.uint8)
    upright[0, 0], upright[0, -1], upright[-1, 0] = 50, 100, 200
    # How a camera stores the picture, per the table of the EXIF standard.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    assert np.array_equal(loaded(path), upright)


def test_float_images_are_refused(path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(path.with_suffix(".tif"))
    refusal(lambda: loaded(path.with_suffix(".tif")), "x.tif", "floating-point")


# timm


def write_tar(path, root):
    with tarfile.open(path, "w") as tar:
        for name in sorted(os.listdir(root)):
            tar.add(root / name, arcname=name)
    return path


THREE = {"train": "train", "val": "val", "test": "test"}


def test_timm_folders(tmp_path):
    write_folder(tmp_path, classes=("cat", "eel"))
    source = timm_dataset(root=str(tmp_path), splits=THREE)
    expected = folder(str(tmp_path))
    assert source.classes == ["cat", "eel"]
    for part in THREE:
        ours, theirs = getattr(source, part), getattr(expected, part)
        assert ours.labels.tolist() == theirs.labels.tolist()
        assert colours(ours) == colours(theirs)
        assert ours.fingerprint() == theirs.fingerprint()


def test_timm_class_folders_without_splits(tmp_path):
    write_folder(tmp_path, ("",), classes=("cat", "eel"))
    source = timm_dataset(root=str(tmp_path), splits={"train": "train", "val": None, "test": None})
    assert source.classes == ["cat", "eel"]
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (source.val, source.test) == (None, None)


def test_timm_splits_that_are_one_place_are_refused(tmp_path):
    write_folder(tmp_path, ("train", "val"))
    for splits in (
        {"train": "train", "test": "tset"},
        {"train": "trian_", "test": "val"},
        {"train": "train", "test": "train"},
        {"train": "train", "test": "training/../train"},
    ):
        refusal(lambda splits=splits: timm_dataset(root=str(tmp_path), splits=splits), "train")
    tar = write_tar(tmp_path / "photos.tar", tmp_path / "train")
    splits = {"train": "train", "test": "test"}
    refusal(lambda: timm_dataset(root=str(tar), splits=splits), "photos.tar", "contains")


def test_timm_classes_that_differ_between_splits_are_refused(tmp_path):
    write_folder(tmp_path, ("train",), classes=("cat", "dog", "eel"))
    write_folder(tmp_path, ("test",), classes=("cat", "eel"))
    splits = {"train": "train", "test": "test"}
    refusal(lambda: timm_dataset(root=str(tmp_path), splits=splits), "different classes: dog")


def test_timm_tars(tmp_path):
    write_folder(tmp_path / "x", ("",), classes=("dog", "cat"))
    source = timm_dataset(root=str(write_tar(tmp_path / "photos.tar", tmp_path / "x")))
    assert (source.name, source.classes) == ("photos", ["cat", "dog"])
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert colours(source.train) == [[200, 0, k] for k in range(3)] + [
        [0, 200, k] for k in range(3)
    ]
    first = source.train.fingerprint()
    assert timm_dataset(root=str(tmp_path / "photos.tar")).train.fingerprint() == first
    write_image(tmp_path / "x" / "cat" / "0.png", 0, size=(90, 90))
    other = timm_dataset(root=str(write_tar(tmp_path / "photos.tar", tmp_path / "x")))
    assert other.train.fingerprint() != first


def test_timm_tars_in_a_tar(tmp_path):
    write_folder(tmp_path / "x", ("",), classes=("dog", "cat"))
    outer = tmp_path / "outer"
    outer.mkdir()
    for name in ("dog", "cat"):
        write_tar(outer / f"{name}.tar", tmp_path / "x" / name)
    source = timm_dataset(root=str(write_tar(tmp_path / "photos.tar", outer)))
    assert source.classes == ["cat", "dog"]
    found = {
        tuple(c): label
        for c, label in zip(colours(source.train), source.train.labels.tolist(), strict=True)
    }
    assert found == {(200, 0, k): 0 for k in range(3)} | {(0, 200, k): 1 for k in range(3)}


def test_timm_names_a_broken_image_and_never_gives_another_instead(tmp_path):
    write_folder(tmp_path / "x", ("",))
    truncated(tmp_path / "x" / "cat" / "1.png")
    tar = write_tar(tmp_path / "photos.tar", tmp_path / "x")
    for root in (tmp_path / "x", tar):
        split = timm_dataset(root=str(root)).train
        refusal(lambda split=split: split.load(1), "broken image", "cat/1.png", error=ValueError)
        assert colour(split.load(2)) == [200, 0, 2]


def test_timm_grey(tmp_path):
    write_folder(tmp_path, ("",))
    source = timm_dataset(root=str(tmp_path), channels=1)
    assert colour(source.train.load(0)) == [round(0.299 * 200)]
    refusal(lambda: timm_dataset(root=str(tmp_path), channels=4), "data.channels")


def test_what_timm_cannot_open_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.tar").write_text("no tar")
    (tmp_path / "none.tar").write_bytes(bytes(10240))
    write_image(tmp_path / "one.png", 0)
    refusal(lambda: timm_dataset(), "data.root")
    refusal(lambda: timm_dataset(root=str(tmp_path / "no")), tmp_path / "no", "does not exist")
    for name in ("empty", "bad.tar", "none.tar", "one.png"):
        refusal(lambda name=name: timm_dataset(root=str(tmp_path / name)), tmp_path / name)
    for name in ("cifar10", "hdfs/x/y", "wds/x", "torch/cifar10", "torch/nothing"):
        refusal(lambda name=name: timm_dataset(name=name), "data.")
    refusal(lambda: timm_dataset("torch/cifar10", str(tmp_path)), "torch/cifar10")
    refusal(lambda: timm_dataset("hfds/no/where", str(tmp_path / "cache")), "hfds/no/where")
    for splits in ({"test": "test"}, {"train": "train", "dev": "dev"}, {"train": None}):
        refusal(lambda splits=splits: timm_dataset(root=".", splits=splits), "data.splits")


def test_torchvisions_own_data_sets(tmp_path):
    write_folder(tmp_path, ("train", "val"), classes=("eel", "cat"))
    source = timm_dataset("torch/image_folder", str(tmp_path), {"train": "train", "test": "val"})
    assert source.classes == ["cat", "eel"]
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert colour(source.test.load(5)) == [0, 0, 202]


def png(value, size=(20, 16)):
    with closing(io.BytesIO()) as file:
        Image.new("RGB", size, value).save(file, "PNG")
        return file.getvalue()


@pytest.fixture
def shards(tmp_path):
    """A folder for shards, which webdataset itself leaves open."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield tmp_path
        gc.collect()


def write_shards(root, split, count=6, info=None, broken=(), target=lambda k: k % 3):
    """Write two webdataset shards; the colour of an image is its number."""
    import webdataset as wds

    root.mkdir(exist_ok=True)
    names = [f"{split}-{shard}.tar" for shard in range(2)]
    for shard, name in enumerate(names):
        with wds.TarWriter(str(root / name)) as writer:
            for k in range(shard * count // 2, (shard + 1) * count // 2):
                image = b"broken" if k in broken else png((k, 0, 0))
                writer.write({"__key__": f"{k:04}", "png": image, "cls": str(target(k)).encode()})
    if info is not None:
        lengths = [count // 2, count // 2]
        info[split] = {
            "name": split, "num_samples": count, "filenames": names, "shard_lengths": lengths,
        }  # fmt: skip
        (root / "_info.json").write_text(json.dumps({"splits": info}))
    return root


@pytest.mark.parametrize("described", [True, False])
def test_webdatasets_are_held_in_memory(shards, described):
    info = {} if described else None
    splits = {"train": "train-{0..1}.tar", "test": "test-{0..1}.tar"}
    for split in splits:
        write_shards(shards, split, count=6 if split == "train" else 4, info=info)
    if described:
        splits = {"train": "train", "test": "test"}
    source = timm_dataset("wds/local", str(shards), splits, image_size=8)
    assert colours(source.train) == [[k, 0, 0] for k in range(6)]
    assert {source.train.load(k).size for k in range(6)} == {(8, 8)}
    assert source.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert (len(source.test), source.classes) == (4, ["0", "1", "2"])
    assert source.train.fingerprint() != source.train.subset(torch.arange(1, 6)).fingerprint()
    grey = timm_dataset("wds/local", str(shards), splits, channels=1, image_size=8)
    assert colours(grey.train) == [[round(0.299 * k)] for k in range(6)]
    assert grey.train.fingerprint() != source.train.fingerprint()
    named = timm_dataset("wds/local", str(shards), splits, classes=["a", "b", "c"])
    assert named.classes == ["a", "b", "c"]


def test_a_webdataset_with_a_broken_sample_is_refused_not_shortened(shards):
    splits = {"train": "train-{0..1}.tar"}
    write_shards(shards, "train", broken=(4,))
    refusal(lambda: timm_dataset("wds/x", str(shards), splits), "wds/x", "1 samples cannot be read")
    write_shards(shards, "train", target=lambda k: "cat")
    refusal(lambda: timm_dataset("wds/x", str(shards), splits), "6 samples cannot be read", "cat")
    write_shards(shards, "train")
    (shards / "train-1.tar").write_bytes((shards / "train-1.tar").read_bytes()[:2000])
    refusal(lambda: timm_dataset("wds/x", str(shards), splits), "cannot be read")
    (shards / "train-1.tar").unlink()
    refusal(lambda: timm_dataset("wds/x", str(shards), splits), "cannot be read", "train-1.tar")


def test_a_webdataset_without_the_split_is_refused(shards):
    write_shards(shards, "train", info={})
    refusal(lambda: timm_dataset("wds/x", str(shards), {"train": "training"}), "training")


def write_parquet(path, labels, feature=None, key="label", value=lambda k: (k, 0, 0)):
    import datasets

    columns = {"image": datasets.Image()} | ({key: feature} if feature else {})
    rows = {"image": [{"bytes": png(value(k)), "path": None} for k in range(len(labels))]}
    features = datasets.Features(columns) if feature else None
    data = datasets.Dataset.from_dict({**rows, key: labels}, features=features)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.cast_column("image", datasets.Image()).to_parquet(str(path))


@pytest.fixture
def hub(tmp_path):
    """A folder laid out as a data set of the Hub, and the cache beside it."""
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    return tmp_path / "hub", str(tmp_path / "cache")


def from_hub(hub, splits=None, **options):
    return timm_dataset(f"hfds/{hub[0]}", hub[1], splits, **options)


def test_data_sets_of_the_hub(hub):
    import datasets

    names = datasets.ClassLabel(names=["owl", "ant"])
    write_parquet(hub[0] / "train-0.parquet", [1, 0, 1, 0], names)
    write_parquet(hub[0] / "test-0.parquet", [0, 1], names)
    source = from_hub(hub, {"train": "train", "test": "test"})
    assert source.classes == ["owl", "ant"]
    assert source.train.labels.tolist() == [1, 0, 1, 0]
    assert colours(source.train) == [[k, 0, 0] for k in range(4)]
    assert len(source.test) == 2
    refusal(lambda: from_hub(hub, {"train": "tarin"}), "tarin")


def test_the_hubs_image_folders(hub):
    write_folder(hub[0], ("train", "test"), classes=("cat", "eel"))
    source = from_hub(hub, {"train": "train", "test": "test"})
    assert source.classes == ["cat", "eel"]
    assert sorted(map(tuple, colours(source.train)))[0] == (0, 0, 200)
    by_label = zip(source.train.labels.tolist(), colours(source.train), strict=True)
    assert all(label == (c[2] >= 200) for label, c in by_label)


def test_labels_of_the_hub_that_are_words(hub):
    import datasets

    words = datasets.Value("string")
    write_parquet(hub[0] / "train-0.parquet", ["owl", "ant", "owl"], words)
    write_parquet(hub[0] / "test-0.parquet", ["owl"], words)
    source = from_hub(hub, {"test": "test", "train": "train"})
    assert source.classes == ["ant", "owl"]
    assert source.train.labels.tolist() == [1, 0, 1]
    assert source.test.labels.tolist() == [1]
    assert from_hub(hub, classes=["owl", "ant"]).train.labels.tolist() == [0, 1, 0]
    write_parquet(hub[0] / "test-0.parquet", ["bat"], words)
    refusal(lambda: from_hub(hub, {"train": "train", "test": "test"}), "'test'", "'bat'")


def test_columns_of_the_hub_may_have_other_names(hub):
    write_parquet(hub[0] / "train-0.parquet", [0, 1], key="fine")
    assert from_hub(hub, options={"target_key": "fine"}).train.labels.tolist() == [0, 1]
    refusal(lambda: from_hub(hub), "column 'label' is missing", "target_key", "fine")
    refusal(
        lambda: from_hub(hub, options={"input_key": "img", "target_key": "fine"}),
        "'img'",
        "input_key",
    )
    refusal(lambda: from_hub(hub, options={"target_kye": "fine"}), "target_kye")


@pytest.mark.parametrize("labels", [[0.5, 1.0], [[0], [1]], [0, None]])
def test_labels_of_the_hub_that_are_no_classes(hub, labels):
    write_parquet(hub[0] / "train-0.parquet", labels)
    refusal(lambda: from_hub(hub), "labels should be class numbers or names")


def test_the_fingerprint_of_a_data_set_of_the_hub_is_of_its_pixels(hub):
    prints = []
    for value in (lambda k: (k, 0, 0), lambda k: (0, k, 0)):
        write_parquet(hub[0] / "train-0.parquet", [0, 1, 0], value=value)
        prints += [from_hub(hub).train.fingerprint() for _ in range(2)]
    assert prints[0] == prints[1] != prints[2] == prints[3]


def test_reading_any_source_warns_of_nothing(tmp_path):
    write_folder(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source in (folder(str(tmp_path)), timm_dataset(root=str(tmp_path))):
            source.train.load(0)


def test_a_source_says_what_it_lacks():
    source = Source("x", ["a"], 1, Resident(torch.zeros(1, 1, 1, 1), torch.zeros(1)))
    assert (source.val, source.test, source.notes) == (None, None, [])
