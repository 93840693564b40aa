"""A sweep that is started again goes on where it ended (`sweep.resume=DIR`)."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from distill import config
from distill.models.checkpoint import as_object, epochs_done, read_lightning
from distill.report.leaderboard import FREE, flat
from distill.report.reading import METRICS, SUMMARY, by_epoch, read_history, read_summary

log = logging.getLogger(__name__)

COMPARED = ("student.name", "student.args", "objective.temperature")  # or found out by the run
LAST = Path("checkpoints") / "last.ckpt"


def finished(cfg: DictConfig) -> float | list[float] | str | None:
    """Return what a job of a resumed sweep came to, if it has ended.

    Returns:
        What a sweeper is told of it; or, where another job has ended in its folder, what is wrong,
        for people; or None if it is still to be run.
    """
    folder = Path(cfg.paths.output_dir)
    if not cfg.sweep.resume or not (folder / SUMMARY).is_file():
        return None
    changed = difference(read_summary(folder / SUMMARY).get("config") or {}, cfg)
    if changed:
        return f"{changed}; its numbers are set aside"
    history = read_history(folder / METRICS)
    try:
        told = config.for_sweeper(cfg, lambda name: by_epoch(history, name)[1][-1])
    except IndexError:  # nothing was logged of it
        return None
    log.info("%s has been run before", folder)
    return told


def difference(before: dict[str, Any], cfg: DictConfig) -> str | None:
    """Return where a job was told otherwise before, or None if it was told the same."""
    then, now = flat(before), flat(config.plain(cfg))
    for name in sorted(then.keys() | now.keys()):
        old, new = (None if v in ({}, []) else v for v in (then.get(name), now.get(name)))
        if old != new and not (name.startswith(FREE) or found_out(name, cfg)):
            return (
                f"sweep.resume={cfg.sweep.resume}: {Path(cfg.paths.output_dir).name} was run with "
                f"{name}={old}, and this sweep says {new}"
            )
    return None


def found_out(name: str, cfg: DictConfig) -> bool:
    """Whether a value is one that a run finds out for itself."""
    architecture = name.startswith(("student.name", "student.args"))
    return (bool(cfg.student.checkpoint) and architecture) or (
        name == "objective.temperature" and cfg.objective.temperature == "auto"
    )


def fingerprint(cfg: DictConfig) -> str:
    """Return a hash of what a job was told, but for what `config.check_resume` compares itself."""
    told = [
        (name, value)
        for name, value in sorted(flat(config.plain(cfg)).items())
        if value not in ({}, [], None) and not name.startswith((*FREE, *COMPARED))
    ]
    return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()


def go_on(cfg: DictConfig) -> None:
    """Let a job of a resumed sweep, which was interrupted, go on from its last checkpoint.

    Raises:
        ValueError: if it was another job that was interrupted there.
    """
    last = Path(cfg.paths.output_dir) / LAST
    if cfg.sweep.resume and not cfg.ckpt_path and last.is_file():
        content = read_lightning(last)
        if as_object(content.get("distill")).get("job") not in (None, fingerprint(cfg)):
            raise ValueError(
                f"sweep.resume={cfg.sweep.resume}: {last} was left by another configuration: "
                "remove it to begin anew"
            )
        done = epochs_done(content, last)
        if done < cfg.trainer.max_epochs:
            log.info("going on from %s: %d epochs done", last, done)
            cfg.ckpt_path = str(last)
