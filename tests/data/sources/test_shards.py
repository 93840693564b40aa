"""Shards: what is read of them, here and elsewhere, what is refused, and runs on them."""

import io
import json
import os
import pickle
import tarfile
import threading
import time
from functools import partial

import aiohttp
import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.http import HTTPFileSystem
from PIL import Image

from distill.data import DataModule
from distill.data.loading import KeyedSplit
from distill.data.sources import folder, shard_files, shard_index, shard_remote, shards
from distill.data.sources.errors import SampleBroken, ShardLost
from distill.data.sources.judged import Judged, opened
from distill.data.sources.shard_classes import places
from distill.data.sources.shard_files import Shard, ShardFiles, expanded, part_of, shards_at
from distill.data.sources.shard_index import KeptIndex, Reading, indexed, progress, read_index
from distill.data.sources.unlabeled import UNKNOWN
from distill.data.views.views import CLEAN
from tests.data.conftest import colour, colours, refusal, write_folder
from tests.data.sources.shard_cases import (
    Unreliable,
    lose,
    picture,
    samples,
    served,
    write_shard,
    write_shards,
)


@pytest.fixture
def root(tmp_path):
    return write_shards(tmp_path / "shards")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Wait a hundredth of the time between retries."""
    monkeypatch.setattr(shard_remote, "PAUSE", 0.001)


def plain(path):
    """Every image of a tar by `tarfile` alone: name, offset, bytes."""
    with tarfile.open(path) as tar:
        return [(m.name, m.offset_data, tar.extractfile(m).read())
                for m in tar.getmembers() if m.name.endswith(".png")]  # fmt: skip


def modular(source, **options):
    return DataModule(source, **{"batch_size": 6, "image_size": 8, **options})


def drawn(data, epoch=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


# Where shards lie


def test_ranges_mean_every_address_in_them():
    assert expanded("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expanded("{a,b}-{0..1}.tar") == ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar"]
    assert expanded("{9..11}") == ["9", "10", "11"]
    assert expanded("plain.tar") == ["plain.tar"]
    assert expanded("one{x}.tar") == ["one{x}.tar"]
    refusal(lambda: expanded("a-{3..1}.tar"), "{3..1}")


@pytest.mark.parametrize(
    ("address", "folder", "part"),
    [
        ("/d/train-0000.tar", "/d", "train"), ("/d/imagenet1k-validation-00.tar", "/d", "val"),
        ("/d/val/0000.tar", "/d", "val"), ("/d/0000.tar", "/d", None),
        ("/test/0000.tar", "/test", None), ("http://h/test/0000.tar", "", "test"),
        ("s3://b/x/training.0.tar", "", "train"),
    ],
)  # fmt: skip
def test_a_shards_split_is_in_its_name_or_its_folders(address, folder, part):
    assert part_of(address, folder) == part


def test_names_are_the_same_wherever_shards_lie(root, tmp_path):
    here = [shard.name for shard in shards_at(str(root))[0]]
    assert here == [shard.name for shard in shards_at(f"file://{root}")[0]]
    assert here == ["test-0000.tar", "train-0000.tar", "train-0001.tar", "train-0002.tar",
                    "val-0000.tar"]  # fmt: skip
    found, missing = shards_at([f"{root}/train-{{0000..0003}}.tar", f"{root}/val-*.tar"])
    assert [shard.name for shard in found] == [*here[1:4], here[4]]
    assert missing == [f"{root}/train-0003.tar"]


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda root: root / "nowhere", ("nowhere", "does not exist")),
        (lambda root: write_folder(root.parent / "photos"), ("data=folder", "scripts/shards")),
        (lambda root: f"{root}/train-0000.tar.gz", ("compressed", "unpack")),
        (lambda root: (root / "x.tgz").touch() or root, ("x.tgz", "unpack")),
        (lambda root: [f"{root}/train-0000.tar"] * 2, ("twice", "train-0000.tar")),
        (lambda root: f"{root}/train-{{0000..0007}}.tar", ("5 shards are missing", "skip")),
        (lambda root: f"{root}/val-0000.tar", ("no shard of train",)),
        (lambda root: write_shard(root / "val-train.tar", ()).parent, ("train or val",)),
        (lambda root: write_shard(root / "more.tar", samples()).parent, ("more.tar", "train")),
        (lambda root: "nope://x/train-0.tar", ("nope",)),
        (lambda root: [], ("empty",)),
    ],
)
def test_what_is_no_place_of_shards_is_refused(root, prepare, words):
    place = prepare(root)
    refusal(lambda: shards([*map(str, place)] if isinstance(place, list) else str(place)), *words)


# What a shard holds


def test_the_index_is_what_tarfile_reads(root):
    path = root / "train-0001.tar"
    index, expected = read_index(path, Reading()), plain(path)
    content = path.read_bytes()
    assert len(index) == 12
    assert list(index.names) == [name for name, _, _ in expected]
    for start, size, (_, offset, image) in zip(index.starts, index.sizes, expected, strict=True):
        assert (start, content[start : start + size]) == (offset, image)
    assert index.labels.tolist() == [k % 3 for k in range(12, 24)]
    assert (len(index.faults), len(index.digests), index.starts.dtype) == (0, 0, np.int64)


def test_other_tars_long_names_and_folders(tmp_path):
    long = "a/" + "b" * 120 + "/" + "c" * 130
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{form}.tar"
        with tarfile.open(path, "w", format=form) as tar:
            for name, content in (("./x/._1.png", b"litter"), (f"./{long}.cls", b" 2\n"),
                                  ("./grüße.JSON", b'{"label": 1}'), ("./grüße.PNG", b"image"),
                                  ("README", b"text"), (f"{long}.png", b"pixels"),
                                  (f"{long}.seg.png", b"mask")):  # fmt: skip
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        index = read_index(path, Reading())
        assert list(index.names) == [f"{long}.png", "./grüße.PNG"]
        assert index.labels.tolist() == [2, 1]
        assert not len(index.faults)


LABELLED = {
    "numbers": ([("a.cls", "1"), ("a.json", '{"label": 2}')], None, 1),
    "a key": ([("a.cls", "1"), ("a.json", '{"label": 2, "kind": 0}')], "kind", 0),
    "usual keys": ([("a.json", '{"cls": 2}')], None, 2),
    "text": ([("a.cls.txt", "eel\n")], None, "eel"),
    "a name": ([("a.cls", "eel")], None, "eel"),
    "text of a number": ([("a.json", '{"label": "2"}')], None, 2),
}  # fmt: skip


@pytest.mark.parametrize("case", LABELLED)
def test_labels_are_numbers_or_names(tmp_path, case):
    files, key, label = LABELLED[case]
    path = write_shard(tmp_path / "x.tar", [*files, ("a.png", picture(0, 0))])
    index = read_index(path, Reading(key))
    assert not len(index.faults)
    if isinstance(label, str):
        assert (list(index.classes), index.labels.tolist()) == ([label], [0])
    else:
        assert (len(index.classes), index.labels.tolist()) == (0, [label])


IMAGE = ("a.png", picture(0, 0))
FAULTS = {
    "no label": ([IMAGE], ("a.png", "no label")),
    "no image": ([("a.cls", "0")], ("a", "no image")),
    "a file twice": ([("a.cls", "0"), IMAGE, IMAGE], ("a.png", "twice")),
    "two images": ([("a.cls", "0"), IMAGE, ("a.jpg", b"")], ("a.png", "a.jpg")),
    "no number": ([("a.cls", ""), IMAGE], ("a.cls", "no label")),
    "no JSON": ([("a.json", "{"), IMAGE], ("a.json",)),
    "another key": ([("a.json", '{"target": 1}'), IMAGE], ("data.label_key", "target")),
    "true": ([("a.json", '{"label": true}'), IMAGE], ("a.json", "number or a name")),
    "dots in names": ([("v1.2.cls", "0"), ("v1.2.png", IMAGE[1])], ("v1.2.png", "first dot")),
    "other files": ([("x.bin", b"")], ("x.bin", "no sample")),
    "both": ([("a.cls", "0"), IMAGE, ("b.cls", "eel"), ("b.png", IMAGE[1])],
             ("numbers and names",)),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_what_is_no_sample_is_named_with_its_shard(tmp_path, case):
    files, words = FAULTS[case]
    write_shard(tmp_path / "train-0.tar", files)
    refusal(lambda: shards(str(tmp_path)), "train-0.tar", *words, "data.broken=skip")


def damaged(content, how):
    if how == "within":
        return content[: len(content) // 2 - 300]
    end = len(content.rstrip(b"\0"))
    whole = -(-end // 512) * 512
    return content[:whole] if how == "without end" else content[:whole] + b"x" * 512


@pytest.mark.parametrize("how", ["within", "without end", "after"])
def test_a_tar_that_is_not_whole_is_refused_or_read_as_far_as_it_goes(root, how):
    path = root / "train-0001.tar"
    path.write_bytes(damaged(path.read_bytes(), how))
    refusal(lambda: shards(str(root)), "train-0001.tar", "no whole tar")
    source = shards(str(root), broken="skip")
    assert 24 < len(source.train) <= 36
    assert (len(source.train) == 36) == (how != "within")
    assert any("1 fault in shards, left out" in note for note in source.notes) or how == "within"
    assert all(colour(source.train.load(i)) for i in range(len(source.train)))


def test_skipped_samples_are_counted_and_the_others_read(tmp_path):
    files = [*samples(0, 6), ("x.cls", "0"), ("y.png", picture(1, 1))]
    write_shard(tmp_path / "train-0.tar", files)
    source = shards(str(tmp_path), broken="skip")
    assert len(source.train) == 6
    assert any("2 faults in shards, left out" in note for note in source.notes)
    write_shard(tmp_path / "train-0.tar", [("x.cls", "0")])
    refusal(lambda: shards(str(tmp_path), broken="skip"), "no image")


# Classes


def test_classes_are_named_beside_the_shards_or_by_the_samples(root):
    assert shards(str(root)).classes == ["0", "1", "2"]
    assert shards(str(root), classes=["a", "b", "c", "d"]).classes == ["a", "b", "c", "d"]
    refusal(lambda: shards(str(root), classes=["a", "b"]), "labels go up to 2")
    (root / "_info.json").write_text(json.dumps({"splits": {}, "classes": ["x", "y", "z"]}))
    assert shards(str(root)).classes == ["x", "y", "z"]
    features = {"features": {"image": {}, "label": {"names": ["k", "l", "m"]}}}
    (root / "_info.json").unlink()
    (root / "dataset_info.json").write_text(json.dumps(features))
    assert shards(str(root)).classes == ["k", "l", "m"]
    (root / "classes.txt").write_text("cat\ndog\neel\n")
    source = shards(f"{root}/train-{{0000..0002}}.tar")
    assert source.classes == ["cat", "dog", "eel"]
    assert any("classes.txt" in note for note in source.notes)
    (root / "classes.txt").write_text("cat\ncat\neel\n")
    refusal(lambda: shards(str(root)), "classes.txt", "twice")


def test_names_of_samples_are_numbered_over_all_shards(tmp_path):
    for number, names in enumerate(("eel dog", "cat eel")):
        files = [(f"{k}{name[0]}.{ending}", content) for k, name in enumerate(names.split())
                 for ending, content in (("cls", name), ("png", picture(k, k)))]  # fmt: skip
        write_shard(tmp_path / f"train-{number}.tar", files)
    source = shards(str(tmp_path))
    assert source.classes == ["cat", "dog", "eel"]
    assert source.train.labels.tolist() == [2, 1, 0, 2]
    refusal(lambda: shards(str(tmp_path), classes=["dog", "eel"]), "cat", "train-1.tar")
    write_shard(tmp_path / "val-0.tar", [("a.cls", "owl"), ("a.png", picture(0, 0))])
    refusal(lambda: shards(str(tmp_path)), "val-0.tar", "owl", "train")
    write_shard(tmp_path / "val-0.tar", samples())
    refusal(lambda: shards(str(tmp_path)), "names", "numbers")


# The split


def test_samples_are_reached_by_their_index(root):
    source = shards(str(root))
    assert [len(split) for split in (source.train, source.val, source.test)] == [36, 12, 12]
    expected = [[200 * (k % 3 == c) + (k % 50 if c == 0 else 0) for c in range(3)]
                for k in range(36)]  # fmt: skip
    assert colours(source.train) == expected
    assert source.train.load.name(13) == "train-0001.tar/s0013.png"
    again = pickle.loads(pickle.dumps(source.train.load))
    assert colour(again(35)) == expected[35]


def test_the_fingerprint_is_of_what_is_shown_and_not_of_where_or_when(root, tmp_path):
    first = shards(str(root)).train.fingerprint()
    (root / "train-0000.tar").touch()
    assert shards(str(root)).train.fingerprint() == first
    elsewhere = write_shards(tmp_path / "elsewhere")
    assert shards(str(elsewhere)).train.fingerprint() == first
    files = dict(samples(0, 12))
    files["s0003.png"] = picture(0, 4)  # as many bytes as before
    assert len(files["s0003.png"]) == len(picture(0, 3))
    write_shard(elsewhere / "train-0000.tar", files.items())
    assert shards(str(elsewhere)).train.fingerprint() != first


def test_verified_images_are_known_by_their_bytes(root, tmp_path):
    assert any("data.verify" in note for note in shards(str(root)).notes)
    source = shards(str(root), verify="new")
    assert not any("data.verify" in note for note in source.notes)
    assert source.train.contents()[:12].tolist() == source.val.contents().tolist()
    notes = modular(source).notes
    assert any("12 images of train are held out" in note for note in notes)
    files = dict(samples(0, 12))
    files["s0003.png"] = files["s0003.png"][:50]
    write_shard(root / "train-0000.tar", files.items())
    refusal(lambda: shards(str(root), verify="new"), "train-0000.tar", "s0003.png", "broken image")
    source = shards(str(root))
    refusal(lambda: source.train.load(3), "broken image train-0000.tar/s0003.png")


def test_the_same_pictures_as_a_folder_and_as_shards_give_the_same_clean_views(tmp_path):
    photos = write_folder(tmp_path / "photos", classes=("cat", "dog", "eel"))
    for split in ("train", "val", "test"):
        files = [
            file
            for label, name in enumerate(("cat", "dog", "eel"))
            for path in sorted((photos / split / name).iterdir())
            for file in ((f"{name}{path.stem}.cls", str(label)),
                         (f"{name}{path.stem}.png", path.read_bytes()))
        ]  # fmt: skip
        write_shard(tmp_path / "shards" / split / "0.tar", files)
    (tmp_path / "shards" / "classes.txt").write_text("cat\ndog\neel\n")
    sources = folder(str(photos)), shards(str(tmp_path / "shards"), verify="new")
    there, here = (modular(source, batch_size=2) for source in sources)
    for a, b in zip(there.val_dataloader(), here.val_dataloader(), strict=True):
        assert torch.equal(a.view, b.view)
        assert torch.equal(a.target, b.target)
    rows = torch.arange(9)
    assert torch.equal(there.training_views(CLEAN, rows), here.training_views(CLEAN, rows))
    assert torch.equal(there.training_views(3, rows), here.training_views(3, rows))
    assert there.pictures == here.pictures


# What is kept


def counted(monkeypatch):
    """Count the shards that are read from now on, in this process."""
    read, original = [], shard_index.read_index
    monkeypatch.setattr(shard_index, "cores", lambda: 1)
    monkeypatch.setattr(
        shard_index, "read_index", lambda *given: read.append(given[0].name) or original(*given)
    )
    return read


def test_an_index_that_was_changed_anywhere_ends_no_run(root, tmp_path):
    cache = tmp_path / "cache"
    first = shards(str(root), cache=str(cache)).train.fingerprint()
    path = min((cache / "shards").glob("*.npz"))
    whole, draw = path.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[draw.integers(len(damaged))] ^= 1 << draw.integers(8)
        path.write_bytes(damaged[: draw.integers(len(damaged)) if draw.random() < 0.3 else None])
        shards(str(root), cache=str(cache))
    path.write_bytes(whole)
    assert shards(str(root), cache=str(cache)).train.fingerprint() == first


def test_a_shard_is_read_once_and_again_when_it_has_changed(root, tmp_path, monkeypatch):
    read, cache = counted(monkeypatch), str(tmp_path / "cache")
    first = shards(str(root), cache=cache)
    assert len(read) == 5
    again = shards(str(root), cache=cache)
    assert len(read) == 5
    assert again.train.fingerprint() == first.train.fingerprint()
    assert list(again.train.names) == list(first.train.names)
    write_shard(root / "train-0001.tar", samples(50, 4))
    assert len(shards(str(root), cache=cache).train) == 28
    assert read[5:] == ["train-0001.tar"]
    os.utime(root / "val-0000.tar", (1, 1))
    shards(str(root), cache=cache)
    assert read[6:] == ["val-0000.tar"]
    shards(str(root), cache=cache, verify="new")
    assert len(read) == 12
    shards(str(root), cache=cache)
    shards(str(root), cache=cache, verify="new")
    assert len(read) == 12


def test_damaged_indices_are_made_anew(root, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = shards(str(root), cache=str(cache)).train
    kept = sorted((cache / "shards").glob("*.npz"))
    kept[0].write_bytes(b"nothing")
    kept[1].write_bytes(kept[1].read_bytes()[:-200])
    np.savez(kept[2], form=np.array("1"))
    read = counted(monkeypatch)
    assert shards(str(root), cache=str(cache)).train.fingerprint() == first.fingerprint()
    assert len(read) == 3
    assert not list((cache / "shards").glob("*.part"))


def test_an_index_is_built_in_several_processes(root, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_index, "cores", lambda: 2)
    together = shards(str(root), cache=str(tmp_path / "cache")).train
    monkeypatch.setattr(shard_index, "cores", lambda: 1)
    assert shards(str(root)).train.fingerprint() == together.fingerprint()


@pytest.mark.parametrize("processes", [1, 2])
def test_how_far_reading_has_come_is_said(root, monkeypatch, caplog, processes):
    original = shard_index.read_index
    monkeypatch.setattr(shard_index, "EVERY", 0.04)
    monkeypatch.setattr(shard_index, "cores", lambda: processes)
    monkeypatch.setattr(
        shard_index, "read_index", lambda *given: time.sleep(0.08) or original(*given)
    )
    caplog.set_level("INFO")
    shards(str(root))
    said = [line for line in caplog.messages if "of 5 shards read" in line]
    assert len(said) >= 2
    assert not [one for one in threading.enumerate() if one.name == "shards read"]


def test_how_far_reading_has_come_in_bytes_and_time():
    sizes = [3 * 10**9, 10**9, 2 * 10**9]
    assert progress(sizes, 0, 30.0) == "0 of 3 shards read in 0 min"
    assert progress(sizes, 2, 400.0) == (
        "2 of 3 shards read in 7 min: 4.0 GB of 6.0 GB, 10.0 MB/s, 3 min left"
    )


def test_a_cache_that_cannot_be_written_to_does_without(root, tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert len(shards(str(root), cache=str(tmp_path / "cache")).train) == 36


# Elsewhere


@pytest.fixture
def memory(root):
    files = fsspec.filesystem("memory")
    for path in root.iterdir():
        files.pipe(f"/bucket/{path.name}", path.read_bytes())
    yield "memory://bucket"
    files.rm("/bucket", recursive=True)


def test_a_folder_of_another_file_system(root, memory, tmp_path):
    here = shards(str(root))
    there = shards(memory, cache=str(tmp_path / "cache"))
    assert there.train.fingerprint() == here.train.fingerprint()
    assert colours(there.val) == colours(here.val)
    refusal(lambda: shards(memory), "data.cache")
    refusal(lambda: shards(memory, cache=str(tmp_path), cache_gb=1e-9), "data.cache_gb")
    refusal(lambda: shards("memory://nowhere"), "nowhere", "no shards")


def test_addresses_of_a_server(root, tmp_path):
    with served(root) as server:
        given = [f"{server.address}/train-{{0000..0002}}.tar", f"{server.address}/val-0000.tar"]
        cache = str(tmp_path / "cache")
        source = shards(given, cache=cache)
        assert source.train.fingerprint() == shards(str(root)).train.fingerprint()
        fetched = [one for one in server.asked if one.startswith("GET") and one.endswith(".tar")]
        assert sorted(set(fetched)) == sorted(f"GET /{name}" for name in os.listdir(root)
                                              if not name.startswith("test"))  # fmt: skip
        assert colour(source.train.load(35)) == colour(shards(str(root)).train.load(35))
        before = server.asked.count("GET /train-0001.tar")
        data = modular(shards(given, cache=cache), num_workers=2)
        assert sum(len(batch.index) for batch in drawn(data)) == len(data.train) // 6 * 6
        assert server.asked.count("GET /train-0001.tar") == before  # the copies are there
        listed = shards(f"{server.address}/", cache=cache)
        assert len(listed.train) == 36
        refusal(lambda: shards(f"{server.address}/train-{{0000..0009}}.tar", cache=cache),
                "7 shards are missing", "train-0003.tar")  # fmt: skip
        some = shards(f"{server.address}/train-{{0000..0009}}.tar", cache=cache, broken="skip")
        assert any("7 shards are missing, and left out" in note for note in some.notes)


def test_what_does_not_answer_is_asked_again(root, tmp_path):
    with served(root) as server:
        given = f"{server.address}/train-0000.tar"
        found, _ = shards_at(given)
        files = ShardFiles(found, tmp_path, retries=2)
        server.refuse("/train-0000.tar", 2)
        assert files.read(0, 0, 6) == b"s0000."
        (tmp_path / files.local(0).name).unlink()
        files = ShardFiles(found, tmp_path, retries=1)
        server.refuse("/train-0000.tar", 9)
        refusal(lambda: files.read(0, 0, 6), given, "tried 2 times", error=ShardLost)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_server_that_fails_once_while_shards_are_indexed_is_asked_again(
    root, tmp_path, monkeypatch, processes
):
    monkeypatch.setattr(shard_index, "cores", lambda: processes)
    with served(root) as server:
        given = f"{server.address}/train-{{0000..0002}}.tar"
        server.refuse("/train-0001.tar", 1)
        source = shards(given, cache=str(tmp_path / "cache"))
        assert source.train.fingerprint() == shards(str(root)).train.fingerprint()
        server.cut("/train-0001.tar", 1)
        assert len(shards(given, cache=str(tmp_path / "other")).train) == 36


def test_a_shard_that_cannot_be_fetched_is_named_or_passed_over(root, tmp_path):
    with served(root) as server:
        given = f"{server.address}/train-{{0000..0002}}.tar"
        server.refuse("/train-0001.tar", 99)
        options = {"cache": str(tmp_path / "cache"), "retries": 1}
        lost = f"{server.address}/train-0001.tar"
        words = f"{lost}: cannot be read", "503", "tried 2 times", "data.broken=skip"
        refusal(lambda: shards(given, **options), *words)
        assert server.asked.count("GET /train-0001.tar") == 2
        source = shards(given, broken="skip", **options)
        assert len(source.train) == 24
        assert any("1 fault in shards, left out" in note for note in source.notes)


BOTH = ("HEAD", "GET")


def test_a_server_that_does_not_answer_once_has_its_shards_all_the_same(root):
    with served(root) as server:
        given = f"{server.address}/train-{{0000..0003}}.tar"
        server.refuse("/train-0001.tar", 1, 503, BOTH)
        server.plan("/train-0002.tar", 1, BOTH, Unreliable.hang_up)
        found, missing = shards_at(given)
        assert [shard.name for shard in found] == [f"train-{k:04}.tar" for k in range(3)]
        assert missing == [f"{server.address}/train-0003.tar"]
        assert server.asked.count("GET /train-0003.tar") == 1


@pytest.mark.parametrize(
    ("status", "words"),
    [(503, ("503 Service", "tried 2 times")), (403, ("403 Forb",)), (401, ("401 Unauthorized",))],
)
@pytest.mark.parametrize("broken", ["refuse", "skip"])
def test_a_shard_that_may_be_there_is_never_taken_for_a_missing_one(
    root, tmp_path, status, words, broken
):
    with served(root) as server:
        given = f"{server.address}/train-{{0000..0002}}.tar"
        server.refuse("/train-0001.tar", 99, status, BOTH)
        options = {"cache": str(tmp_path), "retries": 1, "broken": broken}
        refusal(lambda: shards(given, **options), "train-0001.tar", *words)


def test_a_server_that_cannot_be_reached_is_said(root):
    with served(root) as server:
        given = f"{server.address}/train-{{0000..0002}}.tar"
    refusal(lambda: shards_at(given, 1), "train-0000.tar", "onnect", "tried 2", error=ShardLost)


def test_a_shard_that_is_gone_for_good_is_missing(root):
    with served(root) as server:
        server.refuse("/train-0001.tar", 99, 410, BOTH)
        found, missing = shards_at(f"{server.address}/train-{{0000..0001}}.tar")
    assert (len(found), missing) == (1, [f"{server.address}/train-0001.tar"])


def test_a_copy_takes_as_long_as_bytes_come_and_a_silent_server_is_named(
    root, tmp_path, monkeypatch
):
    monkeypatch.setattr(aiohttp.client, "DEFAULT_TIMEOUT", aiohttp.ClientTimeout(total=0.2))
    monkeypatch.setattr(shard_remote, "SILENCE", 0.5)
    HTTPFileSystem.clear_instance_cache()
    with served(root) as server:
        found, _ = shards_at(f"{server.address}/train-0000.tar")
        files = ShardFiles(found, tmp_path, retries=0)
        server.plan("/train-0000.tar", 1, ("GET",), partial(Unreliable.dribble, seconds=0.4))
        assert files.read(0, 0, 6) == b"s0000."
        files.local(0).unlink()
        server.plan("/train-0000.tar", 1, ("GET",), partial(Unreliable.dribble, seconds=4, parts=4))
        refusal(lambda: files.local(0), "train-0000.tar", "imeout", error=ShardLost)


def test_what_fsspec_is_configured_to_holds_beside(monkeypatch):
    monkeypatch.setitem(fsspec.config.conf, "https", {"client_kwargs": {"trust_env": True}})
    client = shard_remote.file_system("https://localhost/a.tar")[0].client_kwargs
    assert (client["trust_env"], client["timeout"].total) == (True, None)


@pytest.mark.parametrize("name", ["classes.txt", "_info.json"])
def test_class_names_that_do_not_answer_once_are_read_all_the_same(root, tmp_path, name):
    names = ["cat", "dog", "eel"]
    (root / name).write_text("\n".join(names) if name == "classes.txt" else json.dumps(
        {"classes": names}))  # fmt: skip
    with served(root) as server:
        given, options = f"{server.address}/train-0000.tar", {"cache": str(tmp_path), "retries": 1}
        server.refuse(f"/{name}", 1)
        assert shards(given, **options).classes == names
        server.cut(f"/{name}", 1)
        assert shards(given, **options).classes == names
        server.refuse(f"/{name}", 2)
        refusal(lambda: shards(given, **options), f"{server.address}/{name} cannot be read", "503")


def test_class_names_that_may_not_be_read_are_noted(root, tmp_path):
    with served(root) as server:
        server.refuse("/classes.txt", 9, 403)
        source = shards(f"{server.address}/train-0000.tar", cache=str(tmp_path))
        assert server.asked.count("GET /classes.txt") == 1
    assert source.classes == ["0", "1", "2"]
    assert any(f"may not be read ({server.address}/classes.txt)" in note for note in source.notes)


def test_nothing_is_asked_for_above_a_server():
    one = Shard("https://host/train-0.tar", "train-0.tar", "train", 1, "")
    assert places(one.address, [one]) == ["https://host"]


def test_signed_addresses_are_read_and_known_without_their_signature(root, tmp_path, monkeypatch):
    cache, names = str(tmp_path / "cache"), ["train-0000.tar", "train-0001.tar", "val-0000.tar"]
    with served(root) as server:
        server.signature = "X-Amz-Signature=a%2Fb%2Bc&X-Amz-Expires=60"
        given = [f"{server.address}/{name}?{server.signature}" for name in names]
        source = shards(given, cache=cache)
        here = shards([str(root / name) for name in names])
        assert source.train.fingerprint() == here.train.fingerprint()
        assert len(source.test) == 12
        assert source.train.load.name(13) == "train-0001.tar/s0013.png"
        read, server.signature = counted(monkeypatch), "X-Amz-Signature=another"
        before = list(server.asked)
        again = shards([f"{server.address}/{name}?{server.signature}" for name in names],
                       cache=cache)  # fmt: skip
        assert colours(again.train) == colours(source.train)
        asked = server.asked[len(before) :]
        assert not read  # index and copies are those of before
        assert sum(one.startswith("GET /train") for one in asked) == 2  # for their sizes
        message = refusal(lambda: shards(given, cache=cache), "train-0000.tar", "403")
        assert "Signature" not in message
        refusal(lambda: shards([given[0], f"{given[0]}&x=y"], cache=cache), "names a shard twice")


@pytest.fixture
def nested(tmp_path):
    """Shards of two folders."""
    write_shard(tmp_path / "there" / "train" / "0.tar", samples())
    write_shard(tmp_path / "there" / "train" / "1.tar", samples(6))
    write_shard(tmp_path / "there" / "val" / "0.tar", samples())
    return tmp_path / "there"


@pytest.mark.parametrize("failing", ["/", "/train/", "/val/"])
def test_a_folder_of_a_server_that_does_not_answer_once_is_listed_again(nested, failing):
    with served(nested) as server:
        server.refuse(failing, 1)
        assert len(shards_at(f"{server.address}/")[0]) == 3
        server.plan(failing, 1, ("GET",), Unreliable.hang_up)
        assert [one.part for one in shards_at(f"{server.address}/")[0]] == ["train"] * 2 + ["val"]
        server.plan(failing, 9, ("GET",), Unreliable.hang_up)
        refusal(lambda: shards_at(f"{server.address}/", 1), f"{server.address}{failing}",
                "give the addresses", "tried 2 times")  # fmt: skip


def test_a_pattern_means_shards_of_a_server(nested):
    with served(nested) as server:
        server.refuse("/train/", 1)
        assert len(shards_at(f"{server.address}/train/*.tar")[0]) == 2
        assert not any("val" in one for one in server.asked)
        assert [one.name for one in shards_at(f"{server.address}/*/0.tar")[0]] == [
            "train/0.tar", "val/0.tar"
        ]  # fmt: skip
        assert len(shards_at(f"{server.address}/**/*.tar")[0]) == 3
        server.plan("/train/", 9, ("GET",), Unreliable.hang_up)
        refusal(lambda: shards_at(f"{server.address}/train/*.tar", 1), "tried 2 times")
        refusal(lambda: shards_at(f"{server.address}/nowhere/*.tar", 0), "no shards")


def test_a_store_that_does_not_answer_once_is_listed_again(root, memory, monkeypatch):
    files = type(fsspec.filesystem("memory"))
    for name, place in (("find", memory), ("glob", f"{memory}/*.tar")):
        original, calls = getattr(files, name), []

        def failing(self, *given, calls=calls, original=original, **options):
            calls.append(given)
            if len(calls) == 1:
                raise OSError("it is busy")
            return original(self, *given, **options)

        with monkeypatch.context() as patched:
            patched.setattr(files, name, failing)
            assert len(shards_at(place)[0]) == 5
            calls.clear()
            refusal(lambda place=place: shards_at(place, 0), "it is busy", "give the addresses")


def test_copies_make_room_for_each_other(root, memory, tmp_path):
    found, _ = shards_at(memory)
    size = found[0].size
    files = ShardFiles(found, tmp_path, limit=2.5 * size)
    paths = []
    for number in (0, 1, 0, 2):
        paths.append(files.local(number))
        time.sleep(0.01)
    left = {path for path in paths if path.exists()}
    assert left == {paths[0], paths[3]}


def test_the_shards_of_the_next_windows_are_fetched_ahead(memory, tmp_path):
    source = shards(memory, cache=str(tmp_path / "cache"), shuffle_window=12)
    copies = tmp_path / "cache" / "shards" / "copies"
    sampler = modular(source).training_keys()
    for path in copies.glob("*.tar"):
        path.unlink()
    next(iter(sampler))
    deadline = time.monotonic() + 20
    while len(list(copies.glob("*.tar"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(list(copies.glob("*.tar"))) == 2  # 24 samples, in two shards of 12


# In the course of a run


def test_a_shard_that_is_lost_ends_the_run_and_is_named(root):
    data = modular(shards(str(root), retries=1))
    lose(data, root / "train-0001.tar")
    refusal(lambda: drawn(data), root / "train-0001.tar", "No such file", "tried 2 times")
    (root / "train-0001.tar").write_bytes(b"short")
    refusal(lambda: drawn(data), "train-0001.tar", "5 bytes")


def test_a_shard_that_another_of_its_size_has_replaced_ends_the_run(root):
    data = modular(shards(str(root), retries=0))
    path = root / "train-0001.tar"
    before = path.stat()
    lose(data, path)
    write_shard(path, samples(24, 12))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert path.stat().st_size == before.st_size
    refusal(lambda: drawn(data), path, "written to after the run began")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(drawn(data)) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_is_lost_may_be_passed_over(root, caplog, workers):
    data = modular(shards(str(root), retries=0, broken="skip"), num_workers=workers)
    whole = drawn(modular(shards(str(root))))
    assert data.lost_note is None
    lose(data, root / "train-0001.tar")
    batches = drawn(data)
    lost = set(range(12, 24))
    assert [len(batch.index) for batch in batches] == [6] * 6
    own = {int(i): view for batch in whole for i, view in
           zip(batch.index, batch.view, strict=True)}  # fmt: skip
    for batch, before in zip(batches, whole, strict=True):
        there = [i for i in before.index.tolist() if i not in lost]
        assert set(batch.index.tolist()) == set(there)
        for place, index in enumerate(before.index.tolist()):
            assert index in lost or batch.index[place] == index
        for index, view, target in zip(batch.index.tolist(), batch.view, batch.target, strict=True):
            assert torch.equal(view, own[index])
            assert target == index % 3
    assert data.lost_note.startswith(
        "training went without 12 of its 36 images from when train-0001.tar could not be read"
    )
    if not workers:
        assert caplog.text.count("its 12 images are left out from here on") == 1
    lose(data, root / "val-0000.tar")
    refusal(lambda: list(modular(data.source).val_dataloader()), "val-0000.tar")


@pytest.mark.parametrize("view", [None, {"mixup": 1.0}])
def test_a_shard_that_is_lost_is_tried_again_once_and_not_in_every_batch(root, monkeypatch, view):
    data = modular(shards(str(root), retries=2, broken="skip"), view=view)
    tried, original = [], shard_files.opened
    monkeypatch.setattr(
        shard_files, "opened", lambda path, *given: tried.append(path) or original(path, *given)
    )
    lose(data, root / "train-0001.tar")
    for epoch in range(2):
        assert [len(batch.index) for batch in drawn(data, epoch)] == [6] * 6
    assert tried.count(root / "train-0001.tar") == 3


def test_a_batch_of_which_all_is_lost_ends_the_run(root):
    data = modular(shards(str(root), retries=0, broken="skip"))
    lose(data, *root.glob("train-*.tar"))
    refusal(lambda: drawn(data), "train-000", "No such file")


def with_a_broken_image(root, number, kind):
    """Shards of JPEG or PNG files, of which train's one of this number is cut short."""
    ending = "jpg" if kind == "JPEG" else "png"
    for path in sorted(root.glob("*.tar")):
        first = 12 * int(path.stem[-4:]) if path.name.startswith("train") else 0
        files = []
        for k in range(first, first + 12):
            content = picture(k % 3, k, kind)
            if path.name.startswith("train") and k == number:
                content = content[: len(content) // 2]
            files += [(f"s{k:04}.cls", str(k % 3)), (f"s{k:04}.{ending}", content)]
        write_shard(path, files)
    return f"train-{number // 12:04}.tar/s{number:04}.{ending}"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_broken_image_may_be_passed_over_and_is_counted(root, caplog, workers, kind):
    whole = drawn(modular(shards(str(root))))
    name = with_a_broken_image(root, 13, kind)
    refusal(lambda: drawn(modular(shards(str(root)))), f"broken image {name}", error=SampleBroken)
    data = modular(shards(str(root), broken="skip"), num_workers=workers)
    assert data.lost_note is None
    for epoch in range(2):
        batches = drawn(data, epoch)
        assert [len(batch.index) for batch in batches] == [6] * 6
        assert sorted({int(i) for batch in batches for i in batch.index}) == [
            k for k in range(36) if k != 13
        ]
    for batch, before in zip(drawn(data), whole, strict=True):
        assert [a for a in batch.index.tolist() if a != 13] == batch.index.tolist()
        for place, index in enumerate(before.index.tolist()):
            assert index == 13 or batch.index[place] == index
        assert batch.target.tolist() == [index % 3 for index in batch.index.tolist()]
    assert data.lost_note == (
        f"training went without 1 of its 36 images that cannot be decoded ({name}) "
        "(data.broken=skip)"
    )
    if not workers:
        assert caplog.text.count("is shown again in its place") == 1
    lose(data, root / "train-0000.tar")
    drawn(data)
    assert "12 of its 36 images from when train-0000.tar could not be read" in data.lost_note
    assert "and without 1 of its 36 images that cannot be decoded" in data.lost_note


def test_what_was_gone_without_is_gone_without_by_a_run_that_goes_on(root, caplog):
    with_a_broken_image(root, 13, "PNG")
    whole = modular(shards(str(root), broken="skip"))
    assert whole.state_dict() == {}
    before = modular(shards(str(root), retries=0, broken="skip"))
    path = root / "train-0002.tar"
    content, about = path.read_bytes(), path.stat()
    lose(before, path)
    expected = [batch.index.tolist() for epoch in range(2) for batch in drawn(before, epoch)][6:]
    path.write_bytes(content)  # it is there again
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    state = before.state_dict()
    after = modular(shards(str(root), broken="skip"))
    after.load_state_dict(state)
    assert [batch.index.tolist() for batch in drawn(after, 1)] == expected
    assert after.lost_note == before.lost_note
    path.unlink()  # at the start it is left out, and so the data are others
    other = modular(shards(str(root), retries=0, broken="skip"))
    other.load_state_dict(state)
    assert other.lost_note is None
    assert f"before it was interrupted, {before.lost_note}: it goes on without them" in caplog.text
    strict = modular(shards(str(root)))
    strict.load_state_dict(state)
    refusal(lambda: drawn(strict), "s0013.png", error=SampleBroken)


def test_a_broken_partner_leaves_a_view_as_it_is(root):
    with_a_broken_image(root, 13, "PNG")
    data = modular(shards(str(root), broken="skip"), view={"mixup": 1.0})
    for epoch in range(3):
        for batch in drawn(data, epoch):
            assert 13 not in batch.index
            assert torch.allclose(batch.target.sum(1), torch.ones(6))
    assert "without 1 of its 36 images" in data.lost_note


def test_a_broken_image_that_is_held_out_ends_the_run(root):
    files = dict(samples(0, 12, prefix="v"))
    files["v0003.png"] = files["v0003.png"][:50]
    write_shard(root / "val-0000.tar", files.items())
    data = modular(shards(str(root), broken="skip"))
    refusal(lambda: list(data.val_dataloader()), "broken image val-0000.tar/v0003.png")


class Stalled:
    """A loader of which one image never comes."""

    def __init__(self, load):
        self.load = load

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.load, name)

    def open(self, position):
        if position == 13:
            time.sleep(60)
        return self.load.open(position)


def test_a_stalled_reader_is_named(root):
    source = shards(str(root))
    source.train.load = Stalled(source.train.load)
    data = modular(source, num_workers=1, timeout=1.5)
    refusal(lambda: drawn(data), "1.5 seconds", "data.timeout", "train-0001.tar/s0013.png")
    refusal(lambda: modular(shards(str(root)), timeout=-1), "data.timeout")


# Mixed and unlabelled


def test_a_mixed_views_partner_is_of_its_own_shard(root):
    data = modular(shards(str(root)), view={"mixup": 1.0})
    split = KeyedSplit(data.train, data.view, 0, classes=3)
    positions = torch.arange(36).repeat(40)
    index = positions + 1000 * torch.arange(40).repeat_interleave(36)
    others = split._partners(data.view.mixing, positions, 0, 0, index)
    assert torch.equal(others // 12, positions // 12)
    assert all(len(set(others[positions // 12 == k].tolist())) == 12 for k in range(3))
    batch = drawn(data)[0]
    assert batch.target.shape == (6, 3)


def test_unlabelled_pictures_are_no_shards(root):
    more = shards(str(root))
    more.train = more.train.relabelled(torch.full((36,), UNKNOWN))
    refusal(lambda: modular(shards(str(root)), unlabeled=more), "data.unlabeled", "folder")


def test_pictures_of_shards_beside_an_unlabelled_folder(root, tmp_path):
    write_folder(tmp_path / "more", splits=("x",))
    data = modular(shards(str(root)), unlabeled=str(tmp_path / "more"))
    assert data.training_keys().in_shards is not None
    assert sum(batch.labeled for batch in drawn(data)) == 36


def test_shards_without_train_are_judged(root):
    for path in root.glob("train-*.tar"):
        path.unlink()
    judged = Judged("a model", ["1", "0", "2"])
    options = {"root": str(root), "channels": 3, "classes": None, "label_key": None,
               "verify": "none", "broken": "refuse", "cache": None, "cache_gb": 1.0, "retries": 0,
               "shuffle_window": 8}  # fmt: skip
    refusal(lambda: shards(**options), "no shard of train")
    source = opened(shards, options, judged)
    assert [len(split) for split in (source.train, source.val, source.test)] == [0, 12, 12]
    assert source.test.labels.tolist() == [(1, 0, 2)[k % 3] for k in range(12)]
    (root / "val-0000.tar").unlink()
    assert opened(shards, options, judged).val is None
    (root / "test-0000.tar").rename(root / "0.tar")
    assert len(opened(shards, options, judged).test) == 12


def test_a_file_that_is_not_for_this_process_is_closed(root, monkeypatch):
    monkeypatch.setattr(shard_files, "OPEN", 2)
    source = shards(str(root))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for position in (0, 13, 30):
            source.train.load(position)
    assert len(os.listdir("/proc/self/fd")) == before + 2
    assert isinstance(Image.open(source.train.load.open(0)), Image.Image)


def test_the_kept_index_of_another_key_is_another(root, tmp_path):
    found, _ = shards_at(str(root))
    paths = {KeptIndex(tmp_path, found[0], Reading(key)).path for key in (None, "label", "x")}
    assert len(paths) == 3
    assert all(not isinstance(one, str) for one in indexed(ShardFiles(found), Reading(), None))
