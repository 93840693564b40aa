"""What a data module refuses, and what it says of classes that are absent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from distill.data.sources.listing import some
from distill.data.sources.splits import Source, Split, Streamed
from distill.data.views.build import MIXING
from distill.data.views.views import ResidentView, StreamedView
from distill.utils.numbers import is_number


def check_numbers(
    batch_size: int, num_workers: int, val_fraction: float, test_fraction: float
) -> None:
    """Refuse numbers that are out of range."""
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("num_workers", num_workers, 0),
    ):
        if value < least:
            raise ValueError(f"data.{name} must be at least {least}, got {value}")
    for name, share in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 < share < 1:
            raise ValueError(f"data.{name} must lie between 0 and 1, got {share}")


def check_timeout(timeout: Any) -> None:
    """Refuse a time to wait for a batch that is none."""
    if not (is_number(timeout) and timeout >= 0):
        raise ValueError(
            "data.timeout is how many seconds to wait for a batch of data workers, 0 for ever, got "
            f"{timeout!r}"
        )


def check_views(views: Any) -> None:
    """Refuse a number of views per sample that is not one."""
    if views is not None and (not isinstance(views, int) or isinstance(views, bool) or views < 1):
        raise ValueError(
            f"data.views must be how many views each sample has, at least 1, or null, got {views!r}"
        )


def check_balance(balance: Any) -> None:
    """Refuse an exponent of class sizes that is none."""
    if not (is_number(balance) and 0 <= balance <= 1):
        raise ValueError(
            "data.balance is the power of a class's size by which it is drawn: from 0, all classes "
            f"equally often, to 1, every image once, got {balance!r}"
        )


def check_mixing(view: ResidentView | StreamedView, unlabeled: Split | None) -> None:
    """Refuse to mix labels where there are samples without."""
    if unlabeled is not None and view.mixes:
        names = [name for name in MIXING if getattr(view, name)]
        raise ValueError(
            f"data.view.{names[0]} mixes labels, and the pictures of data.unlabeled have none: "
            "leave one of the two out"
        )


def check_streams(unlabeled: Split | None) -> None:
    """Refuse unlabelled pictures in shards: they are drawn in an order that opens all at once."""
    if isinstance(unlabeled, Streamed) and hasattr(unlabeled.load, "in_shards"):
        raise ValueError(
            "data.unlabeled cannot be shards, as its pictures are drawn from anywhere: give a "
            "folder"
        )


def check_labels(source: Source, splits: Mapping[str, Split]) -> None:
    """Refuse splits, by name, whose labels cannot be learned or judged."""
    count = len(source.classes)
    if count < 2:
        raise ValueError(f"{source.name} has {count} class: nothing to tell apart")
    for name, split in splits.items():
        if not len(split) and source.judged and name != "test":
            continue
        if not len(split):
            raise ValueError(f"{source.name}: the {name} split is empty")
        low, high = int(split.labels.min()), int(split.labels.max())
        if low < 0 or high >= count:
            raise ValueError(
                f"{source.name}: {name} has label {low if low < 0 else high}, but labels of "
                f"{count} classes go from 0 to {count - 1}"
            )
    if (missing := absent(source.classes, splits["train"])) and not source.judged:
        raise ValueError(f"{source.name}: train has no image of {some(missing, 5)}")


def absent(classes: Sequence[str], split: Split) -> list[str]:
    """Return the names of the classes that a split has no image of."""
    found = torch.bincount(split.labels, minlength=len(classes))
    return [classes[k] for k in torch.nonzero(found == 0).flatten().tolist()]


def absent_notes(classes: Sequence[str], splits: Mapping[str, Split]) -> list[str]:
    """Return what is to be said of classes that cannot be judged, or that nothing is fitted on."""
    return [
        f"{name} has no image of {some(missing, 5)}"
        for name, split in splits.items()
        if name != "train" and len(split) and (missing := absent(classes, split))
    ]
