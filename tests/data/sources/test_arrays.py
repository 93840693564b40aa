"""Arrays on disk are read as they are called and shaped, and refused where they do not fit."""

import doctest
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.data.sources.arrays import arrays
from tests.data.conftest import refusal
from tests.data.sources.pickle_cases import Runs

MAPS = Path("/proc/self/maps")  # the files that a process has in its memory


def images(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def labels(count, classes=3, kind=np.int64):
    return (np.arange(count) % classes).astype(kind)


def held(shape=(5, 4, 3), parts=("train", "val", "test"), **more):
    """Return arrays of splits with 9, 6 and 3 images."""
    arrays = {}
    for part, count in (("train", 9), ("val", 6), ("test", 3)):
        if part in parts:
            arrays |= {f"x_{part}": images(count, *shape, seed=count), f"y_{part}": labels(count)}
    return arrays | more


def medical(arrays):
    """Return arrays under the names of MedMNIST, labels `[N, 1]` in 8 bits."""
    return {
        f"{name[2:]}_{'images' if name[0] == 'x' else 'labels'}": (
            array if name[0] == "x" else array[:, None].astype(np.uint8)
        )
        for name, array in arrays.items()
    }


def write(root, arrays, folder=False, compressed=False):
    if not folder:
        (np.savez_compressed if compressed else np.savez)(root / "photos.npz", **arrays)
        return root / "photos.npz"
    (root / "photos").mkdir()
    for name, array in arrays.items():
        np.save(root / "photos" / f"{name}.npy", array)
    return root / "photos"


@pytest.mark.parametrize("named", [dict, medical])
@pytest.mark.parametrize("form", [{}, {"compressed": True}, {"folder": True}])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((5, 4), None),
        ((5, 4, 1), (0, 3, 1, 2)),
        ((5, 4, 3), (0, 3, 1, 2)),
        ((1, 5, 4), (0, 1, 2, 3)),
        ((3, 5, 4), (0, 1, 2, 3)),
    ],
)
def test_every_layout_and_naming_gives_the_same_images(tmp_path, named, form, shape, axes):
    expected = held(shape)
    source = arrays(str(write(tmp_path, named(expected), **form)))
    assert (source.name, source.classes, source.notes) == ("photos", ["0", "1", "2"], [])
    for part in ("train", "val", "test"):
        split, array = getattr(source, part), expected[f"x_{part}"]
        array = array[:, None] if axes is None else array.transpose(axes)
        assert split.images.dtype == torch.uint8
        assert np.array_equal(split.images.numpy(), array)
        assert split.labels.dtype == torch.int64
        assert split.labels.tolist() == expected[f"y_{part}"].tolist()
    assert source.channels == source.train.images.shape[1] == (3 if 3 in shape else 1)


def test_files_of_a_folder_are_mapped_and_never_written(tmp_path):
    root = write(tmp_path, held((1, 5, 4)), folder=True)
    path = root / "x_train.npy"
    before = path.read_bytes()
    source = arrays(str(root))
    if MAPS.exists():
        assert str(path) in MAPS.read_text()
    source.train.images += 1
    assert path.read_bytes() == before


def test_images_are_resized_only_when_that_is_asked_for(tmp_path):
    root = str(write(tmp_path, held()))
    assert arrays(root).train.images.shape == (9, 3, 5, 4)
    assert arrays(root, image_size=8).train.images.shape == (9, 3, 8, 8)
    assert arrays(root, image_size=[6, 7]).test.images.shape == (3, 3, 6, 7)


@pytest.mark.parametrize("kind", ["U4", "S4"])
def test_classes_may_be_named(tmp_path, kind):
    names = ["cat", "dog", "eel", "fox"]
    source = arrays(str(write(tmp_path, held(classes=np.array(names, kind)))))
    assert source.classes == names
    root = write(tmp_path, held(classes=np.array(names[:2], kind)))
    refusal(lambda: arrays(str(root)), root, "labels go up to 2, but 2 classes are named")


def test_a_lone_held_out_split_is_the_test_split(tmp_path):
    source = arrays(str(write(tmp_path, held(parts=("train", "val")))))
    assert (source.val, len(source.test)) == (None, 6)
    assert "the one held-out split is the test split" in source.notes[0]
    source = arrays(str(write(tmp_path, held(parts=("train",)))))
    assert (source.val, source.test) == (None, None)


def test_what_is_not_used_is_named(tmp_path):
    source = arrays(str(write(tmp_path, held(weights=np.ones(3), x_extra=np.ones(2)))))
    assert source.notes == ["arrays that are not used: weights, x_extra"]


def test_the_fingerprint_is_of_pixels_and_labels(tmp_path):
    def fingerprint(**change):
        return arrays(str(write(tmp_path, held() | change))).train.fingerprint()

    pixel, label = held()["x_train"], held()["y_train"]
    first = fingerprint()
    assert fingerprint(classes=np.array(["a", "b", "c"])) == first
    pixel[8, 4, 3, 2] ^= 1
    label[8] = 0
    assert len({first, fingerprint(x_train=pixel), fingerprint(y_train=label)}) == 3


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x_train": None, "y_train": None}, ["x_train and y_train or train_images and train_lab"]),
        ({"y_train": None}, ["has x_train and no y_train"]),
        ({"x_test": None}, ["has y_test and no x_test"]),
        ({"x_train": images(9, 5, 4, 3) / 255}, ["x_train", "is float64", "uint8"]),
        ({"x_val": images(6, 5, 4, 3).astype(np.int16)}, ["x_val", "is int16"]),
        ({"x_train": images(9, 3, 4, 3)}, ["x_train", "[9, 3, 4, 3] may be"]),
        ({"x_train": images(9, 5, 4, 2)}, ["x_train", "[9, 5, 4, 2], and should be"]),
        ({"x_train": images(9, 5)}, ["x_train", "[9, 5], and should be"]),
        ({"x_train": images(9, 2, 5, 4, 3)}, ["x_train", "[9, 2, 5, 4, 3], and should be"]),
        ({"x_train": images(9, 0, 4, 3)}, ["x_train is empty"]),
        ({"x_val": images(0, 5, 4, 3), "y_val": labels(0)}, ["x_val is empty"]),
        ({"y_train": labels(8)}, ["9 images in x_train, 8 in y_train"]),
        ({"y_train": labels(9) - 1}, ["y_train", "label -1"]),
        ({"y_train": labels(9) / 1.0}, ["y_train", "is float64", "whole numbers"]),
        ({"y_train": np.array(["a"] * 9)}, ["y_train", "<U1"]),
        ({"y_train": np.eye(9, 3, dtype=int)}, ["y_train", "[9, 3], and should be [N] or [N, 1]"]),
        ({"y_train": np.array(3)}, ["y_train", "[], and should be [N]"]),
        ({"x_test": images(3, 5, 5, 3)}, ["[3, 5, 4] in train and [3, 5, 5] in test"]),
        ({"x_test": images(3, 5, 4)}, ["[3, 5, 4] in train and [1, 5, 4] in test"]),
        ({"classes": np.arange(3)}, ["classes", "is int64 [3]", "strings"]),
        ({"classes": np.array([["a", "b", "c"]])}, ["classes", "[1, 3]"]),
        ({"classes": np.array([b"\xff"] * 3)}, ["classes"]),
        ({"classes": np.array(["a", "b", "a"])}, ["classes", "names a class twice"]),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, folder, change, words):
    given = {name: array for name, array in (held() | change).items() if array is not None}
    root = write(tmp_path, given, folder=folder)
    refusal(lambda: arrays(str(root)), root, *words)


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("name", ["x_train", "y_val", "classes"])
def test_objects_are_not_unpickled(tmp_path, folder, name):
    array = np.array([Runs(tmp_path / "made")], dtype=object)
    root = write(tmp_path, held() | {name: array}, folder=folder)
    refusal(lambda: arrays(str(root)), root, name)
    assert not (tmp_path / "made").exists()


def test_a_pickle_by_the_name_of_an_archive_or_array_is_not_read(tmp_path):
    content = pickle.dumps(Runs(tmp_path / "made"))
    path = tmp_path / "photos.npz"
    path.write_bytes(content)
    refusal(lambda: arrays(str(path)), path, "no .npz archive")
    root = write(tmp_path, held(), folder=True)
    (root / "y_test.npy").write_bytes(content)
    refusal(lambda: arrays(str(root)), root / "y_test.npy")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x_train.npy", content)
        archive.writestr("y_train", content)
    refusal(lambda: arrays(str(path)), path, "x_train: it is no array")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("keep", [0, 3, 200, 900, -200, -1])
def test_a_truncated_archive_is_refused(tmp_path, compressed, keep):
    path = write(tmp_path, held(), compressed=compressed)
    path.write_bytes(path.read_bytes()[:keep])
    refusal(lambda: arrays(str(path)), path)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_damaged_archive_is_refused(tmp_path, compressed):
    path = write(tmp_path, held(), compressed=compressed)
    content = bytearray(path.read_bytes())
    content[content.index(b"x_train") + 250] ^= 0xFF
    path.write_bytes(content)
    refusal(lambda: arrays(str(path)), path, "x_train")


@pytest.mark.parametrize("keep", [0, 5, 100, 130, -1])
@pytest.mark.parametrize("name", ["x_train", "y_train"])
def test_a_truncated_file_of_a_folder_is_refused(tmp_path, name, keep):
    root = write(tmp_path, held(), folder=True)
    path = root / f"{name}.npy"
    path.write_bytes(path.read_bytes()[:keep])
    refusal(lambda: arrays(str(root)), path)


def test_what_is_not_there_is_named(tmp_path):
    refusal(lambda: arrays(str(tmp_path / "no.npz")), "no.npz does not exist", ".npz archive",
            error=FileNotFoundError)  # fmt: skip
    refusal(lambda: arrays(str(tmp_path)), tmp_path, "holds no arrays", error=ValueError)


def test_the_example_gives_what_it_shows():
    result = doctest.testmod(sys.modules[arrays.__module__])
    assert result.attempted > 0
    assert result.failed == 0
