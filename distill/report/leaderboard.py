"""The jobs of a sweep as rows: the overrides of each, and what came of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence
from operator import ge
from pathlib import Path
from typing import Any

from distill.config.keys import flat, is_bookkeeping
from distill.config.resolvers import higher_is_better
from distill.metrics import mean_interval
from distill.utils.files import held_elsewhere
from distill.utils.reading import read_yaml
from distill.utils.run_folder import (
    ENDED,
    FAILED,
    RECORD,
    SUMMARY,
    jobs_in,
    read_overrides,
    read_summary,
)

METRICS = ("top1", "nll", "ece", "ece_after_scaling", "agreement")
AVERAGED = ("val_top1", "test_top1", "test_nll", "test_ece", "baseline_top1")
TEMPERATURE, SEED = "objective.temperature", "seed"
# The settings that bear on a student that is trained on labels alone.
ON_LABELS = ("student.", "optimizer.", "scheduler.", "trainer.", "data.", "condition.", SEED)
COSTS = ("params", "flops", "latency_ms")  # of a student, the last on the machine of the run
UNSHOWN = ("folder", "config", "validation", "interval")  # of a row: no columns
Row = dict[str, Any]
Points = list[tuple[float, float, float, int]]


def sweep_rows(folder: Path) -> list[Row]:
    """Return one row per job: its overrides, its validation and its test numbers.

    A job is named by where its folder lies in the sweep's, however deep.
    """
    going_on, jobs = held_elsewhere(folder), jobs_in(folder)
    names = [job.relative_to(folder).as_posix() for job in jobs]
    rows = [job_row(job, going_on) | {"job": name} for job, name in zip(jobs, names, strict=True)]
    overrides = differences(
        [r for j, r in zip(jobs, rows, strict=True) if not (j / RECORD).is_file()]
    )
    rows = [overrides.get(row["job"], {}) | row for row in rows]
    return with_baselines(with_front(with_one_latency(rows)))


def with_one_latency(rows: list[Row]) -> list[Row]:
    """Give students of one architecture one latency: the median of what their jobs measured.

    Jobs of one process share a measurement, others measured while other things went on.
    """
    latencies: dict[Any, list[float]] = {}
    for row in rows:
        if row.get("latency_ms"):
            latencies.setdefault((row["params"], row["flops"]), []).append(row["latency_ms"])
    for row in rows:
        if row.get("latency_ms"):
            row["latency_ms"] = statistics.median(latencies[row["params"], row["flops"]])
    return rows


def by_cost(rows: Sequence[Row], cost: str) -> list[tuple[str, float, float, float, int]]:
    """Return what each kind of student costs and how often it is right on test.

    Returns:
        `(name, cost, mean top-1, standard deviation, number of runs)` in ascending cost; the
        deviation of a single run is NaN.
    """
    settings = [name for name in varied(rows) if name.startswith("student")]
    kinds: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        if row.get(cost) and row.get("test_top1") is not None:
            values = [f"{name.removeprefix('student.')}={row[name]}" for name in settings
                      if row.get(name) is not None]  # fmt: skip
            name = ", ".join(values) or str(row["config"].get("student.name", "student"))
            kinds.setdefault((name, float(row[cost])), []).append(row["test_top1"])
    points = [
        (name, value, *mean_and_deviation(top1), len(top1)) for (name, value), top1 in kinds.items()
    ]
    return sorted(points, key=lambda kind: kind[1])


def job_row(job: Path, going_on: bool = False) -> Row:
    """Return the row of one job.

    Args:
        job: its folder.
        going_on: whether its sweep is being run.

    Returns:
        The row, whose `status` is `done`, `failed`, `running`, or `ended` without numbers.
    """
    row: Row = {"job": job.name, "status": "failed", "val_top1": "failed"}
    row |= overrides_of(job)
    if not (job / SUMMARY).is_file():
        status = unfinished(job, going_on)
        return row | {"status": status, "val_top1": None if status == "ended" else status}
    summary = read_summary(job / SUMMARY)
    student, baseline = summary["student"], summary.get("baseline") or {}
    row["status"] = "done"
    row["validation"] = summary.get("validation") or {}
    row["config"] = flat(summary.get("config") or {})
    decisive = ("top1", decider([row]), *goals_of(row))
    row |= {f"val_{name}": row["validation"].get(name) for name in decisive}
    row |= {f"test_{name}": student.get(name) for name in METRICS}
    row |= {f"baseline_{name}": baseline.get(name) for name in METRICS[:3]}
    row["interval"] = (student.get("intervals") or {}).get("top1")
    row |= {name: student.get(name) for name in COSTS}
    row["seconds"] = summary.get("seconds")
    # As the configuration has it, so that 8e-3 and 0.008 are one setting; `none` leaves {} there.
    values = {name: value for name, value in row["config"].items() if value != {}}
    return row | {name: values[name] for name in overrides_of(job) if name in values}


def unfinished(job: Path, going_on: bool) -> str:
    """Return the status of a job that has left no numbers."""
    if (job / ENDED).is_file():
        return "ended"
    running = held_elsewhere(job) or (going_on and not (job / FAILED).is_file())
    return "running" if running else "failed"


def differences(rows: Sequence[Row]) -> dict[str, Row]:
    """Return, of jobs without Hydra's record of their overrides, where they differ."""
    names = dict.fromkeys(name for row in rows for name in row["config"])
    differing = [
        name
        for name in names
        if not is_bookkeeping(name) and len({repr(row["config"].get(name)) for row in rows}) > 1
    ]
    first = ("job", "status")
    return {
        row["job"]: {name: row[name] for name in first}
        | {name: row["config"].get(name) for name in differing}
        for row in rows
    }


def with_baselines(rows: list[Row]) -> list[Row]:
    """Give runs that left out their baseline the one of another run, where it would be the same."""
    done = [row for row in rows if row["status"] == "done"]
    baselines = {baseline_of(row): row for row in done if row["baseline_top1"] is not None}
    for row in done:
        if row["baseline_top1"] is None and (other := baselines.get(baseline_of(row))):
            row |= {name: other[name] for name in (f"baseline_{m}" for m in METRICS[:3])}
    return rows


def baseline_of(row: Row) -> str:
    """Return all that decides the student without a teacher: itself, its budget and its data."""
    config = row["config"]
    own = [
        name for name in sorted(config) if name.startswith(ON_LABELS) and not is_bookkeeping(name)
    ]
    return repr([(name, config[name]) for name in own])


def goals_of(row: Row) -> list[str]:
    """Return the metrics of validation that a search weighs against each other, if any."""
    return [str(name).removeprefix("val/") for name in row["config"].get("sweep.metrics") or []]


def with_front(rows: list[Row]) -> list[Row]:
    """Mark the Pareto-optimal jobs of a search for several goals.

    A job is on the `front` (Pareto's, on validation) unless another is at least as good in every
    goal and better in one.
    """
    searched = [row for row in rows if row["status"] == "done" and goals_of(row)]
    for row in searched:
        rivals = (merits(other) for other in searched if goals_of(other) == goals_of(row))
        own = merits(row)
        beaten = any(rival != own and all(map(ge, rival, own)) for rival in rivals)
        row["front"] = "" if beaten else "yes"
    return rows


def merits(row: Row) -> list[float]:
    """Return a job's goals as numbers of which more is better."""
    return [merit(row["validation"].get(name), name) for name in goals_of(row)]


def decider(rows: Sequence[Row]) -> str:
    """Return the metric of validation that ranks jobs: top-1 where `optimized_metric` differs."""
    metrics = {str(row["config"].get("optimized_metric") or "val/top1") for row in rows}
    return metrics.pop().removeprefix("val/") if len(metrics) == 1 else "top1"


def merit(value: Any, name: str) -> float:
    """Return a metric's value as a number of which more is better."""
    if not isinstance(value, int | float):  # as JSON has what is not finite
        return -math.inf
    return value if higher_is_better(f"val/{name}") else -value


def overrides_of(job: Path) -> Row:
    """Return the overrides of a job that may decide its numbers, by name."""
    pairs = [override.split("=", 1) for override in read_overrides(job)]
    overrides = {name.lstrip("+~"): "".join(value) for name, *value in pairs}
    return {name: value for name, value in overrides.items() if not is_bookkeeping(name)}


def setting(row: Row, axis: str) -> str:
    """Return all that decides a job's numbers but its seeds and the axis, as one text."""
    config = row["config"]
    free = {axis, *filter(is_seed, config)}
    kept = [n for n in sorted(config) if n not in free and not is_bookkeeping(n)]
    return repr([(name, config[name]) for name in kept])


def is_seed(name: str) -> bool:
    """Whether a value, such as `data.seed`, only says which of the possible draws is made."""
    return name.rpartition(".")[2] == SEED


def seeds_of(row: Row) -> tuple[tuple[str, Any], ...]:
    """Return a job's seeds by name, of which any makes it another draw of its setting."""
    return tuple((name, value) for name, value in row["config"].items() if is_seed(name))


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Return every column any row has, in order of appearance."""
    return list(dict.fromkeys(key for row in rows for key in row if key not in UNSHOWN))


def varied(rows: Sequence[Row]) -> list[str]:
    """Return the overrides in which the jobs differ."""
    results = ("job", "sweep", "status", "seconds", "front", *COSTS)
    return [
        column
        for column in columns_of(rows)
        if column not in results
        and not column.startswith(("val_", "test_", "baseline_"))
        and len({str(row.get(column)) for row in rows}) > 1
    ]


def axis_of(rows: Sequence[Row]) -> str | None:
    """Return the override to draw numbers over: the temperature, or what else was varied most."""
    counts = {
        name: len({row.get(name) for row in rows})
        for name in varied(rows)
        if not is_seed(name) and all(as_number(row.get(name)) is not None for row in rows)
    }
    return (
        TEMPERATURE if TEMPERATURE in counts else max(counts, key=counts.__getitem__, default=None)
    )


def series_over(rows: Sequence[Row], axis: str, metric: str) -> dict[str, Points]:
    """Return mean and deviation of a test metric over seeds, for each setting of all the rest.

    Returns:
        Label → `(x, mean, standard deviation, number of seeds)` in ascending x; the deviation of a
        single seed is NaN. Of two runs that differ in nothing, the later counts.
    """
    rest = [name for name in varied(rows) if name != axis and not is_seed(name)]
    titles: dict[str, str] = {}
    series: dict[str, dict[float, dict[Any, float]]] = {}
    for row in rows:
        value, x = row.get(f"test_{metric}"), as_number(row.get(axis))
        if value is not None and x is not None:
            key = setting(row, axis)
            titles.setdefault(key, title_of(row, rest, titles.values()))
            seeds = series.setdefault(titles[key], {}).setdefault(x, {})
            seeds[seeds_of(row)] = value
    return {
        title: [
            (x, *mean_and_deviation(list(seeds.values())), len(seeds))
            for x, seeds in sorted(at.items())
        ]
        for title, at in series.items()
    }


def over_seeds(rows: Sequence[Row]) -> list[Row]:
    """Return mean and deviation over seeds of each setting, the best by `decider` first.

    Returns:
        `setting`, `seeds` (how many), the deciding metric and each of `AVERAGED` as `(mean,
        standard deviation)`, or None where a run lacks it; nothing where no setting has several
        seeds.
    """
    names = [name for name in varied(rows) if not is_seed(name)]
    runs: dict[str, dict[Any, Row]] = {}
    for row in rows:
        runs.setdefault(setting(row, SEED), {})[seeds_of(row)] = row
    if not any(len(by_seed) > 1 for by_seed in runs.values()):
        return []
    metric = decider(rows)
    decisive = f"val_{metric}"
    averaged: list[Row] = []
    for by_seed in runs.values():
        title = title_of(next(iter(by_seed.values())), names, [row["setting"] for row in averaged])
        averaged.append({"setting": title, "seeds": len(by_seed)})
        for name in dict.fromkeys((decisive, *AVERAGED)):
            values = [row.get(name) for row in by_seed.values()]
            present = [value for value in values if value is not None]
            complete = len(present) == len(values)
            averaged[-1][name] = mean_and_deviation(present) if complete else None
    return sorted(
        averaged, key=lambda row: merit((row[decisive] or (None,))[0], metric), reverse=True
    )


def gains(rows: Sequence[Row]) -> list[Row]:
    """Return how the student of each setting differs from the one without a teacher, over seeds.

    Returns:
        `setting`, `seeds` (how many) and, for `top1` and `nll`, `value`, the mean of the
        differences of the seeds, and its `interval`; only settings of two seeds with a baseline.
    """
    names = [name for name in varied(rows) if not is_seed(name)]
    runs: dict[str, dict[Any, Row]] = {}
    for row in rows:
        if row.get("baseline_top1") is not None and row.get("baseline_nll") is not None:
            runs.setdefault(setting(row, SEED), {})[seeds_of(row)] = row
    averaged: list[Row] = []
    for several in runs.values():
        compared = list(several.values())
        if len(compared) > 1:
            title = title_of(compared[0], names, [one["setting"] for one in averaged])
            averaged.append({"setting": title, "seeds": len(compared)})
            for metric in ("top1", "nll"):
                apart = [row[f"test_{metric}"] - row[f"baseline_{metric}"] for row in compared]
                ends = mean_interval(apart)
                averaged[-1][metric] = {"value": statistics.fmean(apart), "interval": ends}
    return averaged


def title_of(row: Row, names: Sequence[str], taken: Collection[str]) -> str:
    """Return a title for a setting, numbered where another has the same."""
    settings = [f"{name}={row[name]}" for name in names if row.get(name) is not None]
    title = ", ".join(settings) or "student"
    others = sum(one == title or one.startswith(f"{title} (") for one in taken)
    return f"{title} ({others + 1})" if others else title


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation, which for a single value is NaN."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def as_number(value: Any) -> float | None:
    """Return a finite number, or None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def gathered(paths: Sequence[Path]) -> list[Row]:
    """Return the rows of several runs and sweeps, with their `folder` and, if several, `sweep`.

    What only one job overrides is filled in from the configuration of the other.
    """
    rows = []
    for path in paths:
        jobs = [job_row(path)] if (path / SUMMARY).is_file() else sweep_rows(path)
        if not jobs:
            raise FileNotFoundError(f"{path} holds neither a finished run nor a sweep")
        single = (path / SUMMARY).is_file()
        label = {"sweep": path.name} if len(paths) > 1 and not single else {}
        rows += [row | label | {"folder": path if single else path / row["job"]} for row in jobs]
    overridden = {name for row in rows for name in overrides_of(row["folder"])}
    return with_baselines(with_one_latency([configured(row, overridden) for row in rows]))


def configured(row: Row, overridden: set[str]) -> Row:
    """Return a row with what its job did not override but had by default."""
    missing = sorted(overridden - row.keys())
    if not missing or row["status"] != "done":
        return row
    hydra = read_yaml(row["folder"] / ".hydra" / "hydra.yaml")
    choices = hydra["hydra"]["runtime"]["choices"] if hydra else {}
    return row | {name: choices.get(name) or row["config"].get(name) for name in missing}
