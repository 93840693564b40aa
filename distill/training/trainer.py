"""The trainer of a run: its callbacks, loggers and flags, and what is refused of them."""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    ModelCheckpoint,
    ProgressBar,
    WeightAveraging,
)
from pytorch_lightning.loggers import CSVLogger, Logger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from distill.config import library, read
from distill.config.build import make
from distill.config.keys import with_values
from distill.config.overrides import closest
from distill.config.read import on_gpu, plain, present, processes, teacher_name
from distill.data import DataModule
from distill.data.sources.judged import named
from distill.models.checkpoint import as_object, epochs_done, read_lightning, student_weights
from distill.objective.objective import Objective
from distill.training.callbacks.annealing import Annealing
from distill.training.callbacks.averages import UntilAveraged
from distill.training.callbacks.checkpoints import LatestCheckpoint, StopWhenTold, WholeCheckpoints
from distill.training.callbacks.continuity import Continuity
from distill.training.callbacks.fake_quantize import FakeQuantize
from distill.training.callbacks.finite import FiniteLoss
from distill.training.callbacks.last_step import LastStep
from distill.training.callbacks.progress import EpochLines
from distill.training.callbacks.rate import LearningRate
from distill.training.callbacks.sparsity import check_averaging
from distill.training.callbacks.speed import Speed
from distill.training.callbacks.step_losses import StepLosses
from distill.training.module import (
    DEFAULT_TOPK,
    create_optimizer,
    create_schedule,
    has_schedule,
    logged_names,
    resolve_topk,
)
from distill.utils.errors import first_line
from distill.utils.sharing import Sharing

log = logging.getLogger(__name__)

MANY = 1000  # updates in an epoch, where a schedule is only tried
RECIPE = ("opt", "lr", "weight_decay", "momentum", "betas", "eps", "layer_decay")


def check_trainer(cfg: DictConfig) -> None:
    """Refuse trainers under which a run could not end with its numbers."""
    trainer = cfg.trainer
    if "fsdp" in str(trainer.strategy).lower():
        raise ValueError(
            f"trainer.strategy={trainer.strategy} would leave each device a piece of the student: "
            "use ddp; where the teacher needs the memory, ask it ahead with distill-store"
        )
    if any(word in str(trainer.strategy) for word in ("fork", "spawn", "notebook")):
        raise ValueError(
            f"trainer.strategy={trainer.strategy} leaves the results in another process: use ddp"
        )
    every, interval = trainer.check_val_every_n_epoch, trainer.get("val_check_interval")
    if every is None and not isinstance(interval, int):
        raise ValueError(
            "trainer.check_val_every_n_epoch=null counts batches: give trainer.val_check_interval=N"
        )
    if every is not None and not 1 <= every <= (trainer.max_epochs or 0):
        raise ValueError(
            f"trainer.max_epochs={trainer.max_epochs} with trainer.check_val_every_n_epoch="
            f"{trainer.check_val_every_n_epoch} never validates"
        )
    if trainer.limit_val_batches == 0:
        raise ValueError("trainer.limit_val_batches=0 leaves nothing to choose the best epoch by")
    if by_steps(cfg):
        for name in ("min_epochs", "min_steps"):
            if trainer.get(name) is not None:
                raise ValueError(
                    f"trainer.{name}={trainer[name]}: trainer.max_steps={trainer.max_steps} says "
                    "already when training ends: leave one out"
                )
    library.check_trainer(map(str, trainer))


def by_steps(cfg: DictConfig) -> bool:
    """Whether a number of updates says how long training is, and not one of epochs."""
    return (cfg.trainer.get("max_steps") or -1) > 0


def with_length(cfg: DictConfig, data: DataModule) -> DictConfig:
    """Return a configuration whose `max_epochs` are those that `max_steps` begins, if it is given.

    So it takes their place wherever the length of training counts.
    """
    if not by_steps(cfg):
        return cfg
    epochs = math.ceil(cfg.trainer.max_steps / updates_per_epoch(cfg, data))
    return with_values(cfg, {"trainer.max_epochs": epochs})


def check_validation(cfg: DictConfig, data: DataModule) -> None:
    """Refuse to validate after so many batches that there are not, or none."""
    every, interval = cfg.trainer.check_val_every_n_epoch, cfg.trainer.get("val_check_interval")
    if interval is None:
        return
    each = batches_per_epoch(cfg, data)
    there = each if every is not None else each * cfg.trainer.max_epochs
    given = f"trainer.val_check_interval={interval}"
    if isinstance(interval, int) and interval > there:
        wider = ", or trainer.check_val_every_n_epoch=null to count on over epochs"
        raise ValueError(
            f"{given} never validates: there are {there:,} batches"
            f"{' in an epoch' if every is not None else ''}; give fewer"
            f"{wider if every is not None else ''}"
        )
    if not isinstance(interval, int) and int(interval * each) < 1:
        raise ValueError(f"{given} of {each:,} batches is less than one: give more, or a number")


def check_unlabeled(cfg: DictConfig, data: DataModule, objective: Objective) -> None:
    """Refuse unlabelled pictures of which no term of the objective makes anything."""
    if data.unlabeled is None:
        return
    moved = {annealing.value for annealing in schedules(cfg, objective)}
    if not objective.teaches_unlabeled(moved):
        raise ValueError(
            "data.unlabeled: no term of this objective that has a weight learns from the teacher "
            "without reading labels: give one that does, such as objective=kd, or no such pictures"
        )


def schedules(cfg: DictConfig, objective: Objective) -> list[Annealing]:
    """Return what moves the objective's values: `annealing`, and the objective's own schedules.

    One whose end is null has nowhere to go: what it would move is not in use.

    Raises:
        ValueError: if two move the same value, of which the later one would win unseen.
    """
    nodes = [("annealing", cfg.annealing)] if cfg.annealing else []
    own = present(cfg.objective.get("schedules"))
    nodes += [(f"objective.schedules.{k}", v) for k, v in own if v.get("end", 1.0) is not None]
    moved = [make(node, label) for label, node in nodes]
    movers: dict[str, str] = {}
    for (label, _), annealing in zip(nodes, moved, strict=True):
        annealing.check(objective)
        other = movers.setdefault(annealing.value, label)
        if other != label:
            raise ValueError(
                f"{other} and {label} both move {annealing.value}: set {label}=null, or change it"
            )
    return moved


def compile_model(cfg: DictConfig, model: nn.Module) -> None:
    """Let a model be compiled at its first call, where `trainer.compile` says so."""
    if mode := cfg.trainer.get("compile"):
        try:
            model.compile(mode=None if mode is True else mode)
        except RuntimeError as error:
            raise ValueError(f"trainer.compile={mode}: {first_line(error)}") from error


def check_compile(cfg: DictConfig) -> None:
    """Refuse a `trainer.compile` that torch does not take here."""
    compile_model(cfg, nn.Identity())


def build_trainer(
    cfg: DictConfig,
    objective: Objective,
    named: dict[str, pl.Callback],
    sharing: Sharing,
) -> pl.Trainer:
    """Return a trainer with the configured loggers, these callbacks, and annealing."""
    callbacks = with_ours(cfg, objective, named, sharing)
    folder = Path(cfg.paths.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    history, others = CSVLogger(str(folder), name="", version=""), loggers_beside(cfg, folder)
    callbacks.append(Continuity(history))
    if others:
        callbacks.append(StepLosses(others, cfg.trainer.log_every_n_steps))
    own: dict[str, Any] = {}
    kept_back = (*library.OURS, "max_steps")  # which is the callback's
    if on_gpu(cfg) and not cfg.trainer.deterministic and "benchmark" not in cfg.trainer:
        own["benchmark"] = True  # batches have one shape: the fastest kernels are looked for once
    return make(
        OmegaConf.masked_copy(cfg.trainer, [key for key in cfg.trainer if key not in kept_back]),
        "trainer",
        callbacks=callbacks,
        logger=[history, *others],
        plugins=[WholeCheckpoints()],
        default_root_dir=str(folder),
        use_distributed_sampler=False,  # the data module gives each rank its share
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
        enable_progress_bar=any(isinstance(c, ProgressBar) for c in callbacks),
        **own,
    )


def with_ours(
    cfg: DictConfig, objective: Objective, named: dict[str, pl.Callback], sharing: Sharing
) -> list[pl.Callback]:
    """Return the configured callbacks, and those that every run has, in the order they need.

    Of runs that share a process none has a bar: there is only one line for it.
    """
    if sharing.active:
        bars = [name for name, callback in named.items() if isinstance(callback, ProgressBar)]
        named |= {name: EpochLines() for name in bars}
    # The latest state comes last, and holds what the others have kept.
    callbacks = sorted(named.values(), key=lambda callback: isinstance(callback, LatestCheckpoint))
    check_averaging(callbacks)
    averages = [callback for callback in callbacks if isinstance(callback, WeightAveraging)]
    if averages:
        callbacks.insert(0, UntilAveraged(averages))
    if cfg.trainer.get("compile") and any(isinstance(c, FakeQuantize) for c in callbacks):
        raise ValueError("callbacks.fake_quantize needs trainer.compile=false")
    callbacks += [Speed(sharing.clock), LearningRate(), FiniteLoss(cfg.on_nan)]
    if by_steps(cfg):
        callbacks.insert(0, LastStep(cfg.trainer.max_steps))
    if not any(isinstance(c, LatestCheckpoint) for c in callbacks):
        callbacks.append(StopWhenTold())
    return [*callbacks, *schedules(cfg, objective)]


def loggers_beside(cfg: DictConfig, folder: Path) -> list[Logger]:
    """Return the configured loggers, beside the one of `metrics.csv`, which every run has."""
    others = {f"logger.{name}": make(node, f"logger.{name}") for name, node in present(cfg.logger)}
    library.check_parts(others, library.LOGGERS)
    for label, logger in others.items():
        if isinstance(logger, CSVLogger) and Path(logger.log_dir).resolve() == folder.resolve():
            raise ValueError(f"{label} would write over the run's metrics.csv: give it a name")
    return [*others.values()]


def made_callbacks(cfg: DictConfig) -> dict[str, pl.Callback]:
    """Return the configured callbacks, by what a person calls them."""
    made = {f"callbacks.{k}": make(node, f"callbacks.{k}") for k, node in present(cfg.callbacks)}
    library.check_parts(made, library.CALLBACKS)
    return made


def check_callbacks(
    cfg: DictConfig, data: DataModule, objective: Objective, made: Mapping[str, pl.Callback]
) -> None:
    """Refuse callbacks that could not do what they say in a run of this length and these metrics.

    Raises:
        ValueError: naming the callback, and what to change.
    """
    trainer = cfg.trainer
    updates = updates_of(cfg, data)
    library.check_averages(made, str(trainer.precision), trainer.max_epochs, updates)
    for label, callback in made.items():
        if not isinstance(callback, WeightAveraging):
            continue
        sets_classifier = objective.helpers.sets_classifier
        if sets_classifier or objective.helpers.keeps_samples:
            what = "sets the student's classifier" if sets_classifier else "has a queue"
            raise ValueError(
                f"{label} averages weights, and a term of this objective {what}, which has no "
                "average: leave one out"
            )
    terms = [f"train/{name}" for name in objective.terms]
    logged = ["train/loss", *terms, "train/temperature", "train/zeros", "train/skipped"]
    may_log = any(library.is_own_class(callback) for callback in made.values())
    for label, callback in made.items():
        if isinstance(callback, DeviceStatsMonitor) and not find_spec("psutil"):
            asked = cfg.callbacks[label.removeprefix("callbacks.")].get("cpu_stats")
            if asked or (asked is None and not on_gpu(cfg)):
                raise ValueError(f"{label} needs pip install psutil, to tell of a CPU")
        if not isinstance(callback, ModelCheckpoint | EarlyStopping) or not callback.monitor:
            continue
        monitor = callback.monitor
        if monitor.startswith("train/") and monitor not in logged and not may_log:
            raise ValueError(
                f"{label}.monitor={monitor} is not logged; there are {', '.join(logged)}"
            )
        told = cfg.callbacks[label.removeprefix("callbacks.")]
        within = isinstance(callback, ModelCheckpoint) and (
            told.get("every_n_train_steps") or told.get("train_time_interval")
        )
        if monitor.startswith("val/") and within:
            raise ValueError(
                f"{label}.monitor={monitor} is known at the end of epochs alone: leave out "
                "every_n_train_steps and train_time_interval, or monitor train/loss"
            )


def batches_per_epoch(cfg: DictConfig, data: DataModule) -> int:
    """Return how many batches an epoch of a run has on each device."""
    batches = len(data.train) // (data.labeled_per_batch * processes(cfg))
    limit = cfg.trainer.limit_train_batches
    return min(limit, batches) if isinstance(limit, int) else int(limit * batches)


def updates_per_epoch(cfg: DictConfig, data: DataModule) -> int:
    """Return how many optimiser updates an epoch of a run has."""
    return max(math.ceil(batches_per_epoch(cfg, data) / cfg.trainer.accumulate_grad_batches), 1)


def updates_of(cfg: DictConfig, data: DataModule) -> int:
    """Return how many optimiser updates a run has."""
    whole = updates_per_epoch(cfg, data) * int(cfg.trainer.max_epochs)
    return min(whole, cfg.trainer.max_steps) if by_steps(cfg) else whole


def reported_topk(cfg: DictConfig, data: DataModule) -> tuple[int, ...]:
    """Return the k to report."""
    return resolve_topk(plain(cfg.topk), data.num_classes)


def note_data(cfg: DictConfig, data: DataModule) -> None:
    """Say once for a command what was done with its data, and which numbers say nothing of them."""
    for note in data.notes:
        log.info("%s: %s", data.source.name, note)
    if "trainer" in cfg and data.unlabeled is not None:
        beside = data.training_keys(ranks=processes(cfg)).unlabeled_note()
        log.info("%s: %s", data.source.name, beside)
    if cfg.topk is None and DEFAULT_TOPK[-1] not in reported_topk(cfg, data):
        log.info("top-5 is left out: there are %d classes", data.num_classes)


def check_monitor(cfg: DictConfig, data: DataModule, objective: Objective) -> None:
    """Refuse an `optimized_metric`, or any of `sweep.metrics`, that no epoch will log."""
    several = plain(cfg.sweep.metrics) or []
    if not isinstance(several, list):
        raise ValueError(f"sweep.metrics is a list, such as [val/top1,val/ece], not {several!r}")
    names = logged_names(
        resolve_topk(plain(cfg.topk), data.num_classes),
        data.num_classes,
        objective,
        teacher_name(cfg) is not None,
    )
    known = [f"val/{name}" for name in names]
    asked = [("optimized_metric", cfg.optimized_metric), *(("sweep.metrics", n) for n in several)]
    for key, name in asked:
        if name not in known:
            raise ValueError(f"{key}={name} is not logged; there are {', '.join(known)}")
    for callback, node in present(cfg.callbacks):
        name = node.get("monitor")
        if name is not None and name not in known and not str(name).startswith("train/"):
            raise ValueError(
                f"callbacks.{callback}.monitor={name} is not logged; there are {', '.join(known)}"
            )


def check_optimizer(
    cfg: DictConfig, model: Any, where: str = "", epochs: float | None = None
) -> None:
    """Refuse an optimiser or a schedule that cannot be built, before anything is trained.

    Args:
        cfg: of what is trained.
        model: which is.
        where: what comes before its keys.
        epochs: how long training is; None is `trainer.max_epochs`.
    """
    epochs = epochs or cfg.trainer.max_epochs
    try:
        optimizer = create_optimizer(model, plain(cfg.optimizer))
        library.check_layers(cfg.optimizer, has_schedule(cfg.scheduler))
        if has_schedule(cfg.scheduler):
            options = plain(cfg.scheduler)
            create_schedule(optimizer, options, epochs, MANY)
            for told in library.unread(options, epochs):
                log.warning("%s%s", where, told)
    except ValueError as error:
        name = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        known = [key for key in RECIPE if name and key != name[1]]
        meant = closest(name[1], known, f"{where}optimizer.") if name else ""
        raise ValueError(f"{where}{error}{meant}") from error
    if "lr" not in cfg.optimizer:
        raise ValueError(f"{where}optimizer has no learning rate: give {where}optimizer.lr=…")
    warmup = (cfg.scheduler or {}).get("warmup_epochs") or 0
    if warmup >= epochs:
        raise ValueError(
            f"{where}scheduler.warmup_epochs={warmup} leaves none of {epochs:.3g} epochs at the "
            "full learning rate"
        )


def check_single_images(model: nn.Module, data: DataModule, batch_size: int, key: str) -> None:
    """Refuse batches of one image that a model's batch normalisation cannot be trained on."""
    if batch_size > 1:
        return
    blank = torch.zeros(1, data.in_chans, *data.image_size)
    with explained_batch_of_one(key), torch.no_grad():
        copy.deepcopy(model).train()(blank)


@contextmanager
def explained_batch_of_one(key: str = "data.batch_size") -> Iterator[None]:
    """Say what to do where batch normalisation meets a single value for each channel."""
    try:
        yield
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"{key}=1: batch normalisation needs more than one value for each channel, and the "
            f"model's last maps have one for each image: give {key}=2 or more, or larger images"
        ) from error


def check_resume(cfg: DictConfig, model: Any, objective: Objective, classes: Sequence[str]) -> None:
    """Refuse a checkpoint of another run: other weights, classes, values, or nothing left to do."""
    if not cfg.ckpt_path:
        return
    content = read_lightning(Path(cfg.ckpt_path))
    own, saved = model.state_dict(), student_weights(content)
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in saved.items()}:
        raise ValueError(f"ckpt_path={cfg.ckpt_path} is a checkpoint of another student")
    known = as_object(content.get("distill")).get("classes") or list(classes)
    if known != list(classes):
        raise ValueError(
            f"ckpt_path={cfg.ckpt_path} knows the classes {named(known)} and the data have "
            f"{named(classes)}: start from it with student.checkpoint, which matches them by name"
        )
    progress = epochs_done(content, cfg.ckpt_path)
    may_only_be_judged = cfg.resume or cfg.sweep.resume
    if progress >= cfg.trainer.max_epochs and not may_only_be_judged:
        raise ValueError(
            f"ckpt_path={cfg.ckpt_path} has trained {progress} epochs of trainer.max_epochs="
            f"{cfg.trainer.max_epochs}: there is nothing left to do"
        )
    moved = {annealing.value for annealing in schedules(cfg, objective)}
    before = as_object(as_object(content.get("distill")).get("objective"))
    if cfg.objective.get("temperature") == "auto":  # the same teacher gives the same again
        moved.add("temperature")
    for name in objective.annealed:
        if name not in moved and before.get(name) != objective.annealed[name]:
            raise ValueError(
                f"ckpt_path={cfg.ckpt_path} was trained at objective.{name}={before.get(name)}, "
                f"and this run says {objective.annealed[name]}"
            )


def single_device(cfg: DictConfig, **options: Any) -> pl.Trainer:
    """Return a quiet trainer on the first of a run's devices."""
    devices = read.plain(cfg.trainer.devices)
    try:
        return pl.Trainer(
            accelerator=cfg.trainer.accelerator,
            devices=devices[:1] if isinstance(devices, list) else 1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            **options,
        )
    except MisconfigurationException as error:
        raise ValueError(f"trainer.accelerator={cfg.trainer.accelerator}: {error}") from error
