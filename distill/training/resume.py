"""A run, or a sweep, that is started again goes on where it ended.

`resume=auto` is a run's, in the same `hydra.run.dir`; `sweep.resume=DIR` is that of all jobs of a
sweep. Both look into the run's directory: what has finished is not run again, what was interrupted
goes on from its last checkpoint, and what was left by another configuration is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from distill.config import read
from distill.config.keys import flat, is_bookkeeping, with_values
from distill.models.checkpoint import as_object, epochs_done, read_lightning
from distill.training import prolonging
from distill.training.callbacks.continuity import nothing_left
from distill.training.trainer import by_steps
from distill.utils.run_folder import METRICS, SUMMARY, by_epoch, read_history, read_summary

log = logging.getLogger(__name__)

COMPARED = ("student.name", "student.args", "objective.temperature")  # or found out by the run
EPOCHS = "trainer.max_epochs"
CHECKPOINTS = "checkpoints"
LAST = Path(CHECKPOINTS) / "last.ckpt"


def asked(cfg: DictConfig) -> str | None:
    """Return what a person has written so that this run may go on, or None."""
    if cfg.sweep.resume:
        return f"sweep.resume={cfg.sweep.resume}"
    return "resume=auto" if cfg.resume else None


def check(cfg: DictConfig) -> None:
    """Refuse a `resume` that could not find anything.

    Raises:
        ValueError: if it is not `auto`, or not for one run in a directory that stays the same.
    """
    if not cfg.resume:
        return
    if cfg.resume != "auto":
        raise ValueError(
            f"resume={cfg.resume} is unknown: it is auto; one checkpoint is ckpt_path=PATH"
        )
    if cfg.ckpt_path:
        raise ValueError("resume=auto finds the checkpoint itself: leave out ckpt_path")
    if not HydraConfig.initialized():
        return
    if read.swept():
        if not cfg.sweep.resume:
            raise ValueError("resume=auto is for one run: for a sweep give sweep.resume=DIR")
    elif "${now:" in str(OmegaConf.to_container(HydraConfig.get().run, resolve=False)["dir"]):  # type: ignore[index, call-overload]
        raise ValueError(
            "resume=auto needs a directory that is the same each time: give hydra.run.dir=DIR"
        )


def finished(cfg: DictConfig) -> float | list[float] | str | None:
    """Return what a run that may go on came to, if it has ended.

    Returns:
        What a sweeper is told of it; or, where another has ended in its folder, what is wrong, for
        people; or None if it is still to be run.
    """
    folder = Path(cfg.paths.output_dir)
    if not asked(cfg) or not (folder / SUMMARY).is_file():
        return None
    before = read_summary(folder / SUMMARY).get("config") or {}
    if prolongs(before, cfg):
        return None
    changed = difference(before, cfg)
    if changed:
        return f"{changed}; its numbers are kept" if cfg.sweep.resume else changed
    history = read_history(folder / METRICS)
    try:
        told = read.for_sweeper(cfg, lambda name: by_epoch(history, name)[1][-1])
    except IndexError:  # nothing was logged of it
        return None
    log.info("%s has been run before: there is nothing left to do", folder)
    return told


def prolongs(before: dict[str, Any], cfg: DictConfig) -> bool:
    """Whether a run goes on for more epochs than it was told before, and is the same in all else.

    Raises:
        ValueError: if what it was told before is no beginning of that.
    """
    then = as_object(before.get("trainer")).get("max_epochs")
    if by_steps(cfg) or not cfg.resume or not isinstance(then, int):
        return False
    if then >= cfg.trainer.max_epochs:
        return False
    if difference(before, cfg, but=EPOCHS):
        return False
    laid_out = prolonging.obstacle(cfg, then)
    if laid_out is None:
        return True
    folder = Path(cfg.paths.output_dir)
    bundle = folder / "student"
    start = os.path.relpath(bundle if bundle.is_dir() else folder / LAST)
    raise ValueError(
        f"{asked(cfg)}: {laid_out} was laid out for {EPOCHS}={then}, and more would have gone "
        f"otherwise from the beginning: student.checkpoint={start} starts another run from what it "
        "has learned, in another hydra.run.dir"
    )


def difference(before: dict[str, Any], cfg: DictConfig, but: str | None = None) -> str | None:
    """Return where a run was told otherwise before, or None if it was told the same.

    Args:
        before: what it was told before.
        cfg: what it is told now.
        but: a value that may differ.
    """
    then, now = flat(before), flat(read.plain(cfg))
    for name in sorted((then.keys() | now.keys()) - {but}):
        old, new = (None if v in ({}, []) else v for v in (then.get(name), now.get(name)))
        if old != new and not (is_bookkeeping(name) or found_out(name, cfg)):
            return (
                f"{asked(cfg)}: {Path(cfg.paths.output_dir).name} was run with "
                f"{name}={old}, and this {'sweep' if cfg.sweep.resume else 'run'} says {new}"
            )
    return None


def found_out(name: str, cfg: DictConfig) -> bool:
    """Whether a value is one that a run finds out for itself."""
    architecture = name.startswith(("student.name", "student.args"))
    return (
        (bool(cfg.student.checkpoint) and architecture)
        or (name == "objective.temperature" and cfg.objective.temperature == "auto")
        or (name == EPOCHS and by_steps(cfg))
    )


def fingerprint(cfg: DictConfig) -> str:
    """Return a hash of what a run was told, but for what `check_resume` compares itself."""
    told = [
        (name, value)
        for name, value in sorted(flat(read.plain(cfg)).items())
        if value not in ({}, [], None)
        and not is_bookkeeping(name)
        and not name.startswith(COMPARED)
        and not (name == EPOCHS and by_steps(cfg))
    ]
    return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()


def with_checkpoint(cfg: DictConfig) -> DictConfig:
    """Return the configuration of a run that goes on from its last checkpoint, if it has one.

    Raises:
        ValueError: if it was another that was interrupted there.
    """
    if not asked(cfg) or cfg.ckpt_path:
        return cfg
    folder = Path(cfg.paths.output_dir)
    found = latest(folder / CHECKPOINTS)
    if found is None:
        if cfg.resume:
            log.info("%s holds no checkpoint: from the beginning", folder)
        return cfg
    path, content = found
    check_same(path, content, cfg)
    log.info("going on from %s: %d epochs done", path, epochs_done(content, path))
    return with_values(cfg, {"ckpt_path": str(path)})


def latest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return a folder's last checkpoint; of those that can be read, the furthest."""
    found = []
    for path in sorted(folder.glob("*.ckpt"), key=lambda path: path.name != LAST.name):
        try:
            content = read_lightning(path)
        except ValueError as error:
            log.warning("%s; another is looked for", error)
            continue
        if path.name == LAST.name:
            return path, content
        found.append((path, content))
    return max(found, key=lambda one: one[1]["global_step"], default=None)


def check_same(path: Path, content: dict[str, Any], cfg: DictConfig) -> None:
    """Refuse a checkpoint of another configuration, saying where it differs."""
    metadata = as_object(content.get("distill"))
    if metadata.get("job") in (None, fingerprint(cfg)):
        return
    if prolongs(as_object(metadata.get("config")), cfg):
        log.info("%s=%d, more than before: nothing was laid out for fewer, so that the run goes on "
                 "as if it had been told at once", EPOCHS, cfg.trainer.max_epochs)  # fmt: skip
        return
    changed = difference(metadata["config"], cfg) if metadata.get("config") else None
    raise ValueError(
        f"{changed or asked(cfg)}: {path} was left by another configuration: "
        "remove it to begin anew"
    )


def left_behind(cfg: DictConfig) -> dict[str, Any]:
    """Return the checkpoint that a run which may go on goes on from; empty if it begins."""
    return read_lightning(Path(cfg.ckpt_path)) if cfg.ckpt_path and asked(cfg) else {}


def check_unchanged(cfg: DictConfig, left: dict[str, Any], learned_from: dict[str, Any]) -> None:
    """Refuse to go on under a teacher, or from images, that have changed since.

    Args:
        cfg: of the run.
        left: see `left_behind`.
        learned_from: what its student learns from → a hash of what that is now.
    """
    before = as_object(as_object(left.get("distill")).get("learned_from"))
    for source, then in before.items():
        if then != learned_from.get(source):
            raise ValueError(
                f"{asked(cfg)}: the {source} changed since {cfg.ckpt_path} was written: "
                "remove it to begin anew"
            )


def is_over(cfg: DictConfig, left: dict[str, Any]) -> bool:
    """Return whether what was left behind has nothing left to train, only to judge."""
    return bool(left) and nothing_left(left, cfg.trainer.max_epochs)
