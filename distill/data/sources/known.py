"""What was found out of the images under a root, kept from one run to the next."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from filelock import FileLock

from distill.data.sources.errors import reason
from distill.data.sources.packed import PackedStrings
from distill.data.sources.pieces import STAMP
from distill.data.sources.splits import DIGEST, NO_DIGESTS
from distill.utils.files import load_arrays, remove_stale, resolved_path, save_arrays

log = logging.getLogger(__name__)

FORM = 2  # of the file

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Known:
    """What was found of images, in any order.

    Args:
        names: of the images under their root.
        stamps: what tells a change of their files, int64 `[N, STAMP]`.
        digests: hashes of their bytes, of type `DIGEST`, `[N]`.
        faults: place → why the image there cannot be decoded; all others can.
    """

    names: PackedStrings
    stamps: Array
    digests: Array
    faults: Mapping[int, str]

    def __len__(self) -> int:
        return len(self.names)

    def places_of(self, names: PackedStrings) -> Array:
        """Return where the images of these names are, int64 `[N]`; −1 for what is not here."""
        places = {name: place for place, name in enumerate(self.names)}
        found = (places.get(name, -1) for name in names)
        return np.fromiter(found, np.int64, len(names))

    def take(self, places: Array) -> Known:
        """Return what is known of the images at these places, int64 `[n]`."""
        new = {old: place for place, old in enumerate(places.tolist()) if old in self.faults}
        faults = {place: self.faults[old] for old, place in new.items()}
        return Known(self.names.take(places), self.stamps[places], self.digests[places], faults)

    def joined(self, other: Known) -> Known:
        """Return what is known of these images and then of others."""
        names = PackedStrings.joined([self.names, other.names])
        stamps = np.concatenate([self.stamps, other.stamps])
        digests = np.concatenate([self.digests, other.digests])
        moved = {len(self) + place: fault for place, fault in other.faults.items()}
        return Known(names, stamps, digests, {**self.faults, **moved})


NOTHING = Known(PackedStrings.of([]), np.empty((0, STAMP), np.int64), NO_DIGESTS, faults={})


@dataclass(frozen=True)
class KnownFile:
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
        return resolved_path(self.cache) / "contents" / f"{name}.npz"

    def load(self) -> Known:
        """Return what is kept; nothing of a file that is damaged or of another form.

        Nothing, too, where another Pillow found it: it may read what this one does not.
        """
        saved = load_arrays(self.path) or {}
        try:
            kind = [saved[name].tolist() for name in ("form", "pillow")]
            return checked(saved) if kind == [FORM, PIL.__version__] else NOTHING
        except (KeyError, ValueError):
            return NOTHING

    def add(self, fresh: Known) -> None:
        """Write what was found beside what is kept already, but for images that are gone."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock"):
                remove_stale(self.path.parent, self.path.name)
                kept = self.load()
                lasting = np.fromiter(self.lasting(kept.names, fresh.names), np.int64)
                self.save(kept.take(lasting).joined(fresh))
        except OSError as error:
            log.info("what images hold is not kept: %s: %s", self.path, reason(error))

    def save(self, known: Known) -> None:
        """Write what is known, whole or not at all."""
        faults = PackedStrings.of(known.faults.values())
        save_arrays(
            self.path,
            {
                "form": FORM,
                "pillow": PIL.__version__,
                "names": known.names.text,
                "name_ends": known.names.ends,
                "stamps": known.stamps,
                "digests": known.digests,
                "faulty": np.fromiter(known.faults, np.int64),
                "faults": faults.text,
                "fault_ends": faults.ends,
            },
        )

    def lasting(self, names: Iterable[str], fresh: Iterable[str]) -> Iterable[int]:
        """Yield the places of names that are still there, and not found anew."""
        renewed = set(fresh)
        for place, name in enumerate(names):
            if name not in renewed and self.there(name):
                yield place

    def there(self, name: str) -> bool:
        """Whether the file of an image still exists; of a part of one, the whole."""
        whole = name.rpartition("#")[0] or name
        return os.path.lexists(self.root / name) or os.path.lexists(self.root / whole)


def checked(saved: Mapping[str, Any]) -> Known:
    """Return what a file that anyone may have written says, if it is what it should be.

    Raises:
        ValueError: if it is not.
    """
    names = PackedStrings(saved["names"], saved["name_ends"])
    texts = PackedStrings(saved["faults"], saved["fault_ends"])
    stamps, digests, faulty = saved["stamps"], saved["digests"], saved["faulty"]
    sound = (
        names.sound
        and texts.sound
        and (stamps.dtype, stamps.shape) == (np.int64, (len(names), STAMP))
        and (digests.dtype, digests.shape) == (DIGEST, (len(names),))
        and (faulty.dtype, faulty.shape) == (np.int64, (len(texts),))
        and (not len(faulty) or (faulty.min() >= 0 and faulty.max() < len(names)))
    )
    if not sound:
        raise ValueError("it is damaged")
    return Known(names, stamps, digests, dict(zip(faulty.tolist(), texts, strict=True)))
