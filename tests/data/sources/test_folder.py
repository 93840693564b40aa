"""Image folders are read as they lie, and refused in one line that says where they are wrong."""

import os

import pytest
from PIL import Image

from distill.data.sources.folder import existing_folder, folder
from tests.data.conftest import colour, colours, refusal, truncated, write_folder, write_image


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    assert existing_folder("~/data") == tmp_path / "data"


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
    split = folder(str(tmp_path), verify="none").train
    refusal(lambda: split.load(4), "broken image", path, error=ValueError)
    split.load(3)


@pytest.mark.parametrize(
    ("damage", "ext"),
    [
        ("empty", "jpg"),
        ("text", "jpg"),
        ("empty", "png"),
        ("truncated", "png"),
        ("truncated", "jpg"),
    ],
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
    refusal(lambda: folder(str(root / "val")), "no folder 'train'", f"data.root={root}?")
    refusal(lambda: folder(str(tmp_path)), "no folder 'train'", f"data.root={root}?")
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
    write_image(root / "val" / "fox" / "0.png", 0)
    refusal(
        lambda: folder(str(root)),
        root,
        "train and val have different classes: eel, fox; train lacks fox",
    )


def test_ten_thousand_classes_are_refused_in_a_short_line(tmp_path):
    write_folder(tmp_path, ("val",))
    for k in range(2000):
        (tmp_path / "train" / f"class{k}").mkdir(parents=True)
    assert len(refusal(lambda: folder(str(tmp_path)), "no images")) < 300
    for k in range(2000):
        (tmp_path / "train" / f"class{k}" / "0.png").touch()
    message = refusal(lambda: folder(str(tmp_path), verify="none"), "different classes")
    assert len(message) < 300


def test_the_fingerprint_of_a_folder_is_of_names_contents_and_labels(tmp_path):
    def fingerprint(root=tmp_path / "a"):
        return folder(str(root)).train.fingerprint()

    write_folder(tmp_path / "a", ("train",), ext="bmp")
    write_folder(tmp_path / "elsewhere", ("train",), ext="bmp")
    first = fingerprint()
    assert fingerprint(tmp_path / "elsewhere") == first
    (tmp_path / "a" / "train" / "cat" / "0.bmp").rename(tmp_path / "a" / "train" / "cat" / "00.bmp")
    second = fingerprint()
    changed = tmp_path / "a" / "train" / "cat" / "1.bmp"
    size = changed.stat().st_size
    write_image(changed, (1, 2, 3))
    assert changed.stat().st_size == size
    assert len({first, second, fingerprint()}) == 3


# The names that folders have in the wild


@pytest.mark.parametrize("name", ["valid", "Validation", "dev", "EVAL", "val"])
@pytest.mark.parametrize("training", ["train", "Training"])
@pytest.mark.parametrize("testing", ["test", "testing"])
def test_folders_of_splits_may_have_the_names_that_are_in_use(tmp_path, name, training, testing):
    write_folder(tmp_path, (training, name, testing), count=1)
    source = folder(str(tmp_path))
    assert [len(split) for split in (source.train, source.val, source.test)] == [2, 2, 2]
    renamed = [n for n in (training, name, testing) if n not in ("train", "val", "test")]
    assert all(any(n in note for note in source.notes) for n in renamed)
    assert len(source.notes) == len(renamed)


def test_two_folders_of_one_meaning_are_refused(tmp_path):
    write_folder(tmp_path, ("train", "val", "valid"), count=1)
    refusal(lambda: folder(str(tmp_path)), "val and valid both mean val")
    os.symlink("train", tmp_path / "test")
    (tmp_path / "valid").rename(tmp_path / "other")
    refusal(lambda: folder(str(tmp_path)), "the same folder")


def test_a_folder_that_is_not_used_is_named(tmp_path):
    write_folder(tmp_path, ("train", "holdout", ".cache"), count=1)
    write_image(tmp_path / "train" / "loose.png", 0)
    notes = folder(str(tmp_path)).notes
    assert notes == [
        "beside the splits, and not used: holdout",
        "1 hidden file or folder is not read (.cache)",
        "1 image lies in no class folder, and not used (train/loose.png)",
    ]


def test_held_out_splits_may_lack_classes_but_keep_the_labels_of_train(tmp_path):
    write_folder(tmp_path, ("train", "test"), classes=("cat", "dog", "eel"), count=1)
    write_folder(tmp_path, ("val",), classes=("eel",), count=1)
    source = folder(str(tmp_path))
    assert source.val.labels.tolist() == [2]


def test_flat_class_folders_are_one_pool(tmp_path):
    write_folder(tmp_path, ("",), classes=("cat", "dog"), count=2)
    (tmp_path / "docs").mkdir()
    source = folder(str(tmp_path))
    assert source.classes == ["cat", "dog"]
    assert source.train.labels.tolist() == [0, 0, 1, 1]
    assert (source.val, source.test) == (None, None)
    assert source.notes == [
        "no folders of splits: its 2 folders are classes",
        "without images, and not used: docs",
    ]


def test_what_may_be_splits_or_classes_is_refused(tmp_path):
    write_folder(tmp_path / "a", ("",), classes=("car", "bus", "train"))
    refusal(lambda: folder(str(tmp_path / "a")), "train may be a split", "a class beside bus, car")
    write_folder(tmp_path / "b", ("trn", "tst"))
    refusal(lambda: folder(str(tmp_path / "b")), "trn, tst each hold cat, dog", "train, val and")
    write_folder(tmp_path / "c", ("val", "test"))
    refusal(lambda: folder(str(tmp_path / "c")), "no folder 'train', only test, val")


# Broken images


def test_all_broken_images_are_listed_at_once(tmp_path):
    write_folder(tmp_path, ("train", "val"), count=8)
    for part in ("train", "val"):
        for k in range(6):
            truncated(tmp_path / part / "cat" / f"{k}.png")
    message = refusal(lambda: folder(str(tmp_path)), f"12 broken images in {tmp_path}: ")
    assert message.count(".png (") == 10
    assert "train/cat/5.png" in message
    assert "data.broken=skip" in message


def test_broken_images_can_be_left_out_named_and_counted(tmp_path):
    write_folder(tmp_path, ("train", "test"))
    write_folder(tmp_path / "whole", ("train", "test"))
    truncated(tmp_path / "train" / "dog" / "1.png")
    os.symlink("nowhere", tmp_path / "test" / "cat" / "9.png")
    source = folder(str(tmp_path), broken="skip")
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert colours(source.train)[3:] == [[0, 200, 0], [0, 200, 2]]
    assert len(source.test) == 6
    assert "2 broken images are left out (train/dog/1.png, test/cat/9.png)" in source.notes
    whole = folder(str(tmp_path / "whole"))
    assert source.train.fingerprint() != whole.train.fingerprint()
    for k in (0, 2):
        truncated(tmp_path / "train" / "dog" / f"{k}.png")
    refusal(lambda: folder(str(tmp_path), broken="skip"), "all training images of dog are broken")
    refusal(lambda: folder(str(tmp_path), broken="drop"), "data.broken must be refuse or skip")
