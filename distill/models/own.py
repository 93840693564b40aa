"""A user's own modules, imported so that what they register with timm is known."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from distill.utils.errors import first_line


def import_modules(names: Sequence[str]) -> None:
    """Import modules by name; those that lie where the command was typed are found, too.

    Raises:
        ValueError: if there is no such module, or it cannot be imported.
    """
    here = str(Path.cwd())
    if names and not {"", here} & set(sys.path):
        sys.path.append(here)
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # their code raises anything
            message = f"{type(error).__name__}: {first_line(error)}"
            raise ValueError(f"imports={name}: {message}") from error
