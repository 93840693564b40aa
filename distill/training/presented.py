"""What students see of a batch, made in fixed places: views, targets, the teacher's answers."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import InitVar, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distill.data import DataModule
from distill.data.batch import Batch
from distill.teacher.cached import Answers, CachedTeacher, read, sent
from distill.training.replay import in_fixed_places

# Where the answers come from; those that are asked for a store are rounded as it will keep them.
NONE, LIVE, ASKED, READ, RESIDENT = "none", "live", "asked", "read", "resident"


@dataclass(frozen=True)
class Sources:
    """What a batch is made from.

    Args:
        tensors: by name, on any device: `positions`, or `view` and `target`; `index`, where stored
            answers lie on the device; `answers`, where they were read.
        teacher: where the teacher's answers come from.
        view_number: which view of the samples is shown.
        labeled: how many samples, the first ones, have a label; None is all.
        answers: what lies on the device.
    """

    tensors: dict[str, Tensor]
    teacher: str
    view_number: int | None
    labeled: int | None
    answers: Answers | None = None

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def key(self) -> Hashable:
        """Return what has to be equal for two batches to be made in the same places."""
        shapes = [(name, t.shape, t.dtype) for name, t in self.tensors.items()]
        kept = self.answers.fields.values() if self.answers else ()
        return (*shapes, self.teacher, self.labeled, *(field.data_ptr() for field in kept))


def sources_of(
    batch: Batch, cached: CachedTeacher | None, logits_only: bool, device: torch.device
) -> Sources:
    """Return what a batch is made from; the teacher is asked where the store lacks an answer.

    Args:
        batch: as its loader gave it.
        cached: the teacher, if there is one.
        logits_only: whether students need no more of the teacher than its logits.
        device: where it is made.
    """
    tensors = {"positions": batch.view}
    if batch.view.ndim > 1:
        tensors = {"view": batch.view, "target": batch.target}
    more = batch.view_number, batch.labeled
    if cached is None or not logits_only:
        return Sources(tensors, NONE, *more)
    store = cached.stores.get("train")
    if store is None or batch.index is None:
        return Sources(tensors, LIVE, *more)
    if (answers := cached.resident(batch, device)) is not None:
        return Sources({**tensors, "index": batch.index}, RESIDENT, *more, answers)
    logits, there = read(store, batch.view_number, batch.index)
    if not there.all():
        return Sources(tensors, ASKED, *more)
    return Sources({**tensors, "answers": sent(logits, device)}, READ, *more)


class Made(NamedTuple):
    """What students see of a batch.

    Args:
        view: `[N, C, H, W]` in [0, 1].
        target: labels `[N]`, or class probabilities `[N, K]`.
        answers: the teacher's logits `[N, K]`, if they are at hand.
        asked: the same before they were rounded, if they are to be kept.
    """

    view: Tensor
    target: Tensor
    answers: Tensor | None
    asked: Tensor | None


@dataclass(eq=False)
class Presentation:
    """A batch in fixed places, made by one function of what lies in others.

    Args:
        sources: of the first batch; all others have its shapes.
        data: whose views are shown.
        cached: the teacher, if there is one.
        device: where it is made.
    """

    sources: InitVar[Sources]
    data: DataModule
    cached: CachedTeacher | None
    device: torch.device

    def __post_init__(self, sources: Sources) -> None:
        self.teacher, self.labeled, self.kept = sources.teacher, sources.labeled, sources.answers
        self.tensors = {
            name: torch.empty_like(tensor, device=self.device)
            for name, tensor in sources.tensors.items()
        }
        words = self._words(sources)
        self.words = None if words is None else words.clone()
        self.view_number = sources.view_number

    def show(self, sources: Sources, index: Tensor | None) -> None:
        """Say which batch is made next.

        Args:
            sources: what it is made from.
            index: which samples it holds, by which runs that take turns know it; None makes it
                anew.
        """
        self.write(sources)

    def write(self, sources: Sources) -> None:
        """Put what a batch is made from in its places, without waiting for the device."""
        for name, tensor in sources.tensors.items():
            self.tensors[name].copy_(tensor, non_blocking=True)
        if self.words is not None and sources.view_number != self.view_number:
            words = self._words(sources)
            assert words is not None
            self.words.copy_(words)
        self.view_number = sources.view_number

    def made(self) -> Made:
        """Return what students see of the batch."""
        view, target = self.tensors.get("view"), self.tensors.get("target")
        if view is None or target is None:
            assert self.words is not None
            resident = self.data.resident_on(self.device)
            view, target = resident(self.tensors["positions"], self.words)
        view, answers, asked = view.float().div_(255), self.tensors.get("answers"), None
        if self.teacher in (LIVE, ASKED):
            assert self.cached is not None
            answers = self.cached.teacher(view)
            if self.teacher == ASKED:
                asked, answers = answers, self.cached.stores["train"].layout.as_kept(answers)
        elif self.kept is not None:
            answers = self.kept(self.tensors["index"])
        return Made(view, target, answers, asked)

    def _words(self, sources: Sources) -> Tensor | None:
        if "positions" not in sources.tensors:
            return None
        assert sources.view_number is not None
        return self.data.resident_on(self.device).words(sources.view_number)


@dataclass(eq=False)
class SharedPresentation(Presentation):
    """A batch that runs which take turns learn from, made by the first of them for all."""

    def __post_init__(self, sources: Sources) -> None:
        super().__post_init__(sources)
        self.write(sources)
        self.outputs, self.replay = in_fixed_places(super().made, self.device)
        self.replay()  # captured or not, what lies there is a batch
        self.holds: Tensor | None = None  # the index of the batch that was made last

    def made(self) -> Made:
        """Return what was made last."""
        view, target, answers, asked = self.outputs
        assert view is not None
        assert target is not None
        return Made(view, target, answers, asked)

    def show(self, sources: Sources, index: Tensor | None) -> None:
        """Make a batch, unless another run has made it."""
        if index is None or self.holds is not index:
            self.write(sources)
            self.replay()
            self.holds = index
