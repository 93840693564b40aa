"""Tables by class, such as what mistakes cost, read from a CSV file."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distill.utils.files import resolved_path


def read_costs(
    path: str | Path, classes: Sequence[str], what: str = "costs"
) -> tuple[Tensor, list[str]]:
    r"""Read a table of costs: one row for each true class, one column for each decision.

    The file is UTF-8 text with cells separated by commas; blank lines are skipped. Either it holds
    nothing but numbers, rows and columns in the order of the classes and any further actions last,
    or its first line names the columns and the first cell of each later line the true class, both
    in any order. It is read as the second kind if its very first cell, which stands above the true
    classes, is not a number. Costs may be negative: a gain.

    Args:
        path: the file.
        classes: the K class names in label order.
        what: the numbers, for messages: a table of another kind is read alike.

    Returns:
        The costs `[K, D]`, float64, with the columns of the classes first and in label order, and
        the D names of the columns; further actions without a name are `action 1`, `action 2`, ….

    Raises:
        ValueError: for anything wrong in the file, naming its line and column.
        OSError: if there is no such file or it cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        ...     _ = file.write("true,dog,cat,ask\ncat,5,0,1\ndog,0,2,1\n")
        ...     file.flush()
        ...     costs, names = read_costs(file.name, ["cat", "dog"])
        >>> names, costs.tolist()
        (['cat', 'dog', 'ask'], [[0.0, 5.0, 1.0], [2.0, 0.0, 1.0]])
    """
    path = resolved_path(path)
    lines = read_lines(path)
    if not lines:
        raise ValueError(f"{path} is empty: it needs one line of {what} for each class")
    if len(lines[0].cells) == 1:
        raise ValueError(
            f"{path} line {lines[0].number} is one cell, {lines[0].cells[0]!r}: "
            "separate the cells by commas"
        )
    if _is_number(lines[0].cells[0]):
        return _without_header(path, lines, classes, what)
    return _with_header(path, lines, classes, what)


@dataclass(frozen=True)
class Line:
    """A line's number in its file, and its cells."""

    number: int
    cells: list[str]


def read_lines(path: Path) -> list[Line]:
    """Return the cells of every line that is not blank, with the line's number in the file."""
    try:
        # Spreadsheets put a byte order mark before UTF-8.
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start}): save it as CSV in UTF-8"
        ) from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        lines = [Line(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except csv.Error as error:
        raise ValueError(f"{path} line {reader.line_num} is not CSV: {error}") from error
    return [line for line in lines if any(line.cells)]


def _without_header(
    path: Path, lines: list[Line], classes: Sequence[str], what: str
) -> tuple[Tensor, list[str]]:
    _check_rows(path, len(lines), classes, what)
    width = len(lines[0].cells)
    if width < len(classes):
        raise ValueError(
            f"{path} line {lines[0].number} has {width} columns for {len(classes)} classes: "
            "it needs at least one each"
        )
    actions = [f"action {number}" for number in range(1, width - len(classes) + 1)]
    rows = [_numbers(path, line, width) for line in lines]
    return torch.tensor(rows, dtype=torch.float64), [*classes, *actions]


def _with_header(
    path: Path, lines: list[Line], classes: Sequence[str], what: str
) -> tuple[Tensor, list[str]]:
    header, body = lines[0], lines[1:]
    if len(set(classes)) < len(classes):
        raise ValueError(f"{path} names its rows, but some classes share a name: {_twice(classes)}")
    names = _column_names(path, header, classes, what)
    costs = {}
    for line in body:
        name = line.cells[0]
        if name not in classes:
            raise ValueError(
                f"{path} line {line.number} column 1: {name!r} is not a class: "
                f"name one of {listed(classes)}"
            )
        if name in costs:
            raise ValueError(f"{path} line {line.number} column 1: a second row for {name!r}")
        costs[name] = _numbers(path, line, len(header.cells), skip=1)
    _check_rows(path, len(costs), classes, what, [name for name in classes if name not in costs])
    order = [header.cells[1:].index(name) for name in names]
    rows = [[costs[name][column] for column in order] for name in classes]
    return torch.tensor(rows, dtype=torch.float64), names


def _column_names(path: Path, header: Line, classes: Sequence[str], what: str) -> list[str]:
    """Return the names of the header, those of the classes first."""
    where, names = f"{path} line {header.number}", header.cells[1:]
    if "" in names:
        raise ValueError(f"{where} column {names.index('') + 2} has no name")
    if len(set(names)) < len(names):
        raise ValueError(f"{where} names a column more than once: {_twice(names)}")
    missing = [name for name in classes if name not in names]
    if missing:
        raise ValueError(
            f"{where} has no column for {listed(missing)} (it holds names, not {what}, because "
            f"its first cell {header.cells[0]!r} is not a number)"
        )
    return [*classes, *(name for name in names if name not in classes)]


def _check_rows(
    path: Path, rows: int, classes: Sequence[str], what: str, missing: Sequence[str] = ()
) -> None:
    if rows != len(classes):
        hint = f": there is none for {listed(missing)}" if missing else ""
        raise ValueError(
            f"{path} has {rows} rows of {what} for {len(classes)} classes, and needs one each{hint}"
        )


def _numbers(path: Path, line: Line, width: int, skip: int = 0) -> list[float]:
    if len(line.cells) != width:
        raise ValueError(
            f"{path} line {line.number} has {len(line.cells)} cells, where the first line has "
            f"{width}"
        )
    for column, cell in enumerate(line.cells[skip:], start=skip + 1):
        if not _is_number(cell) or not math.isfinite(float(cell)):
            raise ValueError(
                f"{path} line {line.number} column {column}: "
                f"{repr(cell) if cell else 'an empty cell'} is not a finite number"
            )
    return [float(cell) for cell in line.cells[skip:]]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _twice(names: Sequence[str]) -> str:
    return repr(next(name for place, name in enumerate(names) if name in names[:place]))


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return the first names, quoted, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more
