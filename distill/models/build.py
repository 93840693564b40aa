"""Build teachers and students with timm, from names and from files."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import timm
import torch
from torch import Tensor, nn

import distill.models.cifar  # noqa: F401  (registers its families with timm)
from distill.errors import first_line
from distill.models.checkpoint import Checkpoint, read_checkpoint
from distill.models.weights import DataShape, check_tensors_fit, load_weights

FROM_DATA = ("num_classes", "in_chans")  # the data decide these, whatever a checkpoint recorded
LARGEST_HEAD = 2**25  # numbers that a last layer for other classes may have
LARGEST_BUFFERS = 2**28  # numbers: what positions need of a model for images of 4,096 pixels
VECTOR = 16  # float32 values in the widest CPU register


@dataclass(frozen=True)
class ModelSpec:
    """Which model to build, and where its weights come from.

    Args:
        name: timm's name of the architecture; None where `checkpoint` knows it.
        args: further arguments of `timm.create_model`.
        pretrained: whether timm fetches its published weights.
        checkpoint: a student bundle, a Lightning checkpoint of this project (both bring their own
            architecture), `.pth` or `.safetensors`.
    """

    name: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    checkpoint: str | None = None


class Normalize(nn.Module):
    """Shift and scale each channel: `(x − mean)/std` for `[N, C, H, W]`."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def extra_repr(self) -> str:
        """Return what the state dict leaves out, for whoever tells models apart."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"

    def forward(self, view: Tensor) -> Tensor:
        """Return the normalised view."""
        return (view - self.mean) / self.std


def build_model(
    spec: ModelSpec, shape: DataShape, role: str, any_classes: bool = False
) -> nn.Module:
    """Return a timm model that fits the data, with its weights loaded, in channels-last layout.

    Args:
        spec: which model.
        shape: what the data ask of it.
        role: `teacher` or `student`, for messages.
        any_classes: whether a checkpoint of other classes will do, of which the last layer is left
            out: it is to be trained.

    Raises:
        ValueError: if the name is unknown, the weights do not fit, or the model refuses the images.
    """
    checkpoint = read_checkpoint(spec.checkpoint) if spec.checkpoint else None
    name, args = architecture(spec, checkpoint)
    if not name:
        raise ValueError(f"give {role}.name: a timm model, or {role}.checkpoint: a student bundle")
    published = published_classes(name) if spec.pretrained and checkpoint is None else None
    if published not in (None, shape.num_classes):
        raise ValueError(
            f"the published weights of {role} {name} know {published} classes and the data have "
            f"{shape.num_classes}: fine-tune it first and give {role}.checkpoint, or set "
            f"{role}.pretrained=false"
        )
    if checkpoint is not None and checkpoint.architecture:
        check_proportion(checkpoint, name, {**args, **asked_by(shape)})
    model = create(name, args, shape, spec.pretrained and checkpoint is None, role)
    if checkpoint is not None:
        origin = f"{role}.checkpoint={spec.checkpoint}"
        load_weights(model, checkpoint, shape, origin, any_classes)
        take_preprocessing(model, checkpoint)
    check_forward(model, shape, f"{role} {name}")
    return channels_last(model)


def channels_last(model: nn.Module) -> nn.Module:
    """Return the model in channels-last layout: 1.3 to 3.3 times faster, here and on GPUs.

    One with a narrow, strided 1×1 convolution stays as it is. On CPUs without AVX-512, oneDNN
    gives such a layer wrong gradients in this layout, or overwrites memory (oneDNN issue 6035).
    """
    if any(is_narrow_and_strided(layer) for layer in model.modules()):
        return model
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def is_narrow_and_strided(layer: nn.Module) -> bool:
    """Whether a layer is a 1×1 convolution that skips pixels and reads less than a vector."""
    if not isinstance(layer, nn.Conv2d) or max(layer.stride) == 1:
        return False
    return set(layer.kernel_size) == {1} and layer.in_channels // layer.groups < VECTOR


def rebuilt(checkpoint: Checkpoint) -> nn.Module:
    """Return the model that a checkpoint knows itself to be, with its weights.

    Raises:
        ValueError: if the architecture does not make these very tensors.
    """
    assert checkpoint.architecture
    args = dict(checkpoint.args)
    if "input_size" in checkpoint.preprocessing:
        args.setdefault("in_chans", checkpoint.preprocessing["input_size"][0])
    outline = check_proportion(checkpoint, checkpoint.architecture, args)
    check_tensors_fit(outline, checkpoint.weights, "its weights file")
    model = call_timm(checkpoint.architecture, args)
    model.load_state_dict(checkpoint.weights)
    take_preprocessing(model, checkpoint)
    return model


def check_proportion(checkpoint: Checkpoint, name: str, args: Mapping[str, Any]) -> nn.Module:
    """Refuse an architecture that is much larger than its weights, before any memory is taken.

    Returns:
        The model without its numbers. It is built no further than there are tensors in the file:
        what a stranger's file says of depth and width costs neither time nor memory.
    """
    left = len(checkpoint.weights)

    def count(*made: Any) -> None:
        nonlocal left
        left -= made[-1] is not None
        if left < 0:
            raise ValueError("the architecture has more tensors than the file")

    hook = torch.nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            model = call_timm(name, args)
    finally:
        hook.remove()
    held = sum(weight.numel() for weight in checkpoint.weights.values())
    if sum(weight.numel() for weight in model.parameters()) > 2 * held + LARGEST_HEAD or (
        sum(buffer.numel() for buffer in model.buffers()) > LARGEST_BUFFERS
    ):
        raise ValueError(f"the architecture {name} with {dict(args)} is out of all proportion")
    return model


def call_timm(name: str, args: Mapping[str, Any], pretrained: bool = False) -> nn.Module:
    """Call `timm.create_model`, explaining in one line what it refuses."""
    try:
        return timm.create_model(name, pretrained=pretrained, **args)
    except Exception as error:  # constructors raise anything, and so do downloads
        raise ValueError(
            f"timm cannot build {name} with {dict(args)}: {first_line(error)}"
        ) from error


def take_preprocessing(model: Any, checkpoint: Checkpoint) -> None:
    """Let a model declare the preprocessing that its checkpoint was trained under."""
    tested = dict.fromkeys(("test_input_size", "test_crop_pct"))  # of timm's own weights
    known = {**tested, **checkpoint.preprocessing} if checkpoint.preprocessing else {}
    model.pretrained_cfg = {**model.pretrained_cfg, **known}


def resolved(spec: ModelSpec) -> ModelSpec:
    """Return the spec with the architecture that its checkpoint brings, where it brings one."""
    checkpoint = read_checkpoint(spec.checkpoint) if spec.checkpoint else None
    name, args = architecture(spec, checkpoint)
    return replace(spec, name=name, args=args)


def architecture(
    spec: ModelSpec, checkpoint: Checkpoint | None
) -> tuple[str | None, dict[str, Any]]:
    """Return the name and arguments to build: the checkpoint's own, where it knows them."""
    if checkpoint is None or not checkpoint.architecture:
        return spec.name, dict(spec.args)
    args = {key: value for key, value in checkpoint.args.items() if key not in FROM_DATA}
    return checkpoint.architecture, args


def normalization(model: nn.Module, in_chans: int) -> Normalize:
    """Return the input normalisation that the model's `pretrained_cfg` declares.

    A model that declares three channels and sees another number is given the three's mean.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    mean, std = (
        list(config.get(key) or [default]) for key, default in (("mean", 0.5), ("std", 0.5))
    )
    if len(mean) != in_chans:
        mean, std = ([sum(values) / len(values)] * in_chans for values in (mean, std))
    return Normalize(mean, std)


def published_classes(name: str) -> int | None:
    """Return the class count of timm's published weights."""
    config = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    return config.num_classes if config is not None else None


def create(
    name: str, args: Mapping[str, Any], shape: DataShape, pretrained: bool, role: str
) -> nn.Module:
    """Call `timm.create_model`, explaining what it refuses."""
    check_name(name, f"{role}.name")
    options = {**asked_by(shape), **args}
    try:
        return call_timm(name, options, pretrained)
    except ValueError as error:
        raise ValueError(f"{role}: {error}") from error


def check_name(name: str, key: str) -> None:
    """Refuse a name that timm does not know, with those that were probably meant."""
    if not timm.is_model(name.split(".")[0]) and ":" not in name:
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; see timm.list_models()"
        raise ValueError(f"timm has no model {name!r} for {key}{hint}")


def asked_by(shape: DataShape) -> dict[str, int]:
    """Return the arguments that the data decide."""
    return {"num_classes": shape.num_classes, "in_chans": shape.in_chans}


def check_forward(model: nn.Module, shape: DataShape, label: str) -> None:
    """Run one blank image, so that a wrong size is refused now and not after the teacher."""
    training = model.training
    blank = torch.zeros(1, shape.in_chans, *shape.image_size)
    try:
        with torch.inference_mode():
            logits = model.eval()(blank)
    except Exception as error:  # a model refuses a size in its own way
        size = "×".join(map(str, (shape.in_chans, *shape.image_size)))
        raise ValueError(f"{label} does not take {size} images: {first_line(error)}") from error
    finally:
        model.train(training)
    if logits.shape != (1, shape.num_classes):
        raise ValueError(f"{label} answers {tuple(logits.shape)}, not (1, {shape.num_classes})")
