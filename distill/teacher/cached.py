"""A teacher with a store behind it: what is kept is read, and only the rest is asked for."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distill.data.batch import Batch
from distill.teacher.records import topk_error
from distill.teacher.store import TeacherStore
from distill.teacher.teacher import Teacher

log = logging.getLogger(__name__)
TEMPERATURES = (1, 4, 16)


class CachedTeacher:
    """A teacher that is asked for an answer only if no store keeps it.

    Args:
        teacher: what is asked for the answers that are missing.
        stores: split → the store of its answers; samples of other splits are always asked for.
    """

    def __init__(self, teacher: Teacher, stores: Mapping[str, TeacherStore] | None = None) -> None:
        self.teacher = teacher
        self.stores = dict(stores or {})
        self._topk_reported = False

    def __deepcopy__(self, memo: dict[int, Any]) -> CachedTeacher:
        return self  # weight averaging copies the module that holds it

    def __call__(self, batch: Batch, step: int | None = None) -> Tensor:
        """Return logits `[N, K]` on the device of the batch's views.

        What is asked is written, and returned as a later read will return it, so that the run that
        fills a store trains on the very numbers of one that reads it.

        Args:
            batch: the samples.
            step: the optimiser step, in training.

        Raises:
            ValueError: if an answer cannot be kept; see `TeacherStore.write`.
        """
        store = self.stores.get(batch.split or "")
        if store is None or batch.index is None:
            return self.teacher(batch.view, step)
        logits, there = read(store, batch.view_number, batch.index)
        logits = logits.to(batch.view.device, non_blocking=True)
        missing = (~there).nonzero().squeeze(1)
        if not len(missing):
            return logits
        places = missing.to(logits.device)
        answers = self.teacher(batch.view, step)[places]
        index = batch.index.cpu()[missing]
        written = store.write(stored_view(batch.view_number), index, answers)
        self._report_topk(store, answers)
        return logits.index_copy(0, places, written)

    def has(self, split: str, view_number: int, index: Tensor) -> bool:
        """Return whether every answer to one view of these samples of a split is kept."""
        return bool(read(self.stores[split], view_number, index)[1].all())

    def close(self) -> None:
        """Let another process write."""
        for store in self.stores.values():
            store.close()

    def _report_topk(self, store: TeacherStore, answers: Tensor) -> None:
        if store.layout.topk and store.writes and not self._topk_reported:
            self._topk_reported = True
            log.info("teacher store: %s", topk_text(answers, store.layout.topk))


def read(store: TeacherStore, view_number: int | None, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits `[N, K]`, zero where none are kept, and which are or need not be, bool `[N]`.

    The samples that pad a rank's share need none.
    """
    index = index.cpu()
    logits, there = store.read(stored_view(view_number), index.clamp(min=0))
    return logits, there | (index < 0)


def stored_view(view_number: int | None) -> int:
    """Return the place of a view in its store: the clean one is the only one of its split."""
    return max(view_number or 0, 0)


def topk_text(logits: Tensor, k: int) -> str:
    """Return what keeping k of the logits `[N, K]` costs, for people."""
    costs = [f"{topk_error(logits, k, t):.2g} nats at T = {t}" for t in TEMPERATURES]
    return (
        f"keeping {k:,} of {logits.shape[1]:,} logits moves the teacher's probabilities by a KL of "
        f"{', '.join(costs)} (mean over {len(logits)} answers)"
    )
