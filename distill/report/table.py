"""Tables for a terminal."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distill.report import words

ROLES = {"teacher": "teacher", "baseline": "baseline", "student": "student"}


SMALL = 20  # classes up to which all are listed


def print_table(summary: dict[str, Any]) -> None:
    """Print teacher, baseline and student with their numbers, and what the differences are worth.

    Below each number is its interval; classes that are unbalanced have numbers of their own.
    """
    taught = {"student": "distilled"} if summary.get("teacher") else {}
    present = by_label(summary, ROLES | taught)
    columns = headline_columns(present, words.is_unbalanced(summary))
    rows = [[label, *(shown(row, *c[1:]) for c in columns)] for label, row in present.items()]
    if words.is_unbalanced(summary):
        always = {"top1": summary["majority"]["share"], **summary["majority"]}
        cells = [number(always.get(key), scale, digits) for _, key, scale, digits in columns]
        rows.append([words.majority_name(summary), *cells])
    show(
        ["", *(heading for heading, *_ in columns)],
        rows,
        title="test split, last epoch" if summary.get("epochs") else "test split",
        drop=("images/s", "top-5 %", "macro F1 %", "parameters", "ECE %"),
        rest="summary.json",
    )
    print("below each number its 95 % interval over test images; of images/s the quartiles")
    if words.is_unbalanced(summary):
        print_recall(summary, present)
    for sentence in words.sentences(summary):
        print(sentence)
    corrupted = {k: row for k, row in present.items() if row.get("corruption_errors")}
    if corrupted:
        show(
            ["", *corrupted], corruption_rows(corrupted), title="errors on corrupted test images, %"
        )


def headline_columns(
    models: Mapping[str, Mapping[str, Any]], unbalanced: bool
) -> list[tuple[str, str, float, int]]:
    """Return heading, key, scale and digits of each number of a table's rows."""
    ks = sorted({int(k[3:]) for row in models.values() for k in row if k[3:].isdigit()})
    ks = [k for k in ks if any(row.get(f"top{k}") is not None for row in models.values())]
    rare = [
        ("balanced accuracy %", "balanced_accuracy", 100, 2),
        ("macro F1 %", "macro_f1", 100, 2),
    ]
    return [
        *((f"top-{k} %", f"top{k}", 100, 2) for k in ks),
        *(rare if unbalanced else ()),
        ("NLL", "nll", 1, 4),
        ("ECE %", "ece", 100, 2),
        ("parameters", "params", 1, 0),
        ("images/s", "images_per_second", 1, 0),
    ]


def shown(numbers: Mapping[str, Any], key: str, scale: float, digits: int) -> str:
    """Return a number and, below it, its interval or its quartiles."""
    value = number(numbers.get(key), scale, digits)
    ends = (numbers.get("intervals") or {}).get(key) or numbers.get(f"{key}_quartiles")
    if not ends:
        return value
    # An interval is no more exact than its number's first doubtful digit.
    return f"{value}\n{span(ends, scale, max(digits - 1, 0))}"


def span(ends: Sequence[float], scale: float, digits: int) -> str:
    """Return the ends of an interval, or a dash."""
    return "–".join(number(end, scale, digits) for end in ends) if ends else "–"


def print_recall(summary: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the recall of each class or, of many, of those that the student knows least."""
    counts, classes = summary["majority"]["counts"], summary["classes"]
    there = [k for k, count in enumerate(counts) if count]
    listed = sorted(there, key=lambda k: summary["student"]["recall"][k])[:SMALL]
    listed = listed if len(there) > SMALL else there
    rows = [
        [words.shortened(words.plain(classes[k]), 30), f"{counts[k]:,}",
         *(number(row["recall"][k], 100, 1) for row in models.values())]
        for k in listed
    ]  # fmt: skip
    lowest = f", the student's {SMALL} lowest of {len(there)}" if len(there) > SMALL else ""
    show(["", "test images", *models], rows, title=f"recall of each class, %{lowest}")


def corruption_rows(models: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return each corruption's errors in %, mean over severities, and what they come to.

    Args:
        models: label → numbers with `corruption_errors`.
    """
    first = next(iter(models.values()))
    rows = []
    for name in first["corruption_errors"]:
        errors = [row["corruption_errors"][name] for row in models.values()]
        rows.append([name, *(number(sum(e) / len(e), 100, 2) for e in errors)])
    means = [number(row["mean_corruption_error"], 100, 2) for row in models.values()]
    rows.append(["mean corruption error", *means])
    if any(row["relative_corruption_error"] is not None for row in models.values()):
        relative = [number(row["relative_corruption_error"], 1, 3) for row in models.values()]
        rows.append(["relative to the baseline", *relative])
    return rows


def by_label(summary: dict[str, Any], roles: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the numbers of each model by what it is called.

    The teacher is the student's own; before it are the first of a chain and further assistants.
    """
    chain = enumerate(summary.get("chain") or [])
    before = {f"assistant {k}" if k else "first teacher": row for k, row in chain}
    return before | {label: summary[role] for role, label in roles.items() if summary.get(role)}


def number(value: float | None, scale: float, digits: int) -> str:
    """Return a number for a person, or a dash."""
    return "–" if value is None else f"{value * scale:,.{digits}f}"


def show(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    title: str,
    drop: Sequence[str] = (),
    rest: str = "",
) -> None:
    """Print a table that fits the terminal; where there is none, it is as wide as its rows.

    Where there is no room, words of a heading go below each other, then columns are left out, and
    it is said which. `COLUMNS` counts as a terminal's width, also where the output is a file.

    Args:
        columns: headings.
        rows: a cell for each; of a cell of two lines the second is of less weight.
        title: above the table.
        drop: headings that may be left out, the least important first.
        rest: where what is left out can be found.
    """
    console = Console()
    if not console.is_terminal and not os.environ.get("COLUMNS"):  # no width to fit into
        console = Console(width=10_000)
    table, left_out = fitted(columns, [list(row) for row in rows], title, drop, console.width)
    if console.width == 10_000:
        console = Console(width=max(80, wanted(table)))
    console.print(table)
    if left_out:
        print(f"no room for {', '.join(left_out)}: see {rest}")


def fitted(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str,
    drop: Sequence[str],
    width: int,
) -> tuple[Table, list[str]]:
    """Return a table of at most `width` characters, if it can be, and what is not in it."""
    table = built(columns, rows, title)
    if wanted(table) <= width:
        return table, []
    left_out: list[str] = []
    waiting = [name for name in drop if name in columns]
    while wanted(table := built(columns, rows, title, stacked=True)) > width and waiting:
        left_out.append(waiting.pop(0))
        gone = columns.index(left_out[-1])
        columns = [cell for place, cell in enumerate(columns) if place != gone]
        rows = [[cell for place, cell in enumerate(row) if place != gone] for row in rows]
    return table, left_out


def built(
    columns: Sequence[str], rows: Iterable[Sequence[str]], title: str, stacked: bool = False
) -> Table:
    """Return a table in which no number is broken; names may be."""
    table = Table(title=title, title_justify="left")
    rows = [list(row) for row in rows]
    for place, column in enumerate(columns):
        numeric = place > 0 and all(is_number(row[place]) for row in rows)
        heading = Text(column.replace(" ", "\n") if stacked else column)
        justify: Any = "right" if place else "left"
        table.add_column(heading, justify=justify, no_wrap=numeric, overflow="fold")
    for row in rows:
        table.add_row(*(cell_text(cell) for cell in row))
    return table


def is_number(cell: str) -> bool:
    """Whether a cell holds numbers, or nothing, that must not be broken."""
    return not any(character.isalpha() for character in cell) or cell == "failed"


def cell_text(cell: str) -> Text:
    """Return a cell as it is, with its second line of less weight."""
    value, line, below = cell.partition("\n")
    return Text.assemble(value, line, (below, "dim"))


def wanted(table: Table) -> int:
    """Return the characters that a table would take in a row."""
    return Console(width=10_000).measure(table).maximum
