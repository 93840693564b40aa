"""CIFAR is read in every form, to the byte and in order; damaged copies are refused."""

import hashlib
import io
import json
import pickle
import shutil
import sys
import tarfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from distill.data.sources import cifar
from distill.data.sources.cifar import CIFAR10, CIFAR100, cifar10, cifar100, read_release
from tests.data.conftest import refusal
from tests.data.sources.pickle_cases import python2, running

TINY = {
    10: replace(CIFAR10, train=20, test=4),
    100: replace(CIFAR100, train=20, test=4),
}
NAMES = {
    "label": [f"kind {k}" for k in range(10)],
    "fine_label": [f"fine {k}" for k in range(100)],
    "coarse_label": [f"coarse {k}" for k in range(20)],
}
FORMS = ("python 2", "protocol 2", "protocol 4", "protocol 5", "binary", "python archive",
         "binary archive", "parquet")  # fmt: skip


def samples(count, seed):
    """Return random images and labels of each kind."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    return images, {name: rng.integers(0, len(of), count) for name, of in NAMES.items()}


TRAIN, TEST = samples(20, 1), samples(4, 2)


def files_of(release, form):
    """Yield each file of images with those that belong in it."""
    size = len(TRAIN[0]) // len(form.train)
    for place, name in enumerate(form.train):
        part = slice(place * size, (place + 1) * size)
        yield name, TRAIN[0][part], {k: v[part] for k, v in TRAIN[1].items()}
    yield form.test, *TEST


def names_of(release):
    return [one.name for one in release.labels.values()]


def write_python(root, release, dump=python2):
    """Write what torchvision unpacks."""
    folder = root / release.pickled.folder
    folder.mkdir(parents=True, exist_ok=True)
    for file, images, labels in files_of(release, release.pickled):
        held = {b"data": images.reshape(-1, 3072), b"filenames": [b"x.png"] * len(images)}
        held |= {f"{name}s".encode(): labels[name].tolist() for name in names_of(release)}
        (folder / file).write_bytes(dump(held))
    held = {f"{name}_names".encode(): [n.encode() for n in NAMES[name]]
            for name in names_of(release)}  # fmt: skip
    (folder / release.pickled.names).write_bytes(dump(held))
    return folder


def python3(protocol):
    """Return how Python 3 pickles the same again, its keys and names being texts."""

    def texts(value):
        if isinstance(value, dict):
            return {texts(key): texts(held) for key, held in value.items()}
        if isinstance(value, list):
            return [texts(one) for one in value]
        return value.decode() if isinstance(value, bytes) else value

    return lambda value: pickle.dumps(texts(value), protocol)


def write_binary(root, release):
    """Write what the archive for C unpacks to: coarse and fine label, then pixels."""
    folder = root / release.binary.folder
    folder.mkdir(parents=True)
    kinds = sorted(names_of(release))
    for file, images, labels in files_of(release, release.binary):
        rows = zip(images, *(labels[kind] for kind in kinds), strict=True)
        content = b"".join(bytes(map(int, numbers)) + image.tobytes() for image, *numbers in rows)
        (folder / file).write_bytes(content)
    for kind in kinds:
        text = "\n".join(NAMES[kind]) + "\n\n"
        (folder / release.binary.names.format(kind)).write_text(text)
    return folder


def write_archive(path, folder):
    """Pack a folder as it is published, and remove it."""
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, folder.name)
    shutil.rmtree(folder)
    return path


def write_parquet(root, release, picture="img", names=True, shards=2):
    """Write what the Hub has."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (root / "plain_text").mkdir(parents=True)
    features = {name: {"names": NAMES[name], "_type": "ClassLabel"} for name in names_of(release)}
    features[picture] = {"_type": "Image"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else {}
    for part, (images, labels) in (("train", TRAIN), ("test", TEST)):
        for shard in range(shards):
            rows = np.array_split(np.arange(len(images)), shards)[shard]
            cells = [{"bytes": png(images[row]), "path": None} for row in rows]
            columns = {picture: cells, **{n: labels[n][rows].tolist() for n in names_of(release)}}
            kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
            arrays = [pyarrow.array(columns[picture], kind),
                      *(pyarrow.array(columns[name]) for name in names_of(release))]  # fmt: skip
            table = pyarrow.table(arrays, names=list(columns)).replace_schema_metadata(metadata)
            path = root / "plain_text" / f"{part}-{shard:05}-of-{shards:05}.parquet"
            parquet.write_table(table, path)
    return root


def png(image):
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()


def write(root, release, form):
    """Write a release in one of the forms, and return the folder or file itself."""
    if form == "python 2":
        return write_python(root, release)
    if form.startswith("protocol"):
        return write_python(root, release, python3(int(form[-1])))
    if form == "binary":
        return write_binary(root, release)
    if form == "python archive":
        return write_archive(root / release.pickled.archive, write_python(root, release))
    if form == "binary archive":
        return write_archive(root / release.binary.archive, write_binary(root, release))
    return write_parquet(root, release)


def check(source, name):
    for split, (images, labels) in ((source.train, TRAIN), (source.test, TEST)):
        assert np.array_equal(split.images.numpy(), images)
        assert split.labels.tolist() == labels[name].tolist()
        assert split.index.tolist() == list(range(len(images)))
    assert source.classes == NAMES[name]
    assert (source.val, source.channels) == (None, 3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("release", "labels"), [(10, "fine"), (100, "fine"), (100, "coarse")])
def test_every_form_gives_the_images_in_their_order(tmp_path, form, release, labels):
    release = TINY[release]
    itself = write(tmp_path, release, form)
    for root in (tmp_path, itself):
        source = read_release(release, str(root), labels)
        check(source, release.labels[labels].name)
        assert source.name == release.name
        assert bool(source.notes) == (form[:6] in ("python", "protoc"))


def test_images_come_in_any_size(tmp_path):
    write_binary(tmp_path, TINY[10])
    source = read_release(TINY[10], str(tmp_path), "fine", [16, 48])
    assert source.train.images.shape == (20, 3, 16, 48)


def test_arrays_by_columns_and_arrays_of_labels_are_read_too(tmp_path):
    def dump(held):
        held = {k: np.array(v) if k == b"labels" else v for k, v in held.items()}
        held = {k: np.asfortranarray(v) if k == b"data" else v for k, v in held.items()}
        return python2(held)

    write_python(tmp_path, TINY[10], dump)
    check(read_release(TINY[10], str(tmp_path), "fine"), "label")


def test_an_archive_may_have_any_name_and_hold_other_files(tmp_path):
    folder = write_python(tmp_path, TINY[100])
    (folder / "file.txt~").write_text("left by an editor")
    write_archive(tmp_path / "downloaded.tgz", folder)
    check(read_release(TINY[100], str(tmp_path / "downloaded.tgz"), "fine"), "fine_label")


# What is published, and what is not


def test_published_files_are_known_by_their_checksums(tmp_path, monkeypatch):
    folder = write_python(tmp_path, TINY[10])
    sums = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    known = SimpleNamespace(
        train_list=[[name, sums[name]] for name in CIFAR10.pickled.train],
        test_list=[["test_batch", sums["test_batch"]]],
        meta={"filename": "batches.meta", "md5": sums["batches.meta"]},
    )
    monkeypatch.setattr(datasets, "CIFAR10", known)
    assert read_release(TINY[10], str(tmp_path), "fine").notes == []
    known.train_list[2][1] = "0" * 32
    (note,) = read_release(TINY[10], str(tmp_path), "fine").notes
    assert note == f"data_batch_3 in {folder} is not the published file: its MD5 differs"


def test_torchvision_still_knows_the_files_of_both():
    for release in (CIFAR10, CIFAR100):
        known = getattr(datasets, release.torchvision)
        assert known.base_folder == release.pickled.folder
        assert known.filename == release.pickled.archive
        assert [name for name, _ in known.train_list] == list(release.pickled.train)
        assert [name for name, _ in known.test_list] == [release.pickled.test]
        assert known.meta["filename"] == release.pickled.names


@pytest.mark.parametrize("write_form", [write_python, write_binary])
@pytest.mark.parametrize("release", [10, 100])
def test_each_missing_file_is_named(tmp_path, write_form, release):
    folder = write_form(tmp_path, TINY[release])
    form = TINY[release].pickled if write_form is write_python else TINY[release].binary
    for name in form.files(TINY[release].labels["fine"]):
        (folder / name).rename(tmp_path / "kept")
        refusal(lambda: read_release(TINY[release], str(tmp_path), "fine"), folder, f"lacks {name}",
                "partial copy", "data.download=true", error=FileNotFoundError)  # fmt: skip
        (tmp_path / "kept").rename(folder / name)


@pytest.mark.parametrize("keep", [0, 1, 100, 3073, -3073, -1])
@pytest.mark.parametrize("write_form", [write_python, write_binary])
@pytest.mark.parametrize("place", [2, -1])
def test_a_short_file_is_refused(tmp_path, write_form, place, keep):
    path = sorted(write_form(tmp_path, TINY[10]).iterdir())[place]
    path.write_bytes(path.read_bytes()[:keep])
    refusal(lambda: read_release(TINY[10], str(tmp_path), "fine"), path)


@pytest.mark.parametrize("form", ["python archive", "binary archive"])
@pytest.mark.parametrize("keep", [0, 10, 2000, -2000, -1])
def test_a_short_archive_is_refused(tmp_path, form, keep):
    path = write(tmp_path, TINY[10], form)
    path.write_bytes(path.read_bytes()[:keep])
    refusal(lambda: read_release(TINY[10], str(tmp_path), "fine"), path)


def test_a_damaged_archive_is_refused(tmp_path):
    path = write(tmp_path, TINY[10], "binary archive")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    refusal(lambda: read_release(TINY[10], str(tmp_path), "fine"), path)
    path.write_text("<html>404</html>")
    refusal(lambda: read_release(TINY[10], str(path), "fine"), path)


def test_other_counts_and_labels_are_refused(tmp_path):
    write_binary(tmp_path, TINY[10])
    refusal(lambda: read_release(CIFAR10, str(tmp_path), "fine"), "data_batch_1.bin",
            "4 images and 4 labels where 10,000 belong")  # fmt: skip
    path = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    path.write_bytes(b"\x0a" + path.read_bytes()[1:])
    refusal(lambda: read_release(TINY[10], str(tmp_path), "fine"), path, "label 10", "10 classes")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({b"data": None}, "has no data"),
        ({b"labels": None}, "has no labels"),
        ({b"labels": [0, 1, 2]}, "4 images and 3 labels where 4 belong"),
        ({b"labels": [0, 1, 2, -1]}, "label -1"),
        ({b"labels": [0, 1, 2, b"3"]}, "no list of whole numbers"),
        ({b"labels": b"0123"}, "no list of whole numbers"),
        ({b"labels": np.array([2.5] * 4)}, "does not hold whole numbers"),
        ({b"data": np.zeros((4, 3071), np.uint8)}, "uint8 [4, 3071], not uint8 [N, 3072]"),
        ({b"data": np.zeros((4, 3072), np.int16)}, "int16 [4, 3072], not uint8"),
        ({b"data": np.zeros((3, 3072), np.uint8)}, "3 images and 4 labels where 4 belong"),
        ({b"data": [0] * 3072}, "its images are int64"),
        ({b"data": np.array(3, np.uint8)}, "its images are uint8 []"),
    ],
)
def test_a_pickle_of_something_else_is_refused(tmp_path, change, word):
    path = write_python(tmp_path, TINY[10]) / "data_batch_2"
    held = {b"data": np.zeros((4, 3072), np.uint8), b"labels": [0, 1, 2, 3]} | change
    path.write_bytes(python2({key: value for key, value in held.items() if value is not None}))
    refusal(lambda: read_release(TINY[10], str(tmp_path), "fine"), path, word)
    for content in (python2([1]), python2({3: 4})):
        path.write_bytes(content)
        refusal(lambda: read_release(TINY[10], str(tmp_path), "fine"), path)


@pytest.mark.parametrize("file", ["data_batch_2", "test_batch", "batches.meta"])
@pytest.mark.parametrize("way", ["reduce2", "reduce4", "in a list", "instance", "import"])
def test_a_pickle_that_would_run_code_is_refused_in_one_line(tmp_path, file, way):
    path = write_python(tmp_path, TINY[10]) / file
    path.write_bytes(running(tmp_path / "made")[way])
    words = (path, "it would run", "nothing of it was run")
    refusal(lambda: read_release(TINY[10], str(tmp_path), "fine"), *words)
    assert not (tmp_path / "made").exists()


def test_class_names_are_those_of_the_release(tmp_path):
    path = write_binary(tmp_path, TINY[10]) / "batches.meta.txt"
    for text in ("", "a\nb\n", "a\n" * 10):
        path.write_text(text)
        refusal(lambda: read_release(TINY[10], str(tmp_path), "fine"), path, "where 10 belong")
    path.write_bytes(b"\xff\n" * 10)
    refusal(lambda: read_release(TINY[10], str(tmp_path), "fine"), path)
    refusal(lambda: cifar100(str(tmp_path), labels="both"), "data.labels must be fine or coarse")


def test_a_file_that_would_fill_the_memory_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "LARGEST", 13_000)
    path = write_python(tmp_path, TINY[100]) / "train"
    refusal(lambda: read_release(TINY[100], str(tmp_path), "fine"), path, "no file of a release")
    write_archive(tmp_path / "x.tgz", path.parent)
    refusal(lambda: read_release(TINY[100], str(tmp_path / "x.tgz"), "fine"), "train is no", "kB",
            "x.tgz: cifar")  # fmt: skip


# Parquet


def test_a_column_may_be_called_image_and_classes_without_names_are_numbers(tmp_path):
    write_parquet(tmp_path, TINY[10], picture="image", names=False, shards=1)
    source = read_release(TINY[10], str(tmp_path), "fine")
    assert np.array_equal(source.train.images.numpy(), TRAIN[0])
    assert source.classes == [str(k) for k in range(10)]


def test_of_several_releases_parquet_files_the_own_are_read(tmp_path):
    for release in TINY.values():
        write_parquet(tmp_path / release.torchvision.lower(), release)
    for number, name in ((10, "label"), (100, "fine_label")):
        check(read_release(TINY[number], str(tmp_path), "fine"), name)


def test_wrong_parquet_files_are_refused(tmp_path):
    def read(release=10):
        return read_release(TINY[release], str(tmp_path), "fine")

    folder = write_parquet(tmp_path, TINY[10]) / "plain_text"
    refusal(lambda: read(100), folder, "no column img or image, or fine_label: img, label")
    first, second = sorted(folder.glob("train-*.parquet"))
    content = first.read_bytes()
    first.write_bytes(content[:-100])
    refusal(read, first)
    first.write_bytes(content.replace(b"IHDR", b"IHDX", 1))
    refusal(read, first, "row 0")
    first.write_bytes(content)
    second.unlink()
    refusal(read, "10 images and 10 labels where 20 belong", tmp_path)
    for path in folder.glob("test-*"):
        path.unlink()
    refusal(read, tmp_path, "lacks test-*.parquet", error=FileNotFoundError)


def test_pictures_of_another_size_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "TEST", (TEST[0][:, :, :, :31], TEST[1]))
    write_parquet(tmp_path, TINY[10])
    refusal(lambda: read_release(TINY[10], str(tmp_path), "fine"), "row 0", "of 32 × 31")


def test_without_pyarrow_the_extra_that_brings_it_is_named(tmp_path, monkeypatch):
    write_parquet(tmp_path, TINY[10])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refusal(lambda: read_release(TINY[10], str(tmp_path), "fine"), "train-00000-of-00002.parquet",
            "pip install 'distill-kd[data]'")  # fmt: skip


# Where there is nothing


class Downloader:
    """Torchvision's class as far as it is used, which finds its files nowhere but here."""

    train_list, test_list, meta = (), (), {"filename": "batches.meta", "md5": ""}

    def __init__(self):
        self.calls = []

    def __call__(self, root, download=False):
        self.calls.append((root, download))
        write_python(root, TINY[10])


@pytest.fixture
def downloader(monkeypatch):
    monkeypatch.setattr(datasets, "CIFAR10", Downloader())
    return datasets.CIFAR10


def test_nothing_is_fetched_unless_that_is_asked_for(tmp_path, downloader):
    root = tmp_path / "new"
    refusal(lambda: read_release(TINY[10], str(root), "fine"), root, "does not exist",
            "cifar-10-batches-py, cifar-10-batches-bin, cifar-10-python.tar.gz",
            "data.download=true fetches it", error=FileNotFoundError)  # fmt: skip
    refusal(lambda: cifar10(str(tmp_path)), tmp_path, "holds none of", error=FileNotFoundError)
    assert downloader.calls == []
    check(read_release(TINY[10], str(root), "fine", download=True), "label")
    check(read_release(TINY[10], str(root), "fine", download=True), "label")
    assert downloader.calls == [(root, True)]


@pytest.mark.parametrize("damage", ["file", "archive", "binary", "pickle"])
def test_a_copy_that_cannot_be_read_is_fetched_anew_only_when_that_is_asked_for(
    tmp_path, downloader, damage
):
    if damage == "archive":  # as an interrupted download leaves it
        path = write(tmp_path, TINY[10], "python archive")
        path.write_bytes(path.read_bytes()[:-2000])
    elif damage == "binary":
        (write_binary(tmp_path, TINY[10]) / "test_batch.bin").write_bytes(b"")
    elif damage == "file":
        (write_python(tmp_path, TINY[10]) / "test_batch").unlink()
    else:
        path = write_python(tmp_path, TINY[10]) / "test_batch"
        path.write_bytes(running(tmp_path / "made")["reduce2"])
    refusal(lambda: read_release(TINY[10], str(tmp_path), "fine"))
    assert downloader.calls == []
    check(read_release(TINY[10], str(tmp_path), "fine", download=True), "label")
    assert downloader.calls == [(tmp_path, True)]
    assert not (tmp_path / "made").exists()


def test_a_copy_of_other_bytes_is_never_written_over(tmp_path, downloader):
    write_python(tmp_path, TINY[10], python3(4))
    assert read_release(TINY[10], str(tmp_path), "fine", download=True).notes
    assert downloader.calls == []


def test_what_cannot_be_fetched_is_one_line(tmp_path, monkeypatch):
    def fails(root, download):
        raise RuntimeError("File not found or corrupted.\nTry again.")

    monkeypatch.setattr(datasets, "CIFAR10", fails)
    refusal(lambda: read_release(TINY[10], str(tmp_path), "fine", download=True),
            "CIFAR-10 cannot be fetched into", "File not found or corrupted.")  # fmt: skip
    (tmp_path / "file").write_text("x")
    refusal(lambda: read_release(TINY[10], str(tmp_path / "file" / "in"), "fine", download=True),
            "CIFAR-10 cannot be fetched into")  # fmt: skip


# Whole ones


def test_whole_releases_are_read_by_the_functions_that_people_name(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    rows = np.zeros((10_000, 3073), np.uint8)
    rows[:, 0] = np.arange(10_000) % 10
    for name in ("test_batch", *cifar.BATCHES):
        (folder / f"{name}.bin").write_bytes(rows.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(NAMES["label"]))
    source = cifar10(str(tmp_path))
    assert source.train.images.shape == (50_000, 3, 32, 32)
    assert source.test.images.shape == (10_000, 3, 32, 32)
    assert source.train.labels.bincount().tolist() == [5_000] * 10
    shutil.rmtree(folder)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, count in (("train", 50_000), ("test", 10_000)):
        fine = [k % 100 for k in range(count)]
        held = {"data": np.zeros((count, 3072), np.uint8), "fine_labels": fine}
        (folder / name).write_bytes(pickle.dumps(held, 4))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": NAMES["fine_label"]}, 4))
    source = cifar100(str(tmp_path))
    assert (len(source.train), len(source.test), source.classes[99]) == (50_000, 10_000, "fine 99")
    assert source.test.labels.bincount().tolist() == [100] * 100
