"""Bytes that training takes: of weights, gradients, the optimiser, and what is kept for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.utils.memory import distinct_bytes, held_bytes


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step takes on its device.

    Args:
        teacher: weights and running statistics of the model that teaches; 0 without one.
        weights: those of what is trained.
        gradients: of what is trained.
        optimizer: the optimiser's own state.
        activations: what the forward pass keeps for the backward pass, at the full batch; on a GPU
            all that a step takes beside the others.
    """

    teacher: int
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All together."""
        parts = self.teacher, self.weights, self.gradients, self.optimizer, self.activations
        return sum(parts)


def weight_bytes(module: nn.Module | None) -> int:
    """Return the bytes of a module's parameters and buffers; 0 without one."""
    return 0 if module is None else held_bytes(module)


def gradient_bytes(module: nn.Module) -> int:
    """Return the bytes of the gradients of what a module learns."""
    return sum(one.nbytes for one in module.parameters() if one.requires_grad)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of what an optimiser keeps of each parameter, once it has made a step."""
    return distinct_bytes(tensors_in(optimizer.state_dict()["state"]))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors that a nested state holds."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)


def saved_bytes(forward: Callable[[], Any], but: Iterable[Tensor] = ()) -> tuple[int, Any]:
    """Return the bytes that a forward pass keeps for the backward pass, and what it returns.

    Several tensors that lie in one storage, such as a ReLU's output that is the next layer's input,
    take its bytes once.

    Args:
        forward: makes a graph, which its answer keeps alive.
        but: tensors that are there anyway, such as weights, and are not counted.

    Example:
        >>> layer, images = nn.Linear(4, 3), torch.zeros(2, 4)
        >>> saved_bytes(lambda: layer(images), layer.parameters())[0]  # the images, for its weights
        32
    """
    there = {one.untyped_storage().data_ptr() for one in but}
    kept: dict[int, int] = {}

    def keep(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        answer = forward()
    return sum(kept.values()), answer
