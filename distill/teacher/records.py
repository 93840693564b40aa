"""What a store keeps of an answer: a record of fixed size with a checksum, and files of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

DTYPES = {"float16": torch.float16, "float32": torch.float32}
CHECKSUM_BYTES = 4
TEMPERATURES = (1, 4, 16)  # at which is said what a top-k costs
MUCH = 0.1  # nats, from which on it is said what costs less

Array = npt.NDArray[Any]
Fields = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """What a record holds: an answer in full, or its k largest logits and what the rest weighs.

    The classes of the rest share one logit, `tail = lse(kept as rounded) + lse(rest) − lse(kept) −
    log(K − k)`: at T = 1 their total mass is exact, however coarsely the k are rounded.

    Args:
        classes: K.
        dtype: `float16` or `float32`, in which logits are kept; the tail is always float32.
        topk: k, from 1 to K − 1; None keeps all K.

    Raises:
        ValueError: if there is no such dtype or k.
    """

    classes: int
    dtype: str = "float16"
    topk: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"store.dtype={self.dtype} is unknown; there are {', '.join(DTYPES)}")
        if self.topk is not None and not 1 <= self.topk < self.classes:
            raise ValueError(
                f"store.topk={self.topk} must lie between 1 and {self.classes - 1}: there are "
                f"{self.classes} classes"
            )

    @cached_property
    def record(self) -> np.dtype[np.void]:
        """The record's fields; its size is a multiple of 4 bytes."""
        kind = {"float16": "<f2", "float32": "<f4"}[self.dtype]
        checksum = ("checksum", "<u4")
        if self.topk is None:
            return np.dtype([checksum, ("logits", kind, (self.classes,))], align=True)
        ids, kept = ("ids", "<u4", (self.topk,)), ("logits", kind, (self.topk,))
        return np.dtype([checksum, ids, ("tail", "<f4"), kept], align=True)

    def encode(self, logits: Tensor) -> Fields:
        """Return the rounded fields of logits `[N, K]`, on their device.

        Raises:
            ValueError: if the shape is wrong, or the logits are not finite, or not once rounded.
        """
        if logits.ndim != 2 or logits.shape[1] != self.classes:
            raise ValueError(
                f"the teacher's logits are {list(logits.shape)}, and the store holds "
                f"{self.classes} classes"
            )
        logits = logits.detach().float()
        if not finite(logits):
            raise ValueError("the teacher's logits are not finite: they are not kept")
        fields = self._rounded(logits)
        if not all(map(finite, fields.values())):
            raise ValueError(
                f"the teacher's logits reach {logits.abs().max():.6g}, beyond what {self.dtype} "
                "holds: set store.dtype=float32"
            )
        return fields

    def as_kept(self, logits: Tensor) -> Tensor:
        """Return logits `[N, K]` as decoding gives them back, without a look at their numbers."""
        return self.decode(self._rounded(logits.detach().float()))

    def _rounded(self, logits: Tensor) -> Fields:
        return self._whole(logits) if self.topk is None else self._largest(logits, self.topk)

    def decode(self, fields: Mapping[str, Tensor]) -> Tensor:
        """Return the logits `[N, K]` of fields, float32."""
        logits = fields["logits"].float().contiguous()
        if self.topk is None:
            return logits
        tail = fields["tail"][:, None].expand(-1, self.classes)
        return tail.scatter(1, fields["ids"].long(), logits)

    def sound(self, fields: Mapping[str, Tensor]) -> Tensor:
        """Return which records hold an answer, bool `[N]`: a checksum is no signature."""
        sound = fields["logits"].isfinite().all(dim=1)
        if self.topk is None:
            return sound
        ids = fields["ids"].long()
        return sound & fields["tail"].isfinite() & (ids < self.classes).all(dim=1)

    def pack(self, fields: Mapping[str, Tensor]) -> Array:
        """Return records as bytes `[N, size]`, their checksums zero."""
        records = np.zeros(len(fields["logits"]), self.record)
        for name, field in fields.items():
            records[name] = field.cpu().numpy()
        return records[:, None].view(np.uint8)

    def unpack(self, records: Array) -> Fields:
        """Return the fields of records given as bytes `[N, size]`."""
        fields = records.view(self.record)[:, 0]
        names = (name for name in self.record.names or () if name != "checksum")
        return {name: torch.from_numpy(fields[name]) for name in names}

    def _whole(self, logits: Tensor) -> Fields:
        return {"logits": logits.to(DTYPES[self.dtype])}

    def _largest(self, logits: Tensor, k: int) -> Fields:
        kept, ids = logits.topk(k)
        rounded = kept.to(DTYPES[self.dtype])
        odds = logsumexp(logits.scatter(1, ids, -math.inf)) - logsumexp(kept)
        tail = logsumexp(rounded) + odds - math.log(self.classes - k)
        return {"ids": ids, "tail": tail.float(), "logits": rounded}


class ViewFile:
    """Records of one view, mapped from their file, and which of them are known to be whole.

    Args:
        path: the file, of full size.
        samples: how many records there are.
        size: bytes per record.
        start: where this file's checksums start from, in place of zero.
        writable: whether the file is mapped for writing.
    """

    def __init__(self, path: Path, samples: int, size: int, start: int, writable: bool) -> None:
        mapped = np.memmap(path, np.uint8, "r+" if writable else "r", shape=(samples, size))
        self.start = start
        self.records: Array = mapped.view(np.ndarray)  # a memmap is slow to index
        self.checksums: Array = self.records[:, :CHECKSUM_BYTES].view("<u4")[:, 0]
        self.verified = np.zeros(samples, bool)

    def check(self, rows: Array) -> tuple[Array, Array]:
        """Return which records are there, and which are damaged: bool `[n]` each.

        A record whose checksum is zero is absent; one that was found whole is not checked again.
        """
        claimed = self.checksums[rows]
        there = self.verified[rows]
        doubtful = np.flatnonzero(~there & (claimed != 0))
        if len(doubtful):
            some = rows[doubtful]
            there[doubtful] = self.checksum(self.records[some], some) == claimed[doubtful]
            self.verified[rows[there]] = True
        return there, ~there & (claimed != 0)

    def take(self, rows: Array, there: Array) -> Array:
        """Return copies of the records, bytes `[n, size]`, blank where they are not there."""
        records = self.records[rows]
        if not there.all():
            records[~there] = 0
        return records

    def put(self, rows: Array, records: Array) -> None:
        """Write records that are not there.

        Their checksums come last: a record that is being written, or never was to its end, reads
        as absent. What is there is never written again, for it may be read.
        """
        checksums = self.checksum(records, rows)
        self.records[rows] = records
        self.checksums[rows] = checksums

    def checksum(self, records: Array, rows: Array) -> Array:
        """Return the checksums of records `[n, size]` in these rows: uint32 `[n]`, never zero.

        A CRC-32 that starts elsewhere ends elsewhere, so a record in another row does not pass.
        """
        starts = ((self.start + rows) % 2**32).tolist()
        found = map(crc32, records[:, CHECKSUM_BYTES:], starts)
        return np.maximum(np.fromiter(found, np.uint32, len(rows)), 1)


def topk_error(logits: Tensor, k: int, temperature: float = 1.0) -> float:
    """Return what keeping k logits costs: `mean KL(softmax(z/T) ‖ softmax(ẑ/T))` in nats.

    `ẑ` are the logits as a store with `topk=k` gives them back, apart from the dtype's rounding.

    Args:
        logits: `[N, K]`.
        k: logits kept, from 1 to K − 1.
        temperature: T > 0.
    """
    return topk_errors(logits, k, [temperature])[0]


def topk_errors(logits: Tensor, k: int, temperatures: Sequence[float]) -> list[float]:
    """Return `topk_error` at several temperatures."""
    layout = Layout(logits.shape[1], "float32", k)
    both = logits.double(), layout.as_kept(logits).double()
    errors = []
    for temperature in temperatures:
        full, part = ((z / temperature).log_softmax(1) for z in both)
        divergence = F.kl_div(part, full, reduction="batchmean", log_target=True)
        errors.append(float(divergence))
    return errors


class TopkCost:
    """What keeping k logits costs, over all answers that are shown to it.

    Args:
        k: logits kept, from 1 to K − 1.
    """

    def __init__(self, k: int) -> None:
        self.k, self.answers, self.classes = k, 0, 0
        self._sums = [0.0] * len(TEMPERATURES)

    def add(self, logits: Tensor) -> None:
        """Take answers `[N, K]` into account."""
        errors = topk_errors(logits, self.k, TEMPERATURES)
        count, self.classes = len(logits), logits.shape[1]
        self._sums = [s + count * error for s, error in zip(self._sums, errors, strict=True)]
        self.answers += count

    def described(self) -> str:
        """Return the means, for people, and advice where one is large."""
        means = [total / self.answers for total in self._sums]
        costs = [f"{m:.2g} nats at T = {t}" for m, t in zip(means, TEMPERATURES, strict=True)]
        advice = "; a larger store.topk is closer, and null keeps all" if max(means) > MUCH else ""
        return (
            f"keeping {self.k:,} of {self.classes:,} logits moves the teacher's probabilities by a "
            f"KL of {', '.join(costs)} (mean over {self.answers:,} answers){advice}"
        )


def finite(values: Tensor) -> bool:
    """Return whether no value is NaN or infinite; `isfinite` of each is ten times slower."""
    return not values.numel() or bool(values.abs().amax().isfinite())


def logsumexp(logits: Tensor) -> Tensor:
    """Return `log Σ exp z`, float64 `[N]`, of logits `[N, K]`; only its sums are so wide."""
    peak = logits.amax(1, keepdim=True)
    wide = (logits.float() - peak).exp().sum(1, dtype=torch.float64)
    return wide.log() + peak[:, 0]
