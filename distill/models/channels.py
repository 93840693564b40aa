"""Which tensors write a channel, which channels are dead, and the smaller model without them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from distill.models.build import ModelSpec

STAGES = ("layer1", "layer2", "layer3", "layer4")
STEM = "stem"
DENSE = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    nn.Linear,
)


@dataclass(frozen=True)
class ChannelGroup:
    """Tensors whose slices along axis 0 together write the channels of one feature map.

    Where all slices of a channel are zero, so is the channel, for every image.
    """

    name: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """A convolution and the norm that follows: which channels it reads and which it writes."""

    conv: str
    norm: str
    reads: str | None  # None: the image
    writes: str


@dataclass(frozen=True)
class Stage:
    """A stage of a ResNet: its width, the least that holds what is alive, and how it begins."""

    planes: int
    least: int
    expansion: int
    strided: bool
    projected: bool

    def begins_alike(self, planes: int, incoming: int) -> bool:
        """Whether timm begins this stage with a projection exactly where it does now."""
        return (self.strided or incoming != planes * self.expansion) == self.projected


def dense_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of convolutions and linear layers by name."""
    return {
        f"{name}.weight" if name else "weight": layer.weight
        for name, layer in model.named_modules()
        if isinstance(layer, DENSE)
    }


def channel_groups(model: nn.Module) -> list[ChannelGroup]:
    """Return the groups of a model's channels.

    For timm's ResNets a group holds scale and shift of every batch norm that writes to a channel:
    along a residual connection these are the last ones of all blocks. The filters before them are
    not in it: a batch norm undoes their size, so that it says nothing. Of another model it is each
    convolution's filters; the layer that gives the logits has none.
    """
    if unknown_structure(model) is not None:
        return filters(model)
    writers: dict[str, list[str]] = {}
    for layer in layers_of(model):
        written = writers.setdefault(layer.writes, [])
        written += [f"{layer.norm}.weight", f"{layer.norm}.bias"]
    return [ChannelGroup(name, tuple(tensors)) for name, tensors in writers.items()]


def filters(model: nn.Module) -> list[ChannelGroup]:
    """Return each convolution's filters as a group."""
    classifier = getattr(model, "get_classifier", lambda: None)()
    return [
        ChannelGroup(name, (f"{name}.weight",))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d) and layer is not classifier
    ]


def unknown_structure(model: nn.Module) -> str | None:
    """Return why a channel's death cannot be followed through a model, or None if it can."""
    if type(model) is not ResNet:
        kind = type(model).__name__
        return f"widths are known to be arguments of timm's ResNet, and this is a {kind}"
    blocks = [block for name in STAGES for block in getattr(model, name)]
    if any(type(block) not in (BasicBlock, Bottleneck) for block in blocks):
        return "its blocks are not ResNet's own"
    if any(block.se is not None for block in blocks):
        return "the widths of its attention layers follow from its channels"
    if any(has_other_widths(block) for block in blocks):
        return "its convolutions are grouped, or wider than its stages say"
    if next(model.maxpool.parameters(), None) is not None:
        return "the pooling of its stem has weights"
    if model.global_pool.feat_mult() != 1:
        return "its classifier reads each channel twice"
    return unknown_layers(model)


def has_other_widths(block: Any) -> bool:
    """Whether a residual block's convolutions are not as wide as timm's `channels` says."""
    planes = block.conv1.out_channels
    last = block.conv3 if isinstance(block, Bottleneck) else block.conv2
    wide = last.out_channels != planes * block.expansion
    return wide or block.conv2.weight.shape[1] != planes


def unknown_layers(model: nn.Module) -> str | None:
    """Return a layer after which a channel whose scale is zero would not be zero, or None."""
    norms = [model.get_submodule(layer.norm) for layer in layers_of(model)]
    if any(type(norm) is not nn.BatchNorm2d or not norm.affine for norm in norms):
        return "its norms are not batch norms: they mix channels, or have no scale to be zero"
    for layer in activations(model):
        zero = torch.zeros(1, device=next(model.parameters()).device)
        if layer(zero).item() != 0:
            return f"its activation {type(layer).__name__} does not keep zero"
    return None


def activations(model: Any) -> Iterator[nn.Module]:
    """Yield a ResNet's activations."""
    yield model.act1
    if is_deep(model):
        yield from (model.conv1[2], model.conv1[5])
    for stage in STAGES:
        for block in getattr(model, stage):
            yield from (layer for name, layer in block.named_children() if name[:3] == "act")


def layers_of(model: nn.Module) -> Iterator[Layer]:
    """Yield a ResNet's convolutions in order, with the channels that each reads and writes."""
    stem = [("conv1", "bn1", STEM)]
    if is_deep(model):
        stem = [("conv1.0", "conv1.1", "stem.0"), ("conv1.3", "conv1.4", "stem.1"),
                ("conv1.6", "bn1", STEM)]  # fmt: skip
    reads: str | None = None
    for conv, norm, writes in stem:
        yield Layer(conv, norm, reads, writes)
        reads = writes
    stream = STEM
    for stage in STAGES:
        for number, block in enumerate(getattr(model, stage)):
            after = stage if block.downsample is not None else stream
            yield from block_layers(f"{stage}.{number}", block, stream, after)
            stream = after


def block_layers(name: str, block: Any, stream: str, after: str) -> Iterator[Layer]:
    """Yield the convolutions of a residual block, which reads one stream and adds to another."""
    depth = 3 if isinstance(block, Bottleneck) else 2
    reads = stream
    for number in range(1, depth + 1):
        conv, norm = f"{name}.conv{number}", f"{name}.bn{number}"
        writes = after if number == depth else norm
        yield Layer(conv, norm, reads, writes)
        reads = writes
    if block.downsample is not None:
        last = len(block.downsample) - 1  # the first may be a pooling
        names = f"{name}.downsample.{last - 1}", f"{name}.downsample.{last}"
        yield Layer(*names, stream, after)


def alive_channels(model: nn.Module) -> dict[str, Tensor]:
    """Return for each feature map of a ResNet which channels some writer gives a value `[C]`."""
    alive: dict[str, Tensor] = {}
    for layer in layers_of(model):
        norm: Any = model.get_submodule(layer.norm)
        speaks = (norm.weight != 0) | (norm.bias != 0)
        alive[layer.writes] = alive.get(layer.writes, torch.zeros_like(speaks)) | speaks
    return alive


def without_dead_channels(
    model: nn.Module, spec: ModelSpec
) -> tuple[nn.Module, dict[str, list[int]]]:
    """Return a smaller model that gives the same logits, built by timm from its arguments.

    A channel is dead where the batch norms that write it have scale and shift zero. Widths that
    timm ties to each other are as small as the largest of them allows; dead channels fill up the
    others, and all weights that write or read one are zero.

    Args:
        model: a timm model.
        spec: the name and arguments that it was built with.

    Returns:
        The smaller model, and the widths before and after by stage; if no channel is dead, the
        model itself and nothing.

    Raises:
        ValueError: if timm cannot build a narrower one from arguments, with the reason.
    """
    name = str(spec.name)
    why = "its arguments are on a hub" if ":" in name else unknown_structure(model)
    if why is not None:
        raise ValueError(f"no channel of {name} is removed: {why}")
    alive = alive_channels(model)
    if all(mask.all() for mask in alive.values()):
        return model, {}
    stem_width, planes = narrowest(model, {key: int(mask.sum()) for key, mask in alive.items()})
    before = [stem_of(model), *(stage_planes(model, stage) for stage in STAGES)]
    args = {**spec.args, "channels": planes}
    if is_deep(model):
        args["stem_width"] = stem_width
    args |= {"num_classes": model.num_classes, "in_chans": model.in_chans}
    weight = next(model.parameters())
    small = timm.create_model(name, **args).to(weight.device, weight.dtype)
    small.load_state_dict(kept_weights(model, small, alive))
    small.pretrained_cfg = model.pretrained_cfg
    widths = zip((STEM, *STAGES), before, [stem_width, *planes], strict=True)
    return small.train(model.training), {key: [old, new] for key, old, new in widths}


def is_deep(model: Any) -> bool:
    """Whether a ResNet's stem has three convolutions, whose width is an argument."""
    return isinstance(model.conv1, nn.Sequential)


def stem_of(model: Any) -> int:
    """Return the width of a ResNet's stem, as timm's `stem_width` counts it."""
    return model.bn1.num_features // 2 if is_deep(model) else model.bn1.num_features


def stage_planes(model: nn.Module, stage: str) -> int:
    """Return the width of a ResNet's stage, as timm's `channels` counts it."""
    return getattr(model, stage)[0].bn1.num_features


def narrowest(model: nn.Module, alive: Mapping[str, int]) -> tuple[int, list[int]]:
    """Return the smallest `stem_width` and `channels` that hold what is alive."""
    stages, stream = [], STEM
    for name in STAGES:
        blocks = getattr(model, name)
        first = blocks[0]
        projected = first.downsample is not None
        stream = name if projected else stream
        inner = [count for key, count in alive.items() if key.startswith(f"{name}.")]
        least = max(1, *inner, -(-alive[stream] // first.expansion))
        stages.append(
            Stage(stage_planes(model, name), least, first.expansion, first.stride != 1, projected)
        )
    for width, out in stem_widths(model, alive):
        planes = stage_widths(stages, out)
        if planes is not None:
            return width, planes
    raise AssertionError("the widths that a model has are among those tried")


def stem_widths(model: Any, alive: Mapping[str, int]) -> Iterator[tuple[int, int]]:
    """Yield the widths that a stem can have, and its number of output channels, smallest first."""
    if not is_deep(model):  # timm's plain stem has 64 channels, whatever its arguments
        yield stem_of(model), stem_of(model)
        return
    tiered = model.conv1[1].num_features != model.conv1[4].num_features
    for width in range(1, stem_of(model) + 1):
        first = 3 * (width // 4) if tiered else width
        sizes = {"stem.0": first, "stem.1": width, STEM: 2 * width}
        if first and all(alive[key] <= size for key, size in sizes.items()):
            yield width, 2 * width


def stage_widths(stages: Sequence[Stage], incoming: int) -> list[int] | None:
    """Return the smallest widths of stages behind so many channels; None if there are none."""
    if not stages:
        return []
    stage, rest = stages[0], stages[1:]
    for planes in range(stage.least, stage.planes + 1):
        if stage.begins_alike(planes, incoming):
            behind = stage_widths(rest, planes * stage.expansion)
            if behind is not None:
                return [planes, *behind]
    return None


def kept_weights(
    model: nn.Module, small: nn.Module, alive: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return a model's weights without the channels that a smaller one has no room for."""
    kept = kept_channels(small, alive)
    weights = dict(model.state_dict())
    for layer in layers_of(model):
        filters, rows = weights[f"{layer.conv}.weight"], kept[layer.writes]
        if layer.reads is not None:
            filters = columns(filters, alive[layer.reads], kept[layer.reads])
        filters = columns(filters.transpose(0, 1), alive[layer.writes], rows).transpose(0, 1)
        weights[f"{layer.conv}.weight"] = filters
        for key in ("weight", "bias", "running_mean", "running_var"):
            weights[f"{layer.norm}.{key}"] = weights[f"{layer.norm}.{key}"][rows]
    last = layer.writes
    weights["fc.weight"] = columns(weights["fc.weight"], alive[last], kept[last])
    return weights


def kept_channels(small: nn.Module, alive: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return which channels of each stream a smaller model keeps: the dead ones go first."""
    kept = {}
    for layer in layers_of(small):
        width = small.get_submodule(layer.norm).num_features
        dead_last = torch.argsort(alive[layer.writes].logical_not().int(), stable=True)
        kept[layer.writes] = dead_last[:width].sort().values
    return kept


def columns(weight: Tensor, alive: Tensor, kept: Tensor) -> Tensor:
    """Return the kept columns of a weight `[K, C, …]`, those of dead channels zero."""
    dead = ~alive.view(-1, *[1] * (weight.ndim - 2))
    return weight.masked_fill(dead, 0.0)[:, kept]
