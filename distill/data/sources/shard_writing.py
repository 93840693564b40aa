"""Writing shards of an image folder: the same bytes whoever writes them, finished ones kept."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distill.data.sources.contents import Listed
from distill.data.sources.folder import existing_folder, layout_of, listed_split
from distill.data.sources.listing import Seen, endings, real_paths, relative, some
from distill.data.sources.shard_classes import NAMES
from distill.utils.files import only_run_in, remove_stale, resolved_path, write_whole, writing
from distill.utils.memory import bytes_text
from distill.utils.process import cores

PLAN = "shards.json"
BLOCK = tarfile.BLOCKSIZE
END = 2 * BLOCK  # bytes after the last file of a tar, before it is filled up


class Picture(NamedTuple):
    """An image file that is to be packed: its class number, its bytes, and when it was changed."""

    path: Path
    label: int
    size: int
    changed: int  # in nanoseconds


@dataclass(frozen=True)
class Planned:
    """A shard that is to be written: its name, its images, and the number of the first of them.

    Args:
        name: of its file.
        first: the number of its first image in the split.
        images: the files.
    """

    name: str
    first: int
    images: Sequence[Picture]


def write_shards(
    folder: str | Path,
    out: str | Path,
    size: float = 256e6,
    count: int | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> Iterator[str]:
    """Write shards of an image folder, and yield what is done, a line at a time.

    The folder is read as `data=folder` reads it. Each split has shards `train-0000.tar`,
    `val-0000.tar` … with a member `NUMBER.jpg` (or the file's own ending) and a label `NUMBER.cls`
    for each image; `classes.txt` names the classes. The images of train come in an order that the
    seed decides, so that neighbours are of different classes; held-out ones in the folder's.

    Shards that are finished are kept, so that what was interrupted goes on. Files that are empty
    are named, and packed as they lie.

    Args:
        folder: the image folder.
        out: where the shards go.
        size: bytes that a shard has at most, but for one image that is larger.
        count: images of a shard, in the place of `size`.
        seed: of the order of train.
        workers: processes that write; None is one for each processor.

    Raises:
        ValueError: if `out` holds shards of another folder, of files that have changed since, or of
            other options; for a split or a class without images; for a size of no bytes.
        FileNotFoundError: if there is no such folder.
    """
    if size <= 0:
        raise ValueError(f"a shard's size must be more than 0 bytes, got {size:g}")
    base, target = existing_folder(folder), resolved_path(out)
    if target.resolve().is_relative_to(base.resolve()):
        raise ValueError(f"{target} lies in {base}, and would be read as a part of it")
    seen = Seen(base)
    layout = layout_of(base, seen)
    classes = [path.name for path in layout.classes["train"]]
    seen.walked |= real_paths([*layout.places.values(), *chain(*layout.classes.values())])
    planned: list[Planned] = []
    for part, place in layout.places.items():
        images = pictures_of(base, listed_split(layout, part, classes, 3, seen))
        if not images:
            raise ValueError(f"{place} has no images ({', '.join(endings())})")
        if part == "train":
            order = np.random.default_rng(seed).permutation(len(images)).tolist()
            images = [images[place] for place in order]
        cut = list(plan(part, images, size, count))
        planned += cut
        yield f"{part}: {len(images):,} images in {len(cut):,} shards"
        yield from empty_note(base, images)
    yield from [*layout.notes, *seen.notes()]
    with only_run_in(target):
        check_plan(base, target, classes, planned)
        write_whole(target / NAMES, "".join(f"{name}\n" for name in classes))
        yield from written(target, planned, workers or cores())


def pictures_of(base: Path, split: Listed) -> list[Picture]:
    """Return the image files of a split of a folder."""
    pictures = []
    for name, label in zip(split.pieces.files, split.labels.tolist(), strict=True):
        about = (base / name).stat()
        pictures.append(Picture(base / name, label, about.st_size, about.st_mtime_ns))
    return pictures


def empty_note(base: Path, images: Sequence[Picture]) -> Iterator[str]:
    """Yield what is to be said of files that hold nothing, where there are any."""
    empty = [relative(image.path, base) for image in images if not image.size]
    if empty:
        one = len(empty) == 1
        what = "file is empty and packed as it lies" if one else "files are empty and packed so"
        yield (
            f"{len(empty):,} {what} ({some(sorted(empty))}): data=shards "
            "refuses such images, or leaves them out with data.verify=new data.broken=skip"
        )


def plan(part: str, images: Sequence[Picture], size: float, count: int | None) -> Iterator[Planned]:
    """Yield the shards that images of a split are cut into."""
    begins = [0]
    taken = float(END)
    for place, image in enumerate(images):
        more = 0 if count else 3 * BLOCK + -(-image.size // BLOCK) * BLOCK
        filled_up = -(-(taken + more) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
        full = place - begins[-1] >= count if count else filled_up > size
        if full and place > begins[-1]:
            begins.append(place)
            taken = float(END)
        taken += more
    width = max(4, len(str(len(begins) - 1)))
    for number, (begin, end) in enumerate(zip(begins, [*begins[1:], len(images)], strict=True)):
        name = f"{part}-{number:0{width}}.tar"
        yield Planned(name, begin, images[begin:end])


def check_plan(
    base: Path, target: Path, classes: Sequence[str], planned: Sequence[Planned]
) -> None:
    """Keep what is to be written, and refuse a folder where something else was.

    Raises:
        ValueError: if so.
    """
    digest = hashlib.sha256(repr(list(classes)).encode())
    for one in planned:
        for image in one.images:
            name = f"{one.name} {relative(image.path, base)}"
            line = f"{name} {image.size} {image.changed} {image.label}\n"
            digest.update(line.encode(errors="surrogateescape"))
    wanted = {"plan": digest.hexdigest(), "shards": [one.name for one in planned]}
    path = target / PLAN
    if path.is_file():
        if json.loads(path.read_text(encoding="utf-8")) != wanted:
            raise ValueError(
                f"{target} holds shards of another folder, of files that have changed since, or of "
                "other options: give another folder, or remove it"
            )
    elif any(target.glob("*.tar")):
        raise ValueError(f"{target} holds tars already: give another folder")
    write_whole(path, json.dumps(wanted))


def written(target: Path, planned: Sequence[Planned], workers: int) -> Iterator[str]:
    """Write the shards that are not there yet, and yield a line for each and one for all."""
    remove_stale(target)
    lacking = [one for one in planned if not (target / one.name).exists()]
    if len(lacking) < len(planned):
        yield f"{len(planned) - len(lacking):,} shards are there already"
    with ProcessPoolExecutor(min(workers, len(lacking)) or 1) as processes:
        begun = [processes.submit(write, target / one.name, one) for one in lacking]
        for one, done in zip(lacking, begun, strict=True):
            yield f"{one.name}: {len(one.images):,} images, {bytes_text(done.result())}"
    total = sum((target / one.name).stat().st_size for one in planned)
    yield f"{len(planned):,} shards, {bytes_text(total)}, in {target}"


def write(path: Path, planned: Planned) -> int:
    """Write one shard, whole or not at all, and return its bytes."""
    with (
        writing(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for number, image in enumerate(planned.images, planned.first):
            add(tar, f"{number:08}.cls", str(image.label).encode())
            add(tar, f"{number:08}{image.path.suffix.lower()}", image.path.read_bytes())
    return path.stat().st_size


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file to a tar, with nothing of who wrote it or when."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
