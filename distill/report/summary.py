"""The facts of a run, for `summary.json`."""

from __future__ import annotations

import logging
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from distill.data import DataModule
from distill.utils.files import save_arrays
from distill.utils.provenance import git_revision, versions

log = logging.getLogger(__name__)


def run_metadata(cfg: DictConfig, data: DataModule) -> dict[str, Any]:
    """Return how a run was made: command, configuration, data, versions, revision, seed."""
    overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *overrides]),
        "config": OmegaConf.to_container(cfg, resolve=True),
        "versions": versions(),
        "git": git_revision(Path(__file__).parent),
        "seed": cfg.seed,
        "data": data.source.name,
        "classes": data.classes,
        "images": {
            **{"train": len(data.train), "val": len(data.val), "test": len(data.test)},
            **({} if data.unlabeled is None else {"unlabeled": len(data.unlabeled)}),
        },
        "decoder": data.decoded_by("train"),
        "condition": condition_of(data),
        "notes": data.notes,
    }


def unlabeled_of(cfg: DictConfig, data: DataModule, trainer: pl.Trainer) -> dict[str, Any] | None:
    """Return which pictures without labels a run was shown, and how often; None where none was."""
    if data.unlabeled is None:
        return None
    batches = trainer.fit_loop.epoch_loop.batch_progress.total.completed * trainer.world_size
    return {
        "from": OmegaConf.to_container(cfg, resolve=True)["data"]["unlabeled"],  # type: ignore[index,call-overload]
        "images": len(data.unlabeled),
        "left_out": data.left_out,
        "share": data.unlabeled_per_batch / data.batch_size,
        "per_batch": data.unlabeled_per_batch,
        "labelled_per_batch": data.labeled_per_batch,
        "views_shown": batches * data.unlabeled_per_batch,
    }


def condition_of(data: DataModule) -> dict[str, Any] | None:
    """Return what was made hard, and what that came to in each split; None where nothing was."""
    if data.condition is None:
        return None
    counts = {name: change.counts() for name, change in data.corrupted.items()}
    return {"asked": asdict(data.condition), **counts}


def save_condition(path: Path, data: DataModule) -> None:
    """Write which samples of a split are kept, with their given and true labels, as an `.npz`.

    Its arrays are `SPLIT_index`, `SPLIT_given` and `SPLIT_true`, `[N]` each.
    """
    save_arrays(
        path,
        {
            f"{name}_{what}": values
            for name, change in data.corrupted.items()
            for what, values in (
                ("index", change.split.index),
                ("given", change.split.labels),
                ("true", change.true),
            )
        },
    )
