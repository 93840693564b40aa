"""Whether weights fit a model, and what to say where they do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
from torch import Tensor, nn

from distill.models.checkpoint import Checkpoint
from distill.models.classes import shared_rows

SHOWN = 200  # tensors that a message lists


@dataclass(frozen=True)
class DataShape:
    """What a data set asks of a model: K, channels, height and width in pixels; its class names."""

    num_classes: int
    in_chans: int
    image_size: tuple[int, int]
    classes: tuple[str, ...] = ()


def load_weights(
    model: Any, checkpoint: Checkpoint, shape: DataShape, origin: str, any_classes: bool = False
) -> None:
    """Load weights that must fit tensor by tensor, naming both sides where they do not.

    Args:
        model: the model.
        checkpoint: the weights.
        shape: what the data ask of the model.
        origin: where the weights come from, for messages.
        any_classes: whether weights for other classes will do: of their last layer, the rows of
            classes that the data have are taken by name, and the others stay as the model has them.
    """
    config, weights = model.pretrained_cfg, dict(checkpoint.weights)
    for key, axis, wanted, noun in (
        (config.get("classifier"), 0, shape.num_classes, "classes"),
        (config.get("first_conv"), 1, shape.in_chans, "input channels"),
    ):
        found = size_along(weights, key, axis)
        renamed = noun == "classes" and any_classes and other_order(checkpoint, shape)
        if found is None or (found == wanted and not renamed):
            continue
        if not any_classes or noun != "classes":
            raise ValueError(f"{origin} has {found} {noun} and the data have {wanted}")
        weights |= last_layer(model, checkpoint, shape, key)
    check_tensors_fit(model, weights, origin)
    model.load_state_dict(weights)


def other_order(checkpoint: Checkpoint, shape: DataShape) -> bool:
    """Whether both sides name their classes, and not alike."""
    return bool(checkpoint.classes and shape.classes) and (
        tuple(checkpoint.classes) != shape.classes
    )


def last_layer(
    model: nn.Module, checkpoint: Checkpoint, shape: DataShape, key: Any
) -> dict[str, Tensor]:
    """Return a model's own last layer, in which classes that a checkpoint knows have its rows."""
    rows = shared_rows(checkpoint.classes, shape.classes)
    return {
        name: with_rows(own, checkpoint.weights.get(name), rows, len(checkpoint.classes))
        for name, own in model.state_dict().items()
        if name.startswith(prefixes(key))
    }


def with_rows(own: Tensor, theirs: Tensor | None, rows: Mapping[int, int], known: int) -> Tensor:
    """Return a tensor whose rows are taken from another, own row → the other's."""
    if theirs is None or not rows or theirs.shape != (known, *own.shape[1:]):
        return own
    mixed = own.clone()
    mixed[list(rows)] = theirs[list(rows.values())].to(own.dtype)
    return mixed


def size_along(weights: Mapping[str, Tensor], key: Any, axis: int) -> int | None:
    """Return how many classes or input channels weights have; None where they do not say."""
    # timm's deep stems are sequences, and a distilled transformer has two classifiers
    stems = [f"{stem}{end}" for stem in prefixes(key) for end in ("weight", "0.weight")]
    weight = next((weights[stem] for stem in stems if stem in weights), None)
    return weight.shape[axis] if weight is not None and weight.ndim > axis else None


def prefixes(key: Any) -> tuple[str, ...]:
    """Return what the tensors of one or several layers begin with."""
    keys = [key] if isinstance(key, str) else key or []
    return tuple(f"{name}." for name in keys)


def classes_of(checkpoint: Checkpoint, name: str) -> int | None:
    """Return how many classes the weights of an architecture tell apart, where they say so."""
    settings = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    return size_along(checkpoint.weights, settings.classifier if settings else None, 0)


def check_tensors_fit(model: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Refuse weights unless each of the model's tensors is there in its shape, and no other."""
    own = model.state_dict()
    differing = [
        f"{key} ({shape_in(weights, key)} for {shape_in(own, key)})"
        for key in sorted(own.keys() | weights.keys())
        if shape_in(weights, key) != shape_in(own, key)
    ]
    if differing:
        raise ValueError(
            f"{origin} does not fit the architecture: {len(differing)} of {len(own)} tensors "
            f"differ: {', '.join(differing[:SHOWN])}"
            f"{f' and {len(differing) - SHOWN} more' if len(differing) > SHOWN else ''}"
        )


def shape_in(tensors: Mapping[str, Tensor], key: str) -> str:
    """Return a tensor's shape in words."""
    if key not in tensors:
        return "none"
    return "×".join(map(str, tensors[key].shape)) or "scalar"
