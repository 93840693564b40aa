"""The table over a sweep's jobs, printed and written as `sweep.csv`."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from distill.files import write_whole

METRICS = ("top1", "nll", "ece", "ece_after_scaling", "agreement")


class SweepTable(Callback):
    """End a multirun with its table; exit with code 2 if a job left no summary."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Gather the jobs' summaries from disk, whichever launcher ran them."""
        folder = Path(config.hydra.sweep.dir)
        rows = sweep_rows(folder)
        write_csv(folder / "sweep.csv", rows)
        print_rows(rows, folder)
        if any(row["status"] == "failed" for row in rows):
            raise SystemExit(2)


def sweep_rows(folder: Path) -> list[dict[str, Any]]:
    """Return one row per job: its overrides, its validation and its test numbers."""
    jobs = sorted(folder.glob("*/.hydra/overrides.yaml"), key=lambda p: numbered(p.parents[1].name))
    rows = []
    for file in jobs:
        job = file.parents[1]
        overrides = [str(o).split("=", 1) for o in OmegaConf.to_container(OmegaConf.load(file))]  # type: ignore[union-attr]
        row: dict[str, Any] = {"job": job.name, "status": "failed", "val_top1": "failed"}
        row |= {name.lstrip("+~"): "".join(value) for name, *value in overrides}
        path = job / "summary.json"
        if path.is_file():
            summary = json.loads(path.read_text(encoding="utf-8"))
            row["status"] = "done"
            row["val_top1"] = summary.get("validation", {}).get("top1")
            row |= {f"test_{name}": summary["student"].get(name) for name in METRICS}
            row["baseline_top1"] = (summary.get("baseline") or {}).get("top1")
            row["seconds"] = summary.get("seconds")
        rows.append(row)
    return rows


def numbered(name: str) -> tuple[int, str]:
    """Return a sort key that puts job 10 after job 9."""
    return (int(name), "") if name.isdigit() else (1 << 30, name)


def columns_of(rows: list[dict[str, Any]]) -> list[str]:
    """Return every column any row has, in order of appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows, whole or not at all."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, columns_of(rows))
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, table.getvalue())


def print_rows(rows: list[dict[str, Any]], folder: Path) -> None:
    """Print the rows, leaving out overrides that all jobs share."""
    from distill.report.table import show

    metrics = ("val_", "test_", "baseline_")
    shared = [c for c in columns_of(rows) if len({str(row.get(c)) for row in rows}) == 1]
    columns = [
        column
        for column in columns_of(rows)
        if column not in ("status", "seconds", "test_ece_after_scaling")
        and (column == "job" or column.startswith(metrics) or column not in shared)
    ]
    table = [[shown(row.get(column)) for column in columns] for row in rows]
    headers = [column.replace("_", " ") for column in columns]
    show(headers, table, title="sweep: val_ decides, test_ reports")
    print(f"written to {os.path.relpath(folder)}/sweep.csv")


def shown(value: Any) -> str:
    """Return a cell for a person."""
    return "–" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
