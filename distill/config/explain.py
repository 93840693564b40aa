"""Errors as one line: what is wrong, where, and what to give instead."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from distill.config.overrides import CONF, requoted, typed
from distill.utils.errors import printable

USER_ERROR = 2
MISTAKES = (HydraException, OmegaConfBaseException, ValueError, OSError)  # a person's own
PLUGINS = {  # of Hydra → the extra that brings it
    "hydra_joblib_launcher": "joblib",
    "hydra_optuna_sweeper": "optuna",
    "hydra_ray_launcher": "ray",
    "hydra_submitit_launcher": "slurm",
}


def refuse(error: Exception, program: str = "distill") -> NoReturn:
    """Print what went wrong in one line and exit with code 2, or the error's own."""
    print(f"{program}: {printable(one_line(error))}", file=sys.stderr)
    raise SystemExit(getattr(error, "exit_code", USER_ERROR))


def refuse_mistake(error: Exception) -> None:
    """End the program where a person can put the error right; return where nobody can."""
    if isinstance(error, MISTAKES):
        refuse(error)
    if advice := remedy(error):
        refuse(ValueError(advice))


def one_line(error: BaseException) -> str:
    """Return an error as one line that says what, where and, for a misspelt key, what instead."""
    for explain in (missing_option, missing_value, unknown_key, unreadable, several_values):
        if line := explain(error):
            return line
    text = message(error)
    if isinstance(error, OmegaConfBaseException):
        text = f"{first_sentence(text)} ({getattr(error, 'full_key', '')})"
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = re.split(r"\s*(?:Config search path:|See https://hydra)", text)[0]
    return re.sub(r"\s*\n+\s*", ", ", text)


def missing_option(error: BaseException) -> str | None:
    """Explain `group=name` where the group has no such file."""
    if not isinstance(error, MissingConfigException) or "/" not in str(error.missing_cfg_file):
        return None
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    options = error.options or sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    return f"there is no {group}={name}{nearest(name, options)}"


def missing_value(error: BaseException) -> str | None:
    """Explain a key that has to be given."""
    if not isinstance(error, MissingMandatoryValue):
        return None
    return f"give {error.full_key}=…: it has no value of its own"


def unknown_key(error: BaseException) -> str | None:
    """Explain an override of a key that does not exist."""
    cause = error.__cause__
    if not isinstance(error, HydraException) or not isinstance(cause, OmegaConfBaseException):
        return None
    return f"{first_sentence(str(error))}{nearest_key(str(error), cause)}"


def unreadable(error: BaseException) -> str | None:
    """Explain an override that Hydra cannot read: the quotes that help, or why."""
    override = getattr(error, "override", None)
    if not override:
        return None
    again = requoted(override)
    if again is None:
        return f"cannot read {override!r}: {first_sentence(message(error))}"
    return f"cannot read {override!r}: it needs quotes within quotes: {again}"


def several_values(error: BaseException) -> str | None:
    """Explain an override with commas where there is no sweep."""
    ambiguous = re.match(r"Ambiguous value for argument '(.*)'", message(error))
    if ambiguous is None:
        return None
    key, _, value = ambiguous[1].partition("=")
    return (
        f"{ambiguous[1]} are several values: add -m for a sweep over them, or quotes within "
        f"quotes: {typed(key, value)}"
    )


def message(error: BaseException) -> str:
    """Return what an error says; of one raised in a data worker, the last line."""
    text = str(error).strip() or type(error).__name__
    if "Original Traceback" not in text:
        return text
    last = text.splitlines()[-1]
    return last.partition(": ")[2] or last


def first_sentence(text: str) -> str:
    """Return the first line of a message."""
    return text.strip().splitlines()[0].rstrip(".")


def nearest_key(text: str, cause: OmegaConfBaseException) -> str:
    """Return a hint at the key that was probably meant, for a key that does not exist."""
    match = re.search(r"override '([^']+)'", text)
    candidates = [str(key) for key in getattr(cause, "parent_node", None) or {}]
    if not match or not candidates:
        return f": {first_sentence(str(cause))}"
    prefix, _, key = match.group(1).rpartition(".")
    if str(inside := getattr(cause, "key", key)) != key:  # of a whole dictionary
        prefix, key = match.group(1), str(inside)
    return nearest(key, candidates, f"{prefix}." if prefix else "")


def nearest(name: str, candidates: Sequence[str], prefix: str = "") -> str:
    """Return a hint at the name that was probably meant, or all the names there are."""
    near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{near[0]}?" if near else f"; there are {', '.join(candidates)}"


def remedy(error: Exception) -> str | None:
    """Return in one line what to do about memory, a data worker or a plug-in that is missing."""
    if out_of_memory(error):
        return (
            "out of memory: lower data.batch_size (trainer.accumulate_grad_batches makes up for "
            "it), data.image_size, or take a smaller student; trainer.precision=bf16-mixed halves "
            "most of it on a GPU"
        )
    died = re.search(r"DataLoader worker \(pid.*", str(error))
    if died:
        return f"a data worker died ({first_sentence(died[0])}): lower data.num_workers"
    missing = re.search(r"Unknown plugin class : 'hydra_plugins\.(\w+)", str(error))
    if missing and missing[1] in PLUGINS:
        return f"this needs pip install 'distill-kd[{PLUGINS[missing[1]]}]'"
    return None


def out_of_memory(error: object) -> bool:
    """Whether memory did not suffice, a GPU's or the processor's."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )
