"""Build teachers and students with timm, from names and from files."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_model_config_from_hf
from torch import Tensor, nn
from torch.nn.functional import interpolate

import distill.models.cifar
import distill.models.slim  # noqa: F401  (both register their families with timm)
from distill.models.checkpoint import TIMM_CONFIG, Checkpoint, as_object, read_checkpoint
from distill.models.classes import LabelSet, MappedClasses, imagenet_names, matched, shared_rows
from distill.models.weights import (
    DataShape,
    KeyMap,
    check_tensors_fit,
    classes_of,
    fits,
    layer_in,
    prefixes,
    renamed,
    settings_of,
    size_along,
    with_own_head,
)
from distill.utils.errors import first_line
from distill.utils.reading import read_json

# The data decide these, whatever a checkpoint recorded.
FROM_DATA = ("num_classes", "in_chans", "img_size")
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
        key_map: where a file has other names for its tensors: `order`, or a mapping of regular
            expressions to their replacements; see `distill.models.weights.renamed`.
    """

    name: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    checkpoint: str | None = None
    key_map: KeyMap | None = None


class Normalize(nn.Module):
    """Shift and scale each channel: `(x − mean)/std` for `[N, C, H, W]`.

    Args:
        mean: of each channel.
        std: the standard deviation of each channel.
        size: the height and width in pixels that views, in [0, 1], are first resized to (bicubic,
            antialiased, cut to [0, 1]); None leaves them as they are.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], size: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.size = None if size is None else (size[0], size[1])
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def extra_repr(self) -> str:
        """Return what the state dict leaves out, for whoever tells models apart."""
        text = f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"
        return text if self.size is None else f"{text}, size={self.size}"

    def forward(self, view: Tensor) -> Tensor:
        """Return the normalised view, of `size`."""
        return (self._resized(view) - self.mean) / self.std

    def _resized(self, view: Tensor) -> Tensor:
        if self.size in (None, tuple(view.shape[2:])):
            return view
        wide = view.to(torch.promote_types(view.dtype, torch.float32))
        resized = interpolate(wide, self.size, mode="bicubic", antialias=True)
        return resized.clamp_(0, 1).to(view.dtype)


def build_model(
    spec: ModelSpec,
    shape: DataShape,
    role: str,
    any_classes: bool = False,
    note: Callable[[str], None] | None = None,
) -> nn.Module:
    """Return a timm model that fits the data, with its weights loaded, in channels-last layout.

    Weights for other channels or other image sizes are adapted as timm adapts its own: the first
    layer is folded or repeated, position embeddings are resampled. A new last layer on weights that
    know other classes begins at zero, so that its first steps do not disturb what they know
    [Kolesnikov 2020, 1912.11370; Dosovitskiy 2021, 2010.11929].

    Args:
        spec: which model.
        shape: what the data ask of it.
        role: `teacher` or `student`, for messages.
        any_classes: whether weights of other classes will do, of which the last layer is left out:
            it is to be trained.
        note: takes in one line each what of the weights was adapted to the data.

    Raises:
        ValueError: if the name is unknown, the weights do not fit, or the model refuses the images.
    """
    checkpoint = read_checkpoint(spec.checkpoint) if spec.checkpoint else None
    name, args = architecture(spec, checkpoint)
    if not name:
        raise ValueError(f"give {role}.name: a timm model, or {role}.checkpoint: a student bundle")
    if checkpoint is not None and checkpoint.architecture:
        check_proportion(checkpoint, name, {**args, **asked_by(shape, name)})
    origin = None
    if checkpoint is None and spec.pretrained:
        origin = published(name, role)
        check_classes(origin, shape, any_classes)
    model = create(name, args, shape, origin is not None, role)
    if origin is not None and origin.classes != shape.num_classes:
        zero_head(model)
    if checkpoint is not None:
        model, origin = started(model, name, args, checkpoint, spec, shape, role, any_classes)
    if note is not None and origin is not None:
        for sentence in adaptations(origin, name, shape):
            note(sentence)
    check_forward(model, shape, f"{role} {name}")
    return channels_last(model)


@dataclass(frozen=True)
class Origin:
    """Where weights come from, for people, and what they were made for, where that is known."""

    label: str
    classes: int | None
    channels: int | None
    names: tuple[str, ...] = ()


def published(name: str, role: str) -> Origin:
    """Return what timm's published weights of an architecture were made for."""
    settings = published_config(name)
    channels = (settings.get("input_size") or (None,))[0]
    return Origin(f"{role}.pretrained ({name})", settings.get("num_classes"), channels)


def check_classes(origin: Origin, shape: DataShape, any_classes: bool) -> None:
    """Refuse weights of another number of classes, unless a new last layer will do."""
    if any_classes or origin.classes in (None, shape.num_classes):
        return
    raise ValueError(
        f"{origin.label} has {origin.classes} classes and the data have {shape.num_classes}: "
        "teacher=finetuned trains a new last layer"
    )


def started(
    model: Any,
    name: str,
    args: Mapping[str, Any],
    checkpoint: Checkpoint,
    spec: ModelSpec,
    shape: DataShape,
    role: str,
    any_classes: bool,
) -> tuple[nn.Module, Origin]:
    """Return the model with a checkpoint's weights, and where they come from."""
    label, settings = f"{role}.checkpoint={spec.checkpoint}", settings_of(model)
    try:
        weights = renamed(checkpoint.weights, model, spec.key_map)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error
    classes = size_along(weights, settings.get("classifier"), 0)
    channels = size_along(weights, settings.get("first_conv"), 1)
    origin = Origin(label, classes, channels, tuple(checkpoint.classes))
    check_classes(origin, shape, any_classes)
    if any_classes and (classes != shape.num_classes or renames(origin, shape)):
        zero_head(model)
        weights = with_own_head(weights, model, origin.names, shape.classes)
    if fits(model, weights):
        model.load_state_dict(weights)
    else:
        model = adapted(model, weights, name, {**asked_by(shape, name), **args}, origin)
    take_preprocessing(model, checkpoint)
    return model, origin


def adapted(
    model: Any, weights: Mapping[str, Tensor], name: str, options: Mapping[str, Any], origin: Origin
) -> nn.Module:
    """Return the model with weights that timm's own loader makes fit.

    Raises:
        ValueError: if they do not fit even so.
    """
    settings = settings_of(model)
    size = (settings.get("input_size") or (0, 0, 0))[1:]
    overlay = {
        "state_dict": dict(weights),
        "num_classes": options["num_classes"],  # the last layer was exchanged: all must fit
        "input_size": (origin.channels or options["in_chans"], *size),
        "first_conv": layer_in(weights, settings.get("first_conv")),
        "label_offset": 0,
        "custom_load": False,
    }
    try:
        with torch.random.fork_rng(devices=[]):
            fitted: Any = timm.create_model(
                name, pretrained=True, pretrained_cfg_overlay=overlay, **options
            )
    except Exception:  # as little says which tensors differ as there are ways to fail
        check_tensors_fit(model, weights, origin.label)
        raise
    fitted.pretrained_cfg = fitted.default_cfg = settings
    return fitted


def zero_head(model: Any) -> None:
    """Let a model answer all classes alike, where its last layer is of a kind that can."""
    for key in prefixes(settings_of(model).get("classifier")):
        head = model.get_submodule(key.removesuffix("."))
        if isinstance(head, nn.Linear | nn.Conv2d):  # what divides by a norm would answer NaN
            for parameter in head.parameters():
                nn.init.zeros_(parameter)


def renames(origin: Origin, shape: DataShape) -> bool:
    """Whether both sides name their classes, and not alike."""
    return bool(origin.names and shape.classes) and origin.names != shape.classes


def becomes(origin: Origin, shape: DataShape) -> str:
    """Return what becomes of a last layer whose rows are taken by name, for people."""
    rows = len(shared_rows(origin.names, shape.classes))
    if not rows:
        return "starts anew"
    rest = ", and the others start anew" if rows < shape.num_classes else ""
    return f"keeps {rows} rows by name{rest}"


def adaptations(origin: Origin, name: str, shape: DataShape) -> list[str]:
    """Return in one line each how weights are adapted to the data."""
    said = []
    if origin.classes is not None and (
        origin.classes != shape.num_classes or renames(origin, shape)
    ):
        said.append(f"{origin.label}: of {origin.classes:,} classes, and the data have "
                    f"{shape.num_classes:,}; the last layer {becomes(origin, shape)}")  # fmt: skip
    if origin.channels not in (None, shape.in_chans):
        said.append(f"{origin.label}: for {origin.channels} channels, and the data have "
                    f"{shape.in_chans}; the first layer is adapted as timm does")  # fmt: skip
    if "img_size" in asked_by(shape, name):
        size = " × ".join(map(str, shape.image_size))
        said.append(f"{origin.label}: position embeddings are resampled for {size} pixels")
    return said


def build_matched(
    spec: ModelSpec,
    shape: DataShape,
    role: str,
    file: str | None = None,
    note: Callable[[str], None] | None = None,
) -> nn.Module:
    """Return a trained model that answers for the data's classes, whatever its own are.

    They are matched by name (`distill.models.classes`), which is said.

    Args:
        spec: which model; it has weights.
        shape: what the data ask of it.
        role: `teacher`, … for messages.
        file: a table of the data's classes and the model's, in place of their names.
        note: see `build_model`.

    Raises:
        ValueError: as `build_model`, and if a class of the data has none of the model's.
    """
    label_set = read_label_set(spec, shape, role) if shape.classes else None
    if label_set is None:
        if file is not None:
            raise ValueError(f"teacher.classes={file}: nothing says which classes the {role} has")
        return build_model(spec, shape, role, note=note)
    groups = matched(label_set, shape.classes, role, file)
    own = replace(shape, num_classes=label_set.count, classes=())
    model = build_model(spec, own, role, note=note)
    return model if groups is None else MappedClasses(model, groups)


def read_label_set(spec: ModelSpec, shape: DataShape, role: str) -> LabelSet | None:
    """Return the classes that a model's weights tell apart; None where there are no weights.

    Raises:
        ValueError: if there are more or fewer names than classes.
    """
    if not spec.checkpoint:
        return published_label_set(spec, role)
    checkpoint = read_checkpoint(spec.checkpoint)
    origin = f"{role}{'' if role == 'baseline' else '.checkpoint'}={spec.checkpoint}"
    name, args = architecture(spec, checkpoint)
    names = [[name] for name in checkpoint.classes] or None
    count = classes_of(checkpoint.weights, name) if name else None
    count = count or checkpoint.args.get("num_classes") or args.get("num_classes")
    if names and count not in (None, len(names)):
        raise ValueError(
            f"{origin} is damaged: it has {len(names)} class names and {count} classes"
        )
    if not isinstance(count, int) or count < 1:  # nothing but the names, or the data, can say
        count = len(names) if names else shape.num_classes
    if names is None and count != shape.num_classes and (guess := imagenet_names(count)):
        taken = f"{origin} names no classes, and is taken for one of ImageNet's: it"
        return LabelSet(count, guess, taken, of_imagenet=True)
    return LabelSet(count, names, origin)


def published_label_set(spec: ModelSpec, role: str) -> LabelSet | None:
    """Return the classes that timm's published weights tell apart."""
    config = published_config(spec.name or "") if spec.pretrained else {}
    count, labels = config.get("num_classes"), config.get("label_names")
    if not isinstance(count, int) or not count:
        return None
    origin = f"{role} {spec.name} with its published weights"
    if isinstance(labels, list | tuple) and len(labels) == count:
        return LabelSet(count, [[str(label)] for label in labels], origin)
    names = imagenet_names(count)
    return LabelSet(count, names, origin, of_imagenet=names is not None)


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
        The model without its numbers. It is built no further than there are tensors in the file,
        which bounds what building costs for an untrusted checkpoint.
    """
    with at_most_parameters(len(checkpoint.weights)), torch.device("meta"):
        model = call_timm(name, args)
    held = sum(weight.numel() for weight in checkpoint.weights.values())
    if sum(weight.numel() for weight in model.parameters()) > 2 * held + LARGEST_HEAD or (
        sum(buffer.numel() for buffer in model.buffers()) > LARGEST_BUFFERS
    ):
        raise ValueError(f"the architecture {name} with {dict(args)} is out of all proportion")
    return model


@contextmanager
def at_most_parameters(count: int) -> Iterator[None]:
    """Refuse to register more parameters than this, in any module that is made meanwhile."""
    left = count

    def register(*registered: Any) -> None:
        nonlocal left
        left -= registered[-1] is not None
        if left < 0:
            raise ValueError("the architecture has more tensors than the file")

    hook = torch.nn.modules.module.register_module_parameter_registration_hook(register)
    try:
        yield
    finally:
        hook.remove()


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
    preprocessing = {**tested, **checkpoint.preprocessing} if checkpoint.preprocessing else {}
    model.pretrained_cfg = {**settings_of(model), **preprocessing}


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


def normalization(
    model: nn.Module, in_chans: int, image_size: Sequence[int] | None = None
) -> Normalize:
    """Return the input normalisation that the model's `pretrained_cfg` declares.

    A model that declares three channels and sees another number is given the three's mean. Where
    it sees images of another `image_size` (height, width) than the views', they are resized first.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    mean, std = (
        list(config.get(key) or [default]) for key, default in (("mean", 0.5), ("std", 0.5))
    )
    if len(mean) != in_chans:
        mean, std = ([sum(values) / len(values)] * in_chans for values in (mean, std))
    return Normalize(mean, std, image_size)


def published_config(name: str) -> dict[str, Any]:
    """Return timm's configuration of published weights; empty where it knows of none."""
    source, _, place = name.partition(":")
    try:
        if source == "local-dir":
            content = read_json(Path(place) / TIMM_CONFIG)
            keys = [key for key in ("num_classes", "label_names") if key in content]
            return {**as_object(content.get("pretrained_cfg")), **{k: content[k] for k in keys}}
        if place:
            return load_model_config_from_hf(place)[0]
        config = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    except Exception:  # what is not there or cannot be reached, `create_model` refuses in a line
        return {}
    return config.to_dict() if config is not None else {}


def create(
    name: str, args: Mapping[str, Any], shape: DataShape, pretrained: bool, role: str
) -> nn.Module:
    """Call `timm.create_model`, explaining what it refuses."""
    check_name(name, f"{role}.name")
    decided = asked_by(shape, name)
    for key in ("num_classes", "in_chans"):
        if args.get(key, decided[key]) != decided[key]:
            raise ValueError(
                f"{role}.args.{key}={args[key]}: the data decide it, and have {decided[key]}: "
                "leave it out"
            )
    options = {**decided, **args}
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


def asked_by(shape: DataShape, name: str) -> dict[str, Any]:
    """Return the arguments that the data decide; the image size, where a model is made for one."""
    decided: dict[str, Any] = {"num_classes": shape.num_classes, "in_chans": shape.in_chans}
    settings = published_config(name)
    if settings.get("fixed_input_size") and settings["input_size"][1:] != shape.image_size:
        decided["img_size"] = shape.image_size
    return decided


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
