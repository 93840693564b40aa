"""Tables for a terminal: whole numbers at any width, and said what is left out."""

import re

import pytest
import torch

from distill.evaluation import majority
from distill.metrics import class_numbers, evaluate, uncertainty
from distill.report.table import print_table, show

CLASSES = ["cat", "dog", "[red]fox"]


def summary(counts=(80, 10, 10), blind=False):
    target = torch.arange(3).repeat_interleave(torch.tensor(counts))
    generator = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.one_hot(target, 3)
    logits = {
        role: torch.randn(len(target), 3, generator=generator) + 2 * truth
        for role in ("student", "teacher", "baseline")
    }
    if blind:
        logits["student"] = torch.eye(3)[[0] * len(target)]
    intervals, comparisons = uncertainty(logits, target, ["baseline", "teacher"])
    numbers = {
        role: {**evaluate(scores, target, topk=(1, 2)), "params": 12345678,
               **class_numbers(scores, target, counts, (20, 100)), "intervals": intervals[role],
               "images_per_second": 12345.0, "images_per_second_quartiles": [12000.0, 13000.0]}
        for role, scores in logits.items()
    }  # fmt: skip
    return {**numbers, "classes": CLASSES, "comparisons": comparisons,
            "majority": majority(target, CLASSES)}  # fmt: skip


def printed(capsys, monkeypatch, width, **options):
    monkeypatch.setenv("COLUMNS", str(width))
    found = summary(**options)
    print_table(found)
    return found, capsys.readouterr().out


def rows_of(said):
    return [[cell.strip() for cell in line.strip("│").split("│")]
            for line in said.splitlines() if line.startswith("│")]  # fmt: skip


@pytest.mark.parametrize("width", [80, 120, 200])
@pytest.mark.parametrize("counts", [(80, 10, 10), (30, 30, 30)])
def test_it_fits_and_no_number_is_broken(capsys, monkeypatch, width, counts):
    found, said = printed(capsys, monkeypatch, width, counts=counts)
    tables = [line for line in said.splitlines() if line[:1] in "┏┃┡│└"]
    assert max(map(len, tables)) <= width
    student = next(row for row in rows_of(said) if row[0] == "distilled")
    assert f"{100 * found['student']['top1']:.2f}" in student
    assert f"{found['student']['nll']:.4f}" in student
    assert "…" not in "".join(tables)
    left_out = re.search(r"^no room for (.*): see summary\.json$", said, re.MULTILINE)
    whole = ("images/s", "12,345,678")
    assert (left_out is None) == all(text in "".join(tables) for text in whole)
    assert width < 200 or left_out is None
    for name in left_out.group(1).split(", ") if left_out else ():
        assert name in ("images/s", "top-2 %", "macro F1 %", "parameters", "ECE %")


def test_without_a_terminal_it_is_as_wide_as_it_needs(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    show(["a", "b" * 300], [["x", "1"]], title="t")
    assert "b" * 300 in capsys.readouterr().out


def test_intervals_are_below_their_numbers(capsys, monkeypatch):
    found, said = printed(capsys, monkeypatch, 200)
    rows = rows_of(said)
    below = rows[[row[0] for row in rows].index("distilled") + 1]
    low, high = found["student"]["intervals"]["top1"]
    assert below[0] == ""
    assert below[1] == f"{100 * low:.1f}–{100 * high:.1f}"
    assert below[-1] == "12,000–13,000"


def test_unbalanced_classes_have_numbers_of_their_own_and_balanced_ones_do_not(capsys, monkeypatch):
    found, said = printed(capsys, monkeypatch, 200)
    always = next(row for row in rows_of(said) if row[0].startswith("always"))
    assert always[:2] == ["always “cat”", "80.00"]
    assert "33.33" in always  # its balanced accuracy
    assert f"{100 * found['student']['balanced_accuracy']:.2f}" in said
    fox = next(row for row in rows_of(said) if row[0] == "[red]fox")  # no markup
    recall = [found[role]["recall"][2] for role in ("teacher", "baseline", "student")]
    assert fox == ["[red]fox", "10", *(f"{100 * value:.1f}" for value in recall)]
    _, said = printed(capsys, monkeypatch, 200, counts=(30, 30, 30))
    assert "always" not in said
    assert "recall" not in said


def test_a_student_of_one_answer_is_called_so(capsys, monkeypatch):
    _, said = printed(capsys, monkeypatch, 120, blind=True)
    assert "The student answers only one class: “cat” for 100.0 % of the test images" in said


def test_a_student_alone_has_a_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    found = summary() | {"teacher": None, "baseline": None, "comparisons": {}}
    print_table(found)
    assert "cannot be told apart" not in capsys.readouterr().out
