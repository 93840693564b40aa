"""Weights from files of any origin: nothing that is read is run, and all of it is checked."""

from __future__ import annotations

import argparse
import inspect
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load as load_safetensors
from timm.models import build_model_with_cfg, clean_state_dict
from torch import Tensor

from distill.models.compiled import plain_name
from distill.utils.files import resolved_path
from distill.utils.reading import inside, read_json

WEIGHTS, TIMM_CONFIG, FACTS = "model.safetensors", "config.json", "distill.json"
STUDENT_PREFIX = "student."
# Under which names training scripts wrap their weights: averaged ones first, as timm takes them.
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "network", "weights", "checkpoint")
PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")  # timm's names
LARGEST_HEADER = 2**24  # bytes
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
        classes: the names of its classes in their order, or none.

    Raises:
        ValueError: if these are not of their kind, or weights are not finite.
    """

    weights: Mapping[str, Tensor]
    architecture: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    classes: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_tensors(self.weights)
        check_architecture(self.architecture, self.args)
        check_preprocessing(self.preprocessing)
        if self.classes and not is_list(self.classes, str):
            raise ValueError("its classes are not a list of names")


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
    source = existing(path)
    try:
        if source.is_dir():
            return checkpoint_of_bundle(source)
        if source.suffix == ".ckpt":
            return student_of(read_lightning(source))
        return Checkpoint(read_weights(source))
    except ValueError as error:
        message = str(error)
        raise ValueError(message if str(source) in message else f"{source}: {message}") from error


def existing(path: str | Path) -> Path:
    """Return the path of a checkpoint, refusing one where there is nothing."""
    source = resolved_path(path)
    if not source.exists():
        raise FileNotFoundError(f"no checkpoint at {source}")
    return source


def checkpoint_of_bundle(folder: Path) -> Checkpoint:
    """Read a bundle's weights, its architecture and its preprocessing."""
    if has_weights_alone(folder):
        # Of a model that timm cannot build, whose architecture is for the configuration to name.
        facts = read_json(folder / FACTS) if (folder / FACTS).exists() else {}
        preprocessing = preprocessing_in(facts.get("preprocessing"))
        return Checkpoint(read_weights(inside(folder, WEIGHTS)), preprocessing=preprocessing)
    config = read_json(folder / TIMM_CONFIG)
    settings = config.get("pretrained_cfg") or {}
    if not isinstance(settings, dict):
        raise ValueError(f"{folder / TIMM_CONFIG}: pretrained_cfg is not an object")
    if config.get("architecture") is None:
        raise ValueError(f"{folder / TIMM_CONFIG} names no architecture")
    preprocessing = preprocessing_in(settings)
    args = config.get("model_args") or {}
    if isinstance(args, dict) and "num_classes" in config:
        args = {"num_classes": config["num_classes"], **args}
    weights = read_weights(inside(folder, WEIGHTS))
    return Checkpoint(weights, config["architecture"], args, preprocessing, class_names(folder))


def class_names(folder: Path) -> list[str]:
    """Return a bundle's class names; of one that is not this project's, timm's."""
    facts = read_json(folder / FACTS) if (folder / FACTS).exists() else {}
    return facts.get("classes") or read_json(folder / TIMM_CONFIG).get("label_names") or []


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
    facts = as_object(content.get("distill"))
    spec = as_object(facts.get("student_model"))
    preprocessing = preprocessing_in(facts.get("preprocessing"))
    args, classes = spec.get("args") or {}, facts.get("classes")
    if isinstance(args, dict):  # what the data decided, which the run's own arguments leave out
        counts = {"num_classes": classes, "in_chans": preprocessing.get("mean")}
        args = {key: len(v) for key, v in counts.items() if isinstance(v, list) and v} | args
    return Checkpoint(
        student_weights(content), spec.get("name"), args, preprocessing, classes or ()
    )


def facts_of_lightning(path: Path) -> dict[str, Any]:
    """Return what a Lightning checkpoint says of its student that a bundle's facts say, too.

    Nothing was fitted on validation when it was written: there is no temperature in it.
    """
    facts = as_object(read_lightning(path).get("distill"))
    return {"classes": facts.get("classes") or []}


def has_weights_alone(folder: Path) -> bool:
    """Whether a bundle is of a model that timm cannot build."""
    return (folder / WEIGHTS).is_file() and not os.path.lexists(folder / TIMM_CONFIG)


def preprocessing_in(settings: Any) -> dict[str, Any]:
    """Return of a configuration what says how images become a model's input."""
    values = as_object(settings)
    return {key: values[key] for key in PREPROCESSING if values.get(key) is not None}


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
    """Read a `.pth` or `.safetensors` file, never running code from it."""
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        # Scripts often keep their arguments beside the weights: plain values in a named box.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"no weights at {path}") from None
    except Exception as error:  # each format fails in its own way
        raise ValueError(f"{path} is not a weights file that can be read safely") from error
    return clean_state_dict(unwrapped(content))


def unwrapped(content: Any) -> dict[str, Tensor]:
    """Return the state dict in what a training script has saved.

    Raises:
        ValueError: if there is none, or several and nothing says which is meant.
    """
    for _ in range(4):  # {"checkpoint": {"model": {…}}}
        if not isinstance(content, dict):
            break
        if any(isinstance(value, Tensor) for value in content.values()):
            return content
        boxes = [name for name, value in content.items() if isinstance(value, dict) and value]
        recognised = [name for name in AVERAGED if name in boxes][:1]
        recognised = recognised or [name for name in WRAPPERS if name in boxes]
        chosen = recognised or [name for name in boxes if holds_tensors(content[name])]
        if len(chosen) != 1:
            what = "several models" if chosen else "no weights"
            raise ValueError(f"it holds {what}: {', '.join(map(str, chosen or content)):.80}")
        content = content[chosen[0]]
    raise ValueError("it holds no weights")


def holds_tensors(value: Mapping[str, Any]) -> bool:
    """Whether a mapping is a state dict: an optimiser's state has other things in it."""
    return all(isinstance(one, Tensor) for one in value.values())


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
