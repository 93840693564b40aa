"""Which image files a folder holds: what is hidden, linked, nested, and what is not read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from distill.utils.errors import printable

# What systems and tools leave beside pictures; names that begin with a dot are hidden anyway.
LITTER = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "__pycache__", "lost+found")
SHOWN = 3  # names that a note gives as examples


@dataclass
class Seen:
    """What was met on the way through folders and is not read as it lies, for the notes.

    Args:
        root: the folder that names are relative to.
        walked: real paths of folders that are read by themselves, or were read before.
    """

    root: Path
    walked: set[str] = field(default_factory=set)
    hidden: list[Path] = field(default_factory=list)
    endings: Counter[str] = field(default_factory=Counter)
    links: list[Path] = field(default_factory=list)
    nested: list[Path] = field(default_factory=list)
    loose: list[Path] = field(default_factory=list)

    def notes(self) -> list[str]:
        """Return a line for each kind of thing that was met."""
        lines = []
        if self.hidden:
            what = (
                "hidden file or folder is"
                if len(self.hidden) == 1
                else "hidden files or folders are"
            )
            names = dict.fromkeys(path.name for path in self.hidden)
            lines.append(f"{len(self.hidden)} {what} not read ({some(names)})")
        if self.endings:
            kinds = [f"{ending or 'none'} {n}" for ending, n in self.endings.most_common()]
            what = (
                "file with another ending is"
                if self.endings.total() == 1
                else ("files with other endings are")
            )
            lines.append(f"{self.endings.total()} {what} not read ({some(kinds, 5)})")
        if self.links:
            what = "link leads" if len(self.links) == 1 else "links lead"
            lines.append(
                f"{len(self.links)} {what} to folders that are read already, and so not followed "
                f"({self._some(self.links)})"
            )
        if self.nested:
            lines.append(
                f"images in sub-folders of a class count as that class ({self._some(self.nested)})"
            )
        if self.loose:
            what = "image lies" if len(self.loose) == 1 else "images lie"
            lines.append(
                f"{len(self.loose)} {what} in no class folder, and not used "
                f"({self._some(self.loose)})"
            )
        return lines

    def _some(self, paths: Iterable[Path]) -> str:
        return some(relative(path, self.root) for path in paths)


def some(names: Iterable[str], shown: int = SHOWN) -> str:
    """Return the first few of these names, and an ellipsis where there are more."""
    names = list(names)
    return printable(", ".join(names[:shown])) + (", …" if len(names) > shown else "")


def relative(path: Path, root: Path) -> str:
    """Return a path as it is named from a folder, with `/` on every system."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def hidden(name: str) -> bool:
    """Whether a file or folder is none of a person's pictures: `.ipynb_checkpoints`, `._x.jpg`."""
    return name.startswith(".") or name in LITTER


def endings() -> tuple[str, ...]:
    """Return the endings of names, in small letters, that image files have."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return IMG_EXTENSIONS


def folders_in(path: Path) -> list[Path]:
    """Return the folders in a folder that are not hidden."""
    return [inside for inside in path.iterdir() if not hidden(inside.name) and inside.is_dir()]


def loose_images(folder: Path) -> list[Path]:
    """Return the images in a folder itself."""
    wanted = endings()
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in wanted and not hidden(path.name) and path.is_file()
    )


def holds_images(folder: Path) -> bool:
    """Whether there is an image in a folder or in those in it, but for what is hidden."""
    wanted = endings()
    inside = walked(folder, Seen(folder))
    return any(ending(name) in wanted for _, names in inside for name in names)


def subfolders(folder: Path, seen: Seen) -> list[Path]:
    """Return the folders in a folder, sorted by name; hidden ones and loops are left out."""
    folders = []
    around = {os.path.realpath(folder)}
    for path in sorted(folder.iterdir()):
        if hidden(path.name):
            seen.hidden.append(path)
        elif path.is_dir() and path.is_symlink() and encloses(os.path.realpath(path), around):
            seen.links.append(path)
        elif path.is_dir():
            folders.append(path)
    return folders


def image_files(folder: Path, seen: Seen) -> list[str]:
    """Return the image files in a folder and those in it, sorted by folder and name.

    A link to a folder is followed once, and not where it leads to what contains it or is read
    anyway (`seen.walked`): else a loop would multiply images, or show them as another class.

    Args:
        folder: one that lies in `seen.root`.
        seen: what is met on the way.

    Returns:
        Paths from `seen.root` on, with `/`.
    """
    wanted = endings()
    places: dict[str, list[str]] = {}
    for inside, names in walked(folder, seen):
        images = [name for name in names if ending(name) in wanted]
        if len(images) < len(names):
            seen.endings.update(kind for name in names if (kind := ending(name)) not in wanted)
        if images and inside != folder:
            seen.nested.append(inside)
        places[str(inside)] = images
    prefixes = {place: relative(Path(place), seen.root) for place in sorted(places)}
    return [
        name if prefix == "." else f"{prefix}/{name}"
        for place, prefix in prefixes.items()
        for name in places[place]
    ]


def ending(name: str) -> str:
    """Return a file name's ending in small letters, as `Path.suffix` has it."""
    return os.path.splitext(name)[1].lower()


def walked(folder: Path, seen: Seen) -> Iterator[tuple[Path, list[str]]]:
    """Yield a folder and those in it with their files' names; no hidden ones and no loops."""
    seen.walked.add(os.path.realpath(folder))
    names, inside = [], []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if hidden(entry.name):
                seen.hidden.append(folder / entry.name)
            elif not entry.is_dir():  # a link that leads nowhere is a file, and a broken one
                names.append(entry.name)
            elif entry.is_symlink() and leads_back(folder / entry.name, seen.walked):
                seen.links.append(folder / entry.name)
            else:
                inside.append(folder / entry.name)
    yield folder, names
    for path in inside:
        if not (path.is_symlink() and leads_back(path, seen.walked)):
            yield from walked(path, seen)
        else:  # since it was listed, another link has led there
            seen.links.append(path)


def leads_back(link: Path, walked: Collection[str]) -> bool:
    """Whether a link leads to a folder that is read already, one in it, or one around it."""
    target = os.path.realpath(link)
    return encloses(target, walked) or any(encloses(path, {target}) for path in walked)


def encloses(outer: str, paths: Collection[str]) -> bool:
    """Whether one of these real paths is the outer one or lies in it."""
    return any(path == outer or path.startswith(os.path.join(outer, "")) for path in paths)


def real_paths(folders: Iterable[Path]) -> set[str]:
    """Return where folders lie, whatever links lead to them."""
    return {os.path.realpath(path) for path in folders}
