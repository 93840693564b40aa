"""Which versions and which commit a result was made with."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

from distill import __version__

PACKAGES = ("torch", "timm", "pytorch-lightning", "torchmetrics", "hydra-core")


def versions() -> dict[str, str]:
    """Return the versions that decide a run's numbers."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"distill": __version__, "python": platform.python_version(), **packages}


def git_revision(folder: Path) -> str | None:
    """Return the commit of the checkout that holds a folder, marked if it has changes."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
