"""How a command's process begins and ends: both take seconds with a million objects in memory."""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def import_heavy(name: str) -> ModuleType:
    """Import a module with all that it needs, without looking for garbage in between.

    Nothing that an import leaves becomes garbage, but the collector goes through it again and
    again: a quarter of the time of importing torch, Lightning and timm. Later it lets them be.
    """
    if name in sys.modules or not gc.isenabled():
        return importlib.import_module(name)
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


class _End:
    """Ends the process after all else that is done at exit, if the command came to its end."""

    status: int | None = None

    def __call__(self) -> None:
        if self.status is None:  # a traceback has been printed: Python knows the status
            return
        logging.shutdown()
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, ValueError):
            return  # Python says so
        os._exit(self.status)


def as_program(function: Callable[[], None]) -> Callable[[], None]:
    """Let the process of an installed command end without taking its libraries apart.

    Freeing object by object what the system frees at once would take a second. What libraries have
    asked to be called for at exit is called.
    """

    @functools.wraps(function)
    def run() -> None:
        end = _End()
        if is_installed_command():
            atexit.register(end)
        try:
            function()
        except SystemExit as stop:
            end.status = stop.code if isinstance(stop.code, int) else None
            raise
        end.status = 0

    return run


def is_installed_command() -> bool:
    """Whether this process runs an installed command, and no test or script that calls one."""
    name = Path(getattr(sys.modules["__main__"], "__file__", None) or "").stem
    return name == "distill" or name.startswith("distill-")
