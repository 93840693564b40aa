"""Whether the steps of a run can be captured, and what stands in the way."""

from __future__ import annotations

import logging

import pytorch_lightning as pl
from omegaconf import DictConfig

from distill.config.read import processes
from distill.data import DataModule
from distill.data.sources.splits import Resident
from distill.objective.objective import Objective
from distill.teacher.precision import checked_device
from distill.training.callbacks.checkpoints import LatestCheckpoint
from distill.training.callbacks.fake_quantize import FakeQuantize
from distill.training.callbacks.finite import FiniteLoss
from distill.training.callbacks.rate import LearningRate
from distill.training.graph import TRIAL, GraphedStep
from distill.training.module import Distiller

log = logging.getLogger(__name__)

# Hooks in the midst of a step, and the callbacks whose own work with captured steps.
WITHIN = ("on_before_zero_grad", "on_before_backward", "on_after_backward",
          "on_before_optimizer_step")  # fmt: skip
INDIFFERENT = (FiniteLoss, LatestCheckpoint, LearningRate)
AUTO, ON, OFF = "auto", "on", "off"
GRAPHED = ("reduce-overhead", "max-autotune")  # modes of torch.compile


def mode_of(cfg: DictConfig) -> str:
    """Return what `trainer.graph` says; a configuration file's `on` is read as true."""
    graph = cfg.trainer.get("graph", OFF)
    return {True: ON, False: OFF}.get(graph, graph)


def check_graph(
    cfg: DictConfig, objective: Objective, data: DataModule, trainer: pl.Trainer
) -> None:
    """Refuse `trainer.graph=on` where the student's steps cannot be captured."""
    if mode_of(cfg) == ON and (found := obstacles(cfg, objective, data, trainer)):
        raise ValueError(f"trainer.graph=on: {'; '.join(found)}; trainer.graph=auto does without")


def build_graph(
    cfg: DictConfig, module: Distiller, data: DataModule, trainer: pl.Trainer
) -> GraphedStep | None:
    """Return what captures a run's steps, or None where they are taken eagerly.

    With `auto` they are on anything but a GPU. What stands in the way is said: with `on` it can
    only be of a teacher or an assistant, whose training has callbacks of its own.
    """
    mode, on_gpu = mode_of(cfg), trainer.strategy.root_device.type == "cuda"
    if mode == OFF or (mode == AUTO and not on_gpu):
        return None
    if found := obstacles(cfg, module.objective, data, trainer):
        log.info("trainer.graph: off (%s)", "; ".join(found))
        return None
    if not on_gpu:
        log.info("trainer.graph: on, and as a CPU has no graphs, the step is called as a function")
    return GraphedStep(module, data, trainer, trial=0 if mode == ON else TRIAL)


def obstacles(
    cfg: DictConfig, objective: Objective, data: DataModule, trainer: pl.Trainer
) -> list[str]:
    """Return what of a run cannot be captured, for people."""
    within = [c for c in trainer.callbacks if acts_within(c)]  # type: ignore[attr-defined]
    compiled, streamed = cfg.trainer.get("compile"), not isinstance(data.train, Resident)
    teacher_device = cfg.teacher.get("device")
    conditions = {
        "several devices": processes(cfg) > 1,
        "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches > 1,
        "trainer.precision=16-mixed scales its gradients": str(cfg.trainer.precision) == "16-mixed",
        "trainer.detect_anomaly": bool(cfg.trainer.get("detect_anomaly")),
        f"trainer.compile={compiled} captures graphs of its own": compiled in GRAPHED,
        "on_nan=skip": cfg.on_nan == "skip",
        "objective.sample_selection": bool(objective.sample_selection),
        "an ensemble that draws its answers": cfg.teacher.get("combine") == "draw",
        f"teacher.device={teacher_device} is another than the student's": teacher_device is not None
        and checked_device(teacher_device) != trainer.strategy.root_device,
        "mixed views of streamed pictures": streamed and data.view.mixes,
    }
    names = [f"{type(c).__name__} acts within a step" for c in within]
    return [name for name, stands in conditions.items() if stands] + names


def acts_within(callback: pl.Callback) -> bool:
    """Whether a callback has something to do in the midst of a step."""
    if isinstance(callback, INDIFFERENT):
        return False
    own = type(callback)
    return isinstance(callback, FakeQuantize) or any(
        getattr(own, hook) is not getattr(pl.Callback, hook) for hook in WITHIN
    )
