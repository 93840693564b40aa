"""A student on disk: a folder that stock timm loads, and the readers of other checkpoints."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import load_state_dict, save_for_hf
from torch import Tensor, nn

WEIGHTS, TIMM_CONFIG, FACTS, CARD = "model.safetensors", "config.json", "distill.json", "README.md"
STUDENT_PREFIX = "student."
PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


@dataclass(frozen=True)
class Checkpoint:
    """Weights read from a file, with the architecture where the file knows it."""

    weights: Mapping[str, Tensor]
    architecture: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)


class Calibrated(nn.Module):
    """A model whose logits are divided by a fitted temperature."""

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, images: Tensor) -> Tensor:
        """Return calibrated logits `[N, K]`."""
        return self.model(images) / self.temperature


class VectorCalibrated(nn.Module):
    """A model whose logits are scaled and shifted class by class."""

    scale: Tensor
    bias: Tensor

    def __init__(self, model: nn.Module, scale: Sequence[float], bias: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("bias", torch.tensor(bias))

    def forward(self, images: Tensor) -> Tensor:
        """Return calibrated logits `[N, K]`."""
        return self.model(images) * self.scale + self.bias


def save_student(
    model: nn.Module,
    path: str | Path,
    *,
    classes: Sequence[str] = (),
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    facts: Mapping[str, Any] | None = None,
    card: str = "",
) -> Path:
    """Write a student bundle, whole or not at all.

    Args:
        model: a timm model.
        path: the folder; one that is there is replaced.
        classes: class names in label order.
        input_size: `(C, H, W)` the model was trained on.
        mean: the input normalisation's mean, one value per channel.
        std: the input normalisation's standard deviation, one value per channel.
        facts: what `distill.json` says; `temperature` and `vector_scaling` (`scale` and `bias`)
            are what `load_student` applies when it is asked to.
        card: the model card's text.

    Raises:
        ValueError: if the model is not timm's.
        OSError: if the folder cannot be written.
    """
    if not getattr(model, "pretrained_cfg", None):
        raise ValueError("only a model made by timm can be saved for timm")
    target = Path(path)
    building = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)
    try:
        write_timm_files(model, building, classes, input_size, mean, std)
        text = json.dumps({"classes": list(classes), **(facts or {})}, indent=2, ensure_ascii=False)
        (building / FACTS).write_text(text + "\n", encoding="utf-8")
        (building / CARD).write_text(card, encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        building.rename(target)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def write_timm_files(
    model: nn.Module,
    folder: Path,
    classes: Sequence[str],
    input_size: Sequence[int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> None:
    """Write weights and timm's configuration, without the licence and papers of other weights."""
    settings = {"input_size": input_size, "mean": mean, "std": std}
    data_config = {key: list(value) for key, value in settings.items() if value is not None}
    inherited = dict.fromkeys(("license", "paper_ids", "paper_name", "origin_url", "notes"))
    config: dict[str, Any] = {"pretrained_cfg": {"tag": "", **inherited, "crop_pct": 1.0}}
    if classes:
        config["label_names"] = list(classes)
    # safetensors stores dense tensors; channels-last is a matter of the machine, not of the file
    model = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    save_for_hf(
        model, str(folder), safe_serialization=True, model_config=config, data_config=data_config
    )


def load_student(path: str | Path, calibrated: bool | str = False) -> nn.Module:
    """Load a student bundle, in eval mode.

    Args:
        path: the bundle's folder.
        calibrated: True divides the logits by the fitted temperature, "vector" applies the fitted
            factor and bias of each class; either does nothing where no such fit was found.

    Raises:
        FileNotFoundError: if it is no bundle.
        ValueError: if it cannot be read, or `calibrated` is another word.

    Example:
        `load_student("runs/first/student", calibrated=True)(images).softmax(1)`
    """
    import distill.models.cifar  # noqa: F401  (a bundle may name one of its families)

    folder = Path(path)
    read_json(folder / TIMM_CONFIG)
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except Exception as error:  # timm raises whatever its readers do
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"cannot load the student bundle {folder}: {why}") from error
    return with_calibration(model, read_facts(folder), calibrated) if calibrated else model


def with_calibration(model: nn.Module, facts: Mapping[str, Any], kind: bool | str) -> nn.Module:
    """Return a model whose logits are calibrated as its bundle says, or the model itself."""
    if kind not in (True, "vector"):
        raise ValueError(f"calibrated must be True, False or 'vector', not {kind!r}")
    temperature, vector = facts.get("temperature"), facts.get("vector_scaling")
    if kind == "vector" and vector:
        return VectorCalibrated(model, vector["scale"], vector["bias"]).eval()
    if kind is True and temperature is not None:
        return Calibrated(model, temperature).eval()
    return model


def read_facts(path: str | Path) -> dict[str, Any]:
    """Return what `distill.json` says of a bundle."""
    return read_json(Path(path) / FACTS)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read weights from a student bundle, a Lightning checkpoint, `.pth` or `.safetensors`.

    Nothing is unpickled into code.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: if the file is none of these.
    """
    source = Path(path).expanduser()
    if source.is_dir():
        config = read_json(source / TIMM_CONFIG)
        weights = read_weights(source / WEIGHTS)
        settings = config.get("pretrained_cfg") or {}
        preprocessing = {key: settings[key] for key in PREPROCESSING if key in settings}
        args = config.get("model_args") or {}
        return Checkpoint(weights, config.get("architecture"), args, preprocessing)
    if not source.exists():
        raise FileNotFoundError(f"no checkpoint at {source}")
    if source.suffix == ".ckpt":
        return student_of(read_lightning(source))
    return Checkpoint(read_weights(source))


def read_lightning(path: Path) -> dict[str, Any]:
    """Read a Lightning checkpoint, never running code from it."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling fails in many ways
        raise ValueError(f"{path} is not a checkpoint that can be read safely") from error
    if not isinstance(content, dict) or not student_weights(content):
        raise ValueError(f"{path} holds no student: it is not a checkpoint of this project")
    return content


def student_of(content: Mapping[str, Any]) -> Checkpoint:
    """Return the student in a Lightning checkpoint's content."""
    known = content.get("distill") or {}
    spec = known.get("student_model") or {}
    weights, preprocessing = student_weights(content), known.get("preprocessing") or {}
    return Checkpoint(weights, spec.get("name"), spec.get("args") or {}, preprocessing)


def student_weights(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the student's own tensors from a Lightning checkpoint."""
    return {
        key.removeprefix(STUDENT_PREFIX): value
        for key, value in (content.get("state_dict") or {}).items()
        if key.startswith(STUDENT_PREFIX)
    }


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """Read a `.pth` or `.safetensors` file as timm does, never running code from it."""
    try:
        return load_state_dict(str(path), use_ema=True, device="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"no weights at {path}") from None
    except Exception as error:  # each format fails in its own way
        raise ValueError(f"{path} is not a weights file that can be read safely") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read one of a bundle's JSON files."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path.parent} is not a student bundle: no {path.name}") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it does not hold an object")
    return content
