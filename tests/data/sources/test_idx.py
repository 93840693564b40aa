"""The idx format is read to the byte, and what is damaged or inconsistent is refused."""

import gzip
import struct

import numpy as np
import pytest

from distill.data.sources.idx import idx
from tests.data.conftest import refusal


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
