"""Feature maps of timm models, with their logits, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


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


def forward_with_features(
    model: Any, images: Tensor, stages: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """Return logits `[N, K]` and the maps `[N, C, H, W]` of the stages."""
    final, maps = model.forward_intermediates(images, indices=list(stages))
    return model.forward_head(final), maps
