"""One self-contained HTML page for a run, and one for a sweep: made from files alone."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import numpy as np
import yaml
from markupsafe import Markup
from PIL import Image

from distill.config.resolvers import higher_is_better
from distill.metrics import wilson_interval
from distill.report import figures, words
from distill.report.card import unlabeled_text
from distill.report.leaderboard import (
    COSTS,
    Row,
    axis_of,
    by_cost,
    decider,
    gains,
    gathered,
    goals_of,
    merit,
    over_seeds,
    seeds_of,
    series_over,
    varied,
)
from distill.report.reading import Run, read_run, temperature_of
from distill.report.table import by_label
from distill.utils.errors import first_line
from distill.utils.files import write_whole
from distill.utils.run_folder import SUMMARY, by_epoch, jobs_in

PAGE = "report.html"
MANY, LOWEST = 100, 20  # classes beyond which those of the lowest recall are listed, and how many
BRIEF = 40  # characters of a class name beside a picture
ROLES = {"teacher": "teacher", "baseline": "without teacher", "student": "student"}


def write_pages(paths: Sequence[Path], output: Path) -> list[Path]:
    """Write the page of every run and sweep and, if several are given, one page over all of them.

    Args:
        paths: run directories and sweep directories.
        output: the page over several.

    Raises:
        FileNotFoundError: if a path holds neither a finished run nor a sweep.
        ValueError: if a file is damaged or of another version.
    """
    written = []
    for path in paths:
        finished = [job for job in jobs_in(path) if (job / SUMMARY).is_file()]
        check_jobs(path, finished)
        runs = [path] if (path / SUMMARY).is_file() else finished
        written += [write_run_page(run) for run in runs]
        if path not in runs:
            written.append(write_sweep_page([path], path / PAGE))
    return written + ([write_sweep_page(paths, output)] if len(paths) > 1 else [])


def check_jobs(sweep: Path, jobs: Sequence[Path]) -> None:
    """Refuse a job that is a link out of its sweep: its page would be written there."""
    for job in jobs:
        if not job.resolve().is_relative_to(sweep.resolve()):
            raise ValueError(f"{job} is a link out of its folder: name the run itself")


def write_run_page(folder: Path) -> Path:
    """Write a run's `report.html` from the files in its directory.

    Raises:
        FileNotFoundError: if the directory holds no run that has ended.
        ValueError: if a file is damaged or of another version.
    """
    run = read_run(folder)
    with explained(folder):
        page = render("run.html", **run_content(run))
    write_whole(folder / PAGE, page)
    return folder / PAGE


@contextmanager
def explained(what: Path) -> Iterator[None]:
    """Turn whatever a page's numbers lead to into one line, and keep their warnings quiet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of axes for numbers that no run has
        try:
            yield
        except (OSError, MemoryError):
            raise
        except Exception as error:  # what is no number, or too large a one, fails in many ways
            if isinstance(error, ValueError) and str(what) in str(error):  # it says where
                raise
            raise ValueError(
                f"{what}: summary.json or metrics.csv is not what this version writes "
                f"({first_line(error):.200}): distill-eval judges a student anew"
            ) from error


def run_content(run: Run) -> dict[str, Any]:
    """Return what the template of a run shows."""
    absent = dict.fromkeys(
        ("epochs", "seconds", "sparsity", "condition", "warnings")
    )  # of an evaluation
    summary = {**absent, **run.summary}
    models = by_label(summary, ROLES)
    if summary["student_best"] and summary["epochs"]["best"] != summary["epochs"]["last"]:
        models[f"student, epoch {summary['epochs']['best']}"] = summary["student_best"]
    evidence = summary["evidence"]
    return {
        "summary": summary,
        "student": summary["student"],
        "models": models,
        "sentences": [unbroken(sentence) for sentence in words.sentences(summary)],
        "unbalanced": words.is_unbalanced(summary),
        "differences": difference_rows(summary.get("comparisons") or {}),
        "by_class": class_rows(summary),
        "ks": top_ks(models),
        "reliability": reliability_figures(summary),
        "scaling": scaling_figures(summary),
        "risk": figures.risk_coverage(
            {role: model["risk_coverage"] for role, model in evidence["models"].items()}
        ),
        "learning": learning_figures(run),
        "confusion": confusion_content(evidence["confusion"]["matrix"], summary["classes"]),
        "pairs": evidence["confusion"]["pairs"],
        "classes": summary["classes"],
        "unlabeled": unlabeled_text(summary),
        "examples": with_images(evidence["examples"], run.images),
        "config": yaml.safe_dump(summary["config"], sort_keys=False, allow_unicode=True),
        "files": [name for name in LEFT_BEHIND if (run.folder / name).exists()],
    }


def unbroken(sentence: str) -> str:
    """Return a sentence in which a line ends neither within “95 %” nor within “p = 0.01”."""
    return re.sub(r"(?<=\d) (?=%)|(?<=p) (?=[=<])|(?<=[=<]) (?=\d)", "\u00a0", sentence)


def difference_rows(comparisons: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the differences of the student from each other model, a row for each number."""
    roles = [role for role in words.OTHERS if role in comparisons]
    if not roles:
        return None
    every = [comparisons[role]["differences"] for role in roles]
    ks = sorted(int(key[3:]) for key in every[0] if key[:3] == "top")
    names = [(f"top-{k}, points", f"top{k}", 100, 2) for k in ks]
    names += [("balanced accuracy, points", "balanced_accuracy", 100, 2), ("NLL", "nll", 1, 4),
              ("Brier", "brier", 1, 4), ("ECE, points", "ece", 100, 2)]  # fmt: skip
    return {
        "others": [words.OTHERS[role] for role in roles],
        "rows": [
            (heading, [difference_cell(differences[key], scale, digits) for differences in every])
            for heading, key, scale, digits in names
        ],
    }


def difference_cell(difference: Mapping[str, Any], scale: float, digits: int) -> dict[str, Any]:
    """Return a difference and its interval as they are shown, and whether it is clear of zero."""
    ends: Sequence[float] = difference["interval"] or ()
    numbers = (difference["value"], *ends)
    value, *shown = (f"{scale * number:+z.{digits}f}".replace("-", "−") for number in numbers)
    surely = bool(ends) and not ends[0] <= 0 <= ends[1]
    return {"value": value, "ends": " to ".join(shown), "surely": surely}


def class_rows(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the classes of the test split with each model's recall; of many, the lowest."""
    if not summary.get("majority"):  # of an earlier version
        return None
    counts, recall = summary["majority"]["counts"], summary["student"]["recall"]
    there = [k for k, count in enumerate(counts) if count]
    listed = sorted(there, key=lambda k: recall[k])[:LOWEST] if len(there) > MANY else there
    roles = [role for role in ROLES if summary.get(role)]
    return {
        "models": [ROLES[role] for role in roles],
        "lowest": len(listed) if len(listed) < len(there) else None,
        "of": len(there),
        "absent": len(counts) - len(there),
        "rows": [
            {
                "name": summary["classes"][k],
                "count": counts[k],
                "recall": [(ROLES[role], summary[role]["recall"][k]) for role in roles],
                "ends": wilson_interval(round(recall[k] * counts[k]), counts[k]),
            }
            for k in listed
        ],
    }


def write_sweep_page(paths: Sequence[Path], output: Path) -> Path:
    """Write a leaderboard over runs and sweeps, which links to the page of each run.

    Raises:
        FileNotFoundError: if a path holds neither a finished run nor a sweep.
        ValueError: if a file is damaged.
    """
    with explained(paths[0]):
        page = render("sweep.html", **sweep_content(paths, output))
    write_whole(output, page)
    return output


def sweep_content(paths: Sequence[Path], output: Path) -> dict[str, Any]:
    """Return what the template of a sweep shows."""
    rows = gathered(paths)
    done = [row for row in rows if row["status"] == "done"]
    metric = decider(done)

    def worth(row: Row) -> float:
        return merit(row["validation"].get(metric), metric)

    ranked = sorted(done, key=worth, reverse=True)
    best = max(map(worth, done), default=-math.inf)
    averaged, axis = over_seeds(done), axis_of(done)
    goals = list(dict.fromkeys(name for row in done for name in goals_of(row)))
    on_front = [row["job"] for row in done if row.get("front")]
    return {
        "title": ", ".join(path.resolve().name for path in paths),
        "columns": (["sweep"] if any("sweep" in row for row in rows) else []) + varied(done),
        "rows": [row | {"link": link_to(row["folder"], output.parent)} for row in ranked],
        "metric": metric,
        "order": "descending" if higher_is_better(f"val/{metric}") else "ascending",
        "decided": best > -math.inf,
        "ties": sum(worth(row) == best for row in ranked),
        "failed": [row for row in rows if row["status"] == "failed"],
        "running": sum(row["status"] == "running" for row in rows),
        "seeds": max((row["seeds"] for row in averaged), default=1),
        "averaged": averaged,
        "gains": [unbroken(sentence) for sentence in words.gain_sentences(gains(done))],
        "axis": axis,
        "decides": validation_columns([metric]),
        "goals": validation_columns(dict.fromkeys([metric, *goals])),
        "front": {"goals": goals, "jobs": on_front} if on_front else None,
        "drawn": [sweep_figure(done, axis, metric) for metric in SHOWN] if axis else [],
        "costs": [figures.over_cost(cost, by_cost(done, cost)) for cost in differing_costs(done)],
    }


def differing_costs(rows: Sequence[Row]) -> list[str]:
    """Return the costs to draw accuracy over: all of them where students differ, else none."""
    costs = [cost for cost in COSTS if any(row.get(cost) for row in rows)]
    sizes = {(row.get("params"), row.get("flops")) for row in rows if row.get("params")}
    return costs if len(sizes) > 1 else []


def validation_columns(metrics: Iterable[str]) -> list[tuple[str, str, int]]:
    """Return key, heading and factor of the columns of validation beside top-1, which is there."""
    return [(f"val_{name}", f"validation {name}", 1) for name in metrics if name != "top1"]


def sweep_figure(rows: Sequence[Row], axis: str, metric: str) -> figures.Figure:
    """Return a metric over what a sweep varied, with the mean of the students without teacher."""
    by_seed: dict[Any, set[float]] = {}
    for row in rows:
        if (value := row[f"baseline_{metric}"]) is not None:
            by_seed.setdefault(seeds_of(row), set()).add(value)
    baselines = [value for values in by_seed.values() for value in values]
    shared = baselines and all(len(values) == 1 for values in by_seed.values())
    reference = sum(baselines) / len(baselines) if shared else None
    return figures.over_axis(metric, axis, series_over(rows, axis, metric), reference)


def link_to(folder: Path, start: Path) -> str | None:
    """Return a relative link to a run's page, if it has one."""
    page = folder / PAGE
    return quote(Path(os.path.relpath(page, start)).as_posix()) if page.is_file() else None


SHOWN = ("top1", "nll", "ece")
LEFT_BEHIND = (
    "summary.json",
    "predictions.npz",
    "condition.npz",
    "metrics.csv",
    "student",
    "student_best",
    "checkpoints",
)


def top_ks(models: Mapping[str, Mapping[str, Any]]) -> list[int]:
    """Return the k whose top-k accuracy some model has."""
    names = {name for numbers in models.values() for name in numbers if numbers[name] is not None}
    return sorted(int(name[3:]) for name in names if name[:3] == "top" and name[3:].isdigit())


def reliability_figures(summary: Mapping[str, Any]) -> list[figures.Figure]:
    """Return a diagram of each model as it is, and of the student after scaling."""
    models = summary["evidence"]["models"]
    student, numbers = models["student"], summary["student"]
    drawn = [
        figures.reliability(
            "student", "student", student["reliability"], numbers["ece"], "reliability-student"
        )
    ]
    if student["reliability_after_scaling"]:
        title = f"student, logits ÷ {numbers['temperature_star']:.3g}"
        bins, ece = student["reliability_after_scaling"], numbers["ece_after_scaling"]
        drawn.append(figures.reliability("student", title, bins, ece, "reliability-scaled"))
    for role in ("teacher", "baseline"):
        if role in models:
            bins, ece = models[role]["reliability"], summary[role]["ece"]
            name = f"reliability-{role}"
            drawn.append(figures.reliability(role, ROLES[role], bins, ece, name))
    return drawn


def scaling_figures(summary: Mapping[str, Any]) -> list[figures.Figure]:
    """Return NLL and ECE over the scaling temperature."""
    models = summary["evidence"]["models"]
    curves = {role: models[role]["scaling"] for role in models}
    chosen = {role: summary[role]["temperature_star"] for role in models}
    return [figures.curve_over_temperature(curves, metric, chosen) for metric in ("nll", "ece")]


def learning_figures(run: Run) -> list[figures.Figure]:
    """Return accuracy and loss over epochs; none for a run that trained nothing."""
    if not run.history:
        return []
    temperature, drawn = temperature_of(run), []
    for name, metrics in (
        ("top-1 on validation", {"student": "val/top1"}),
        ("loss", {"validation": "val/loss", "train": "train/loss"}),
        ("NLL on validation", {"student": "val/nll"}),
    ):
        curves = {title: by_epoch(run.history, metric) for title, metric in metrics.items()}
        if "student" in curves and run.summary["baseline"]:
            curves["without teacher"] = by_epoch(run.baseline_history, metrics["student"])
        curves = {title: points for title, points in curves.items() if points[0]}
        if curves:
            drawn.append(figures.learning(name, curves, temperature))
    return drawn


def confusion_content(
    matrix: Sequence[Sequence[int]] | None, classes: Sequence[str]
) -> list[dict[str, Any]] | None:
    """Return the rows of a confusion matrix, each cell with its share of the row."""
    if matrix is None:
        return None
    return [
        {
            "name": classes[i],
            "cells": [
                {"count": n, "share": n / max(sum(row), 1), "right": i == j, "as": classes[j]}
                for j, n in enumerate(row)
            ],
        }
        for i, row in enumerate(matrix)
    ]


def with_images(
    examples: Sequence[Any], images: Sequence[np.ndarray]
) -> list[tuple[Any, str | None]]:
    """Return each example with its image, or with none where the images are not these."""
    matched = len(images) == len(examples)
    uris = [data_uri(image) for image in images] if matched else [None] * len(examples)
    return list(zip(examples, uris, strict=True))


def data_uri(image: np.ndarray) -> str:
    """Return an image `[H, W, C]` as a PNG within a page."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def render(template: str, **content: Any) -> str:
    """Return a page of the template of that name."""
    return rendered(environment().get_template(template), **content)


def rendered(template: jinja2.Template, **content: Any) -> str:
    """Return a page that needs nothing but itself, and may not ask for more."""
    script = asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = template.render(
        style=Markup(asset("style.css")),
        script=Markup(script),
        policy="default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'",
        **content,
    )
    return page.encode("utf-8", "replace").decode()  # half a surrogate pair is no character


def asset(name: str) -> str:
    """Return a file that lies beside the templates."""
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


@cache
def environment() -> jinja2.Environment:
    """Return the templates' environment: whatever comes from data is escaped."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("distill.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"percent": percent, "number": number, "amount": amount, "brief": brief}
    return made


def brief(name: str) -> str:
    """Return the beginning of a class name that is longer than a picture is wide."""
    return name if len(name) <= BRIEF else name[: BRIEF - 1].rstrip(" ,") + "…"


def percent(value: float | None, digits: int = 2) -> str:
    """Return a share in percent."""
    return "–" if value is None else f"{100 * value:z.{digits}f}"


def number(value: float | None, digits: int = 4) -> str:
    """Return a number to some digits after the point."""
    return "–" if value is None else f"{value:z,.{digits}f}"


def amount(value: float | None, unit: str = "") -> str:
    """Return a large number with three digits and a prefix: 1.24 M."""
    if value is None:
        return "–"
    power = min(int(math.log10(max(value, 1))) // 3, 4)
    return f"{value / 1000**power:.3g} {'kMGT'[power - 1] if power else ''}{unit}".rstrip()
