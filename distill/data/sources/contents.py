"""What image files hold: a hash of their bytes, and whether they can be decoded, found out once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import PIL
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

from distill.data.sources.errors import reason
from distill.data.sources.images import decoded
from distill.data.sources.listing import relative, some
from distill.data.sources.splits import Split, Streamed
from distill.utils.files import remove_stale, resolved_path, write_whole

log = logging.getLogger(__name__)

FORM = 1  # of the files that keep what was found
FRESH = 2_000_000_000  # ns after its last change in which a file may change again unseen
MANY, LARGE = 5_000, 1 << 30  # files or bytes from which on reading them is announced
AT_ONCE = 512  # files that are handed to the threads together, so that Ctrl-C is heard
THREADS = 8
Stamp = tuple[int, int, int, int]  # bytes, then ns of the last change, of that of the inode, inode


@dataclass(frozen=True)
class Piece:
    """The bytes of one image: a file, or a part of one, as in a tar.

    Args:
        path: the file.
        start: where the image begins in it.
        size: how many bytes it has; None reads to the end.
        inside: what the part is called in the file.
    """

    path: Path
    start: int = 0
    size: int | None = None
    inside: str = ""

    def read(self) -> bytes:
        """Return the bytes."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read() if self.size is None else file.read(self.size)

    def name(self, root: Path) -> str:
        """Return what names it under a root, wherever that lies."""
        part = "" if self.size is None else f"#{self.start}+{self.size}"
        return relative(self.path, root) + part

    def shown(self, root: Path) -> str:
        """Return what a person finds it by."""
        return "/".join(filter(None, (relative(self.path, root), self.inside)))


@dataclass(frozen=True)
class Content:
    """What was found in a piece.

    Args:
        digest: a hash of the bytes; empty where they cannot be read.
        fault: why it cannot be decoded; empty where it can; None where that was not tried.
    """

    digest: str
    fault: str | None = None


def read_contents(
    root: Path, pieces: Sequence[Piece], decode: bool = True, cache: str | Path | None = None
) -> list[Content]:
    """Return what pieces hold, each read once and then only after its file has changed.

    What is found is kept in `cache`, one file for each root. It holds as long as size, modification
    time (ns), change time and inode of a file do; of a file that had changed within the last two
    seconds nothing is kept, as clocks of file systems may be that coarse.

    Args:
        root: the folder that the pieces are named from.
        pieces: what to read.
        decode: whether to find out, too, if they can be decoded.
        cache: the folder for what is kept; None keeps nothing.
    """
    kept = Kept(cache, root) if cache is not None else None
    cached = kept.load() if kept else {}
    names, stamps = [piece.name(root) for piece in pieces], stamps_of(pieces)
    contents = [
        valid(cached.get(name), stamp, decode) for name, stamp in zip(names, stamps, strict=True)
    ]
    lacking = [place for place, one in enumerate(contents) if one is None]
    announce(root, [stamps[place] for place in lacking], [pieces[place] for place in lacking])
    fresh: dict[str, list[Any]] = {}
    for place, one, settled in examined(pieces, lacking, decode):
        contents[place] = one
        if settled is not None and settled == stamps[place] and one.digest:
            fresh[names[place]] = [*settled, one.digest, one.fault]
    if kept and fresh:
        kept.add(fresh)
    assert all(one is not None for one in contents)
    return [one for one in contents if one is not None]


def valid(entry: list[Any] | None, stamp: Stamp | None, decode: bool) -> Content | None:
    """Return what is cached of a piece, unless its file has changed or more is requested now."""
    if entry is None or stamp is None or tuple(entry[:4]) != stamp:
        return None
    content = Content(entry[4], entry[5])
    return None if decode and content.fault is None else content


def stamps_of(pieces: Iterable[Piece]) -> list[Stamp | None]:
    """Return what tells a change of each piece's file, None for a file that is not there."""
    once = lru_cache(maxsize=16)(stamp_of)  # the pieces of a tar follow each other
    return [once(piece.path) for piece in pieces]


def stamp_of(path: Path) -> Stamp | None:
    """Return what tells that a file has changed."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def examined(
    pieces: Sequence[Piece], places: Sequence[int], decode: bool
) -> Iterator[tuple[int, Content, Stamp | None]]:
    """Read pieces in threads, and yield what they hold and the stamp of a file that is settled."""

    def one(place: int) -> tuple[int, Content, Stamp | None]:
        now = time.time_ns()
        content = examine(pieces[place], decode)
        stamp = stamp_of(pieces[place].path)  # again: it may have changed while it was read
        return place, content, stamp if stamp and now - stamp[1] > FRESH else None

    with ThreadPoolExecutor(THREADS) as threads:
        for begin in range(0, len(places), AT_ONCE):
            yield from threads.map(one, places[begin : begin + AT_ONCE])


def examine(piece: Piece, decode: bool) -> Content:
    """Read a piece and, if that is requested, decode it as training will."""
    try:
        content = piece.read()
    except OSError as error:
        return Content("", reason(error))
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    return Content(digest, decoding_fault(content) if decode else None)


def decoding_fault(content: bytes) -> str:
    """Return why an image file cannot be decoded, or an empty text."""
    try:
        decoded(BytesIO(content), 3)
    except Exception as error:  # decoders raise whatever they stumble on
        return reason(error) or type(error).__name__
    return ""


def announce(root: Path, stamps: Sequence[Stamp | None], pieces: Sequence[Piece]) -> None:
    """Say so where reading will take a while."""
    sizes = [
        piece.size or (stamp[0] if stamp else 0)
        for piece, stamp in zip(pieces, stamps, strict=True)
    ]
    if len(pieces) >= MANY or sum(sizes) >= LARGE:
        log.info(
            "%s: reading %s images once (%.1f GB), to know them by what they hold",
            *(root, f"{len(pieces):,}", sum(sizes) / 1e9),
        )


@dataclass(frozen=True)
class Kept:
    """The file that keeps what the images under a root hold.

    Args:
        cache: the folder of what runs keep for each other.
        root: whose images.
    """

    cache: str | Path
    root: Path

    @property
    def path(self) -> Path:
        """Where it lies: one for each root."""
        place = os.path.realpath(self.root)
        name = hashlib.sha256(place.encode(errors="surrogateescape")).hexdigest()[:16]
        return resolved_path(self.cache) / "contents" / f"{name}.json"

    def load(self) -> dict[str, list[Any]]:
        """Return what is kept, by name; nothing of a file that is damaged or of another form."""
        try:
            saved = json.loads(self.path.read_bytes())
            if saved["form"] != FORM:
                return {}
            entries = {name: entry for name, entry in saved["images"].items() if well_formed(entry)}
            same = saved["pillow"] == PIL.__version__
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}
        # Another Pillow may read what this one does not, and the other way about.
        return entries if same else {name: [*entry[:5], None] for name, entry in entries.items()}

    def add(self, fresh: dict[str, list[Any]]) -> None:
        """Write what was found beside what is kept already, but for images that are gone."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock"):
                remove_stale(self.path.parent, self.path.name)
                before = {n: e for n, e in self.load().items() if n not in fresh and self.there(n)}
                saved = {"form": FORM, "pillow": PIL.__version__, "images": before | fresh}
                write_whole(self.path, json.dumps(saved))
        except OSError as error:
            log.info("what images hold is not kept: %s: %s", self.path, reason(error))

    def there(self, name: str) -> bool:
        """Whether the file of an image still exists; of a part of one, the whole."""
        whole = name.rpartition("#")[0] or name
        return os.path.lexists(self.root / name) or os.path.lexists(self.root / whole)


def well_formed(entry: Any) -> bool:
    """Whether an entry of a file that anyone may have written is what it should be."""
    return (
        isinstance(entry, list)
        and len(entry) == 6
        and all(type(number) is int for number in entry[:4])
        and isinstance(entry[4], str)
        and (entry[5] is None or isinstance(entry[5], str))
    )


@dataclass(frozen=True)
class Listed:
    """Images of a split that are found but not read.

    Args:
        load: position → image.
        labels: int64 `[N]`.
        names: one for each image, wherever the data lie.
        pieces: where their bytes are.
    """

    load: Callable[[int], Image.Image]
    labels: Tensor
    names: Sequence[str]
    pieces: Sequence[Piece]


def read_splits(
    root: Path,
    listed: Mapping[str, Listed],
    classes: Sequence[str],
    verify: bool,
    broken: str,
    cache: str | Path | None,
) -> tuple[dict[str, Split], list[str]]:
    """Return splits that know what their images hold, and a note of what is left out of them.

    Args:
        root: the folder that images are named from.
        listed: part → its images.
        classes: the class names, where there are any.
        verify: whether to decode each image once to find broken ones.
        broken: `refuse` or `skip` these.
        cache: see `read_contents`.

    Raises:
        ValueError: for broken images that are to be refused, or that leave no image of a class.
    """
    check_broken(broken)
    pieces = [piece for one in listed.values() for piece in one.pieces]
    contents = read_contents(root, pieces, verify, cache)
    bad = [
        (piece, content.fault)
        for piece, content in zip(pieces, contents, strict=True)
        if content.fault
    ]
    if bad and broken == "refuse":
        raise ValueError(refusal(root, bad))
    splits: dict[str, Split] = {}
    rest = iter(contents)
    for part, one in listed.items():
        splits[part] = sound(one, [next(rest) for _ in one.pieces])
    if "train" in listed:
        check_none_emptied(root, classes, listed["train"].labels, splits["train"].labels)
    names = some((piece.shown(root) for piece, _ in bad), 5)
    what = "broken image is" if len(bad) == 1 else "broken images are"
    return splits, [f"{len(bad)} {what} left out ({names})"] if bad else []


def sound(listed: Listed, contents: Sequence[Content]) -> Streamed:
    """Return the images of a split that are not broken."""
    digests = [content.digest for content in contents]
    split = Streamed(listed.load, listed.labels, listed.names, digests=digests)
    good = [place for place, content in enumerate(contents) if not content.fault]
    return split if len(good) == len(contents) else split.subset(torch.tensor(good).long())


def check_none_emptied(root: Path, classes: Sequence[str], before: Tensor, after: Tensor) -> None:
    """Refuse to leave out every training image of a class."""
    emptied = sorted(set(before.tolist()) - set(after.tolist()))
    if emptied:
        names = some((classes[k] if k < len(classes) else str(k) for k in emptied), 5)
        raise ValueError(f"{root}: all training images of {names} are broken")


def check_broken(broken: str) -> None:
    """Refuse another word for what to do with broken images."""
    if broken not in ("refuse", "skip"):
        raise ValueError(f"data.broken must be refuse or skip, got {broken!r}")


def refusal(root: Path, bad: Sequence[tuple[Piece, str | None]]) -> str:
    """Return the line that names broken images."""
    remedy = "data.broken=skip leaves them out"
    if len(bad) == 1:
        return f"broken image {root / bad[0][0].shown(root)}: {bad[0][1]} ({remedy})"
    faults = some((f"{piece.shown(root)} ({fault})" for piece, fault in bad), 10)
    return f"{len(bad)} broken images in {root}: {faults}; {remedy}"
