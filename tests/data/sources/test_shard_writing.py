"""Shards of an image folder: what is written, again, in several processes, and who can read it."""

import os
import subprocess
import sys
import tarfile

import pytest
from timm.data import create_dataset

from distill.data.sources import folder, shard_writing, shards
from distill.data.sources.shard_writing import write_shards
from tests.conftest import ROOT
from tests.data.conftest import colour, colours, refusal, write_folder, write_image


@pytest.fixture
def photos(tmp_path):
    return write_folder(tmp_path / "photos", count=5)


def written(photos, out, **options):
    lines = list(write_shards(photos, out, **{"workers": 1, **options}))
    return lines, {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}


def test_shards_hold_what_the_folder_holds(photos, tmp_path):
    lines, files = written(photos, tmp_path / "out", count=4)
    assert list(files) == [f"{part}-{k:04}.tar" for part in ("test", "train", "val")
                           for k in range(3)]  # fmt: skip
    assert "train: 10 images in 3 shards" in lines
    there, here = folder(str(photos)), shards(str(tmp_path / "out"), verify="new")
    assert here.classes == there.classes == ["cat", "dog"]
    for part in ("train", "val", "test"):
        a, b = getattr(there, part), getattr(here, part)
        assert sorted(zip(a.contents().tolist(), a.labels.tolist(), strict=True)) == sorted(
            zip(b.contents().tolist(), b.labels.tolist(), strict=True)
        )
    assert colours(here.val) == colours(there.val)
    assert here.train.contents().tolist() != there.train.contents().tolist()  # in another order


def test_the_bytes_are_the_same_in_any_number_of_processes(photos, tmp_path):
    _, first = written(photos, tmp_path / "first", count=3)
    _, second = written(photos, tmp_path / "second", count=3, workers=2)
    _, third = written(photos, tmp_path / "third", count=3, seed=1)
    assert first == second
    assert first.keys() == third.keys()
    assert first["train-0000.tar"] != third["train-0000.tar"]
    assert first["val-0000.tar"] == third["val-0000.tar"]


def test_what_was_interrupted_goes_on(photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    _, whole = written(photos, tmp_path / "whole", count=3)
    original = shard_writing.written

    def only_some(target, planned, workers):
        yield from original(target, planned[:2], workers)
        (target / f".{planned[2].name}.99.part").write_bytes(b"half")

    monkeypatch.setattr(shard_writing, "written", only_some)
    written(photos, out, count=3)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    monkeypatch.setattr(shard_writing, "written", original)
    lines, files = written(photos, out, count=3)
    assert "2 shards are there already" in lines
    assert files == whole
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert not list(out.glob("*.part"))


@pytest.mark.parametrize("size", [20_480, 40_000])
def test_no_shard_is_larger_than_asked(photos, tmp_path, size):
    _, files = written(photos, tmp_path / "out", size=size)
    assert max(map(len, files.values())) <= size
    _, each = written(photos, tmp_path / "each", size=1)
    assert len(each) == 30  # an image that is larger has a shard of its own


def test_what_is_refused(photos, tmp_path):
    out = tmp_path / "out"
    written(photos, out, count=4)
    refusal(lambda: written(photos, out, count=5), out, "other options")
    write_image(photos / "train" / "cat" / "more.png", (1, 2, 3))
    refusal(lambda: written(photos, out, count=4), out, "another folder")
    refusal(lambda: written(photos, photos / "out"), "lies in")
    refusal(lambda: written(tmp_path / "nowhere", out), "nowhere")
    other = tmp_path / "other"
    other.mkdir()
    (other / "x.tar").touch()
    refusal(lambda: written(photos, other), other, "tars already")


def test_shards_of_files_that_have_changed_since_are_not_taken_for_theirs(photos, tmp_path):
    out = tmp_path / "out"
    _, before = written(photos, out, count=4)
    image = photos / "train" / "cat" / "0.png"
    about, content = image.stat(), image.read_bytes()
    image.write_bytes(content[:-1] + b"\0")  # as long as it was
    os.utime(image, ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    refusal(lambda: written(photos, out, count=4), out, "have changed since")
    _, after = written(photos, tmp_path / "again", count=4)
    assert after != before


@pytest.mark.parametrize(
    ("emptied", "said"), [("train/cat", "train/cat has no images"), ("val", "val has no images")]
)
def test_a_class_or_a_split_without_images_is_refused(photos, tmp_path, emptied, said):
    for image in (photos / emptied).rglob("*.png"):
        image.unlink()
    refusal(lambda: written(photos, tmp_path / "out"), said)
    assert not (tmp_path / "out").exists()


def test_a_held_out_class_that_train_lacks_is_refused(photos, tmp_path):
    write_image(photos / "val" / "eel" / "0.png", (1, 2, 3))
    refusal(lambda: written(photos, tmp_path / "out"), "eel")


def test_empty_files_are_named(photos, tmp_path):
    assert not any("files are empty" in line for line in written(photos, tmp_path / "whole")[0])
    (photos / "train" / "cat" / "0.png").write_bytes(b"")
    (photos / "train" / "dog" / "0.png").write_bytes(b"")
    lines, _ = written(photos, tmp_path / "out")
    (line,) = [line for line in lines if "files are empty" in line]
    assert line.startswith("2 files are empty and packed so (train/cat/0.png, train/dog/0.png)")


def test_a_size_of_no_bytes_is_refused(photos, tmp_path):
    refusal(lambda: written(photos, tmp_path / "out", size=0), "more than 0 bytes")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "said"),
    [("1.2.3MB", "1.2.3MB is no size"), ("0", "more than 0 bytes"), ("few", "few")],
)
def test_the_command_names_a_size_that_is_none(photos, tmp_path, size, said):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "shards", photos, tmp_path / "out", "--size", size],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
    assert "given_bytes" not in done.stderr


def test_class_folders_alone_are_train(tmp_path):
    root = write_folder(tmp_path / "photos", splits=("",))
    lines, files = written(root, tmp_path / "out")
    assert list(files) == ["train-0000.tar"]
    assert any("folders are classes" in line for line in lines)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset's files
def test_timm_and_tarfile_read_them_and_so_does_the_command_write_them(photos, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "shards", photos, out, "--count", "4"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1].startswith("9 shards")
    with tarfile.open(out / "train-0000.tar") as tar:
        assert tar.getnames()[:3] == ["00000000.cls", "00000000.png", "00000001.cls"]
        assert {(m.mtime, m.uid, m.uname) for m in tar.getmembers()} == {(0, 0, "")}
    options = {"root": str(out), "split": "val-{0000..0002}.tar", "batch_size": 1}
    theirs = [(colour(image), label) for image, label in create_dataset("wds/x", **options)]
    ours = shards(str(out)).val
    assert theirs == list(zip(colours(ours), ours.labels.tolist(), strict=True))
    wrong = subprocess.run(
        [sys.executable, ROOT / "scripts" / "shards", tmp_path / "nowhere", out],
        capture_output=True, text=True,
    )  # fmt: skip
    assert wrong.returncode == 2
    assert len(wrong.stderr.splitlines()) == 1
