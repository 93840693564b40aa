"""Teachers of a run: trained once, from files, several as one, and chains of assistants."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from omegaconf import DictConfig
from torch import nn

from distill.config import build, read
from distill.config.keys import with_values
from distill.data import DataModule
from distill.models.build import ModelSpec, build_matched, normalization
from distill.models.features import model_info
from distill.objective.objective import Objective
from distill.teacher.ensemble import Ensemble
from distill.teacher.teacher import Teacher
from distill.training import auxiliary
from distill.training.cache import trained_once
from distill.training.first_look import Look, looked_at, teacher_temperature
from distill.training.fit import train_and_keep

log = logging.getLogger(__name__)


def prepare_teachers(
    cfg: DictConfig, data: DataModule, objective: Objective
) -> tuple[list[Teacher | None], list[Look]]:
    """Return the teacher and its assistants, each trained under the one before it.

    Each is looked at on validation before anything learns from it.
    """
    chain = [prepare_teacher(cfg, data)]
    looks = [looked_at(cfg, data, objective, chain[0], "teacher")]
    for number in range(1, len(cfg.assistants or []) + 1):
        own = auxiliary.assistant_config(cfg, number)
        own = resolve_auto_temperature(own, data, chain[-1])
        role = f"assistant-{number}"
        model = trained_once(own, data, role, train_and_keep, chain[-1])
        recipe = with_values(own, {"paths": None})  # where it was trained changes nothing
        chain.append(data.sharing.once(str([role, recipe]), partial(as_teacher, model, data)))
        looks.append(looked_at(cfg, data, objective, chain[-1], f"assistant {number}"))
    for teacher in chain:
        if teacher is not None and objective.needs_teacher_features:
            model_info(teacher.model, objective.stages, "teacher", maps=True)
    return chain, [look for look in looks if look is not None]


def prepare_teacher(cfg: DictConfig, data: DataModule) -> Teacher | None:
    """Return the teacher, trained once and kept where no weights exist."""
    source, key = cfg.teacher, build.shared_key(cfg, "teacher")
    if not read.to_be_trained(source):
        return data.sharing.once(key, lambda: load_teacher(cfg, data))
    own = auxiliary.supervised_config(cfg, "teacher")
    model = trained_once(own, data, "teacher", train_and_keep)
    return data.sharing.once(key, lambda: as_teacher(model, data, read.own_size(source)))


def load_teacher(cfg: DictConfig, data: DataModule) -> Teacher | None:
    """Return the teacher from its published weights or a file, or None where none is named."""
    source = cfg.teacher
    if not read.teacher_name(cfg):
        return None
    if source.get("checkpoints") is not None:
        return load_ensemble(cfg, data)
    if not source.pretrained and not source.checkpoint:
        raise ValueError(
            f"teacher {source.name} would have random weights: give teacher.pretrained=true, "
            "teacher.checkpoint=PATH, teacher=finetuned, or teacher=trained"
        )
    shape, spec = build.model_shape(source, data), read.model_spec(source)
    model = build_matched(spec, shape, "teacher", source.get("classes"), log.info)
    return as_teacher(model, data, read.own_size(source))


def load_ensemble(cfg: DictConfig, data: DataModule) -> Teacher:
    """Return several teachers as one, each with its own normalisation."""
    members, source = [], cfg.teacher
    shape, size = build.model_shape(source, data), read.own_size(source)
    for path in source.checkpoints:
        spec = ModelSpec(checkpoint=path)
        model = build_matched(spec, shape, "teacher", source.get("classes"))
        members.append(nn.Sequential(normalization(model, data.in_chans, size), model))
    weights = read.plain(cfg.teacher.weights)
    return Teacher(
        Ensemble(members, cfg.teacher.combine, weights),
        batch_size=data.batch_size,
        shared=data.sharing.active,
    )


def as_teacher(
    model: nn.Module, data: DataModule, image_size: Sequence[int] | None = None
) -> Teacher:
    """Freeze a model, with its own normalisation and, where it has one, image size."""
    return Teacher(
        model,
        normalization(model, data.in_chans, image_size),
        data.batch_size,
        shared=data.sharing.active,
    )


def resolve_auto_temperature(
    cfg: DictConfig, data: DataModule, teacher: Teacher | None
) -> DictConfig:
    """Return a configuration with a number in the place of `objective.temperature=auto`."""
    if cfg.objective.temperature != "auto":
        return cfg
    temperature = teacher_temperature(cfg, data, teacher)
    log.info("objective.temperature: %.4f, fitted to the teacher", temperature)
    return with_values(cfg, {"objective.temperature": temperature})
