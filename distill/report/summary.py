"""The facts of a run, for `summary.json`."""

from __future__ import annotations

import hashlib
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
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import safetensors.torch
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distill import __version__
from distill.data import DataModule
from distill.utils.errors import first_line
from distill.utils.files import save_arrays, write_whole

log = logging.getLogger(__name__)

BATCH = 128
WARM_UP, REPEATS, FEWEST = 3, 25, 4  # forward passes
PATIENCE = 1.5  # seconds for each model, after which the fewest repeats are enough
Costs = dict[str, Any]
_measured: dict[str, Costs] = {}  # of this process, by `architecture`
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
        "images": {
            **{"train": len(data.train), "val": len(data.val), "test": len(data.test)},
            **({} if data.unlabeled is None else {"unlabeled": len(data.unlabeled)}),
        },
        "condition": condition_of(data),
        "notes": data.notes,
    }


def unlabeled_of(cfg: DictConfig, data: DataModule, trainer: pl.Trainer) -> dict[str, Any] | None:
    """Return which pictures without labels a run was shown, and how often; None where none was."""
    if data.unlabeled is None:
        return None
    batches = trainer.fit_loop.epoch_loop.batch_progress.total.completed * trainer.world_size
    return {
        "from": OmegaConf.to_container(cfg, resolve=True)["data"]["unlabeled"],  # type: ignore[index,call-overload]
        "images": len(data.unlabeled),
        "left_out": data.left_out,
        "share": data.unlabeled_per_batch / data.batch_size,
        "per_batch": data.unlabeled_per_batch,
        "labelled_per_batch": data.labeled_per_batch,
        "views_shown": batches * data.unlabeled_per_batch,
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


def model_costs(model: nn.Module, shape: tuple[int, ...], device: torch.device) -> Costs:
    """Return what a model costs to store and to run; see `costs_of_models`."""
    return costs_of_models({"": model}, shape, device)[""]


def costs_of_models(
    models: Mapping[str, nn.Module], shape: tuple[int, ...], device: torch.device
) -> dict[str, Costs]:
    """Return what models cost to store and to run, the same for models of one architecture.

    An architecture is measured once in a process; those that are not known yet are measured in
    turns, so that whatever else the machine does meanwhile slows all of them alike.

    Args:
        models: name → images `[N, C, H, W]` → logits.
        shape: `(C, H, W)`.
        device: where they run.

    Returns:
        Of each `flops` of one image (a multiplication and its addition are two; None
        where torch cannot count them), `latency_ms` of
        one image and `images_per_second` in batches of 128, each the median of repeats after a
        warm-up, with `latency_ms_quartiles` and `images_per_second_quartiles`, and `file_bytes` of
        its weights as safetensors.
    """
    keys = {name: architecture(model, shape, device) for name, model in models.items()}
    # Of several models of one architecture the first stands for all.
    new = {keys[name]: models[name] for name in reversed(keys) if keys[name] not in _measured}
    if new:
        _measured.update(measured(dict(reversed(new.items())), shape, device))
    return {name: dict(_measured[key]) for name, key in keys.items()}


def architecture(model: nn.Module, shape: tuple[int, ...], device: torch.device) -> str:
    """Return a name for what decides how long a model takes, but for its weights' values."""
    tensors = [(name, *value.shape, value.dtype) for name, value in model.state_dict().items()]
    told = (type(model).__qualname__, repr(model), tensors, shape, device, torch.get_num_threads())
    return hashlib.sha256(repr(told).encode()).hexdigest()


def measured(
    models: Mapping[str, nn.Module], shape: tuple[int, ...], device: torch.device
) -> dict[str, Costs]:
    """Measure models of different architectures in turns; see `costs_of_models`."""
    training = {key: model.training for key, model in models.items()}
    for model in models.values():
        model.to(device).eval()
    try:
        operations = {key: flops_or_none(model, shape) for key, model in models.items()}
        one = forward_seconds(models, shape, 1)
        many = forward_seconds(models, shape, BATCH)
    finally:
        for key, model in models.items():
            model.train(training[key])
    return {
        key: {
            "flops": operations[key],
            **with_quartiles("latency_ms", [1000 * seconds for seconds in one[key]]),
            **with_quartiles("images_per_second", [BATCH / seconds for seconds in many[key]]),
            "file_bytes": file_bytes(model),
        }
        for key, model in models.items()
    }


def with_quartiles(name: str, values: Sequence[float]) -> Costs:
    """Return the median of values by a name, and their quartiles beside it."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {name: middle, f"{name}_quartiles": [low, high]}


def file_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights as safetensors."""
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    return len(safetensors.torch.save(weights))


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
        time_forward(model, blank(model, shape, 1))
    return counter.get_total_flops()


def forward_seconds(
    models: Mapping[str, nn.Module], shape: tuple[int, ...], batch_size: int
) -> dict[str, list[float]]:
    """Return the seconds of forward passes of each model, in turns and after a warm-up.

    There are at most `REPEATS` of each, and at least `FEWEST` however long they take.
    """
    images = {key: blank(model, shape, batch_size) for key, model in models.items()}
    seconds: dict[str, list[float]] = {key: [] for key in models}
    start = time.perf_counter()
    for repeat in range(WARM_UP + REPEATS):
        for key, model in models.items():
            seconds[key].append(time_forward(model, images[key]))
        spent = time.perf_counter() - start
        if repeat + 1 >= WARM_UP + FEWEST and spent > PATIENCE * len(models):
            break
    return {key: values[WARM_UP:] for key, values in seconds.items()}


def blank(model: nn.Module, shape: tuple[int, ...], batch_size: int) -> torch.Tensor:
    """Return black images `[N, C, H, W]`, where and as a model's weights are."""
    weight = next(model.parameters())
    return torch.zeros(batch_size, *shape, device=weight.device, dtype=weight.dtype)


@torch.no_grad()  # FLOPs are not counted in inference mode
def time_forward(model: nn.Module, images: torch.Tensor) -> float:
    """Return the seconds of one forward pass."""
    start = time.perf_counter()
    model(images)
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - start


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
