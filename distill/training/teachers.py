"""Teachers of a run: trained once, from files, several as one, and chains of assistants."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from distill.config import build, read
from distill.config.keys import with_values
from distill.data import DataModule
from distill.data.views.views import CLEAN
from distill.metrics import kl_from_teacher
from distill.models.build import ModelSpec, build_matched, normalization
from distill.models.features import model_info
from distill.objective.objective import Objective
from distill.teacher.ensemble import Ensemble
from distill.teacher.precision import checked_device
from distill.teacher.teacher import Teacher
from distill.training import auxiliary
from distill.training.cache import trained_once
from distill.training.first_look import Look, looked_at, teacher_temperature
from distill.training.fit import train_and_keep
from distill.utils.memory import bytes_text, held_bytes
from distill.utils.ranks import first_of_run

log = logging.getLogger(__name__)

FEW = 32  # images, on which a teacher of fewer bits is compared with itself
TEMPERATURES = (1, 4)


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

    def made() -> Teacher:
        return as_configured(cfg, data, as_teacher(model, data, read.own_size(source)))

    return data.sharing.once(key, made)


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
    return as_configured(cfg, data, as_teacher(model, data, read.own_size(source)))


def load_ensemble(cfg: DictConfig, data: DataModule) -> Teacher:
    """Return several teachers as one, each with its own normalisation."""
    members, source = [], cfg.teacher
    shape, size = build.model_shape(source, data), read.own_size(source)
    for path in source.checkpoints:
        spec = ModelSpec(checkpoint=path)
        model = build_matched(spec, shape, "teacher", source.get("classes"))
        members.append(nn.Sequential(normalization(model, data.in_chans, size), model))
    weights = read.plain(cfg.teacher.weights)
    teacher = Teacher(
        Ensemble(members, cfg.teacher.combine, weights),
        batch_size=data.batch_size,
        shared=data.sharing.active,
    )
    return as_configured(cfg, data, teacher)


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


def as_configured(cfg: DictConfig, data: DataModule, teacher: Teacher) -> Teacher:
    """Give a teacher the batch size, the precision and the device that are its own.

    What a precision costs is said while the weights are at hand as they were: on the CPU, where a
    teacher that is too large for the device is, too.
    """
    source = cfg.teacher
    batch_size, teacher.batch_size = source.get("batch_size") or teacher.batch_size, None
    if (precision := source.get("precision")) is not None:
        shown = first_views(data) if first_of_run() and precision != "fp32" else None
        whole = None if shown is None else teacher(shown)
        size = held_bytes(teacher.model)
        teacher.in_precision(precision)
        if shown is not None and whole is not None:
            held = f"{bytes_text(held_bytes(teacher.model))} instead of {bytes_text(size)}"
            cost = precision_text(whole, teacher(shown))
            log.info("teacher: its weights in %s, %s; %s", precision, held, cost)
    teacher.batch_size = batch_size
    device = source.get("device")
    return teacher.placed_on(None if device is None else checked_device(device))


@torch.inference_mode()
def first_views(data: DataModule) -> Tensor:
    """Return clean views `[N, C, H, W]` of the first images that are held out; nothing is drawn."""
    split = data.val if len(data.val) else data.test
    few = torch.arange(min(FEW, len(split)))
    with torch.random.fork_rng(devices=[]):  # a loader draws from it, whether it needs to or not
        (batch,) = data.in_order(split, CLEAN, [few], torch.device("cpu"))
    return batch.view


def precision_text(whole: Tensor, reduced: Tensor) -> str:
    """Return how far logits `[N, K]` of fewer bits are from those of all, for people."""
    costs = [
        f"{float(kl_from_teacher(reduced, whole, t)):.2g} nats at T = {t}" for t in TEMPERATURES
    ]
    return f"a KL of {', '.join(costs)} from its float32 answers (mean over {len(whole)} images)"


def resolve_auto_temperature(
    cfg: DictConfig, data: DataModule, teacher: Teacher | None
) -> DictConfig:
    """Return a configuration with a number in the place of `objective.temperature=auto`."""
    if cfg.objective.temperature != "auto":
        return cfg
    temperature = teacher_temperature(cfg, data, teacher)
    log.info("objective.temperature: %.4f, fitted to the teacher", temperature)
    return with_values(cfg, {"objective.temperature": temperature})
