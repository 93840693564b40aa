"""The end of a sweep: its table, printed and written as `sweep.csv`, and its page."""

from __future__ import annotations

import csv
import io
import math
import os
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

# Nothing heavy: Hydra imports this file before it prints its help.
from distill.config.explain import refuse
from distill.sweep.alone import name_it
from distill.utils.files import plain_cell, write_whole
from distill.utils.run_folder import FAILED, jobs_in

# Where a terminal is narrow, these go first.
TO_DROP = ("test_agreement", "flops", "baseline_top1", "test_ece", "latency_ms", "test_nll",
           "params")  # fmt: skip


class SweepTable(Callback):
    """End a multirun with its table and page; exit with code 2 if a job failed."""

    own_jobs: set[str] | None = None  # the jobs of this command, where others may be in its folder

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Give the jobs of a resumed sweep their folders, or say what becomes of others there."""
        if "sweep" not in config:  # of an evaluation
            return
        if config.sweep.resume:
            self.own_jobs = take_up(config)
        else:
            say_what_becomes_of_others(config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Gather the jobs' summaries from disk, whichever launcher ran them."""
        from distill.report.leaderboard import sweep_rows

        folder = Path(config.hydra.sweep.dir)
        rows = sweep_rows(folder)
        if not rows:
            print(f"{folder} holds no job, and so there is no table")
            return
        statuses = {row["status"] for row in rows}
        if "done" in statuses or "ended" not in statuses:  # not of a task without numbers
            tell(rows, folder, config.get("report", False))
        if any(failed(row, folder) for row in rows if self.is_own(row["job"])):
            raise SystemExit(2)

    def is_own(self, job: str) -> bool:
        """Whether a job is one of this command, and not only in its folder."""
        return self.own_jobs is None or job in self.own_jobs


def failed(row: dict[str, Any], folder: Path) -> bool:
    """Whether a job failed now, also one that has numbers of before."""
    return row["status"] == "failed" or (folder / row["job"] / FAILED).is_file()


def say_what_becomes_of_others(config: DictConfig) -> None:
    """Say what becomes of an earlier sweep in the same folder."""
    folder = Path(config.hydra.sweep.dir)
    if there := len(jobs_in(folder)):
        print(f"{folder} holds {there} job{'s' * (there > 1)} of before: the results of those that "
              f"this sweep numbers alike become .previous; sweep.resume={folder} keeps them "
              "all")  # fmt: skip


def take_up(config: DictConfig) -> set[str] | None:
    """Give each job of a resumed sweep the folder it had, and say what is left to do."""
    folder = Path(config.hydra.sweep.dir)
    if folder.resolve() != Path(config.sweep.resume).resolve():
        refuse(ValueError(
            f"sweep.resume={config.sweep.resume} and hydra.sweep.dir={folder} are two folders: "
            "leave out hydra.sweep.dir"
        ))  # fmt: skip
    if not jobs_in(folder):
        print(f"{folder} holds no job: from the beginning")
        return None
    from distill.sweep import matching

    try:
        matched = matching.match(config, folder)
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
        refuse(error)
    print(f"{folder}: {matched}")
    if list(matched.folders) != [str(number) for number in range(len(matched.folders))]:
        name_it(config, "hydra.sweep.subdir", matching.subdir_of(matched.folders))
    return set(matched.folders)


def tell(rows: list[dict[str, Any]], folder: Path, page: bool) -> None:
    """Print and write a sweep's table and, if its jobs left numbers, its page."""
    write_csv(folder / "sweep.csv", rows)
    print_rows(rows)
    done = [row for row in rows if row["status"] == "done"]
    print_over_seeds(done)
    written = "sweep.csv"
    if page and done:
        from distill.report import write_sweep_page

        write_sweep_page([folder], folder / "report.html")
        written += ", report.html"
    print(f"{written} in {os.path.relpath(folder)}")
    print_winner(done, folder)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows, whole or not at all."""
    from distill.report.leaderboard import columns_of

    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, columns_of(rows), extrasaction="ignore")
    columns = columns_of(rows)
    writer.writerow({name: cell(name) for name in columns})
    writer.writerows({name: cell(row.get(name)) for name in columns} for row in rows)
    write_whole(path, table.getvalue())


def cell(value: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula; numbers stay what they are."""
    from distill.report.leaderboard import as_number

    return plain_cell(value) if isinstance(value, str) and as_number(value) is None else value


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print the rows, leaving out overrides that all jobs share."""
    from distill.report.leaderboard import COSTS, columns_of, decider, varied
    from distill.report.table import show

    shown_always = ("job", "front", "test_top1", "test_nll", "test_ece", "test_agreement",
                    "baseline_top1")  # fmt: skip
    differing = varied(rows)
    sizes = {row["params"] for row in rows if row.get("params")}
    columns = [
        column
        for column in columns_of(rows)
        if column in shown_always
        or column in differing
        or column.startswith("val_")
        or (column in COSTS and len(sizes) > 1)  # of one student they are the same
    ]
    table = [[shown(row.get(column)) for column in columns] for row in rows]
    decides = f"val_{decider([row for row in rows if row['status'] == 'done'])}"
    drop = [*TO_DROP, *(name for name in columns if name.startswith("val_") and name != decides)]
    show(
        [heading(column) for column in columns],
        table,
        title="sweep: val decides, test reports",
        drop=[heading(column) for column in drop],
        rest="sweep.csv",
    )


def heading(column: str) -> str:
    """Return what a column is called; an override keeps its name."""
    return column if "." in column else column.replace("_", " ")


def print_over_seeds(rows: list[dict[str, Any]]) -> None:
    """Print mean and deviation over seeds, where there are several."""
    from distill.report.leaderboard import gains, over_seeds
    from distill.report.table import show
    from distill.report.words import gain_sentences

    averaged = over_seeds(rows)
    if averaged:
        table = [[shown(value) for value in row.values()] for row in averaged]
        show(
            [heading(name) for name in averaged[0]],
            table,
            title="mean ± deviation over seeds, best on validation first",
            drop=["test ece", "test nll", "baseline top1"],
            rest="sweep.csv",
        )
        for sentence in gain_sentences(gains(rows)):
            print(sentence)


def print_winner(rows: list[dict[str, Any]], folder: Path) -> None:
    """Print which job is the best on validation, and where its student is."""
    from distill.report.leaderboard import decider, merit, varied

    metric = decider(rows) if rows else ""
    worth = {row["job"]: merit(row["validation"].get(metric), metric) for row in rows}
    best = max(worth.values(), default=-math.inf)
    if best == -math.inf:
        return
    first, *others = [row for row in rows if worth[row["job"]] == best]
    settings = ", ".join(f"{name}={first[name]}" for name in varied(rows) if name in first)
    jobs = ", ".join(row["job"] for row in others)
    tied = ["", f"; job {jobs} ties with it", f"; jobs {jobs} tie with it"][min(len(others), 2)]
    print(
        f"best on validation: job {first['job']}{f' ({settings})' if settings else ''}, "
        f"val {metric} {shown(first['validation'][metric])}, "
        f"test top1 {shown(first['test_top1'])}{tied}"
    )
    student = folder / first["job"] / "student"
    print(os.path.relpath(student if student.is_dir() else student.parent))


def shown(value: Any) -> str:
    """Return a cell for a person."""
    if isinstance(value, tuple):  # mean and deviation, which for a single seed is NaN
        return shown(value[0]) if value[1] != value[1] else " ± ".join(map(shown, value))
    return "–" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
