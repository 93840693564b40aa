"""What a configuration says, without building anything of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from distill.models.build import ModelSpec


def for_sweeper(cfg: DictConfig, value: Callable[[str], float]) -> float | list[float]:
    """Return what a run reports to a sweeper: `optimized_metric`, or each of `sweep.metrics`.

    Args:
        cfg: the run's configuration.
        value: the name of a metric → what it came to.
    """
    several = plain(cfg.sweep.metrics)
    return [value(name) for name in several] if several else value(cfg.optimized_metric)


def finite_or_none(value: float | list[float]) -> float | list[float] | None:
    """Return what is reported to a sweeper, or None, a failed trial, where it is not finite.

    At NaN, Optuna's sweeper ends the search.
    """
    numbers = value if isinstance(value, list) else [value]
    return value if all(map(math.isfinite, numbers)) else None


def numbers_for_sweeper(
    cfg: DictConfig, numbers: dict[str, Any], value: Callable[[str], float]
) -> dict[str, Any]:
    """Return the validation metrics, and the one that is optimised where it is another.

    Of `sweep.metrics` they are what is reported to the sweeper, so that its front is the table's.
    """
    decides = {cfg.optimized_metric.removeprefix("val/"): value(cfg.optimized_metric)}
    several = plain(cfg.sweep.metrics) or []
    return {**decides, **numbers, **{name.removeprefix("val/"): value(name) for name in several}}


def swept() -> bool:
    """Return whether this is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def processes(cfg: DictConfig) -> int:
    """Return how many processes, one per device, a run has."""
    devices = plain(cfg.trainer.devices)
    if isinstance(devices, str) and "," in devices:  # "0,1", as Lightning reads it
        devices = [device for device in devices.split(",") if device.strip()]
    if isinstance(devices, list):
        count = len(devices)
    elif str(devices) in ("auto", "-1"):
        count = 1 if cfg.trainer.accelerator == "cpu" else max(torch.cuda.device_count(), 1)
    else:
        count = int(devices)
    return count * int(cfg.trainer.num_nodes)


def present(group: DictConfig | None) -> Iterable[tuple[str, Any]]:
    """Return the named nodes of a group that have not been switched off with null."""
    return [(str(name), node) for name, node in (group or {}).items() if node is not None]


def model_spec(node: DictConfig) -> ModelSpec:
    """Return which model a teacher or student node names."""
    values = {key: node.get(key) for key in ("name", "pretrained", "checkpoint")}
    key_map = plain(node.get("key_map"))
    return ModelSpec(args=plain(node.get("args")) or {}, key_map=key_map, **values)


def own_size(node: DictConfig) -> tuple[int, int] | None:
    """Return the height and width that a teacher sees, where they are not its student's."""
    size = plain(node.get("image_size"))
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def teacher_name(cfg: DictConfig) -> str | None:
    """Return what a person calls the teacher, or None where there is none."""
    source = cfg.teacher
    if source.get("checkpoints") is not None:
        return " + ".join(map(str, source.checkpoints)) or "an empty ensemble"
    own = source.checkpoint or source.name
    if own and (source.get("fit") or {}).get("from_weights"):  # the weights are not the teacher
        return f"{source.name or Path(own).name}, fine-tuned"
    return own


def to_be_trained(source: DictConfig) -> bool:
    """Whether a teacher has a recipe, and no weights yet or such as are only its start."""
    given = bool(source.checkpoint or source.pretrained)
    if not source.fit or not (source.name or source.checkpoint):
        return False
    return not given or bool(source.fit.get("from_weights"))


def plain(node: Any) -> Any:
    """Return a node as plain containers, resolved."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def on_gpu(cfg: DictConfig) -> bool:
    """Return whether a run's models answer on a GPU."""
    return cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()
