"""Whether a run of so many epochs is the beginning of one of more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from omegaconf import DictConfig

from distill.config.read import plain, present
from distill.objective.schedules import value_at
from distill.training.module import create_schedule

LOOKS = 4  # at the learning rate and at what moves, in an epoch
# Callbacks that do the same in an epoch however many there are.
TIMELESS = ("ModelCheckpoint", "LatestCheckpoint", "progress_callback", "EarlyStopping",
            "EMAWeightAveraging", "LearningRateMonitor", "ModelSummary", "DeviceStatsMonitor",
            "RichProgressBar", "TQDMProgressBar", "Timer")  # fmt: skip


def obstacle(cfg: DictConfig, epochs: int) -> str | None:
    """Return what went otherwise in a run of `epochs` epochs than in the first of `cfg`, or None.

    Args:
        cfg: of a run of more epochs, the same in all else.
        epochs: of the run that was.
    """
    now = int(cfg.trainer.max_epochs)
    if cfg.scheduler and rates(cfg, epochs, epochs) != rates(cfg, now, epochs):
        return f"scheduler.sched={cfg.scheduler.get('sched')}"
    for label, node in moving(cfg):
        if path(node, epochs, epochs) != path(node, now, epochs):
            return label
    for name, node in present(cfg.callbacks):
        timed = "schedule" in node  # one of `moving`
        if not timed and node.get("_target_", "").rpartition(".")[2] not in TIMELESS:
            return f"callbacks.{name}"
    return None


def rates(cfg: DictConfig, total: int, until: int) -> list[float]:
    """Return the learning rates of the first epochs of `total`, where the first is 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = create_schedule(optimizer, plain(cfg.scheduler), total, LOOKS)
    found = []
    for update in range(until * LOOKS):
        schedule.step_update(update)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def moving(cfg: DictConfig) -> Iterator[tuple[str, Any]]:
    """Yield what moves a value along a schedule, with its name in the configuration."""
    if cfg.annealing:
        yield "annealing", cfg.annealing
    for name, node in present(cfg.objective.get("schedules")):
        if node.get("end", 1.0) is not None:
            yield f"objective.schedules.{name}", node
    for name, node in present(cfg.callbacks):
        if "schedule" in node:
            yield f"callbacks.{name}", node


def path(node: Any, total: int, until: int) -> list[float]:
    """Return how far a schedule has come in the first epochs of `total`, from 1 to 2."""
    each = 1 if node.get("unit", "epoch") == "epoch" else LOOKS
    timing = node.get("warmup") or 0, node.get("duration")
    schedule = node.get("schedule", "cosine")
    return [
        value_at(schedule, unit, each * total, 1.0, 2.0, *timing) for unit in range(each * until)
    ]
