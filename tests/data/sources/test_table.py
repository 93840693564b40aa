"""Labels in a table: whatever spreadsheets write is read, and nothing is guessed."""

import pytest

from distill.data.sources.table import table
from tests.data.conftest import colours, refusal, truncated, write_image


@pytest.fixture
def root(tmp_path):
    for k in range(6):
        write_image(tmp_path / "photos" / "deep" / f"{k}.png", (k, 0, 0))
    return tmp_path / "photos"


def written(root, text, encoding="utf-8"):
    (root / "labels.csv").write_text(text, encoding=encoding)
    return table(str(root), "labels.csv")


ROWS = [("deep/2.png", "b"), ("deep/0.png", "a"), ("deep/1.png", "b")]


@pytest.mark.parametrize("head", ["path,label", "Filename,Class", "image,target", "FILE,label", ""])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_two_columns(root, head, delimiter, encoding):
    lines = [head.replace(",", delimiter)] * bool(head) + [delimiter.join(row) for row in ROWS]
    source = written(root, "\r\n".join(lines), encoding)
    assert source.classes == ["a", "b"]
    assert source.train.labels.tolist() == [1, 0, 1]
    assert colours(source.train) == [[2, 0, 0], [0, 0, 0], [1, 0, 0]]
    assert (source.val, source.test, source.name, source.notes) == (None, None, "labels", [])


@pytest.mark.parametrize("head", ["path,label,split\n", ""])
def test_splits_by_the_names_that_folders_have(root, head):
    splits = ["train", "Training", "valid", "dev", "test", "testing"]
    rows = [f"deep/{k}.png,{'ab'[k % 2]},{split}" for k, split in enumerate(splits)]
    source = written(root, head + "\n".join(rows))
    for split, where in ((source.train, 0), (source.val, 2), (source.test, 4)):
        assert colours(split) == [[where, 0, 0], [where + 1, 0, 0]]
        assert split.labels.tolist() == [0, 1]


def test_columns_are_found_by_name_among_others(root):
    source = written(root, 'id,label,note,path\n7,"a, b","x",deep/0.png\n8,c,"y;z",deep/1.png\n')
    assert source.classes == ["a, b", "c"]
    assert colours(source.train) == [[0, 0, 0], [1, 0, 0]]


def test_whole_numbers_are_ordered_as_numbers(root):
    rows = [f"deep/{k}.png,{label}" for k, label in enumerate(["10", "9", "-1", "10"])]
    source = written(root, "\n".join(rows))
    assert source.classes == ["-1", "9", "10"]
    assert source.train.labels.tolist() == [2, 1, 0, 2]


def test_paths_of_windows_and_the_same_row_twice(root):
    source = written(root, "deep\\0.png,a\ndeep/1.png,b\n./deep/1.png,b\n")
    assert len(source.train) == 2
    assert source.notes == ["1 rows are there twice, and read once"]


def test_the_fingerprint_is_of_contents_and_not_of_the_place(root, tmp_path):
    text = "deep/0.png,a\ndeep/1.png,b\n"
    first = written(root, text).train.fingerprint()
    root.rename(tmp_path / "moved")
    assert written(tmp_path / "moved", text).train.fingerprint() == first
    write_image(tmp_path / "moved" / "deep" / "0.png", (1, 1, 1))
    assert written(tmp_path / "moved", text).train.fingerprint() != first


def test_missing_files_are_named_and_counted(root):
    text = "".join(f"deep/{k}.png,a\n" for k in range(11))
    message = refusal(lambda: written(root, text), "5 files are missing", "6.png", "8.png")
    assert "9.png" not in message
    source = table(str(root), "labels.csv", broken="skip")
    assert len(source.train) == 6
    assert any("5 files are missing" in note for note in source.notes)
    truncated(root / "deep" / "3.png")
    assert len(table(str(root), "labels.csv", broken="skip").train) == 5
    refusal(lambda: written(root, "deep/3.png,a\ndeep/0.png,a"), "broken image", "3.png")


def test_what_may_be_amiss_with_missing_files_is_said(root):
    refusal(lambda: written(root, "deep/0,a\ndeep/1,b"), "their names lack .png")
    refusal(lambda: written(root, "img,kind\ndeep/1.png,b"), "if the first line is a header, call")


WRONG = {
    "deep/0.png,a\ndeep/1.png,b\ndeep/0.png,b": "lines 1 and 3: 0.png has the labels a and b",
    "path,label,split\ndeep/0.png,a,train\ndeep/0.png,a,test": "0.png has the splits train and",
    "deep/0.png\ndeep/1.png": "one column",
    "": "one column",
    "path,label\n": "no rows",
    "image,species\ndeep/0.png,a": "of the columns image, species one should be the label",
    "path,label,class\ndeep/0.png,a,b": "one should be the label",
    "path,label\ndeep/0.png,": "line 2: path or label is empty",
    "path,label,split\ndeep/0.png,a,hold": "line 2: the split 'hold' is none of train, val, test",
    "path,label,split\ndeep/0.png,a,": "the split '' is none",
    "path,label,split\ndeep/0.png,a,test": "no row of train",
    "path,label\ndeep/0.png,a\ndeep/1.png": "line 3: 1 values are too few",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_such_table_is_refused(root, text):
    refusal(lambda: written(root, text), root / "labels.csv", WRONG[text])


def test_a_table_that_is_not_there_or_no_text(root):
    refusal(lambda: table(str(root), "nope.csv"), "data.file=nope.csv is neither in", root)
    (root / "labels.csv").write_bytes(b"a\xff\xfe,b")
    refusal(lambda: table(str(root), "labels.csv"), "no text in UTF-8")
