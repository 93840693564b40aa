"""Image files whose labels are in a table: a CSV file of path, label and, if there, split."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from distill.data.sources.contents import Listed, check_broken, read_splits
from distill.data.sources.folder import existing_folder, listed_files
from distill.data.sources.images import check_channels
from distill.data.sources.in_memory import in_memory
from distill.data.sources.listing import endings, relative, some
from distill.data.sources.packed import PackedStrings
from distill.data.sources.pieces import Pieces
from distill.data.sources.sizes import ModelSize
from distill.data.sources.splits import PARTS, Source, meaning, with_test_split
from distill.utils.files import resolved_path

COLUMNS = {
    "path": ("path", "file", "filename", "image"),
    "label": ("label", "class", "target"),
    "split": ("split", "set", "partition"),
}
DELIMITERS = ",;\t"
TRIED = 20  # rows by which the delimiter is inferred


@dataclass(frozen=True)
class Row:
    """One image of a table: the number of its line, its file, label and split."""

    line: int
    path: Path
    label: str
    split: str


def table(
    root: str,
    file: str,
    channels: int = 3,
    verify: str = "new",
    broken: str = "refuse",
    cache: str | None = None,
    resident: bool = False,
    image_size: int | Sequence[int] | None = None,
    model_size: ModelSize | None = None,
    num_workers: int = 0,
) -> Source:
    """Return images whose labels, and splits if it names them, are in a CSV file.

    Columns are found by their names (`COLUMNS`); without a header they are path, label and, if
    there, split. Values are separated by commas, semicolons or tabs. Labels that are all whole
    numbers are ordered as such. Splits go by the names that folders may have; without them all
    images are train, from which the splits are cut, and a lone held-out one is the test split.

    Args:
        root: the folder that paths are relative to.
        file: the table, in `root` or from the working directory.
        channels: 3 for colour, 1 for grey.
        verify: which images are opened before training, to find broken ones: `new`, `all` or
            `none`; see `read_splits`.
        broken: `refuse` broken and missing images, or `skip` them.
        cache: where to keep what the files hold; None reads them anew each time.
        resident: decode all images once and keep them in memory, see `in_memory`, which takes
            `image_size`, `model_size` and `num_workers`.
        image_size: side length in pixels, or height and width, of images that are kept in memory.
        model_size: what the model says of its images' size.
        num_workers: processes that decode images which are kept in memory.

    Raises:
        ValueError: if the table is not as it should be, a file has two labels, files are missing
            or broken, or memory has no room for the images.
        FileNotFoundError: if there is no such folder or table.
    """
    check_channels(channels)
    check_broken(broken)
    base = existing_folder(root)
    place = table_path(base, file)
    rows, again = distinct(place, read_rows(place, base))
    rows, missing = present(place, rows, broken)
    classes = class_order({row.label for row in rows})
    listed = {
        part: listed_rows(base, inside, classes, channels)
        for part in PARTS
        if (inside := [row for row in rows if row.split == part])
    }
    if "train" not in listed:
        raise ValueError(f"{place} has no row of train")
    parts, left_out = read_splits(listed, classes, verify, broken, cache)
    source = with_test_split(place.stem, classes, channels, parts)
    source.notes = [*again, *source.notes, *missing, *left_out]
    return in_memory(source, image_size, model_size, num_workers) if resident else source


def table_path(base: Path, file: str) -> Path:
    """Return where a table lies: in the folder of images or, if not there, where it is named."""
    place = resolved_path(file)
    for path in (base / place, place):
        if path.is_file():
            return path
    raise FileNotFoundError(f"data.file={file} is neither in {base} nor in the working directory")


def read_rows(place: Path, base: Path) -> list[Row]:
    """Return the rows of a table, without its header.

    Raises:
        ValueError: if it is no table of paths and labels.
    """
    lines = split_lines(place, text_of(place))
    columns, body = columns_of(place, lines)
    rows = []
    for number, cells in body:
        if len(cells) <= max(columns.values()):
            raise ValueError(f"{place}, line {number}: {len(cells)} values are too few")
        values = {name: cells[column].strip() for name, column in columns.items()}
        if not values["path"] or not values["label"]:
            raise ValueError(f"{place}, line {number}: path or label is empty")
        split = meaning(values.get("split", "train"))
        if split is None:
            raise ValueError(
                f"{place}, line {number}: the split {values['split']!r} is none of train, val, test"
            )
        rows.append(Row(number, file_of(base, values["path"]), values["label"], split))
    if not rows:
        raise ValueError(f"{place} has no rows")
    return rows


def text_of(place: Path) -> str:
    """Return a table's text, of UTF-8 or, where its first bytes say so, UTF-16."""
    content = place.read_bytes()
    code = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return content.decode(code)
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is no text in UTF-8: {error.reason}") from error


def split_lines(place: Path, text: str) -> list[tuple[int, list[str]]]:
    """Return the numbers and values of the lines that are not empty.

    The delimiter is the one that gives the most lines the same number of values, more than one.
    """

    def parsed(delimiter: str, most: int | None = None) -> list[tuple[int, list[str]]]:
        reader = csv.reader(text.splitlines(keepends=True)[:most], delimiter=delimiter)
        return [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]

    def fit(delimiter: str) -> tuple[int, int]:
        widths = [len(cells) for _, cells in parsed(delimiter, TRIED)]
        best = max(widths, key=widths.count, default=1)
        return (widths.count(best), best) if best > 1 else (0, best)

    try:
        delimiter = max(DELIMITERS, key=fit)
        if fit(delimiter)[0] == 0:
            raise ValueError(f"{place} has one column, where a path and a label are needed")
        return parsed(delimiter)
    except csv.Error as error:
        raise ValueError(f"{place} is no table: {error}") from error


def columns_of(
    place: Path, lines: Sequence[tuple[int, list[str]]]
) -> tuple[dict[str, int], Sequence[tuple[int, list[str]]]]:
    """Return the columns' places, and the lines below the header, if there is one."""
    head = [cell.strip().lower() for cell in lines[0][1]]
    matches: dict[str, list[int]] = {
        name: [column for column, cell in enumerate(head) if cell in names]
        for name, names in COLUMNS.items()
    }
    if not any(matches.values()):
        width = min(len(head), len(COLUMNS))
        has_split = width == 3 and all(len(c) > 2 and meaning(c[2]) for _, c in lines)
        return {"path": 0, "label": 1} | ({"split": 2} if has_split else {}), lines
    for name, columns in matches.items():
        if len(columns) > 1 or (not columns and name != "split"):
            *names, last = COLUMNS[name]
            raise ValueError(
                f"{place}: of the columns {', '.join(lines[0][1])} one should be the {name}, and "
                f"called {', '.join(names)} or {last}"
            )
    return {name: columns[0] for name, columns in matches.items() if columns}, lines[1:]


def file_of(base: Path, name: str) -> Path:
    """Return the file of a path in a table, also of one that was written on Windows."""
    path = base / name
    if "\\" in name and not path.exists():
        return base / name.replace("\\", "/")
    return path


def distinct(place: Path, rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Return each file's first row, and a note of further ones that say the same.

    Raises:
        ValueError: if a file has two labels or lies in two splits.
    """
    first: dict[Path, Row] = {}
    for row in rows:
        before = first.setdefault(Path(*row.path.parts), row)
        for what in ("label", "split"):
            one, other = getattr(before, what), getattr(row, what)
            if one != other:
                raise ValueError(
                    f"{place}, lines {before.line} and {row.line}: {row.path.name} has the {what}s "
                    f"{one} and {other}"
                )
    more = len(rows) - len(first)
    return list(first.values()), [f"{more} rows are there twice, and read once"] if more else []


def present(place: Path, rows: Sequence[Row], broken: str) -> tuple[list[Row], list[str]]:
    """Return the rows whose file is there, and a note of the others.

    Raises:
        ValueError: if files are missing and that is to be refused, or all are.
    """
    missing = [row for row in rows if not row.path.is_file()]
    if not missing:
        return list(rows), []
    names = some(str(row.path) for row in missing)
    what = "file is" if len(missing) == 1 else "files are"
    message = f"{place}: {len(missing)} {what} missing ({names})"
    if broken == "refuse" or len(missing) == len(rows):
        raise ValueError(f"{message}{why_missing(rows, missing)}; data.broken=skip leaves them out")
    return [row for row in rows if row.path.is_file()], [f"{message}, and left out"]


def why_missing(rows: Sequence[Row], missing: Sequence[Row]) -> str:
    """Return what may be amiss with paths that lead nowhere."""
    path = missing[0].path
    for ending in endings():
        if path.with_name(path.name + ending).is_file():
            return f"; their names lack {ending}"
    if missing[0] is rows[0] and rows[0].line == 1 and len(rows) > 1:
        return "; if the first line is a header, call its columns path and label"
    return ""


def class_order(labels: Iterable[str]) -> list[str]:
    """Return class names in order, by their value where all are whole numbers."""
    names = sorted(labels)
    if all(re.fullmatch(r"[+-]?[0-9]{1,18}", name) for name in names):
        names.sort(key=int)
    return names


def listed_rows(base: Path, rows: Sequence[Row], classes: list[str], channels: int) -> Listed:
    """Return the images of one split, in the table's order."""
    numbers = {name: number for number, name in enumerate(classes)}
    labels = torch.tensor([numbers[row.label] for row in rows], dtype=torch.long)
    files = PackedStrings.of(relative(row.path, base) for row in rows)
    return listed_files(Pieces(base, files), labels, channels)
