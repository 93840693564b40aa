"""A training run's state in memory, to go back to."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from distill.training.module import Distiller


class Snapshot:
    """A copy of what a training step changes: weights, statistics, optimiser, means, randomness.

    Args:
        module: whose student and objective are trained.
        optimizer: what trains them; its state has been made.
        others: further tensors.
    """

    def __init__(
        self, module: Distiller, optimizer: torch.optim.Optimizer, others: Iterable[Tensor] = ()
    ) -> None:
        learned = [module.student, module.objective]
        self.tensors = [t for one in learned for t in (*one.parameters(), *one.buffers())]
        self.weights = len(self.tensors)
        self.optimizer = optimizer
        self.tensors += state_tensors(optimizer)
        self.tensors += others
        self.copies = [tensor.detach().clone() for tensor in self.tensors]
        self.random = torch.get_rng_state()
        self.device_random = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    @torch.no_grad()
    def restore(self) -> None:
        """Make everything what it was, in its place."""
        known = {id(tensor) for tensor in self.tensors}
        for tensor in state_tensors(self.optimizer):
            if id(tensor) not in known:  # made since, of what had no gradient before
                tensor.zero_()
        for tensor, copy in zip(self.tensors, self.copies, strict=True):
            tensor.copy_(copy)
        torch.set_rng_state(self.random)
        if self.device_random is not None:
            torch.cuda.set_rng_state_all(self.device_random)

    def way(self, other: Snapshot) -> Tensor:
        """Return how far weights and statistics lie apart, `√Σ (a − b)²`, float64 `[]`."""
        pairs = zip(self.copies[: self.weights], other.copies[: self.weights], strict=True)
        squares = [
            (a.double() - b.double()).square().sum() for a, b in pairs if a.is_floating_point()
        ]
        return torch.stack(squares).sum().sqrt()


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the tensors of an optimiser's state."""
    return [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
