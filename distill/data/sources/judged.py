"""Data that a trained model is only judged on: all of a labelled folder, by the model's classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distill.data.sources.contents import read_splits
from distill.data.sources.folder import existing_folder, folder, labelled_images, listed_files
from distill.data.sources.images import check_channels
from distill.data.sources.in_memory import in_memory
from distill.data.sources.listing import folders_in
from distill.data.sources.shard_files import shards_at
from distill.data.sources.shards import label_of, read_shards, shards
from distill.data.sources.splits import PARTS, Source, meaning, stratified
from distill.data.sources.table import table
from distill.data.sources.timm_data import timm_dataset


class Judged:  # no data class, of which Hydra would make a dictionary
    """What a trained model brings to the data that it is judged on.

    Args:
        label: where the model comes from, for messages.
        classes: its class names in label order; none where it does not know them.
        preprocessing: how it is shown pictures, as timm's configurations say it.
        whole: whether data without a train split are judged as a whole.
        refit: whether a validation split is cut from such data, for what is fitted.
    """

    def __init__(
        self,
        label: str,
        classes: Sequence[str] = (),
        preprocessing: Mapping[str, Any] | None = None,
        whole: bool = True,
        refit: bool = False,
    ) -> None:
        self.label, self.classes = label, list(classes)
        self.preprocessing = dict(preprocessing or {})
        self.whole, self.refit = whole, refit

    def __repr__(self) -> str:
        return f"{self.classes} {self.preprocessing} {self.whole} {self.refit}"


def opened(source: Callable[..., Source], group: Mapping[str, Any], judged: Judged) -> Source:
    """Return the source of a config group's keys, labelled by the classes of a trained model.

    Raises:
        ValueError: if it has a class that the model does not know.
    """
    whole = WHOLE.get(getattr(source, "func", source)) if judged.whole else None
    data = (whole and whole(group)) or source(**group)
    return with_model_classes(data, judged) if judged.classes else data


def with_model_classes(source: Source, judged: Judged) -> Source:
    """Return a source whose labels are a trained model's, by the names of the classes.

    Names are matched as they are written, and those that are not found without regard to case.

    Raises:
        ValueError: if a class is not known, or two would be the same.
    """
    places = [place_of(name, judged.classes) for name in source.classes]
    unknown = [name for name, k in zip(source.classes, places, strict=True) if k is None]
    if unknown:
        raise ValueError(
            f"{judged.label} knows the classes {named(judged.classes)} and {source.name} has "
            f"{named(source.classes)}, of which it does not know {named(unknown)}: give the data "
            "it was trained on (data=…), or rename what means the same"
        )
    if len(set(places)) < len(places):
        raise ValueError(f"{source.name}: two of {named(source.classes)} are the same class")
    labels = torch.tensor([k for k in places if k is not None])
    splits = {part: getattr(source, part) for part in PARTS}
    changed: dict[str, Any] = {
        part: split and relabelled(split, labels) for part, split in splits.items()
    }
    return replace(source, classes=judged.classes, judged=True, **changed)


def relabelled(split: Any, labels: torch.Tensor) -> Any:
    """Return a split whose label k has become `labels[k]`; one out of range is left to be named."""
    inside = (split.labels >= 0) & (split.labels < len(labels))
    return split.relabelled(labels[split.labels]) if bool(inside.all()) else split


def place_of(name: str, classes: Sequence[str]) -> int | None:
    """Return a class's label by its name, or None where it is not known."""
    if name in classes:
        return classes.index(name)
    folded = [one.casefold() for one in classes]
    return folded.index(name.casefold()) if folded.count(name.casefold()) == 1 else None


def named(classes: Sequence[str]) -> str:
    """Return the first class names and how many there are."""
    return f"{', '.join(classes[:3])}{', …' if len(classes) > 3 else ''} ({len(classes)})"


def only_judged(name: str, classes: list[str], channels: int, test: Any, val: Any = None) -> Source:
    """Return a source of nothing but pictures to be judged."""
    note = f"nothing is trained here: all {len(test):,} pictures of {name} are judged"
    nothing = test.subset(torch.arange(0))
    return Source(name, classes, channels, nothing, val, test, [note], judged=True)


def folder_to_judge(group: Mapping[str, Any]) -> Source | None:
    """Return a folder of `test/CLASS/*` or `CLASS/*` as pictures to be judged; None if it trains.

    A folder `val` beside `test` is validation; alone it is what is judged.
    """
    base = existing_folder(group["root"])
    check_channels(group.get("channels", 3))
    parts = {meaning(path.name): path for path in sorted(folders_in(base))}
    if "train" in parts:
        return None
    places = [parts[part] for part in ("test", "val") if part in parts] or [base]
    judged, *more = (images_to_judge(base, place, group) for place in places)
    if more:
        judged = beside_validation(base, judged, more[0])
    if not group.get("resident"):
        return judged
    sizes = group.get("image_size"), group.get("model_size")
    return in_memory(judged, *sizes, group.get("num_workers", 0))


def beside_validation(base: Path, judged: Source, validation: Source) -> Source:
    """Return pictures to be judged with those of another folder as their validation split."""
    numbers = {name: k for k, name in enumerate(judged.classes)}
    missing = [name for name in validation.classes if name not in numbers]
    if missing:
        raise ValueError(f"{base}: val has {named(missing)}, of which test has no folder")
    labels = torch.tensor([numbers[name] for name in validation.classes])
    return replace(judged, val=relabelled(validation.test, labels))


def images_to_judge(base: Path, place: Path, group: Mapping[str, Any]) -> Source:
    """Return the class folders in a place as pictures to be judged."""
    classes, pieces, labels, notes = labelled_images(place)
    channels = group.get("channels", 3)
    listed = {"test": listed_files(pieces, labels, channels)}
    how = group.get("verify", "new"), group.get("broken", "refuse"), group.get("cache")
    splits, left_out = read_splits(listed, classes, *how)
    source = only_judged(base.resolve().name, classes, channels, splits["test"])
    return replace(source, notes=[*source.notes, *notes, *left_out])


def timm_to_judge(group: Mapping[str, Any]) -> Source | None:
    """Return a timm data set without a train split as pictures to be judged; None if it trains."""
    splits = group.get("splits") or {}
    judged = splits.get("test") or splits.get("val")
    if splits.get("train") or not judged:
        return None
    source = timm_dataset(**{**group, "splits": {"train": judged}})
    return only_judged(source.name, source.classes, source.channels, source.train)


def table_to_judge(group: Mapping[str, Any]) -> Source | None:
    """Return a table, whose images are all to be judged where it names no splits."""
    source = table(**group)
    if source.val is not None or source.test is not None:
        return source
    judged = only_judged(source.name, source.classes, source.channels, source.train)
    return replace(judged, notes=[*judged.notes, *source.notes])


def shards_to_judge(group: Mapping[str, Any]) -> Source | None:
    """Return shards without a train split as pictures to be judged; None if there is one."""
    found, _ = shards_at(group["root"], group["retries"])
    parts = {shard.part for shard in found}
    if "train" in parts:
        return None
    splits, classes, said = read_shards(**group)
    judged = next(splits[part] for part in ("test", "val", "train") if part in splits)
    val = splits.get("val") if "test" in splits else None
    source = only_judged(label_of(group["root"]), classes, group["channels"], judged, val)
    return replace(source, notes=[*source.notes, *said])


# How sources are read of which there is nothing to train on.
WHOLE: dict[Any, Callable[[Mapping[str, Any]], Source | None]] = {
    folder: folder_to_judge,
    table: table_to_judge,
    shards: shards_to_judge,
    timm_dataset: timm_to_judge,
}


def with_validation(source: Source, fraction: float, seed: int) -> Source:
    """Return a source of pictures to be judged, some of which are cut off for what is fitted."""
    if len(source.train) or source.val is not None:
        return source
    assert source.test is not None
    positions, rest = stratified(source.test.labels, fraction, seed)
    note = f"{len(positions)} of them are cut off for what is fitted (split_seed={seed})"
    return replace(
        source,
        val=source.test.subset(positions),
        test=source.test.subset(rest),
        notes=[*source.notes, note],
    )
