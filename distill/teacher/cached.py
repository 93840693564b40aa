"""The teacher's answers: from the store where they are kept, and into it where they are not."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distill.data.views.views import CLEAN
from distill.teacher.store import TeacherStore, topk_error

log = logging.getLogger(__name__)
TEMPERATURES = (1, 4, 16)


@dataclass(frozen=True)
class Known:
    """What a store knows of one batch, on the CPU.

    Attributes:
        split: `train` or `val`.
        view: the number of the view.
        index: the samples' indices `[N]`; below zero is a sampler's padding.
        logits: `[N, K]`, zero where they are not known.
        there: which of them are known, bool `[N]`.
    """

    split: str
    view: int
    index: Tensor
    logits: Tensor
    there: Tensor

    @property
    def complete(self) -> bool:
        """Whether nothing is left to ask the teacher."""
        return bool(self.there.all())

    def to(self, device: torch.device, non_blocking: bool = False) -> Known:
        """Return the same with its logits on a device (Lightning calls this)."""
        return replace(self, logits=self.logits.to(device, non_blocking=non_blocking))


class Recall:
    """The stores of a run's splits.

    Args:
        stores: split → its store.
    """

    def __init__(self, stores: Mapping[str, TeacherStore]) -> None:
        self.stores = dict(stores)
        self._said_topk = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Recall:
        return self  # weight averaging copies the module that holds it

    def read(self, split: str, view: int, index: Tensor) -> Known:
        """Return what is known of a batch; a clean view is the only one of its split."""
        view = 0 if view == CLEAN else view
        logits, there = self.stores[split].read(view, index.clamp(min=0))
        return Known(split, view, index, logits, there | (index < 0))

    def complete(self, known: Known, live: Tensor) -> Tensor:
        """Keep a teacher's live answers to a batch, and return what the store will say of it.

        So a run that fills a store trains on the very numbers that one that reads it does.
        """
        missing = (~known.there).nonzero().squeeze(1)
        here = missing.to(live.device)
        store = self.stores[known.split]
        kept = store.write(known.view, known.index[missing], live[here])
        if store.layout.topk and store.writes and not self._said_topk:
            self._said_topk = True
            log.info("teacher store: %s", topk_text(live[here], store.layout.topk))
        return known.logits.to(live.device).index_copy(0, here, kept)

    def close(self) -> None:
        """Let another process write."""
        for store in self.stores.values():
            store.close()


def topk_text(logits: Tensor, k: int) -> str:
    """Return what keeping k of the logits `[N, K]` costs, for people."""
    costs = [f"{topk_error(logits, k, t):.2g} nats at T = {t}" for t in TEMPERATURES]
    return (
        f"keeping {k:,} of {logits.shape[1]:,} logits moves the teacher's probabilities by a KL of "
        f"{', '.join(costs)} (mean over {len(logits)} answers)"
    )
