"""Models trained on labels, kept so that a teacher and a baseline are trained once."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from omegaconf import DictConfig
from torch import nn

from distill import config, report
from distill.data import DataModule
from distill.models.build import channels_last
from distill.models.bundle import load_student, read_checkpoint
from distill.report.reading import METRICS

log = logging.getLogger(__name__)

COSMETIC = ("accelerator", "log_every_n_steps", "compile", "_target_")
FOR_CALLBACKS = ("limit_val_batches", "check_val_every_n_epoch")
Train = Callable[[DictConfig, DataModule, str, Path], None]


def trained_once(cfg: DictConfig, data: DataModule, role: str, train_and_keep: Train) -> nn.Module:
    """Return a model trained on labels, from the cache if the same was trained before.

    Args:
        cfg: the configuration of the run that trains it.
        data: the run's data; seed and batch size are taken from `cfg`.
        role: `teacher` or `baseline`, for messages and the folder's name.
        train_and_keep: trains the model and writes its bundle into the folder that it is given.
    """
    data = data.with_options(seed=cfg.data.seed, batch_size=cfg.data.batch_size)
    kept = Path(cfg.paths.cache) / f"{role}-{fit_key(cfg, data)}"
    kept.parent.mkdir(parents=True, exist_ok=True)
    if kept.is_dir():
        log.info("%s: %s, trained before, from %s", role, cfg.student.name, kept)
        show_history(cfg, kept)
        return load_kept(kept)
    if config.processes(cfg) > 1:  # every rank takes part in training: a lock would wait for itself
        train_and_keep(cfg, data, role, kept)
        return load_kept(kept)
    with FileLock(f"{kept}.lock"):  # a parallel trial waits for this one's work
        if not kept.is_dir():
            train_and_keep(cfg, data, role, kept)
    return load_kept(kept)


def keep_history(cfg: DictConfig, kept: Path) -> None:
    """Keep what was logged while a model was trained."""
    shutil.copyfile(Path(cfg.paths.output_dir) / METRICS, kept / METRICS)


def show_history(cfg: DictConfig, kept: Path) -> None:
    """Put what was logged while a kept model was trained into this run's directory."""
    if (kept / METRICS).is_file():
        folder = Path(cfg.paths.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(kept / METRICS, folder / METRICS)


def load_kept(path: Path) -> nn.Module:
    """Load a kept model; its memory layout is not part of the file."""
    return channels_last(load_student(path))


def fit_key(cfg: DictConfig, data: DataModule) -> str:
    """Return a hash of everything that decides a fit's outcome."""
    values = config.plain(cfg)
    callbacks = {k: node for k, node in (values["callbacks"] or {}).items() if k != "progress"}
    ignored = COSMETIC if callbacks else COSMETIC + FOR_CALLBACKS
    trainer = {k: v for k, v in values["trainer"].items() if k not in ignored}
    decided = {key: values[key] for key in ("student", "optimizer", "scheduler", "seed")}
    decided |= {"trainer": trainer, "view": values["data"]["view"], "size": data.image_size}
    decided |= {"batch_size": data.batch_size, "data": data.fingerprint, "order": data.seed}
    decided |= {"channels": data.in_chans, "classes": data.num_classes}
    decided["gpu"] = cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()
    if cfg.student.checkpoint:  # a path may come to hold other weights
        decided["student"]["checkpoint"] = weights_digest(cfg.student.checkpoint)
    decided["callbacks"] = callbacks
    decided["versions"] = report.versions()
    text = json.dumps(decided, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_digest(path: str) -> str:
    """Return a hash of the weights in a checkpoint."""
    digest = hashlib.sha256()
    for name, tensor in sorted(read_checkpoint(path).weights.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
