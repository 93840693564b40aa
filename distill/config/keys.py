"""Keys of a configuration: their dotted names, and which do not affect results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

# Values that do not affect results: where files are, what is resumed, and what is reported.
BOOKKEEPING = ("sweep", "paths", "hydra", "ckpt_path", "resume", "report", "preview",
               "tags", "task_name", "logger", "store.path", "store.part", "store.parts",
               "data.num_workers", "data.cache", "data.cache_gb", "data.retries", "data.timeout",
               "data.download",
               "trainer.log_every_n_steps")  # fmt: skip


DIRECTORIES = ("dir", "dirpath", "default_root_dir", "save_dir")


def is_bookkeeping(name: str) -> bool:
    """Whether a value, given its dotted name or a group's, does not affect a run's results."""
    if name.rpartition(".")[2] in DIRECTORIES:
        return True
    return any(name == key or name.startswith((f"{key}.", f"{key}/")) for key in BOOKKEEPING)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return a configuration's values by their dotted names."""
    if not isinstance(config, dict) or not config:
        return {prefix: config} if prefix else {}
    parts = (flat(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in config.items())
    return {name: value for part in parts for name, value in part.items()}


def with_values(cfg: DictConfig, values: Mapping[str, Any]) -> DictConfig:
    """Return a copy of a configuration that has other values at these dotted keys."""
    changed = cfg.copy()
    for key, value in values.items():
        OmegaConf.update(changed, key, value, merge=False)
    return changed
