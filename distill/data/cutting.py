"""Splits that a source lacks are cut from train; what train shares with the others is found."""

from __future__ import annotations

import torch

from distill.data.sources.listing import some
from distill.data.sources.splits import Source, Split, stratified


def cut_splits(
    source: Source, val_fraction: float, test_fraction: float, seed: int
) -> tuple[Split, Split, Split, list[str]]:
    """Return train, validation and test, cutting from train what the source lacks.

    Classes of too few images to be in each of them stay in train.
    """
    train, val, test = source.train, source.val, source.test
    notes = list(source.notes)
    if test is not None and not len(train):  # nothing to cut from
        return train, train if val is None else val, test, notes
    rare = [] if test is not None and val is not None else too_rare(source)
    if test is None:
        positions, rest = stratified(train.labels, test_fraction, seed, rare)
        train, test = train.subset(rest), train.subset(positions)
        notes.append(f"no test split: {len(test)} images cut from train (split_seed={seed})")
    if val is None:
        positions, rest = stratified(train.labels, val_fraction, seed, rare)
        train, val = train.subset(rest), train.subset(positions)
        notes.append(f"no validation split: {len(val)} images cut from train (split_seed={seed})")
    if rare:
        names = some((source.classes[k] for k in rare), 5)
        notes.append(f"too few images to be in each split, and so only in train: {names}")
    return train, val, test, notes


def clamped(key: str, asked: int, count: int, given: int | None = None) -> str:
    """Return what is said of a batch that is larger than the training split."""
    return f"{key}={asked}: there are {count} training images, so batches are of {given or count}"


def too_rare(source: Source) -> list[int]:
    """Return the classes with too few images to be in train and in each split cut from it.

    Raises:
        ValueError: if no class has enough.
    """
    needed = 1 + (source.val is None) + (source.test is None)
    labels = source.train.labels
    labels = labels[(labels >= 0) & (labels < len(source.classes))]
    found = torch.bincount(labels, minlength=len(source.classes))
    if not bool((found >= needed).any()):
        raise ValueError(
            f"{source.name}: train has {int(found.max())} images of "
            f"{source.classes[int(found.argmax())]}, and {needed} are needed where splits are cut "
            "from it; no class has more"
        )
    return torch.nonzero((found > 0) & (found < needed)).flatten().tolist()


def apart(train: Split, val: Split, test: Split, duplicates: str) -> tuple[Split, list[str]]:
    """Return train, if asked without the images that are held out too, and what is to be said.

    Images are the same if they hold the same bytes: files byte for byte, images in memory pixel for
    pixel. Where a source does not know what its images hold, nothing is found.

    Args:
        train: the training split.
        val: the validation split.
        test: the test split.
        duplicates: `keep` or `drop`.
    """
    if duplicates not in ("keep", "drop"):
        raise ValueError(f"data.duplicates must be keep or drop, got {duplicates!r}")
    learned, notes = train.contents(), []
    held_out = {"val": set(val.contents()), "test": set(test.contents())}
    both = sum(content in held_out["val"] for content in test.contents())
    if both:
        notes.append(f"{images(both)} of test {are(both)} in val, too")
    twice = {name: sum(c in found for c in learned) for name, found in held_out.items()}
    held = held_out["val"] | held_out["test"]
    among = torch.tensor([content in held for content in learned])
    if not bool(among.any()):
        return train, notes
    where = " and ".join(f"{count} of them in {name}" for name, count in twice.items() if count)
    count = int(among.sum())
    told = f"{images(count)} of train {are(count)} held out, too ({where})"
    if duplicates == "keep":
        return train, [*notes, f"{told}; data.duplicates=drop takes them out of train"]
    return train.subset(torch.nonzero(~among).flatten()), [
        *notes,
        f"{told}, and dropped from train",
    ]


def images(count: int) -> str:
    """Return so many images in words."""
    return f"{count} image{'' if count == 1 else 's'}"


def are(count: int) -> str:
    """Return the verb of so many things."""
    return "is" if count == 1 else "are"
