"""The facts of a run, for `summary.json`."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import nn

from distill import __version__
from distill.files import write_whole

PACKAGES = ("torch", "timm", "pytorch-lightning", "torchmetrics", "hydra-core")


def versions() -> dict[str, str]:
    """Return the versions that decide a run's numbers."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"distill": __version__, "python": platform.python_version(), **packages}


def circumstances(cfg: DictConfig) -> dict[str, Any]:
    """Return how a run was made: command, configuration, versions, revision, seed."""
    overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *overrides]),
        "config": OmegaConf.to_container(cfg, resolve=True),
        "versions": versions(),
        "git": git_revision(Path(__file__).parent),
        "seed": cfg.seed,
    }


def git_revision(folder: Path) -> str | None:
    """Return the commit of the checkout that holds a folder, marked if it has changes."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def parameters(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.inference_mode()
def throughput(
    model: nn.Module, shape: tuple[int, ...], device: torch.device, batch_size: int = 128
) -> float:
    """Return images per second of a model's forward pass, the median of repeats.

    Args:
        model: images `[N, C, H, W]` → logits.
        shape: `(C, H, W)`.
        device: where to measure.
        batch_size: images per pass.
    """
    training, model = model.training, model.to(device).eval()
    images = torch.zeros(batch_size, *shape, device=device, dtype=next(model.parameters()).dtype)
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        model(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    model.train(training)
    return batch_size / statistics.median(seconds[2:])


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all; a number that is not finite becomes null."""
    text = json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(path, text + "\n")


def finite(value: Any) -> Any:
    """Return a value whose numbers JSON can hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
