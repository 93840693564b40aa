"""The teacher asked ahead of training, by any number of processes on any number of machines."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import Tensor

from distill.config import read
from distill.data import DataModule
from distill.data.views.views import CLEAN
from distill.teacher.cached import stored_view
from distill.teacher.records import TopkCost
from distill.teacher.store import Part, TeacherStore
from distill.teacher.teacher import Teacher
from distill.training.cache import expected, open_stores, stored, views_per_sample
from distill.utils.numbers import rate_text

log = logging.getLogger(__name__)

MEASURED = 4  # batches, before it is said how long the rest will take
EVERY = 30.0  # seconds between lines about progress
POLL = 2.0  # seconds between looks at what other processes fill
LOOKED_AT = 2**14  # records, of which is seen at once which are there


class Piece(NamedTuple):
    """What one process fills at a time.

    Args:
        name: of the split.
        number: of its view, or CLEAN.
        part: the file that holds the answers.
    """

    name: str
    number: int
    part: Part


@dataclass
class Progress:
    """How much of what a process is to see filled is there, and how long the rest takes.

    Args:
        total: answers in all.
        warm_up: batches that are not timed.
        clock: returns seconds.
    """

    total: int
    warm_up: int = 1
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.asked = self.there = self.batches = self.timed = 0
        self._started = self._said = self.clock()

    def found(self, count: int) -> None:
        """Note answers that were there, whoever asked for them."""
        self.there += count

    def add(self, count: int) -> None:
        """Note a batch that was asked, and say how it goes: first after a few, then at times."""
        self.asked, self.batches = self.asked + count, self.batches + 1
        now = self.clock()
        if self.batches <= self.warm_up:
            self._started = now
            return
        self.timed += count
        if self.batches == self.warm_up + MEASURED:
            log.info("teacher store: %s at %s, %s at most by this process alone",
                     f"{self.left:,} more answers", self.rate_text, self.time_text)  # fmt: skip
            self._said = now
        elif now - self._said >= EVERY and self.left:
            done = self.asked + self.there
            log.info("teacher store: %.0f %% (%s of %s answers), %s, by %s at the latest",
                     100 * done / self.total, f"{done:,}", f"{self.total:,}", self.rate_text,
                     self.end_text)  # fmt: skip
            self._said = now

    @property
    def left(self) -> int:
        """How many answers are missing, as far as has been looked."""
        return self.total - self.asked - self.there

    @property
    def rate(self) -> float:
        """Answers per second since the first batch."""
        return self.timed / max(self.clock() - self._started, 1e-9)

    @property
    def rate_text(self) -> str:
        """The rate, for people."""
        return f"{rate_text(self.rate)} images/s"

    @property
    def time_text(self) -> str:
        """How long the rest takes, for people."""
        minutes, seconds = divmod(round(self.left / self.rate), 60)
        hours, minutes = divmod(minutes, 60)
        if hours:
            return f"{hours:,} h {minutes} min"
        return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"

    @property
    def end_text(self) -> str:
        """When the end is expected, for people."""
        now, left = datetime.now(), timedelta(seconds=self.left / self.rate)
        end = now + left
        return f"{end:%H:%M}" if end.date() == now.date() else f"{end:%F %H:%M}"


def fill(cfg: DictConfig, data: DataModule, teacher: Teacher, trainer: pl.Trainer) -> None:
    """Ask the teacher for every view that a run will show, of which no answer is kept yet.

    Several processes divide the files of the stores among themselves: each claims one after the
    other, and ends when all are whole. With `store.part` one fills its share alone, which no other
    process needs to end.

    Raises:
        ValueError: if the answers cannot be kept.
    """
    stores = open_stores(cfg, data, teacher, shared=True)
    try:
        Filler(cfg, data, teacher, stores, trainer).run()
    finally:
        for store in stores.values():
            store.close()


class Filler:
    """A process that fills stores, alone or beside others.

    Args:
        cfg: the configuration of the runs that will read them.
        data: their data.
        teacher: who is asked.
        stores: split → its store, which is shared.
        trainer: says where the teacher answers, and how it computes.
    """

    def __init__(
        self,
        cfg: DictConfig,
        data: DataModule,
        teacher: Teacher,
        stores: dict[str, TeacherStore],
        trainer: pl.Trainer,
    ) -> None:
        self.cfg, self.data, self.teacher, self.stores = cfg, data, teacher, stores
        self.device = trainer.strategy.root_device
        self.context: Callable[[], AbstractContextManager[None]] = (
            trainer.precision_plugin.forward_context
        )
        self.batch_size = teacher.batch_size or data.batch_size
        self.keys = data.training_keys(ranks=read.processes(cfg))
        topk = stores["train"].layout.topk
        self.cost = None if topk is None else TopkCost(topk)
        self._order: tuple[tuple[str, int], Tensor, Tensor] | None = None  # of the last view

    def run(self) -> None:
        """Fill what is missing, or see it filled by others."""
        part, parts = own_share(self.cfg)
        every = self.pieces()
        own = every[part::parts]
        log.info("teacher store: %s, %d files in %s", expected(self.cfg, self.data), len(every),
                 self.cfg.store.path)  # fmt: skip
        prefetched = 2 * self.data.num_workers  # batches that loaders have ready at the first
        progress = Progress(sum(len(self.samples(piece)) for piece in own), 1 + prefetched)
        if parts > 1:
            log.info("teacher store: part %d of %d, counted from 0, is %d of %d files, %s answers",
                     part, parts, len(own), len(every), f"{progress.total:,}")  # fmt: skip
        self.teacher.to(self.device)
        self.see_filled(own, progress)
        log.info("teacher store: %scomplete, %s of %s answers asked for now",
                 "" if parts == 1 else "its part is ", f"{progress.asked:,}",
                 f"{progress.total:,}")  # fmt: skip
        if self.cost is not None and self.cost.answers:
            log.info("teacher store: %s", self.cost.described())

    def pieces(self) -> list[Piece]:
        """Return all that is to be filled, validation first."""
        views = range(views_per_sample(self.cfg, self.data))
        shown = [("val", CLEAN), *(("train", number) for number in views)]
        return [
            Piece(name, number, part)
            for name, number in shown
            for part in self.stores[name].parts(stored_view(number))
        ]

    def see_filled(self, pieces: Sequence[Piece], progress: Progress) -> None:
        """Fill pieces until all are whole, waiting for those that others have claimed."""
        waiting, said = list(pieces), False
        while waiting:
            left = [piece for piece in waiting if not self.filled(piece, progress)]
            if len(left) == len(waiting):
                if not said:
                    log.info("teacher store: other processes fill %d more files: waiting for them",
                             len(left))  # fmt: skip
                said = True
                time.sleep(POLL)
            waiting = left

    def filled(self, piece: Piece, progress: Progress) -> bool:
        """Fill a piece, and return whether it is whole; another process may be at it."""
        if not len(self.samples(piece)):
            return True
        store = self.stores[piece.name]
        if not store.claim(piece.part):
            return False
        try:
            missing, asked = self.missing(piece), progress.asked
            there = len(self.samples(piece)) - len(missing)
            progress.found(there)
            whole = self.ask(piece, missing, progress)
            if not whole:  # it is looked at again
                progress.found(asked - progress.asked - there)
            return whole
        finally:
            store.release()

    def ask(self, piece: Piece, positions: Tensor, progress: Progress) -> bool:
        """Ask about samples, and return whether that came to its end."""
        if not len(positions):
            return True
        store, split = self.stores[piece.name], stored(self.data, piece.name)
        batches = positions.split(self.batch_size)
        for batch in self.data.in_order(split, piece.number, batches, self.device, name=piece.name):
            with self.context():
                logits = self.teacher(batch.view)
            assert batch.index is not None
            store.write(piece.part.view, batch.index, logits)
            if self.cost is not None:
                self.cost.add(logits)
            progress.add(len(batch))
            if not store.still_claimed():
                log.info("teacher store: another process took over view %d, file %d: this one was "
                         "silent for too long", piece.part.view, piece.part.number)  # fmt: skip
                return False
        return True

    def missing(self, piece: Piece) -> Tensor:
        """Return which of a piece's samples have no answer yet, positions in the split."""
        store, positions = self.stores[piece.name], self.samples(piece)
        rows = stored(self.data, piece.name).index[positions]
        there = [store.read_fields(piece.part.view, some)[1] for some in rows.split(LOOKED_AT)]
        return positions[~torch.cat(there)]

    def samples(self, piece: Piece) -> Tensor:
        """Return which samples are asked about in a piece: positions in the split, int64 `[n]`."""
        rows, positions = self.in_row_order(piece.name, piece.number)
        ends = torch.tensor([piece.part.rows.start, piece.part.rows.stop])
        first, last = torch.searchsorted(rows, ends).tolist()
        return positions[first:last]

    def in_row_order(self, name: str, number: int) -> tuple[Tensor, Tensor]:
        """Return the rows of a store that a view fills, sorted, and their samples' positions."""
        drawn = name == "train" and self.keys.unlabeled > 0  # else all views show all samples
        key = name, number if drawn else CLEAN
        if self._order is None or self._order[0] != key:
            split = stored(self.data, name)
            positions = torch.arange(len(split))
            if drawn:
                epochs = int(self.cfg.trainer.max_epochs)
                positions = self.keys.shown(number, self.data.views, epochs)
            rows, order = split.index[positions].sort()
            self._order = key, rows, positions[order]
        return self._order[1:]


def own_share(cfg: DictConfig) -> tuple[int, int]:
    """Return which part of a store's files, counted from 0, this process fills, and of how many.

    Raises:
        ValueError: if `store.part` and `store.parts` do not go together.
    """
    part, parts = cfg.store.get("part"), cfg.store.get("parts")
    if part is None and parts is None:
        return 0, 1
    if parts is None:
        raise ValueError(f"store.part={part} needs store.parts=N: how many parts there are")
    if part is None:
        raise ValueError(
            f"store.parts={parts} needs store.part, from 0 to {parts - 1}: "
            f"-m 'store.part=range({parts})' makes each a job"
        )
    if part >= parts:
        raise ValueError(
            f"store.part={part} must lie between 0 and {parts - 1}: store.parts={parts}"
        )
    return part, parts
