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

import numpy as np

from distill.data.sources.folder import existing_folder, files_of, layout_of
from distill.data.sources.listing import Seen, real_paths, relative
from distill.data.sources.shard_classes import NAMES
from distill.utils.files import only_run_in, remove_stale, resolved_path, write_whole, writing
from distill.utils.memory import bytes_text
from distill.utils.process import cores

PLAN = "shards.json"
BLOCK = tarfile.BLOCKSIZE
END = 2 * BLOCK  # bytes after the last file of a tar, before it is filled up


@dataclass(frozen=True)
class Planned:
    """A shard that is to be written: its name, its images and their labels, and their first number.

    Args:
        name: of its file.
        first: the number of its first image in the split.
        images: the files.
        labels: class numbers, one for each.
    """

    name: str
    first: int
    images: Sequence[Path]
    labels: Sequence[int]


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

    Shards that are finished are kept, so that what was interrupted goes on.

    Args:
        folder: the image folder.
        out: where the shards go.
        size: bytes that a shard has at most, but for one image that is larger.
        count: images of a shard, in the place of `size`.
        seed: of the order of train.
        workers: processes that write; None is one for each processor.

    Raises:
        ValueError: if `out` holds shards of another folder or other options.
        FileNotFoundError: if there is no such folder.
    """
    base, target = existing_folder(folder), resolved_path(out)
    if target.resolve().is_relative_to(base.resolve()):
        raise ValueError(f"{target} lies in {base}, and would be read as a part of it")
    seen = Seen(base)
    layout = layout_of(base, seen)
    classes = [path.name for path in layout.classes["train"]]
    seen.walked |= real_paths([*layout.places.values(), *chain(*layout.classes.values())])
    planned: list[Planned] = []
    for part, folders in layout.classes.items():
        files, labels = files_of(folders, classes, seen)
        order = list(range(len(files)))
        if part == "train":
            order = np.random.default_rng(seed).permutation(len(files)).tolist()
        chosen = [base / files[k] for k in order], labels[order].tolist()
        cut = list(plan(part, *chosen, size, count))
        planned += cut
        yield f"{part}: {len(files):,} images in {len(cut):,} shards"
    yield from [*layout.notes, *seen.notes()]
    with only_run_in(target):
        check_plan(base, target, classes, planned)
        write_whole(target / NAMES, "".join(f"{name}\n" for name in classes))
        yield from written(target, planned, workers or cores())


def plan(
    part: str, images: Sequence[Path], labels: Sequence[int], size: float, count: int | None
) -> Iterator[Planned]:
    """Yield the shards that images of a split are cut into."""
    begins = [0]
    taken = float(END)
    for place, image in enumerate(images):
        more = 0 if count else 3 * BLOCK + -(-image.stat().st_size // BLOCK) * BLOCK
        filled_up = -(-(taken + more) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
        full = place - begins[-1] >= count if count else filled_up > size
        if full and place > begins[-1]:
            begins.append(place)
            taken = float(END)
        taken += more
    width = max(4, len(str(len(begins) - 1)))
    for number, (begin, end) in enumerate(zip(begins, [*begins[1:], len(images)], strict=True)):
        name = f"{part}-{number:0{width}}.tar"
        yield Planned(name, begin, images[begin:end], labels[begin:end])


def check_plan(
    base: Path, target: Path, classes: Sequence[str], planned: Sequence[Planned]
) -> None:
    """Keep what is to be written, and refuse a folder where something else was.

    Raises:
        ValueError: if so.
    """
    digest = hashlib.sha256(repr(list(classes)).encode())
    for one in planned:
        for image, label in zip(one.images, one.labels, strict=True):
            line = f"{one.name} {relative(image, base)} {image.stat().st_size} {label}\n"
            digest.update(line.encode(errors="surrogateescape"))
    wanted = {"plan": digest.hexdigest(), "shards": [one.name for one in planned]}
    path = target / PLAN
    if path.is_file():
        if json.loads(path.read_text(encoding="utf-8")) != wanted:
            raise ValueError(
                f"{target} holds shards of another folder, or of other options: give another folder"
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
        for number, (image, label) in enumerate(
            zip(planned.images, planned.labels, strict=True), planned.first
        ):
            add(tar, f"{number:08}.cls", str(label).encode())
            add(tar, f"{number:08}{image.suffix.lower()}", image.read_bytes())
    return path.stat().st_size


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file to a tar, with nothing of who wrote it or when."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
