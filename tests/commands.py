"""Installed commands in this process: a fraction of a second each, not the five of a start."""

import contextlib
import io
import logging
import os
import shlex
import sys
import warnings
from dataclasses import dataclass
from unittest import mock

import pytorch_lightning as pl
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from distill import cli

COMMANDS = {
    "distill": cli.train,
    "distill-eval": cli.evaluate,
    "distill-store": cli.store,
    "distill-export": cli.export,
    "distill-predict": cli.predict,
    "distill-push": cli.push,
    "distill-report": cli.report,
}


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    output: str
    errors: str


class Trained(BaseException):
    """A model was about to be trained."""


def no_training(*_, **__):
    raise Trained


def attempt(line, folder, **environment):
    """Run a command line in a folder; a mistake has to be found before anything is trained."""
    arguments = shlex.split(line) if isinstance(line, str) else line
    out, errors = io.StringIO(), io.StringIO()
    root = logging.getLogger()
    before, level, there = root.handlers[:], root.level, os.getcwd()
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(sys, "argv", arguments),
        mock.patch.object(sys, "stdin", io.StringIO()),
        mock.patch.object(pl.Trainer, "fit", no_training),
        mock.patch.object(Hydra, "get_mode", return_value=None),  # it would compose twice
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
        warnings.catch_warnings(record=True) as told,
    ):
        warnings.resetwarnings()
        warnings.filterwarnings("ignore", message="(?s).*is validated against ConfigStore schema")
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)  # as Python does
        os.environ.pop("HYDRA_FULL_ERROR", None)
        os.environ.pop("DISTILL_EXPLAIN", None)
        os.chdir(folder)
        try:
            code = COMMANDS[arguments[0]]() or 0
        except SystemExit as stopped:
            code = stopped.code
        finally:
            os.chdir(there)
            GlobalHydra.instance().clear()
            HydraConfig.instance().cfg = None
            for handler in {*root.handlers} - {*before}:
                handler.close()
            root.handlers[:] = before
            root.setLevel(level)
    said = errors.getvalue() + "".join(f"{w.category.__name__}: {w.message}\n" for w in told)
    return Ended(code, out.getvalue(), said)
