"""Of a folder's files those are read that a person would call its pictures, each once."""

import os
import shutil

import pytest

from distill.data.sources.folder import labelled_images
from distill.data.sources.listing import Seen, image_files, subfolders
from tests.data.conftest import refusal, write_folder, write_image


def listed(root):
    return list(labelled_images(root)[1].files)


@pytest.fixture
def root(tmp_path):
    return write_folder(tmp_path / "photos", ("",), count=2)


PLAIN = ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]


def test_class_folders_give_names_files_labels_and_notes(root):
    names, pieces, labels, notes = labelled_images(str(root))
    assert names == ["cat", "dog"]
    assert [pieces[n].path for n in range(4)] == [root / name for name in PLAIN]
    assert labels.tolist() == [0, 0, 1, 1]
    assert notes == []


def test_given_classes_decide_labels_and_some_may_be_absent(root):
    names, _, labels, notes = labelled_images(root, ["eel", "dog", "cat"])
    assert names == ["eel", "dog", "cat"]
    assert labels.tolist() == [2, 2, 1, 1]
    assert notes == []  # a split that lacks a class is the data module's to say
    refusal(lambda: labelled_images(root, ["dog", "eel"]), root, "no class: cat")


def test_hidden_files_and_folders_are_skipped_and_counted(root):
    for place in (
        "cat/.ipynb_checkpoints/0.png",
        "cat/._0.png",
        "@eaDir/0.png",
        "__MACOSX/c/0.png",
    ):
        write_image(root / place, 0)
    assert listed(root) == PLAIN
    (note,) = labelled_images(root)[3]
    assert note == "4 hidden files or folders are not read (@eaDir, __MACOSX, ._0.png, …)"


def test_other_endings_are_counted(root):
    for name in ("a.txt", "b.txt", "c.JSON", "README"):
        (root / "cat" / name).touch()
    write_image(root / "dog" / "x.JPEG", 0)
    assert listed(root) == [*PLAIN, "dog/x.JPEG"]
    (note,) = labelled_images(root)[3]
    assert note == "4 files with other endings are not read (.txt 2, none 1, .json 1)"


def test_images_in_sub_folders_count_as_their_class_and_that_is_said(root):
    write_image(root / "cat" / "2019" / "may" / "0.png", 0)
    assert listed(root) == [
        "cat/0.png",
        "cat/1.png",
        "cat/2019/may/0.png",
        "dog/0.png",
        "dog/1.png",
    ]
    assert labelled_images(root)[3] == [
        "images in sub-folders of a class count as that class (cat/2019/may)"
    ]


@pytest.mark.parametrize("target", [".", "..", "../dog", "../dog/inner", "../.."])
def test_links_to_what_is_read_anyway_are_not_followed(root, target):
    write_image(root / "dog" / "inner" / "5.png", 0)
    before = listed(root)
    os.symlink(target, root / "cat" / "again", target_is_directory=True)
    assert listed(root) == before
    assert any("cat/again" in note and "not followed" in note for note in labelled_images(root)[3])


def test_a_link_out_is_followed_once(root, tmp_path):
    write_image(tmp_path / "more" / "inner" / "7.png", 0)
    os.symlink("..", tmp_path / "more" / "inner" / "loop")
    for name in ("dog/first", "dog/second"):
        os.symlink(tmp_path / "more", root / name)
    assert listed(root) == [*PLAIN, "dog/first/inner/7.png"]
    notes = labelled_images(root)[3]
    assert any("2 links lead" in note for note in notes)


def test_class_folders_may_be_links_but_not_to_what_holds_them_or_twice_to_one(root, tmp_path):
    shutil.move(root / "cat", tmp_path / "far")
    os.symlink(tmp_path / "far", root / "cat")
    os.symlink("..", root / "up")
    assert listed(root) == PLAIN
    os.symlink("cat", root / "puss")
    refusal(lambda: labelled_images(root), root / "cat", root / "puss", "the same folder")


def test_what_is_no_folder_or_holds_none_is_refused(root):
    refusal(lambda: labelled_images(root / "nowhere"), "does not exist")
    refusal(lambda: labelled_images(root / "cat"), "no class folders")


def test_a_link_that_leads_nowhere_is_listed_to_be_found_broken(root):
    os.symlink("gone.png", root / "cat" / "9.png")
    seen = Seen(root)
    folders = subfolders(root, seen)
    assert "cat/9.png" in image_files(folders[0], seen)


def test_no_name_commands_the_terminal(root):
    write_image(root / "cat" / "new\nline\x1b[2J" / "0.png", 0)
    assert labelled_images(root)[3] == [
        "images in sub-folders of a class count as that class (cat/new\\nline\\x1b[2J)"
    ]
