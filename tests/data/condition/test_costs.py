"""Tables of costs: both layouts are read alike, and every mistake is one line that says where."""

import doctest
import importlib
import random

import pytest
import torch

from distill.data.condition.costs import read_costs
from tests.data.conftest import refusal

CLASSES = ["cat", "dog", "eel"]
COSTS = [[0.0, 1.0, 2.5, 0.5], [3.0, -1.0, 4.0, 0.5], [1e3, 6.0, 0.0, 0.5]]


@pytest.fixture
def written(tmp_path):
    def write(content, encoding="utf-8"):
        path = tmp_path / "costs.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
        return path

    return write


def named(rows=CLASSES, columns=(*CLASSES, "ask"), corner="true"):
    """The table with its rows and columns in some order."""
    place = {name: k for k, name in enumerate((*CLASSES, "ask"))}
    lines = [",".join([corner, *columns])]
    for row in rows:
        costs = COSTS[place[row]]
        lines.append(",".join([row, *(str(costs[place[column]]) for column in columns)]))
    return "\n".join(lines) + "\n"


def test_bare_numbers(written):
    text = "\n".join(",".join(map(str, row)) for row in COSTS)
    costs, names = read_costs(written(text), CLASSES)
    assert costs.dtype == torch.float64
    assert costs.tolist() == COSTS
    assert names == [*CLASSES, "action 1"]
    costs, names = read_costs(str(written("0,1\n8,0\n")), ("no", "yes"))
    assert (costs.tolist(), names) == ([[0, 1], [8, 0]], ["no", "yes"])


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("corner", ["", "true class"])
def test_names_in_any_order(written, seed, corner):
    rows, columns = CLASSES[:], [*CLASSES, "ask"]
    random.Random(seed).shuffle(rows)
    random.Random(seed + 99).shuffle(columns)
    costs, names = read_costs(written(named(rows, columns, corner)), CLASSES)
    assert (costs.tolist(), names) == (COSTS, [*CLASSES, "ask"])


def test_further_actions_keep_their_order(written):
    costs, names = read_costs(written("t,wait,b,ask,a\na,1,2,3,4\nb,5,6,7,8\n"), ["a", "b"])
    assert names == ["a", "b", "wait", "ask"]
    assert costs.tolist() == [[4, 2, 1, 3], [8, 6, 5, 7]]


def test_classes_that_are_numbers(written):
    costs, names = read_costs(written(",1,0\n0,7,0\n1,0,9\n"), ["0", "1"])
    assert (costs.tolist(), names) == ([[0, 7], [9, 0]], ["0", "1"])


@pytest.mark.parametrize(
    "text",
    [
        named().replace("\n", "\r\n"),
        named().replace("\n", "\r"),
        named().replace(",", " , "),
        "\n" + named().replace("\n", "\n\n") + ",,,,\n",
        named().replace("cat", '"cat"').replace("dog,", '"dog", '),
        "\ufeff" + named(),
    ],
    ids=["windows", "old apple", "spaces", "blank lines", "quotes", "byte order mark"],
)
def test_what_spreadsheets_and_people_write(written, text):
    costs, names = read_costs(written(text), CLASSES)
    assert (costs.tolist(), names) == (COSTS, [*CLASSES, "ask"])


def test_names_with_commas_and_letters_of_the_world(written):
    classes = ["crane, bird", "żuraw"]
    text = '"","żuraw","crane, bird"\n"żuraw",0,1\n"crane, bird",2,0\n'
    costs, names = read_costs(written(text), classes)
    assert (costs.tolist(), names) == ([[0, 2], [1, 0]], classes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["empty", "one line of costs for each class"]),
        ("\n , ,\n", ["empty"]),
        ("0,1\n1,0\n", ["2 rows", "3 classes"]),
        ("0,1,1\n1,0,1\n1,1,0\n1,1,1\n", ["4 rows", "3 classes"]),
        ("0,1\n1,0\n1,1\n", ["line 1", "2 columns for 3 classes"]),
        ("0;1;1\n1;0;1\n1;1;0\n", ["line 1", "commas", "'0;1;1'"]),
        ("0,1,1\n1,0\n1,1,0\n", ["line 2", "2 cells", "first line has 3"]),
        ("0,1,1\n\n1,0,1,5\n1,1,0\n", ["line 3", "4 cells"]),
        ("0,1,1\n1,0,x\n1,1,0\n", ["line 2 column 3", "'x' is not a finite number"]),
        ("0,1,1\n1,,1\n1,1,0\n", ["line 2 column 2", "an empty cell"]),
        ("nan,1,1\n1,0,1\n1,1,0\n", ["line 1 column 1", "'nan'"]),
        ("0,1,1\n1,0,1\n1,-inf,0\n", ["line 3 column 2", "'-inf'"]),
        ("0,1,1\n1,0,1\n1,1e999,0\n", ["line 3 column 2", "'1e999'"]),
        ("O,1,1\n1,0,1\n1,1,0\n", ["line 1", "'1'", "more than once"]),
        ("O,1,2\n1,0,1\n1,1,0\n", ["line 1", "no column for 'cat', 'dog', 'eel'", "'O'"]),
        (named(columns=("cat", "dog", "ask")), ["line 1", "no column for 'eel'"]),
        (named(columns=("cat", "dog", "eel", "dog")), ["line 1", "'dog'", "more than once"]),
        (named().replace("ask", ""), ["line 1 column 5 has no name"]),
        (named(rows=["cat", "eel"]), ["2 rows", "3 classes", "none for 'dog'"]),
        (named(rows=["cat", "eel", "cat"]), ["line 4 column 1", "second row for 'cat'"]),
        (named().replace("\ndog", "\ndgo"), ["line 3 column 1", "'dgo' is not a class", "'dog'"]),
        (named().replace("2.5", "2.5.1"), ["line 2 column 4", "'2.5.1'"]),
        (named().replace(",2.5", ""), ["line 2", "4 cells", "first line has 5"]),
        ('true,"cat,dog\n1', ["line 2", "not CSV"]),
        (b"\xff\xfe0\x00,\x001\x00", ["not UTF-8", "byte 0", "save it as CSV in UTF-8"]),
    ],
)
def test_mistakes_are_explained(written, text, words):
    path = written(text)
    refusal(lambda: read_costs(path, CLASSES), path, *words, error=ValueError)


def test_names_that_are_not_unique_need_bare_numbers(written):
    classes = ["crane", "crane"]
    path = written("t,crane,crane\ncrane,0,1\ncrane,1,0\n")
    refusal(lambda: read_costs(path, classes), path, "share a name", "'crane'", error=ValueError)
    costs, names = read_costs(written("0,1\n1,0\n"), classes)
    assert (costs.tolist(), names) == ([[0, 1], [1, 0]], classes)


def test_many_names_are_cut_short(written):
    path = written("true,a\n")
    message = refusal(lambda: read_costs(path, [f"class {k}" for k in range(1000)]), path)
    assert "'class 4' and 995 more" in message


def test_folders_and_missing_files_are_errors_of_the_system(tmp_path):
    with pytest.raises(OSError, match=r"directory|denied"):
        read_costs(tmp_path, CLASSES)
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        read_costs(tmp_path / "none.csv", CLASSES)


def test_examples_in_the_documentation_run():
    result = doctest.testmod(importlib.import_module("distill.data.condition.costs"))
    assert result.attempted > 0
    assert result.failed == 0
