"""The facts of a run, for `summary.json`."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distill import __version__
from distill.data import DataModule
from distill.errors import first_line
from distill.files import save_arrays, write_whole

log = logging.getLogger(__name__)
PACKAGES = ("torch", "timm", "pytorch-lightning", "torchmetrics", "hydra-core")


def versions() -> dict[str, str]:
    """Return the versions that decide a run's numbers."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"distill": __version__, "python": platform.python_version(), **packages}


def circumstances(cfg: DictConfig, data: DataModule) -> dict[str, Any]:
    """Return how a run was made: command, configuration, data, versions, revision, seed."""
    overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *overrides]),
        "config": OmegaConf.to_container(cfg, resolve=True),
        "versions": versions(),
        "git": git_revision(Path(__file__).parent),
        "seed": cfg.seed,
        "data": data.source.name,
        "classes": data.classes,
        "images": {"train": len(data.train), "val": len(data.val), "test": len(data.test)},
        "condition": condition_of(data),
        "notes": data.notes,
    }


def condition_of(data: DataModule) -> dict[str, Any] | None:
    """Return what was made hard, and what that came to in each split; None where nothing was."""
    if data.condition is None:
        return None
    counts = {name: change.counts() for name, change in data.altered.items()}
    return {"asked": asdict(data.condition), **counts}


def save_condition(path: Path, data: DataModule) -> None:
    """Write which samples of a split are kept, with their given and true labels, as an `.npz`.

    Its arrays are `SPLIT_index`, `SPLIT_given` and `SPLIT_true`, `[N]` each.
    """
    save_arrays(
        path,
        {
            f"{name}_{what}": values
            for name, change in data.altered.items()
            for what, values in (
                ("index", change.split.index),
                ("given", change.split.labels),
                ("true", change.true),
            )
        },
    )


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


def model_costs(
    model: nn.Module, shape: tuple[int, ...], device: torch.device
) -> dict[str, float | None]:
    """Return what a model costs to store and to run.

    Args:
        model: images `[N, C, H, W]` → logits.
        shape: `(C, H, W)`.
        device: where it runs.

    Returns:
        `flops` of one image (a multiplication and its addition are two; None where torch cannot
        count them), `latency_ms` of one image, `images_per_second` in batches of 128, each time the
        median of repeats, and `file_bytes` of its weights as safetensors.
    """
    training = model.training
    model.to(device).eval()
    try:
        operations = flops_or_none(model, shape)
        latency = forward_seconds(model, shape, 1, repeats=15)
        batch = forward_seconds(model, shape, 128, repeats=7)
    finally:
        model.train(training)
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    return {
        "flops": operations,
        "latency_ms": 1000 * latency,
        "images_per_second": 128 / batch,
        "file_bytes": len(safetensors.torch.save(weights)),
    }


def flops_or_none(model: nn.Module, shape: tuple[int, ...]) -> int | None:
    """Return the operations of one image, or None, and say so, where torch cannot count them."""
    try:
        return flops(model, shape)
    except Exception as error:  # an operator's formula fails in its own way
        log.info("FLOPs of %s cannot be counted: %s", type(model).__name__, first_line(error))
        return None


def flops(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Return the floating-point operations of one image `(C, H, W)`."""
    # Compiled, it would not be counted, and no model after it in this process would be compiled.
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        forward_seconds(model, shape, 1, repeats=1)
    return counter.get_total_flops()


@torch.no_grad()  # FLOPs are not counted in inference mode
def forward_seconds(
    model: nn.Module, shape: tuple[int, ...], batch_size: int, repeats: int
) -> float:
    """Return the seconds of a forward pass: the median, without the first two of more."""
    weight = next(model.parameters())
    images = torch.zeros(batch_size, *shape, device=weight.device, dtype=weight.dtype)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        model(images)
        if weight.device.type == "cuda":
            torch.cuda.synchronize(weight.device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:] or seconds)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all; a number that is not finite becomes null."""
    text = json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False)
    # A list of numbers is one line; strings hold no line breaks, so nothing else can match.
    text = re.sub(r"\[\n[^\[\]{}\"]+\]", lambda found: one_line(found.group()), text)
    write_whole(path, text + "\n")


def one_line(text: str) -> str:
    """Return JSON of several lines as one."""
    return re.sub(r"\s+", " ", text).replace("[ ", "[").replace(" ]", "]")


def finite(value: Any) -> Any:
    """Return a value whose numbers JSON can hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
