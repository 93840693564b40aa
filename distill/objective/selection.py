"""Which samples of a training batch the terms on labels see: those whose labels are trusted."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distill.losses._common import upcast, world_size


class Selection:
    """Keep the samples that pass every test asked for.

    A batch is that of all ranks together, so that any number of them keeps the same samples.

    Args:
        small_loss: the share R in (0, 1] of the batch that is kept, `round(R·N)` samples and at
            least one, those with the smallest loss on labels; None keeps all. The papers' `R(t) =
            1 − rate·min(t/warm-up, 1)` is linear annealing of it from 1.
        agreement: True keeps the samples whose label is the teacher's answer; a number in (0, 1]
            those of whose label the teacher's probability, at temperature 1, is at least that.

    Raises:
        ValueError: for a share or a probability out of range.

    Reference:
        Small losses: co-teaching, 1804.06872, here with one network that chooses for itself.
    """

    def __init__(
        self, small_loss: float | None = None, agreement: bool | float | None = None
    ) -> None:
        self._small_loss: float | None = None
        if small_loss is not None:
            self.small_loss = small_loss
        self.agreement = None if agreement is False else agreement
        if self.agreement is not None and not _is_share(self.agreement):
            raise ValueError(
                "objective.sample_selection.agreement is true (the teacher answers as labelled) "
                f"or the least probability in (0, 1] that it gives the label, got {agreement!r}"
            )

    def __bool__(self) -> bool:
        return self.small_loss is not None or self.agreement is not None

    @property
    def small_loss(self) -> float | None:
        """The share of a batch that is kept for its small loss, or None."""
        return self._small_loss

    @small_loss.setter
    def small_loss(self, value: float) -> None:
        if isinstance(value, bool) or not _is_share(value):
            raise ValueError(
                "objective.sample_selection.small_loss is the share of a batch that is kept, in "
                f"(0, 1], got {value!r}"
            )
        self._small_loss = float(value)

    def __call__(
        self, loss: Tensor, teacher: Tensor | None, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return which samples are kept, bool `[N]`, and their share of all ranks' batch, `[]`.

        Args:
            loss: the loss on labels of each sample, `[N]`.
            teacher: logits `[N, K]`, read for agreement only.
            target: class indices `[N]`, or for small losses also class probabilities `[N, K]`.

        Raises:
            ValueError: if agreement has no teacher to ask, or targets mix several classes.
        """
        kept = torch.ones_like(loss, dtype=torch.bool)
        if self.small_loss is not None:
            kept = smallest(loss.detach(), self.small_loss)
        if self.agreement is not None:
            kept = kept & agreed(teacher, target, self.agreement)
        share = kept.to(loss.dtype).mean()
        if world_size() > 1:
            torch.distributed.all_reduce(share)
            share = share / world_size()
        return kept, share


def smallest(loss: Tensor, share: float) -> Tensor:
    """Return which samples `[N]` have the smallest losses of all ranks' batch, bool `[N]`."""
    everyone = [loss]
    if world_size() > 1:
        everyone = [torch.empty_like(loss) for _ in range(world_size())]
        torch.distributed.all_gather(everyone, loss)
    together = torch.cat(everyone)
    best = together.argsort(stable=True)[: max(1, round(share * len(together)))]
    kept = torch.zeros_like(together, dtype=torch.bool).scatter(0, best, True)
    rank = torch.distributed.get_rank() if world_size() > 1 else 0
    return kept.view(-1, len(loss))[rank]


def agreed(teacher: Tensor | None, target: Tensor, agreement: bool | float) -> Tensor:
    """Return of which samples the teacher finds the label right, bool `[N]`."""
    if teacher is None:
        raise ValueError("objective.sample_selection.agreement asks a teacher, and there is none")
    if target.is_floating_point():
        raise ValueError(
            "objective.sample_selection.agreement needs class indices: views that mix samples "
            "have no one label"
        )
    if agreement is True:
        return teacher.argmax(dim=1) == target
    probs = upcast(teacher).softmax(dim=1)
    return probs.gather(1, target.long().unsqueeze(1)).squeeze(1) >= agreement


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and 0 < value <= 1


def build_selection(spec: Mapping[str, Any] | None) -> Selection:
    """Return which samples the terms on labels see, refusing options that there are not."""
    known = list(inspect.signature(Selection).parameters)
    for option in spec or {}:
        if option not in known:
            raise ValueError(
                f"objective.sample_selection has no option {option!r}; it takes {', '.join(known)}"
            )
    return Selection(**spec or {})
