"""A batch: what is shown together, and which samples of which split these are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# What data sets and collators call them; of several that are there, none is chosen.
IMAGES = ("image", "images", "pixel_values", "view", "img", "x")
TARGETS = ("label", "labels", "target", "targets", "y")


@dataclass(eq=False)
class Batch:
    """Samples that are shown together.

    To be read only: it is not frozen because Lightning, where it converts batches to half
    precision, refuses dataclasses that are.

    Attributes:
        view: images `[N, C, H, W]`, un-normalised; of a `DataModule`, uint8 until its views are
            made on the device, and float32 in [0, 1] from then on. Where files are decoded on the
            device it is an `Undecoded`, which becomes images when the batch is sent there.
        target: labels, int64 `[N]`, or class probabilities `[N, K]`; −1 of a sample without one.
        index: which samples of the split these are, int64 `[N]`, below zero where a sampler padded
            a rank's share; None where the loader does not say. It stays on the CPU: who looks
            something up by it must not wait for a device.
        view_number: which of their views is shown; CLEAN, −1, is the one of evaluation.
        split: `train`, `val` or `test`, of a `DataModule`, which has checked the labels; else None.
        labeled: how many samples, the first ones, have a label; None is all.
        views: V, how many views of each sample are shown: rows are those of the first view, then
            those of the next, with the same targets and indices.
    """

    view: Tensor
    target: Tensor
    index: Tensor | None = None
    view_number: int | None = None
    split: str | None = None
    labeled: int | None = None
    views: int = 1

    def __len__(self) -> int:
        return len(self.view)

    @property
    def samples(self) -> int:
        """How many samples are shown, each in all of its views."""
        return len(self) // self.views

    def by_view(self) -> list[Batch]:
        """Return a batch of each view."""
        if self.views == 1:
            return [self]
        views, targets = self.view.chunk(self.views), self.target.chunk(self.views)
        index = None if self.index is None else self.index[: self.samples]
        return [
            replace(self, view=view, target=target, index=index, views=1)
            for view, target in zip(views, targets, strict=True)
        ]

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> Batch:
        """Return the batch with its images and targets on a device (Lightning calls this).

        Lightning leaves the second to us: a GPU is not waited for.
        """
        if non_blocking is None:
            non_blocking = torch.device(device).type == "cuda"
        view, target = (t.to(device, non_blocking=non_blocking) for t in (self.view, self.target))
        return replace(self, view=view, target=target)

    def pin_memory(self) -> Batch:
        """Return the batch in memory that a GPU can read by itself (torch's loaders call this)."""
        view, target = self.view.pin_memory(), self.target.pin_memory()
        index = None if self.index is None else self.index.pin_memory()
        return replace(self, view=view, target=target, index=index)

    @classmethod
    def of(cls, given: Any) -> Batch:
        """Return what a loader gave as a batch.

        Args:
            given: a batch; `(images, targets)`, with the samples' indices or other fields behind
                them; or a mapping with the usual names, such as `image` and `label`, and `index`.

        Raises:
            ValueError: for anything else, and where names are missing or several may be meant.
        """
        if isinstance(given, Batch):
            return given
        if isinstance(given, Mapping):
            view, target = entry(given, IMAGES, "images"), entry(given, TARGETS, "targets")
            return cls(view, target, indices(given.get("index"), target))
        if isinstance(given, Sequence) and len(given) > 1:
            view, target, *rest = given
            return cls(view, target, indices(rest[0] if rest else None, target))
        what = type(given).__name__
        what += f" of {len(given)}" if isinstance(given, list | tuple) else ""
        raise ValueError(f"a batch is (images, targets) or a mapping of both, and not a {what}")


def indices(given: Any, target: Any) -> Tensor | None:
    """Return what a loader gave behind its targets, if it is one whole number for each of them."""
    if not isinstance(given, Tensor) or given.is_floating_point() or given.dtype is torch.bool:
        return None
    return given if given.ndim == 1 and len(given) == len(target) else None


def entry(batch: Mapping[str, Any], names: Sequence[str], what: str) -> Any:
    """Return what a batch holds under one of these names."""
    found = [name for name in names if name in batch]
    if len(found) == 1:
        return batch[found[0]]
    there = ", ".join(map(str, batch)) or "nothing"
    problem = f"may have its {what} in {' or '.join(found)}" if found else f"has no {what}"
    raise ValueError(
        f"a batch that is a mapping {problem}: it holds {there}, and one of {', '.join(names)} is "
        "looked for; let the data set return (image, label)"
    )
