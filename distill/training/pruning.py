"""A trained student's zeros: counted, and taken out where whole channels are dead."""

from __future__ import annotations

import logging
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig
from torch import nn

from distill.config import read
from distill.data import DataModule
from distill.metrics.cost import costs_of_models, parameters
from distill.models.build import channels_last
from distill.models.channels import dense_weights, without_dead_channels
from distill.training.callbacks.sparsity import Sparsity
from distill.training.module import Distiller

log = logging.getLogger(__name__)

COSTS = ("params", "flops", "latency_ms")


def pruned(
    cfg: DictConfig, data: DataModule, student: Distiller, trainer: pl.Trainer
) -> tuple[Distiller, dict[str, Any] | None]:
    """Return a student without its dead channels, and what `summary.json` says of its zeros.

    A student that was trained without sparsity is returned as it is, with None.
    """
    sparsity = next((c for c in trainer.callbacks if isinstance(c, Sparsity)), None)  # type: ignore[attr-defined]
    if sparsity is None:
        return student, None
    removed, reason = None, "nothing is removed: single weights are zero, layers keep their shapes"
    if sparsity.groups:
        try:
            small, widths = without_dead_channels(student.student, read.model_spec(cfg.student))
            reason = "nothing is removed: no channel is dead"
        except ValueError as error:
            small, widths, reason = student.student, {}, str(error)
        if widths:
            removed = changes(data, student.student, small, widths, trainer)
            reason = sentence(removed)
            student = Distiller(small, student.teacher, normalize=student.normalize)
    found = zeros(student.student) | {"removed": removed, "reason": None if removed else reason}
    log.info("sparsity: %s of %s weights are zero; %s",
             f"{found['zeros']:,}", f"{found['weights']:,}", reason)  # fmt: skip
    return student, found


def changes(
    data: DataModule, before: nn.Module, after: nn.Module, widths: dict, trainer: pl.Trainer
) -> dict[str, Any]:
    """Return the widths and costs of a model before and after channels were removed."""
    shape, device = (data.in_chans, *data.image_size), trainer.strategy.root_device
    models = {"before": before, "after": channels_last(after)}
    found = costs_of_models(models, shape, device)
    costs = [{"params": parameters(models[name]), **found[name]} for name in models]
    return {"widths": widths} | {
        name: dict(zip(("before", "after"), (found[name] for found in costs), strict=True))
        for name in COSTS
    }


def zeros(model: nn.Module) -> dict[str, Any]:
    """Return how many weights of each convolution and linear layer are zero, and of all."""
    layers: list[dict[str, Any]] = [
        {"name": name.removesuffix(".weight"), "weights": weight.numel(),
         "zeros": int((weight == 0).sum())}
        for name, weight in dense_weights(model).items()
    ]  # fmt: skip
    return {"layers": layers} | {
        key: sum(layer[key] for layer in layers) for key in ("weights", "zeros")
    }


def sentence(removed: dict[str, Any]) -> str:
    """Return what the removal of channels gave, for a person."""
    widths = ", ".join(f"{k} {old} → {new}" for k, (old, new) in removed["widths"].items())
    names = (("params", "parameters", ",.0f"), ("flops", "FLOPs", ",.0f"),
             ("latency_ms", "ms an image", ".2f"))  # fmt: skip
    gains = (
        f"{label} {removed[key]['before']:{form}} → {removed[key]['after']:{form}}"
        for key, label, form in names
        if None not in removed[key].values()
    )
    return f"channels {widths}; {'; '.join(gains)}"
