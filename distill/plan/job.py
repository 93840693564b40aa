"""One job of a command, from its configuration to what it would take."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from pytorch_lightning.callbacks import ModelCheckpoint

from distill import run
from distill.config import build, read
from distill.config.keys import with_values
from distill.data import DataModule
from distill.data.sources.shards import ShardLoader
from distill.plan.fits import Fit, fits_of, stand_ins
from distill.plan.measure import Decoding, Trial, decoding_of, same_trial, tried
from distill.plan.total import Plan
from distill.teacher.room import expected_bytes
from distill.teacher.teacher import Teacher
from distill.training.cache import check_store, expected, rows, topk_of, views_per_sample
from distill.training.trainer import made_callbacks
from distill.training.untrained import Untrained
from distill.utils.memory import bytes_text
from distill.utils.sharing import Sharing


class Planner:
    """Plan jobs of one command; what several have in common is measured once.

    Args:
        work: a folder for what is written meanwhile.
        seconds: how long a loader of pictures is timed.
    """

    def __init__(self, work: Path, seconds: float) -> None:
        self.work, self.seconds = work, seconds
        self._made: dict[Hashable, Any] = {}  # data, by what they are made from
        self._decoding: dict[str, Decoding | None] = {}
        self._trials: dict[str, Trial] = {}

    def plan(self, cfg: DictConfig, name: str = "") -> Plan:
        """Return what a job would take.

        Raises:
            ValueError: for what its run would refuse before it trains anything.
        """
        cfg = run.checked(cfg)
        cfg = with_values(cfg, elsewhere(cfg, self.work))
        data = run.opened(cfg, Sharing(lambda: None, self._made))
        data.sharing = Sharing()  # a trial is alone
        cfg, _, untrained = run.prepared(cfg, data)
        teachers, fits = stand_ins(cfg, data), fits_of(cfg, data)
        decoding = self._once(
            self._decoding, build.shared_key(cfg, "data") + str(data.batch_size),
            lambda: decoding_of(data, self.seconds, untrained.trainer.strategy.root_device),
        )  # fmt: skip
        trials = {fit.role: self._trial(fit, teachers.get(fit.taught_by or "")) for fit in fits}
        store, kept = store_of(cfg, data, untrained)
        return Plan(
            name=name,
            cfg=cfg,
            fits=fits,
            trials=trials,
            decoding=decoding,
            answers=answers_key(cfg) if kept else None,
            store=store,
            store_bytes=store_bytes(cfg, data),
            facts={**facts_of(cfg, data), "checkpoints": checkpoints_kept(cfg)},
            data=build.shared_key(cfg, "data"),
            copies=copied_bytes(data),
        )

    def _trial(self, fit: Fit, teacher: Teacher | None) -> Trial:
        folder = self.work / f"trial-{len(self._trials)}"
        return self._once(
            self._trials, same_trial(fit, teacher), lambda: tried(fit, teacher, folder)
        )

    @staticmethod
    def _once(made: dict[str, Any], key: str, make: Callable[[], Any]) -> Any:
        if key not in made:
            made[key] = make()
        return made[key]


def elsewhere(cfg: DictConfig, work: Path) -> dict[str, Any]:
    """Return values with which a run leaves no model, answer or page of its own.

    A cache that is there is used: it knows what was trained. What is read of data is kept in it
    whether it is there or not, as the run would have to read, and to fetch, it again.
    """
    values: dict[str, Any] = {"paths.output_dir": str(work / "run"), "resume": None}
    values["sweep.resume"] = None
    for key, folder in (("paths.cache", cfg.paths.cache), ("store.path", cfg.store.path)):
        if not os.path.lexists(folder) and can_be_made(Path(folder)):
            values[key] = str(work / "cache")
    if "paths.cache" in values and cfg.data.get("cache") is not None:
        values["data.cache"] = str(cfg.data.cache)
    return values


def can_be_made(folder: Path) -> bool:
    """Whether a folder that is not there could be."""
    there = next(path for path in folder.absolute().parents if os.path.lexists(path))
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def facts_of(cfg: DictConfig, data: DataModule) -> dict[str, Any]:
    """Return how many images of which kind there are."""
    return {
        "data": data.source.name,
        "train": len(data.train),
        "val": len(data.val),
        "test": len(data.test),
        "unlabeled": len(data.unlabeled or ()),
        "classes": data.num_classes,
        "image_size": list(data.image_size),
        "teacher": read.teacher_name(cfg),
    }


def checkpoints_kept(cfg: DictConfig) -> int:
    """Return how many checkpoints a run has when it ends; −1 of each epoch is one each."""
    count = 0
    for callback in made_callbacks(cfg).values():
        if isinstance(callback, ModelCheckpoint):
            each = callback.save_top_k
            count += int(cfg.trainer.max_epochs) if each == -1 else each
        elif hasattr(callback, "every_n_train_steps"):
            count += 1
    return count


def store_of(cfg: DictConfig, data: DataModule, untrained: Untrained) -> tuple[str, bool]:
    """Return what a store would hold, or why there is none, and whether there is one."""
    if not read.teacher_name(cfg):
        return "no teacher", False
    mode = cfg.store.mode
    size = bytes_text(store_bytes(cfg, data))
    try:
        check_store(cfg, data, untrained.objective)
    except ValueError as error:
        return f"none ({error})", False
    if not mode:
        return f"off; one would take {size}", False
    folder = next(p for p in (Path(cfg.store.path), *Path(cfg.store.path).parents) if p.is_dir())
    free = shutil.disk_usage(folder).free
    if free < store_bytes(cfg, data):
        return f"none ({size}, and the disk has {bytes_text(free)} free)", False
    return f"store={mode} keeps {expected(cfg, data)}; its files take {size}", True


def store_bytes(cfg: DictConfig, data: DataModule) -> int:
    """Return the bytes of a complete store: every view of training, and validation once."""
    if not read.teacher_name(cfg):
        return 0
    kept = (data.num_classes, views_per_sample(cfg, data), cfg.store.dtype, topk_of(cfg, data))
    held_out = (data.num_classes, 1, cfg.store.dtype, topk_of(cfg, data))
    return expected_bytes(rows(data, "train"), *kept) + expected_bytes(rows(data, "val"), *held_out)


def copied_bytes(data: DataModule) -> int:
    """Return the bytes that copies of shards which lie elsewhere take on a machine."""
    loaders = (getattr(split, "load", None) for split in (data.train, data.val, data.test))
    files = [loader.files for loader in loaders if isinstance(loader, ShardLoader)]
    sizes = {shard.address: shard.size for one in files for shard in one.shards if shard.remote}
    return min([sum(sizes.values()), *(int(one.limit) for one in files)])


def devices_here(cfg: DictConfig) -> int:
    """Return how many devices a machine has: as many GPUs as this one, or a run's processes."""
    processes = read.processes(cfg) // int(cfg.trainer.num_nodes)
    return max(processes, torch.cuda.device_count() if read.on_gpu(cfg) else 1)


def answers_key(cfg: DictConfig) -> str:
    """Return a text that is the same for runs that read each other's kept answers."""
    chain = [read.plain(cfg.store), read.plain(cfg.assistants)]
    return build.shared_key(cfg, "teacher") + str(chain)


def device_name(cfg: DictConfig) -> str:
    """Return what a run would train on, for people."""
    if read.on_gpu(cfg):
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"a CPU, {threads} thread{'' if threads == 1 else 's'}"
