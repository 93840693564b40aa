"""Class names that lie beside shards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.data.sources.errors import ShardLost
from distill.data.sources.listing import some
from distill.data.sources.shard_files import BRACES, Shard, local_path
from distill.data.sources.shard_remote import (
    REMOTE,
    denies,
    file_system,
    if_there,
    retried,
    unsigned,
)
from distill.utils.files import resolved_path

NAMES, INFO = "classes.txt", ("_info.json", "info.json", "dataset_info.json")
KEYS = ("classes", "class_names", "label_names")


def names_beside(
    root: str | Sequence[str], shards: Sequence[Shard], retries: int
) -> tuple[list[str] | None, list[str]]:
    """Return the class names that lie beside shards, and a note of where they are from.

    `classes.txt` has one on each line, in label order. In a JSON file of what a data set is they
    are a list under one of `KEYS`, or what the features of the Hub's say.

    Raises:
        ValueError: if a file is not as it should be, or its server does not say whether it is there
            after `retries` more tries. One that may not be read, as stores often answer of files
            that are not there, is passed over and noted.
    """
    denied: list[str] = []
    for folder in places(root, shards):
        for name in (NAMES, *INFO):
            place = f"{folder}/{name}"
            try:
                text = text_at(place, retries)
            except PermissionError:
                denied.append(place)
                continue
            names = None if text is None else names_in(place, name, text)
            if names:
                return names, [f"class names are those of {place}"]
    return None, [f"class names may lie in what may not be read ({some(denied)})"] if denied else []


def places(root: str | Sequence[str], shards: Sequence[Shard]) -> list[str]:
    """Return the folders that class names may lie in: the root, those of shards, and above them."""
    folders = [shard.place.rpartition("/")[0] for shard in shards]
    folders = list(dict.fromkeys(folders))
    above = [folder.rpartition("/")[0] for folder in folders]
    is_folder = isinstance(root, str) and not (
        unsigned(root).endswith(".tar") or BRACES.search(root) or "*" in root
    )
    given = [str(root)] if is_folder else []
    given = [one if REMOTE in one else str(resolved_path(one)) for one in map(local_path, given)]
    every = [*(one.rstrip("/") for one in given), *folders, *above]
    return [one for one in dict.fromkeys(every) if not one.endswith(":/")]  # above all of a server


def text_at(address: str, retries: int) -> str | None:
    """Return a text file's content, or None where there is none.

    Raises:
        PermissionError: if its server does not let it be read.
        ShardLost: if it does not answer, after `retries` more tries.
    """
    if REMOTE not in address:
        path = Path(address)
        return path.read_text(encoding="utf-8") if path.is_file() else None
    files, place = file_system(address)
    try:
        content = retried(lambda: if_there(lambda: files.cat_file(place)), retries, address)
    except ShardLost as error:
        if denies(error.__cause__):
            raise PermissionError(str(error)) from error
        raise
    return None if content is None else str(content.decode())


def names_in(place: str, name: str, text: str) -> list[str] | None:
    """Return the class names that a file says, or None where it says none."""
    if name == NAMES:
        names = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        try:
            names = names_of(json.loads(text)) or []
        except ValueError as error:
            raise ValueError(f"{place} is no JSON: {error}") from error
    if len(set(names)) < len(names):
        raise ValueError(f"{place} names a class twice")
    return names or None


def names_of(facts: Any) -> list[str] | None:
    """Return the class names in what a file says of a data set."""
    if not isinstance(facts, dict):
        return None
    features = facts.get("features")
    told = [facts.get(key) for key in KEYS]
    told += [one.get("names") for one in (features or {}).values() if isinstance(one, dict)] \
        if isinstance(features, dict) else []  # fmt: skip
    for names in told:
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
            return names
    return None
