"""What models cost: parameters, operations, time and bytes."""

from __future__ import annotations

import hashlib
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distill.utils.errors import first_line

log = logging.getLogger(__name__)

BATCH = 128


WARM_UP, REPEATS, FEWEST = 3, 25, 4  # forward passes


PATIENCE = 1.5  # seconds for each model, after which the fewest repeats are enough


Costs = dict[str, Any]


_measured: dict[str, Costs] = {}  # of this process, by `architecture`


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

    An architecture is measured once in a process; those that are not cached yet are measured in
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
    parts = (type(model).__qualname__, repr(model), tensors, shape, device, torch.get_num_threads())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


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
    weight = next(value for value in model.parameters() if value.is_floating_point())
    return torch.zeros(batch_size, *shape, device=weight.device, dtype=weight.dtype)


@torch.no_grad()  # FLOPs are not counted in inference mode
def time_forward(model: nn.Module, images: torch.Tensor) -> float:
    """Return the seconds of one forward pass."""
    start = time.perf_counter()
    model(images)
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - start
