"""What image files hold: a hash of their bytes, and whether they can be decoded, found out once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor, from_numpy

from distill.data.sources.errors import reason
from distill.data.sources.images import decoded
from distill.data.sources.known import NOTHING, Known, KnownFile
from distill.data.sources.listing import some
from distill.data.sources.packed import PackedStrings
from distill.data.sources.pieces import THREADS, Piece, Pieces, Stamp, stamp_of
from distill.data.sources.splits import DIGEST, Split, Streamed, digest_of

log = logging.getLogger(__name__)

FRESH = 2_000_000_000  # ns after its last change in which a file may change again unseen
MANY, LARGE = 5_000, 1 << 30  # files or bytes from which on reading them is announced
AT_ONCE = 512  # files that are handed to the threads together, so that Ctrl-C is heard
VERIFY = ("new", "all", "none")  # which images are opened before training
UNOPENED = (
    "no picture was opened (data.verify=none): broken ones are met in training, and those that are "
    "in two splits are not found"
)

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Content:
    """What was found in a piece.

    Args:
        digest: a hash of the bytes; empty where they cannot be read.
        fault: why it cannot be decoded; empty where it can.
    """

    digest: bytes
    fault: str


def read_contents(pieces: Pieces, verify: str = "new", cache: str | Path | None = None) -> Known:
    """Return what pieces hold, each read once and then only after its file has changed.

    What is found is kept in `cache`, one file for each root. It holds as long as size, modification
    time (ns), change time and inode of a file do; of a file that had changed within the last two
    seconds nothing is kept, as clocks of file systems may be that coarse.

    Args:
        pieces: what to read.
        verify: `new` reads what is not known yet, `all` everything.
        cache: the folder for what is kept; None keeps nothing.
    """
    file = KnownFile(cache, pieces.root) if cache is not None else None
    kept = file.load() if file and verify == "new" else NOTHING
    names, stamps = pieces.names, pieces.stamps()
    if names.same(kept.names) and np.array_equal(kept.stamps, stamps):
        return kept
    places = kept.places_of(names)
    unchanged = places >= 0
    unchanged[unchanged] = (kept.stamps[places[unchanged]] == stamps[unchanged]).all(axis=1)
    digests = np.zeros(len(names), DIGEST)
    digests[unchanged] = kept.digests[places[unchanged]]
    faults = {
        place: kept.faults[int(places[place])]
        for place in np.flatnonzero(unchanged & np.isin(places, list(kept.faults))).tolist()
    }
    lacking = np.flatnonzero(~unchanged)
    announce(pieces.root, pieces.sizes(stamps)[lacking])
    found, settled = Known(names, stamps, digests, faults), np.zeros(len(names), bool)
    try:
        for place, one, stamp in examined(pieces, lacking.tolist()):
            digests[place] = one.digest
            if one.fault:
                faults[place] = one.fault
            settled[place] = stamp == tuple(stamps[place].tolist()) and bool(one.digest)
    finally:  # what was read before Ctrl-C is kept, too
        if file and settled.any():
            file.add(found.take(np.flatnonzero(settled)))
    return found


def examined(pieces: Pieces, places: Sequence[int]) -> Iterator[tuple[int, Content, Stamp | None]]:
    """Read pieces in threads, and yield what they hold and the stamp of a file that is settled."""

    def one(place: int) -> tuple[int, Content, Stamp | None]:
        now = time.time_ns()
        piece = pieces[place]
        content = examine(piece)
        stamp = stamp_of(piece.path)  # again: it may have changed while it was read
        return place, content, stamp if 0 <= stamp[1] < now - FRESH else None

    with ThreadPoolExecutor(THREADS) as threads:
        for begin in range(0, len(places), AT_ONCE):
            yield from threads.map(one, places[begin : begin + AT_ONCE])


def examine(piece: Piece) -> Content:
    """Read a piece, and decode it as training will."""
    try:
        content = piece.read()
    except OSError as error:
        return Content(b"", reason(error))
    return Content(digest_of(content), decoding_fault(content))


def decoding_fault(content: bytes) -> str:
    """Return why an image file cannot be decoded, or an empty text."""
    try:
        decoded(BytesIO(content), 3)
    except Exception as error:  # decoders raise whatever they stumble on
        return reason(error) or type(error).__name__
    return ""


def announce(root: Path, sizes: Array) -> None:
    """Say so where reading images of these sizes in bytes will take a while."""
    if len(sizes) >= MANY or sizes.sum() >= LARGE:
        log.info(
            "%s: reading %s images once (%.1f GB), to know them by what they hold; "
            "data.verify=none opens none before they are shown",
            *(root, f"{len(sizes):,}", sizes.sum() / 1e9),
        )


@dataclass(frozen=True)
class Listed:
    """Images of a split that are found but not read.

    Args:
        load: position → image.
        labels: int64 `[N]`.
        pieces: where their bytes are.
        names: one for each image, wherever the data lie; None are those of the pieces.
    """

    load: Callable[[int], Image.Image]
    labels: Tensor
    pieces: Pieces
    names: Sequence[str] | None = None

    @property
    def told_by(self) -> PackedStrings:
        """What names each image, wherever the data lie."""
        return self.pieces.names if self.names is None else PackedStrings.of(self.names)


def read_splits(
    listed: Mapping[str, Listed],
    classes: Sequence[str],
    verify: str,
    broken: str,
    cache: str | Path | None,
) -> tuple[dict[str, Split], list[str]]:
    """Return splits that know what their images hold, and notes of what is left out of them.

    Args:
        listed: part → its images, all under one root.
        classes: the class names, where there are any.
        verify: `new` opens each image once before training, to find broken ones, and again once
            its file has changed, `all` each time, `none` never: then images are told apart by name
            and size alone.
        broken: `refuse` or `skip` broken ones.
        cache: see `read_contents`.

    Raises:
        ValueError: for broken images that are to be refused, or that leave no image of a class.
    """
    check_broken(broken)
    check_verify(verify)
    if not listed:
        return {}, []
    if verify == "none":
        return {part: unopened(one) for part, one in listed.items()}, [UNOPENED]
    pieces = Pieces.joined([one.pieces for one in listed.values()])
    contents = read_contents(pieces, verify, cache)
    faults = {place: contents.faults[place] for place in sorted(contents.faults)}
    if faults and broken == "refuse":
        raise ValueError(refusal(pieces, faults))
    splits: dict[str, Split] = {}
    begin = 0
    for part, one in listed.items():
        splits[part] = sound(one, contents, begin)
        begin += len(one.pieces)
    if faults and "train" in listed:
        check_none_emptied(pieces.root, classes, listed["train"].labels, splits["train"].labels)
    names = some((pieces[place].shown(pieces.root) for place in faults), 5)
    what = "broken image is" if len(faults) == 1 else "broken images are"
    return splits, [f"{len(faults)} {what} left out ({names})"] if faults else []


def sound(listed: Listed, contents: Known, begin: int) -> Streamed:
    """Return the images of a split, those from `begin` on, that are not broken."""
    count = len(listed.pieces)
    digests = contents.digests[begin : begin + count]
    split = Streamed(listed.load, listed.labels, listed.told_by, digests=digests)
    good = np.ones(count, bool)
    good[[place - begin for place in contents.faults if begin <= place < begin + count]] = False
    return split if good.all() else split.subset(from_numpy(np.flatnonzero(good)))


def unopened(listed: Listed) -> Streamed:
    """Return the images of a split of which none is opened, told apart by name and size."""
    sizes = listed.pieces.sizes(listed.pieces.stamps())
    named = zip(listed.told_by, sizes.tolist(), strict=True)
    names = PackedStrings.of(f"{name} {size}" for name, size in named)
    return Streamed(listed.load, listed.labels, names)


def check_none_emptied(root: Path, classes: Sequence[str], before: Tensor, after: Tensor) -> None:
    """Refuse to leave out every training image of a class."""
    emptied = sorted(set(before.unique().tolist()) - set(after.unique().tolist()))
    if emptied:
        names = some((classes[k] if k < len(classes) else str(k) for k in emptied), 5)
        raise ValueError(f"{root}: all training images of {names} are broken")


def check_broken(broken: str) -> None:
    """Refuse another word for what to do with broken images."""
    if broken not in ("refuse", "skip"):
        raise ValueError(f"data.broken must be refuse or skip, got {broken!r}")


def check_verify(verify: Any) -> None:
    """Refuse another word for which images are opened before training."""
    if verify not in VERIFY:
        was = {True: ": true is new now", False: ": false is none now"}
        meant = was[verify] if isinstance(verify, bool) else ""
        raise ValueError(f"data.verify must be {', '.join(VERIFY)}, got {verify!r}{meant}")


def refusal(pieces: Pieces, faults: Mapping[int, str]) -> str:
    """Return the line that names broken images."""
    root, remedy = pieces.root, "data.broken=skip leaves them out"
    shown = {pieces[place].shown(root): fault for place, fault in islice(faults.items(), 11)}
    if len(faults) == 1:
        ((name, fault),) = shown.items()
        return f"broken image {root / name}: {fault} ({remedy})"
    texts = some((f"{name} ({fault})" for name, fault in shown.items()), 10)
    return f"{len(faults)} broken images in {root}: {texts}; {remedy}"
