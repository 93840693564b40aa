"""What timm opens is read whole and in its own order, and nothing else is taken for it."""

import gc
import io
import json
import os
import sys
import warnings
from contextlib import closing
from itertools import product

import pytest
import torch
from PIL import Image

from distill.data.sources import timm_data
from distill.data.sources.folder import folder
from distill.data.sources.images import cropped
from distill.data.sources.timm_data import timm_dataset
from tests.data.conftest import (
    COLOURS,
    colour,
    colours,
    refusal,
    truncated,
    write_folder,
    write_image,
    write_tar,
)

STORED = {"compress_level": 0}
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
    write_folder(tmp_path, ("train",), classes=("cat", "eel"))
    write_folder(tmp_path, ("test",), classes=("cat", "dog", "eel"))
    splits = {"train": "train", "test": "test"}
    refusal(
        lambda: timm_dataset(root=str(tmp_path), splits=splits),
        "different classes: dog; train lacks dog",
    )


def test_a_held_out_folder_of_timm_may_lack_classes_and_keeps_the_labels_of_train(tmp_path):
    write_folder(tmp_path, ("train",), classes=("cat", "dog", "eel"))
    write_folder(tmp_path, ("test",), classes=("cat", "eel"), count=1)
    source = timm_dataset(root=str(tmp_path), splits={"train": "train", "test": "test"})
    assert source.test.labels.tolist() == [0, 2]


def test_timm_folders_are_read_without_what_is_hidden_or_links_back(tmp_path):
    write_folder(tmp_path, ("",), classes=("cat", "eel"))
    for place in ("cat/.ipynb_checkpoints", ".cache/x"):
        write_image(tmp_path / place / "0.png", 0)
    os.symlink("..", tmp_path / "eel" / "up")
    source = timm_dataset(root=str(tmp_path))
    assert source.classes == ["cat", "eel"]
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert [colour[0] for colour in colours(source.train)] == [200] * 3 + [0] * 3
    assert any("hidden" in note for note in source.notes)


def test_folders_that_timm_does_not_open_are_named(tmp_path):
    write_folder(tmp_path, ("train", "valid", "test", ".cache"))
    splits = {"train": "train", "test": "test"}
    assert timm_dataset(root=str(tmp_path), splits=splits).notes == [
        "beside the splits, and not used: valid; data.splits names what is"
    ]
    write_folder(tmp_path / "flat", ("",))
    assert timm_dataset(root=str(tmp_path / "flat")).notes == []


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_timm_folders_and_tars_are_known_by_what_they_hold(tmp_path, kind):
    def opened(root):
        place = root if kind == "folder" else write_tar(tmp_path / "photos.tar", root)
        return timm_dataset(root=str(place), cache=str(tmp_path / "cache")).train

    for root, name in product((tmp_path / "x", tmp_path / "y"), ("cat/0", "cat/1", "dog/0")):
        write_image(root / f"{name}.png", COLOURS[name[:3]], (8, 8 + int(name[-1])), **STORED)
    first = opened(tmp_path / "x")
    assert len(set(first.contents())) == 3
    assert opened(tmp_path / "x").fingerprint() == first.fingerprint()
    assert opened(tmp_path / "y").fingerprint() == first.fingerprint()
    write_image(tmp_path / "y" / "cat" / "0.png", (3, 3, 3), (8, 8), **STORED)  # of the same size
    second = opened(tmp_path / "y")
    assert second.fingerprint() != first.fingerprint()
    differ = [a != b for a, b in zip(first.contents(), second.contents(), strict=True)]
    assert differ == [True, False, False]


def test_broken_images_of_a_tar_are_left_out_on_request(tmp_path):
    write_folder(tmp_path / "x", ("",))
    truncated(tmp_path / "x" / "cat" / "1.png")
    tar = write_tar(tmp_path / "photos.tar", tmp_path / "x")
    refusal(lambda: timm_dataset(root=str(tar)), "broken image", "photos.tar/cat/1.png")
    source = timm_dataset(root=str(tar), broken="skip")
    assert source.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert source.notes == ["1 broken image is left out (photos.tar/cat/1.png)"]


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
        split = timm_dataset(root=str(root), verify="none").train
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


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.data.readers.reader_hfds", None)
    refusal(lambda: timm_dataset("hfds/x/y"), "timm cannot open hfds/x/y", "distill-kd[data]")


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


@pytest.mark.parametrize("described", [True, False])
def test_what_is_held_is_refused_beyond_half_of_the_free_memory(shards, monkeypatch, described):
    monkeypatch.setattr(timm_data, "AT_ONCE", 4)  # images of a block: the second ends early
    write_shards(shards, "train", info={} if described else None)
    splits = {"train": "train" if described else "train-{0..1}.tar"}
    taken = 6 * 3 * 8 * 8
    for free in (2 * taken, 0):  # as where it is not known
        monkeypatch.setattr(timm_data, "available_bytes", lambda free=free: free)
        source = timm_dataset("wds/x", str(shards), splits, image_size=8)
        assert colours(source.train) == [[k, 0, 0] for k in range(6)]
        assert len(set(source.train.contents())) == 6
    read = []
    monkeypatch.setattr(timm_data, "cropped", lambda *given: read.append(given) or cropped(*given))
    monkeypatch.setattr(timm_data, "available_bytes", lambda: 2 * taken - 1)
    refusal(
        lambda: timm_dataset("wds/x", str(shards), splits, image_size=8),
        "wds/x, split 'train", "6 pictures of 8 × 8 would take 1.2 kB",
        "more than half of the 2.3 kB", "data=shards",
    )  # fmt: skip
    assert len(read) == (0 if described else 6)


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
