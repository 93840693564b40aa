"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

ROLES = {"teacher": "teacher", "baseline": "baseline", "student": "student"}


def print_table(summary: dict[str, Any]) -> None:
    """Print teacher, baseline and student with their accuracy, confidence, size and speed."""
    taught = {"student": "distilled"} if summary.get("teacher") else {}
    present = by_label(summary, ROLES | taught)
    ks = sorted({int(k[3:]) for row in present.values() for k in row if k[3:].isdigit()})
    ks = [k for k in ks if any(row.get(f"top{k}") is not None for row in present.values())]
    columns = ["", *(f"top-{k} %" for k in ks), "NLL", "ECE %", "parameters", "images/s"]
    rows = []
    for label, row in present.items():
        accuracies = [number(row.get(f"top{k}"), 100, 2) for k in ks]
        confidence = [number(row["nll"], 1, 4), number(row["ece"], 100, 2)]
        size = [f"{row['params']:,}", number(row.get("images_per_second"), 1, 0)]
        rows.append([label, *accuracies, *confidence, *size])
    show(columns, rows, title="test split, last epoch")
    corrupted = {k: row for k, row in present.items() if row.get("corruption_errors")}
    if corrupted:
        show(
            ["", *corrupted], corruption_rows(corrupted), title="errors on corrupted test images, %"
        )


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


def show(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str) -> None:
    """Print a table, wide enough for its rows where there is no terminal."""
    table = Table(title=title, title_justify="left")
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if position else "left")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:  # a file has no width to fit into
        console = Console(width=max(console.width, Console(width=10_000).measure(table).maximum))
    console.print(table)
