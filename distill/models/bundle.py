"""A student on disk: a folder that stock timm loads."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from distill.models.build import rebuilt
from distill.models.checkpoint import (
    FACTS,
    TIMM_CONFIG,
    WEIGHTS,
    facts_of_lightning,
    has_weights_alone,
    is_finite,
    is_list,
    read_checkpoint,
)
from distill.models.compiled import uncompiled
from distill.utils.errors import first_line
from distill.utils.files import resolved_path, under_construction
from distill.utils.reading import inside, read_json

log = logging.getLogger(__name__)

CARD = "README.md"
WEIGHTS_ALONE = (
    "timm cannot build this model, so that its weights alone are saved: build it and load the "
    "state dict, or register it with timm through build_model_with_cfg"
)


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
    interpolation: str | None = None,
    crop_pct: float | None = 1.0,
    crop_mode: str | None = None,
    facts: Mapping[str, Any] | None = None,
    card: str = "",
) -> Path:
    """Write a student bundle, whole or not at all.

    Args:
        model: a timm model, compiled or not; of another module the weights alone are written, with
            a note.
        path: the folder; one that is there is replaced.
        classes: class names in label order.
        input_size: `(C, H, W)` the model was trained on.
        mean: the input normalisation's mean, one value per channel.
        std: the input normalisation's standard deviation, one value per channel.
        interpolation: `bilinear`, `bicubic`, …: how images of other sizes are resized.
        crop_pct: the share of the resized image's side that is seen.
        crop_mode: timm's `center`, `squash` or `border`.
        facts: what `distill.json` says; `temperature` and `vector_scaling` (`scale` and `bias`)
            are what `load_student` applies when it is asked to.
        card: the model card's text.

    Raises:
        OSError: if the folder cannot be written.
    """
    model = uncompiled(copy.deepcopy(model))  # what is given may go on being trained
    target = resolved_path(path)
    building = under_construction(target)
    shutil.rmtree(building, ignore_errors=True)
    given: dict[str, Any] = {"input_size": input_size, "mean": mean, "std": std}
    given |= {"interpolation": interpolation, "crop_pct": crop_pct, "crop_mode": crop_mode}
    preprocessing = {key: value for key, value in given.items() if value is not None}
    try:
        content = {"classes": list(classes), **(facts or {})}
        if why := write_timm_files(model, building, classes, preprocessing):
            log.warning("%s: %s (%s)", target, WEIGHTS_ALONE, why)
            write_weights(model, building)
            content |= {"note": WEIGHTS_ALONE, "preprocessing": preprocessing}
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (building / FACTS).write_text(text + "\n", encoding="utf-8")
        (building / CARD).write_text(card, encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        building.rename(target)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def write_weights(model: nn.Module, folder: Path) -> None:
    """Write a model's state dict alone."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # safetensors writes no memory twice: layers may share theirs
    weights = {name: value.cpu().contiguous().clone() for name, value in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS)


def write_timm_files(
    model: nn.Module,
    folder: Path,
    classes: Sequence[str],
    preprocessing: Mapping[str, Any],
) -> str | None:
    """Write weights and timm's configuration, without the licence and papers of other weights.

    Returns:
        None, or of a model that timm could not build again why that is so.
    """
    if not getattr(model, "pretrained_cfg", None):
        return "it has no pretrained_cfg"
    inherited = dict.fromkeys(("license", "paper_ids", "paper_name", "origin_url", "notes"))
    config: dict[str, Any] = {"pretrained_cfg": {"tag": "", **inherited}}
    if classes:
        config["label_names"] = list(classes)
    # safetensors stores dense tensors; channels-last is a matter of the machine, not of the file
    model = model.cpu().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    if not hasattr(model, "in_chans") and "input_size" in preprocessing:
        model.in_chans = preprocessing["input_size"][0]  # which timm asks every model for
    try:
        save_for_hf(
            model, str(folder), safe_serialization=True, model_config=config,
            data_config=dict(preprocessing),
        )  # fmt: skip
    except (ValueError, TypeError, AttributeError) as error:  # of arguments that are no JSON, say
        return first_line(error)
    shutil.copymode(folder / TIMM_CONFIG, folder / WEIGHTS)  # safetensors lets nobody else read it
    return None


def load_student(path: str | Path, calibrated: bool | str = False) -> nn.Module:
    """Load a student bundle, or the student in a run's checkpoint, in eval mode.

    Args:
        path: the bundle's folder, or a Lightning checkpoint of this project, such as `best.ckpt`.
        calibrated: True divides the logits by the fitted temperature, "vector" applies the fitted
            factor and bias of each class; either does nothing where no such fit was found.

    Raises:
        FileNotFoundError: if it is no bundle.
        ValueError: if it cannot be read, or `calibrated` is another word.

    Example:
        `load_student("runs/first/student", calibrated=True)(images).softmax(1)`
    """
    folder = resolved_path(path)
    if has_weights_alone(folder):
        raise ValueError(f"{folder}: {WEIGHTS_ALONE}")
    if not folder.is_file():
        inside(folder, TIMM_CONFIG)
    checkpoint = read_checkpoint(folder)
    if not checkpoint.architecture:
        raise ValueError(
            f"{folder} holds weights and does not say of which model: give a student bundle, or a "
            "run's .ckpt"
        )
    try:
        model = rebuilt(checkpoint).eval()
    except ValueError as error:
        raise ValueError(f"cannot load the student bundle {folder}: {error}") from error
    return with_calibration(model, facts_of(folder, model), calibrated) if calibrated else model


def facts_of(folder: Path, model: nn.Module) -> dict[str, Any]:
    """Return what a bundle says of itself, refusing what is of another number of classes."""
    facts, classes = read_facts(folder), model.num_classes
    names, vector = facts.get("classes"), facts.get("vector_scaling")
    if names and len(names) != classes:
        raise ValueError(
            f"{folder / FACTS} is damaged: it has {len(names)} class names and the model has "
            f"{classes} classes"
        )
    if vector and {len(vector["scale"]), len(vector["bias"])} != {classes}:
        raise ValueError(f"{folder / FACTS} is damaged: vector_scaling is not of {classes} classes")
    return facts


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


def is_single(value: float) -> bool:
    """Whether a number is finite in single precision, too."""
    return is_finite(value) and abs(value) <= torch.finfo(torch.float32).max


def read_facts(path: str | Path) -> dict[str, Any]:
    """Return what `distill.json` says of a bundle, or what a Lightning checkpoint says of itself.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, or what it says cannot be.
    """
    file = resolved_path(path)
    if file.is_file():
        facts = facts_of_lightning(file) if file.suffix == ".ckpt" else {}
    else:
        file /= FACTS
        facts = read_json(file)
    temperature, vector = facts.get("temperature"), facts.get("vector_scaling")
    if temperature is not None and not (is_list([temperature], int | float) and temperature > 0
                                        and is_finite(temperature)):  # fmt: skip
        raise ValueError(f"{file} is damaged: {temperature!r:.80} is no temperature")
    if vector is not None and not (isinstance(vector, dict) and all(
            is_list(vector.get(key), int | float) and all(map(is_single, vector[key]))
            for key in ("scale", "bias"))):  # fmt: skip
        raise ValueError(f"{file} is damaged: vector_scaling is not a scale and a bias")
    classes = facts.get("classes")
    if classes and not is_list(classes, str):
        raise ValueError(f"{file} is damaged: classes are not a list of names")
    return facts
