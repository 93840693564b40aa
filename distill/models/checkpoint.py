"""Weights from files of any origin: nothing that is read is run, and all of it is checked."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load as load_safetensors
from timm.models import build_model_with_cfg, clean_state_dict, load_state_dict
from torch import Tensor

from distill.models.compiled import plain_name

WEIGHTS, TIMM_CONFIG = "model.safetensors", "config.json"
STUDENT_PREFIX = "student."
PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")  # timm's names
LARGEST_JSON = LARGEST_HEADER = 2**24  # bytes: ImageNet-21k's class names fit a hundred times
LARGEST_ARGUMENT = 2**16  # of an architecture: its widths, depths and sizes
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64,
          torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)  # fmt: skip
# What timm itself takes of `create_model`'s arguments: where to find weights, and code to call.
RESERVED = {
    name
    for function in (timm.create_model, build_model_with_cfg)
    for name in inspect.signature(function).parameters
} | {"features_only", "out_indices", "pretrained_model_args", "device", "dtype"}


@dataclass(frozen=True)
class Checkpoint:
    """Weights read from a file, with the architecture where the file knows it.

    Args:
        weights: name → tensor.
        architecture: timm's name of the model, or None.
        args: further arguments of `timm.create_model`.
        preprocessing: some of `PREPROCESSING`, as timm writes them.

    Raises:
        ValueError: if these are not of their kind, or weights are not finite.
    """

    weights: Mapping[str, Tensor]
    architecture: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_tensors(self.weights)
        check_architecture(self.architecture, self.args)
        check_preprocessing(self.preprocessing)


def check_tensors(weights: Mapping[str, Tensor]) -> None:
    """Refuse what are no weights, and weights with which a model could only answer NaN."""
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError("it holds no weights")
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{name!r} is no tensor")
        if value.dtype not in DTYPES:
            raise ValueError(f"tensor {name} is of a type that no weights have, {value.dtype}")
        if not holds_its_numbers(value):
            raise ValueError(f"tensor {name} says that it is larger than what the file holds")
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"tensor {name} has values that are not finite")


def holds_its_numbers(value: Tensor) -> bool:
    """Whether a tensor has a number in memory for each of its elements."""
    if value.layout != torch.strided or value.device.type != "cpu":
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def is_finite(value: float) -> bool:
    """Whether a number of a JSON file, which may have any number of digits, is finite."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_architecture(name: Any, args: Any) -> None:
    """Refuse an architecture that is not one of timm's, or arguments that are not its own."""
    if name is None:
        return
    if not isinstance(name, str) or not timm.is_model(name):
        raise ValueError(f"timm has no architecture {str(name)[:80]!r}")
    if not isinstance(args, dict):
        raise ValueError("the architecture's arguments are not an object")
    for key, value in args.items():
        if key in RESERVED or not str(key).isidentifier():
            raise ValueError(f"{str(key)[:80]!r} is no argument of an architecture")
        if any(abs(number) > LARGEST_ARGUMENT for number in numbers_in(value)):
            raise ValueError(f"the architecture's argument {key} is out of all proportion")


def numbers_in(value: Any) -> list[float]:
    """Return all numbers in a JSON value."""
    if isinstance(value, int | float):
        return [value if is_finite(value) else math.inf]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [number for part in parts for number in numbers_in(part)]


def check_preprocessing(settings: Mapping[str, Any]) -> None:
    """Refuse preprocessing that is not what timm writes."""
    allowed = {
        "input_size": lambda v: (
            is_list(v, int) and len(v) == 3 and 0 < min(v) <= max(v) <= LARGEST_ARGUMENT
        ),
        "mean": lambda v: is_list(v, int | float) and all(map(is_finite, v)),
        "std": lambda v: is_list(v, int | float) and all(x > 0 and is_finite(x) for x in v),
        "interpolation": lambda v: v in INTERPOLATIONS,
        "crop_mode": lambda v: isinstance(v, str),
        "crop_pct": lambda v: is_list([v], int | float) and 0 < v <= 1,
    }
    for key, value in settings.items():
        if not allowed[key](value):
            raise ValueError(f"the preprocessing's {key} cannot be {str(value)[:80]}")
    if {"mean", "std"} <= settings.keys() and len(settings["mean"]) != len(settings["std"]):
        raise ValueError("the preprocessing's mean and std are not of the same number of channels")


def is_list(value: Any, kind: Any) -> bool:
    """Whether a JSON value is a list of at least one element, all of a kind."""
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(isinstance(item, kind) and not isinstance(item, bool) for item in value)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read weights from a student bundle, a Lightning checkpoint, `.pth` or `.safetensors`.

    Nothing is unpickled into code, no name in a file decides what is called, and no link leads out
    of a bundle's folder.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: if the file is none of these, or damaged.
    """
    source = Path(path).expanduser()
    if not source.exists():
        raise FileNotFoundError(f"no checkpoint at {source}")
    try:
        if source.is_dir():
            return checkpoint_of_bundle(source)
        if source.suffix == ".ckpt":
            return student_of(read_lightning(source))
        return Checkpoint(read_weights(source))
    except ValueError as error:
        told = str(error)
        raise ValueError(told if str(source) in told else f"{source}: {told}") from error


def checkpoint_of_bundle(folder: Path) -> Checkpoint:
    """Read a bundle's weights, its architecture and its preprocessing."""
    known = read_json(folder / TIMM_CONFIG)
    settings = known.get("pretrained_cfg") or {}
    if not isinstance(settings, dict):
        raise ValueError(f"{folder / TIMM_CONFIG}: pretrained_cfg is not an object")
    if known.get("architecture") is None:
        raise ValueError(f"{folder / TIMM_CONFIG} names no architecture")
    preprocessing = {key: settings[key] for key in PREPROCESSING if settings.get(key) is not None}
    args = known.get("model_args") or {}
    if isinstance(args, dict) and "num_classes" in known:
        args = {"num_classes": known["num_classes"], **args}
    weights = read_weights(inside(folder, WEIGHTS))
    return Checkpoint(weights, known["architecture"], args, preprocessing)


def read_lightning(path: Path) -> dict[str, Any]:
    """Read a Lightning checkpoint, never running code from it."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling fails in many ways
        raise ValueError(f"{path} is not a checkpoint that can be read safely") from error
    if not isinstance(content, dict) or not student_weights(content):
        raise ValueError(f"{path} holds no student: it is not a checkpoint of this project")
    return content


def epochs_done(content: Mapping[str, Any], path: str | Path = "the checkpoint") -> int:
    """Return how many epochs a Lightning checkpoint has trained."""
    try:
        done = content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    except (LookupError, TypeError):
        done = None
    if not isinstance(done, int):
        raise ValueError(f"{path} does not say how far it was trained: no run goes on from it")
    return done


def student_of(content: Mapping[str, Any]) -> Checkpoint:
    """Return the student in a Lightning checkpoint's content."""
    known = as_object(content.get("distill"))
    spec = as_object(known.get("student_model"))
    settings = as_object(known.get("preprocessing"))
    preprocessing = {key: settings[key] for key in PREPROCESSING if settings.get(key) is not None}
    return Checkpoint(
        student_weights(content), spec.get("name"), spec.get("args") or {}, preprocessing
    )


def as_object(value: Any) -> dict[str, Any]:
    """Return a value that should be an object, or an empty one."""
    return value if isinstance(value, dict) else {}


def student_weights(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the student's own tensors from a Lightning checkpoint."""
    return {
        plain_name(key.removeprefix(STUDENT_PREFIX)): value
        for key, value in as_object(content.get("state_dict")).items()
        if str(key).startswith(STUDENT_PREFIX)
    }


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """Read a `.pth` or `.safetensors` file as timm does, never running code from it."""
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        return load_state_dict(str(path), use_ema=True, device="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"no weights at {path}") from None
    except Exception as error:  # each format fails in its own way
        raise ValueError(f"{path} is not a weights file that can be read safely") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a `.safetensors` file.

    It is read into memory rather than mapped: a file that is cut short or written to while it is
    mapped kills the process at its next look.
    """
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
        if header > LARGEST_HEADER:
            raise ValueError(f"{path} has a header of {header} bytes")
        file.seek(0)
        return clean_state_dict(load_safetensors(file.read()))


def inside(folder: Path, name: str) -> Path:
    """Return the path of a bundle's file, which has to be one and to lie in its folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is a link to elsewhere, or no ordinary file.
    """
    path = folder / name
    try:
        found = path.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(missing(folder, name)) from None
    except (OSError, RuntimeError) as error:  # a circle of links
        raise ValueError(f"{path} leads nowhere: {error}") from error
    if not found.is_relative_to(folder.resolve()):
        raise ValueError(f"{path} is a link out of its folder: copy the file there")
    if not found.is_file():
        raise ValueError(f"{path} is not an ordinary file")
    return path


def missing(folder: Path, name: str) -> str:
    """Return what to say of a bundle's file that is not there."""
    if not folder.exists():
        return f"there is no {folder}"
    if (folder / "student" / name).is_file():
        return f"{folder} is a run, not a student bundle: did you mean {folder / 'student'}?"
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
