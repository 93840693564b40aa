"""What a run builds before any teacher trains, each once; and all that can be refused by then."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from distill.config import build, checks, read
from distill.config.schema import check_folder
from distill.data import DataModule
from distill.data.cutting import clamped
from distill.models.build import build_model
from distill.models.features import check_features
from distill.objective.objective import Objective
from distill.training import auxiliary
from distill.training.cache import check_store
from distill.training.callbacks.head_first import classifier_parameters
from distill.training.capture import check_graph
from distill.training.trainer import (
    build_trainer,
    check_callbacks,
    check_compile,
    check_monitor,
    check_optimizer,
    check_resume,
    check_single_images,
    check_trainer,
    check_unlabeled,
    check_validation,
    made_callbacks,
    updates_of,
    updates_per_epoch,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Untrained:
    """A run's parts but for its teacher.

    Args:
        model: the student, with the weights that the run's seed gives it.
        objective: what it will be trained on.
        trainer: what will train it.
        random: torch's random state once the first two were built, from which the rest is drawn.
    """

    model: nn.Module
    objective: Objective
    trainer: pl.Trainer
    random: Tensor


def build_untrained(cfg: DictConfig, data: DataModule) -> Untrained:
    """Build the parts of a run whose configuration has been checked."""
    model, objective, random = from_seed(cfg, data)
    trainer = build_trainer(cfg, objective, made_callbacks(cfg), data.sharing)
    return Untrained(model, objective, trainer, random)


def from_seed(
    cfg: DictConfig, data: DataModule, note: Callable[..., None] | None = None
) -> tuple[nn.Module, Objective, Tensor]:
    """Return a run's student and objective, and the random state after them."""
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    spec, shape = read.model_spec(cfg.student), build.model_shape(cfg.student, data)
    model = build_model(spec, shape, "student", any_classes=True, note=note)
    return model, build.build_objective(cfg, data), torch.get_rng_state()


def prepare(cfg: DictConfig, data: DataModule) -> Untrained:
    """Build a run's parts, refusing what would only fail after its teacher has been trained.

    Raises:
        ValueError: for what a person can put right.
    """
    check_trainer(cfg)
    check_folder("paths.cache", cfg.paths.cache)
    model, objective, random = from_seed(cfg, data, log.info)
    checks.check_objective(cfg, data, objective)
    check_unlabeled(cfg, data, objective)
    check_monitor(cfg, data, objective)
    checks.check_border(cfg, data, model)
    check_validation(cfg, data)
    check_optimizer(cfg, model, epochs=updates_of(cfg, data) / updates_per_epoch(cfg, data))
    check_single_images(model, data, data.batch_size, "data.batch_size")
    callbacks = made_callbacks(cfg)
    check_callbacks(cfg, data, objective, callbacks)
    check_compile(cfg)
    if objective.needs_student_features:
        check_features(model, (data.in_chans, *data.image_size), objective.stages, "student")
    trainer = build_trainer(cfg, objective, callbacks, data.sharing)
    check_graph(cfg, objective, data, trainer)
    teacher = check_teacher(cfg, data)
    if objective.needs_student_features or teacher is not None:
        objective.helpers.check(model, teacher)
    if teacher is not None and objective.needs_teacher_features:
        shape = (data.in_chans, *data.image_size)
        check_features(teacher, shape, objective.stages, "teacher")
    if objective.needs_teacher and not read.teacher_name(cfg):
        raise ValueError(
            "this objective compares with a teacher: give one, or objective=supervised"
        )
    check_assistants(cfg, data, objective)
    check_resume(cfg, model, objective, data.classes)
    if cfg.store.mode == "disk":
        if not read.teacher_name(cfg):
            raise ValueError("store=disk keeps a teacher's answers, and there is no teacher")
        check_store(cfg, data, objective)
        check_folder("store.path", cfg.store.path)
    return Untrained(model, objective, trainer, random)


def check_teacher(cfg: DictConfig, data: DataModule) -> nn.Module | None:
    """Refuse a teacher that is to be trained and could not be; return one like it."""
    if not read.teacher_name(cfg) and (cfg.teacher.get("fit") or {}).get("from_weights"):
        raise ValueError("give teacher.name=NAME, a timm model, or teacher.checkpoint=PATH")
    if not read.to_be_trained(cfg.teacher):
        return None
    if cfg.teacher.get("classes"):
        raise ValueError(
            f"teacher.classes={cfg.teacher.classes} is for a teacher that has weights: this one is "
            "to be trained, on the data's own classes"
        )
    own = auxiliary.supervised_config(cfg, "teacher")
    spec, shape = read.model_spec(own.student), build.model_shape(own.student, data)
    asked, said = own.data.batch_size, cfg.data.batch_size
    if asked > len(data.train) and asked != said:
        log.info(clamped("teacher.fit.batch_size", asked, len(data.train)))
    model = build_model(spec, shape, "teacher", any_classes=True, note=log.info)
    check_single_images(model, data, own.data.batch_size, "teacher.fit.batch_size")
    check_optimizer(own, model, "teacher.fit.")
    if head_epochs := cfg.teacher.fit.get("head_epochs"):
        classifier_parameters(model)
        if head_epochs >= own.trainer.max_epochs:
            raise ValueError(
                f"teacher.fit.head_epochs={head_epochs} leaves none of {own.trainer.max_epochs} "
                "epochs to the other layers"
            )
    return model


def check_assistants(cfg: DictConfig, data: DataModule, objective: Objective) -> None:
    """Refuse assistants that have no teacher, or cannot be built."""
    if cfg.assistants and not read.teacher_name(cfg):
        raise ValueError("assistants learn from a teacher, and there is none")
    for number in range(1, len(cfg.assistants or []) + 1):
        spec = read.model_spec(auxiliary.assistant_config(cfg, number).student)
        label = f"assistant {number}"
        model = build_model(spec, build.data_shape(data), label, any_classes=True)
        try:
            objective.helpers.check(model, model)
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error
