"""A teacher with a store behind it: what is kept is read, and only the rest is asked for."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.data.batch import Batch
from distill.teacher.records import Fields, Layout, TopkCost
from distill.teacher.store import TeacherStore
from distill.teacher.teacher import Teacher

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answers:
    """A view's answers on the device that trains, so that a batch needs only say which it shows.

    Args:
        layout: of the records.
        fields: of all samples, `[samples, …]` each.
        there: which samples have an answer, bool `[samples]`, on the CPU.
    """

    layout: Layout
    fields: Fields
    there: Tensor

    def __call__(self, index: Tensor) -> Tensor:
        """Return the logits `[N, K]` of samples `[N]`, on the answers' device."""
        return self.layout.decode({name: field[index] for name, field in self.fields.items()})

    def has(self, index: Tensor) -> bool:
        """Return whether all of these samples, on the CPU, have one."""
        return bool(self.there[index].all())


class CachedTeacher:
    """A teacher that is asked for an answer only if no store keeps it.

    Args:
        teacher: what is asked for the answers that are missing.
        stores: split → the store of its answers; samples of other splits are always asked for.
        device_gb: the most that the answers to one training view may take on the device, in 10⁹
            bytes; those that take more are read batch by batch.
    """

    def __init__(
        self,
        teacher: Teacher,
        stores: Mapping[str, TeacherStore] | None = None,
        device_gb: float = 0.0,
    ) -> None:
        self.teacher = teacher
        self.stores = dict(stores or {})
        self.device_gb = device_gb
        self._resident: tuple[int, Answers | None] = (-1, None)  # the last view and its answers
        self._fields: Fields = {}  # where a captured step finds them
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
        if (answers := self.resident(batch, batch.view.device)) is not None:
            return answers(batch.index.to(batch.view.device, non_blocking=True))
        logits, there = read(store, batch.view_number, batch.index)
        logits = sent(logits, batch.view.device)
        missing = (~there).nonzero().squeeze(1)
        if not len(missing):
            return logits
        places = missing.to(logits.device)
        asked = self.teacher(batch.view, step)[places]
        index = batch.index.cpu()[missing]
        written = self._written(store, batch.view_number, index, asked)
        return logits.index_copy(0, places, written)

    def resident(self, batch: Batch, device: torch.device) -> Answers | None:
        """Return the answers to a training batch's view on a device, if its samples all have one.

        The view's are sent there with its first batch, to the place of the view's before.
        """
        store = self.stores.get("train")
        if store is None or batch.split != "train" or batch.index is None:
            return None
        if store.layout.record.itemsize * store.samples > self.device_gb * 1e9:
            return None
        view = stored_view(batch.view_number)
        if self._resident[0] != view:
            fields, there = store.read_fields(view, torch.arange(store.samples))
            whole = bool(there[batch.index].all())
            answers = Answers(store.layout, self._placed(fields, device), there) if whole else None
            self._resident = view, answers
        answers = self._resident[1]
        return answers if answers is not None and answers.has(batch.index) else None

    def _placed(self, fields: Fields, device: torch.device) -> Fields:
        """Return fields on a device, in the place of those before them."""
        for name, field in fields.items():
            # Unsigned numbers can be looked up on few devices; no class has a number as large.
            field = field.view(torch.int32) if field.dtype is torch.uint32 else field
            if name in self._fields and self._fields[name].device == device:
                self._fields[name].copy_(field)
            else:
                self._fields[name] = field.to(device, copy=True)
        return self._fields

    def keep(self, batch: Batch, logits: Tensor) -> None:
        """Write a training batch's answers `[N, K]` that are not kept yet.

        Raises:
            ValueError: as `__call__`.
        """
        assert batch.index is not None
        self._written(self.stores["train"], batch.view_number, batch.index.cpu(), logits)

    def close(self) -> None:
        """Let another process write."""
        self._resident, self._fields = (-1, None), {}
        for store in self.stores.values():
            store.close()

    def _written(
        self, store: TeacherStore, view_number: int | None, index: Tensor, answers: Tensor
    ) -> Tensor:
        """Write answers, and return them as they will be read; once, say what a top-k costs."""
        written = store.write(stored_view(view_number), index, answers)
        if store.layout.topk and store.writes and not self._topk_reported:
            self._topk_reported = True
            cost = TopkCost(store.layout.topk)
            cost.add(answers)
            log.info("teacher store: %s", cost.described())
        return written


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Return values on a device, on their way there where the host need not wait for them."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


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
