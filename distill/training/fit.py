"""Train one model: a student under its teacher, or on labels alone what is kept for other runs."""

from __future__ import annotations

import copy
import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from distill.config import build, read
from distill.config.keys import with_values
from distill.config.resolvers import higher_is_better
from distill.data import DataModule
from distill.metrics.cost import parameters
from distill.models.build import (
    ModelSpec,
    Normalize,
    asked_by,
    build_matched,
    normalization,
)
from distill.models.bundle import save_student
from distill.models.checkpoint import epochs_done, read_lightning, student_weights
from distill.models.weights import DataShape
from distill.teacher.teacher import Teacher
from distill.training import auxiliary, resume
from distill.training.cache import (
    LOST,
    identity_of,
    keep_history,
    open_cached,
    own_place,
    trained_once,
)
from distill.training.callbacks.checkpoints import LatestCheckpoint
from distill.training.callbacks.loggers import begin
from distill.training.callbacks.speed import speed_of
from distill.training.capture import build_graph
from distill.training.module import Distiller
from distill.training.pruning import pruned
from distill.training.trainer import by_steps, compile_model, explained_batch_of_one
from distill.training.untrained import Untrained, build_untrained
from distill.utils import signals
from distill.utils.run_folder import METRICS, by_epoch, read_history

log = logging.getLogger(__name__)

BEST = "best"  # the callback that keeps a teacher's best epoch


def fit(
    cfg: DictConfig,
    data: DataModule,
    teacher: Teacher | None,
    untrained: Untrained | None = None,
    role: str = "student",
) -> tuple[Distiller, pl.Trainer]:
    """Train a student from its seed, and return it with its trainer.

    Args:
        cfg: the configuration of the run.
        data: its data.
        teacher: its teacher, where it has one.
        untrained: its other parts; None builds them.
        role: what messages call it.
    """
    untrained = untrained or build_untrained(cfg, data)
    torch.set_rng_state(untrained.random)  # whatever has been trained since
    student, trainer = student_module(cfg, data, teacher, untrained), untrained.trainer
    left = resume.left_behind(cfg)
    resume.check_unchanged(cfg, left, student.metadata["learned_from"])
    over = resume.is_over(cfg, left)
    done = epochs_done(left, Path(cfg.ckpt_path)) if left else 0
    left = left if over else {}  # no copy of it in memory while the student trains
    begin_logging(cfg, trainer)
    compile_model(cfg, student.student)
    if teacher is not None:
        student.cached_teacher = open_cached(
            cfg, data, teacher, student.objective, trainer.global_rank
        )
    student.graph = build_graph(cfg, student, data, trainer)
    if not over:
        log.info("%s: training %s, %s parameters, for %s under %s", role, cfg.student.name,
                 f"{parameters(student.student):,}", length(cfg),
                 ", ".join(student.objective.terms))  # fmt: skip
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    started = data.sharing.clock()
    train(cfg, student, data, trainer)
    if trainer.is_global_zero and not over:
        seconds = data.sharing.clock() - started
        log.info("%s: %s", role, in_words(cfg, trainer.current_epoch, done, seconds))
    if over:  # nothing was trained, so that no callback has left its average there
        student.student.load_state_dict(student_weights(left))
    if "16-true" in str(cfg.trainer.precision):
        student.float()  # what is judged and saved is what a user will load
    return student, trainer


def begin_logging(cfg: DictConfig, trainer: pl.Trainer) -> None:
    """Tell a trainer's loggers the configuration."""
    own, *others = trainer.loggers
    own.log_hyperparams(read.plain(cfg))
    for logger in others:
        begin(logger, read.plain(cfg))


def train(cfg: DictConfig, student: Distiller, data: DataModule, trainer: pl.Trainer) -> None:
    """Run the trainer; whatever it ends with, store and loggers are released.

    Raises:
        Preempted: if the process was told to end.
        KeyboardInterrupt: at Ctrl-C.
        ValueError: for what Lightning refuses.
    """
    saves_last = any(isinstance(c, LatestCheckpoint) for c in trainer.checkpoint_callbacks)
    try:
        with signals.deferred(saves_last), explained_batch_of_one(), tensor_cores(trainer):
            trainer.fit(student, datamodule=data, ckpt_path=cfg.ckpt_path, weights_only=True)
        signals.stop_if_told()
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except SystemExit as stop:
        signals.stop_if_told()  # before Lightning's own handler had been replaced
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning's exit code for Ctrl-C
            raise KeyboardInterrupt from None
        raise
    finally:
        data.views_by_step = False
        if student.cached_teacher is not None:
            student.cached_teacher.close()
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):  # else the next job of a sweep would log to its run
                logger.experiment.finish()


@contextmanager
def tensor_cores(trainer: pl.Trainer) -> Iterator[None]:
    """Compute in TF32, while a GPU trains in mixed precision, what stays float32 beside it."""
    mixed = "mixed" in str(trainer.precision) and trainer.strategy.root_device.type == "cuda"
    before = torch.get_float32_matmul_precision()
    if mixed:
        log.info(
            "trainer.precision: %s, and TF32 for what stays float32; trainer.precision=32-true "
            "computes all of it in float32",
            trainer.precision,
        )
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def in_words(cfg: DictConfig, epochs: int, before: int, seconds: float) -> str:
    """Return what training came to: "8 epochs in 41 s, val/top1 0.975 (best 0.981 in epoch 7)".

    Args:
        cfg: of the run.
        epochs: how many there have been.
        before: how many of them before the run went on from a checkpoint.
        seconds: what the others took.
    """
    metric = cfg.optimized_metric
    history = read_history(Path(cfg.paths.output_dir) / METRICS)
    at, values = by_epoch(history, metric)
    now = f", {epochs - before} of them now," if before else ""
    found = f"{counted(epochs)}{now} in {seconds:.0f} s"
    if not values:
        return found
    best = (max if higher_is_better(metric) else min)(values)
    return (
        f"{found}, {metric} {values[-1]:.4g} "
        f"(best {best:.4g} in epoch {math.ceil(at[values.index(best)])})"
    )


def length(cfg: DictConfig) -> str:
    """Return how long training is, for a person."""
    return f"{cfg.trainer.max_steps:,} steps" if by_steps(cfg) else counted(cfg.trainer.max_epochs)


def counted(epochs: int) -> str:
    """Return a number of epochs for a person."""
    return f"{epochs} epoch{'' if epochs == 1 else 's'}"


def student_module(
    cfg: DictConfig, data: DataModule, teacher: Teacher | None, untrained: Untrained
) -> Distiller:
    """Return the student as it is before training, with what its checkpoints say of it."""
    model, objective = untrained.model, untrained.objective
    if objective.curriculum is None and "temperature" in cfg.objective:
        objective.temperature = cfg.objective.temperature  # `auto` is known only now
    student = Distiller(
        model,
        teacher,
        objective,
        optimizer=read.plain(cfg.optimizer),
        scheduler=read.plain(cfg.scheduler),
        topk=read.plain(cfg.topk),
        normalize=normalization(model, data.in_chans, read.own_size(cfg.student)),
    )
    spec, shape = read.model_spec(cfg.student), build.model_shape(cfg.student, data)
    student.metadata = {
        "job": resume.fingerprint(cfg),
        "learned_from": {
            "data": data.fingerprint,
            "teacher": teacher and identity_of(teacher),
        },
        "config": read.plain(cfg),
        "classes": list(data.classes),
        "student_model": asdict(built_as(spec, shape)),
        "preprocessing": {
            **data.preprocessing,
            "input_size": list(data.preprocessing["input_size"]),
            **{n: values.flatten().tolist() for n, values in student.normalize.named_buffers()},
        },
    }
    return student


def built_as(spec: ModelSpec, shape: DataShape) -> ModelSpec:
    """Return what builds a model again, but for its weights and what a bundle says of its data."""
    asked = asked_by(shape, spec.name or "")
    size = {"img_size": list(asked["img_size"])} if "img_size" in asked else {}
    return replace(spec, args={**size, **spec.args}, checkpoint=None, pretrained=False)


def best_epoch(trainer: pl.Trainer, student: Distiller) -> tuple[int, Distiller] | None:
    """Return the epoch that was best on validation, counted from 1, and the student it left."""
    for callback in trainer.checkpoint_callbacks:
        path = getattr(callback, "best_model_path", "")
        if str(getattr(callback, "monitor", "")).startswith("val/") and path:
            content = read_lightning(Path(path))
            model = copy.deepcopy(student.student)
            model.load_state_dict(student_weights(content))
            best = Distiller(model, student.teacher, normalize=student.normalize)
            return content["epoch"] + 1, best
    return None


def training_speed(trainer: pl.Trainer) -> float | None:
    """Return the images per second of training."""
    speed = speed_of(trainer)
    return speed.images_per_second if speed else None


def save_bundle(
    student: Distiller, data: DataModule, path: Path, facts: dict[str, Any], card: str = ""
) -> Path:
    """Write the student for timm, with the preprocessing it was trained under."""
    normalize = student.normalize
    assert isinstance(normalize, Normalize)
    preprocessing = dict(data.preprocessing)
    if normalize.size is not None:
        preprocessing["input_size"] = (data.in_chans, *normalize.size)
    return save_student(
        student.student,
        path,
        classes=data.classes,
        **preprocessing,
        mean=normalize.mean.flatten().tolist(),
        std=normalize.std.flatten().tolist(),
        facts=facts,
        card=card,
    )


def load_baseline(cfg: DictConfig, data: DataModule) -> Distiller | None:
    """Return the student without a teacher that an evaluation compares with, where one is named."""
    if not cfg.baseline:
        return None
    model = build_matched(ModelSpec(checkpoint=cfg.baseline), build.data_shape(data), "baseline")
    return Distiller(model, normalize=normalization(model, data.in_chans))


def train_and_keep(
    cfg: DictConfig, data: DataModule, role: str, kept: Path, teacher: Teacher | None
) -> None:
    """Train a model, on labels or under a teacher, and put it into the cache.

    While it trains its checkpoints lie beside its place there: whoever needs the same model after
    an interruption goes on from them. Where a process went without images that it lost, the model
    is put into the run's own folder instead, see `trained_once`.
    """
    work = kept.with_name(f"{kept.name}.training")
    own = with_checkpoints(cfg, work, keep_best=role == "teacher")
    begun = resume.latest(work / resume.CHECKPOINTS)
    if begun is not None:
        path, content = begun
        own = with_values(own, {"ckpt_path": str(path), "resume": "auto"})
        log.info("%s: going on from %s, %d epochs done", role, path, epochs_done(content, path))
    student, trainer = fit(own, data, teacher, role=role)
    lost = lost_note(data, trainer)
    if trainer.is_global_zero:
        if BEST in own.callbacks and (best := best_epoch(trainer, student)):
            by = own.callbacks[BEST].monitor
            log.info("%s: epoch %d was the best by %s, and is kept", role, best[0], by)
            student = best[1]
        student, _ = pruned(own, data, student, trainer)
        facts = {"role": role, "config": read.plain(cfg), "data": data.fingerprint}
        if lost:
            kept = own_place(cfg, kept)
            facts[LOST] = lost
            log.warning("%s: %s; it is for this run alone, others train theirs", role, facts[LOST])
        save_bundle(student, data, kept, facts)
        keep_history(own, kept)
        shutil.rmtree(work, ignore_errors=True)
        log.info("%s: kept in %s", role, kept)
    trainer.strategy.barrier()


def lost_note(data: DataModule, trainer: pl.Trainer) -> str | None:
    """Return what any process of a run trained without, for people; None if nothing."""
    lost = data.lost_note
    if trainer.strategy.reduce_boolean_decision(lost is None):
        return None
    return lost or "another process than the first trained without some images"


def with_checkpoints(cfg: DictConfig, work: Path, keep_best: bool) -> DictConfig:
    """Return the configuration of an auxiliary run that leaves its checkpoints in a folder.

    Args:
        cfg: the run's.
        work: the folder.
        keep_best: whether, where training may stop early, the best epoch is kept too.
    """
    folder = str(work / resume.CHECKPOINTS)
    callbacks = read.plain(cfg.callbacks) or {}
    last = {
        "_target_": "distill.training.callbacks.checkpoints.LatestCheckpoint",
        "dirpath": folder,
    }
    if keep_best and (stop := callbacks.get(auxiliary.STOPPED_EARLY)):
        callbacks[BEST] = {
            "_target_": "pytorch_lightning.callbacks.ModelCheckpoint",
            "filename": "best",
            "enable_version_counter": False,
            "dirpath": folder,
            **{key: stop[key] for key in ("monitor", "mode")},
        }
    own = {"paths.output_dir": str(work), "callbacks": {**callbacks, "last": last}}
    return with_values(cfg, own)


def baseline_config(cfg: DictConfig, data: DataModule) -> DictConfig:
    """Return the configuration of the run that trains the baseline.

    Its batches are the student's, less what has no labels.
    """
    own = auxiliary.supervised_config(cfg, "baseline")
    return with_values(own, {"data.batch_size": data.labeled_per_batch})


def prepare_baseline(cfg: DictConfig, data: DataModule) -> Distiller:
    """Return the same student, trained from the same seed for as long, on labels only."""
    model = trained_once(baseline_config(cfg, data), data, "baseline", train_and_keep)
    return Distiller(model, normalize=normalization(model, data.in_chans))
