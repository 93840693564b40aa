"""The means that a training epoch logs, added up where the batches are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Names = tuple[str, ...]


class EpochMeans:
    """Add up what batches give, weighted by their samples, and divide once an epoch.

    A batch costs two small operations on its device, however many values it has, and no look at
    their numbers; Lightning's `log` of each value would take longer than a small step. The sums
    stay in their place, where a captured step adds to them.
    """

    def __init__(self) -> None:
        self.sums: dict[Names, Tensor] = {}
        self.samples: dict[Names, int] = {}

    def add(self, values: Mapping[str, Tensor], samples: int) -> None:
        """Add a batch's means, scalars on one device, over so many samples."""
        self.add_on_device(values, samples)
        self.count(tuple(values), samples)

    def add_on_device(self, values: Mapping[str, Tensor], samples: int) -> None:
        """Do what a device has to do of `add`."""
        names = tuple(values)
        added = torch.stack(list(values.values())) * samples
        if names not in self.sums:
            self.sums[names] = torch.zeros_like(
                added, dtype=torch.promote_types(added.dtype, torch.float32)
            )
        self.sums[names] += added

    def count(self, names: Names, samples: int) -> None:
        """Do what the host has to do of `add`."""
        self.samples[names] = self.samples.get(names, 0) + samples

    def take(self) -> dict[str, tuple[Tensor, int]]:
        """Return name → the sum and over how many samples, and begin again."""
        taken: dict[str, tuple[Tensor, int]] = {}
        for names, samples in self.samples.items():
            for name, value in zip(names, self.sums[names].clone(), strict=True):
                total, before = taken.get(name, (0, 0))
                taken[name] = total + value, before + samples
            self.sums[names].zero_()
        self.samples = {}
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Return what an epoch that is interrupted has added up."""
        sums = {names: self.sums[names].detach().cpu() for names in self.samples}
        return {"sums": sums, "samples": dict(self.samples)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on where `state_dict` was written."""
        self.sums = {names: value.to(device) for names, value in state["sums"].items()}
        self.samples = dict(state["samples"])
