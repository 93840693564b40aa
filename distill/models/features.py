"""Feature maps of timm models, with their logits, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.utils.errors import first_line


def feature_channels(model: nn.Module, stages: Sequence[int], role: str) -> list[int]:
    """Return the channels of a model's stages.

    Raises:
        ValueError: if the model gives no feature maps, or has no such stage.
    """
    info = getattr(model, "feature_info", None)
    if not info or not hasattr(model, "forward_intermediates"):
        name = type(model).__name__
        raise ValueError(
            f"the {role} {name} gives no feature maps: leave out hint and attention terms"
        )
    channels = [stage["num_chs"] for stage in info]
    try:
        return [channels[stage] for stage in stages]
    except IndexError:
        raise ValueError(
            f"objective.stages={list(stages)}: the {role} has {len(channels)} stages"
        ) from None


def check_features(
    model: nn.Module, shape: Sequence[int], stages: Sequence[int], role: str
) -> None:
    """Show a model a blank image, so that one whose maps cannot be had is refused ahead.

    Args:
        model: any model of timm's.
        shape: `(C, H, W)` of an image.
        stages: whose maps are requested.
        role: `teacher` or `student`, for messages.

    Raises:
        ValueError: if it fails at them, or gives others than it says.
    """
    channels, training = feature_channels(model, stages, role), model.training
    try:
        with torch.inference_mode():
            _, maps = forward_with_features(model.eval(), torch.zeros(1, *shape), stages)
        actual = [m.shape[1] if m.ndim == 4 else 0 for m in maps]
        why = "" if actual == channels else f"maps of {actual} channels, and it declares {channels}"
    except Exception as error:  # a model fails in its own way
        why = first_line(error)
    finally:
        model.train(training)
    if why:
        name = type(model).__name__
        raise ValueError(
            f"the {role} {name} gives no feature maps that could be compared ({why}): leave out "
            "hint and attention terms, or change objective.stages"
        )


def forward_with_features(
    model: Any, images: Tensor, stages: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """Return logits `[N, K]` and the maps `[N, C, H, W]` of the stages."""
    final, maps = model.forward_intermediates(images, indices=list(stages))
    return model.forward_head(final), maps
