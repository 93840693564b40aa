"""Files that somebody else may have written, read without trusting them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from distill.utils.errors import first_line

LARGEST_JSON = 2**24  # bytes: ImageNet-21k's class names fit a hundred times
LARGEST_YAML = 2**22  # bytes that no run's record comes near to


def inside(folder: Path, name: str) -> Path:
    """Return the path of a bundle's file, which has to be one and to lie in its folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is a link to elsewhere, or no ordinary file.
    """
    path = folder / name
    try:
        target = path.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(missing(folder, name)) from None
    except (OSError, RuntimeError) as error:  # a circle of links
        raise ValueError(f"{path} leads nowhere: {error}") from error
    if not target.is_relative_to(folder.resolve()):
        raise ValueError(f"{path} is a link out of its folder: copy the file there")
    if not target.is_file():
        raise ValueError(f"{path} is not an ordinary file")
    return path


def missing(folder: Path, name: str) -> str:
    """Return what to say of a bundle's file that is not there."""
    if not folder.exists():
        return f"there is no {folder}"
    if (folder / "student" / name).is_file():
        return f"{folder} is a run, not a student bundle: did you mean {folder / 'student'}?"
    if folder.name == "teacher":  # of a run, which has its teacher's history there
        return (
            f"{folder} is not a student bundle: no {name}; a teacher that a run has trained lies "
            "where its line “teacher: kept in” says"
        )
    return f"{folder} is not a student bundle: no {name}"


def read_json(path: Path) -> dict[str, Any]:
    """Read one of a bundle's JSON files."""
    inside(path.parent, path.name)
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path} is damaged: it has {path.stat().st_size:,} bytes")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it does not hold an object")
    return content


def read_yaml(path: Path) -> Any:
    """Read a file of Hydra's as plain values; None where there is none.

    Nothing in it is resolved: an interpolation could name a variable of the reader's environment.
    """
    if not there(path, LARGEST_YAML):
        return None
    try:
        return parsed_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {first_line(error)}") from error


def parsed_yaml(text: str) -> Any:
    """Return a text of YAML as plain values; see `read_yaml`."""
    return yaml.load(text, PlainLoader)


class PlainLoader(yaml.SafeLoader):
    """A loader without aliases, by which a few lines can stand for more than there is memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse an alias; see `yaml.composer.Composer`."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias")
        return super().compose_node(parent, index)


def there(path: Path, largest: int) -> bool:
    """Whether there is a file, refusing a link out of its folder and what is out of proportion."""
    if not path.is_symlink() and not path.is_file():
        return False
    size = inside(path.parent, path.name).stat().st_size
    if size > largest:
        raise ValueError(f"{path} is damaged: it has {size:,} bytes")
    return True
