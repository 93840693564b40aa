"""Feature maps of timm models, with their logits, in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distill.losses import ModelInfo
from distill.utils.errors import first_line


class Features(NamedTuple):
    """What a model made of a batch below its logits.

    Attributes:
        maps: `[N, C, H, W]`, of the stages that were named.
        embedding: what the classifier reads, `[N, D]`.
        token: logits `[N, K]` of a distillation token's own classifier, in training; of a model
            that has none, and in evaluation, the model's logits.
    """

    maps: list[Tensor]
    embedding: Tensor
    token: Tensor


def model_info(model: Any, stages: Sequence[int], role: str, maps: bool) -> ModelInfo:
    """Return what helpers are told of a model.

    Args:
        model: the model.
        stages: whose channels are told.
        role: `teacher` or `student`, for messages.
        maps: whether features of it are read; the channels of one that need give none are not told.

    Raises:
        ValueError: if the model gives no feature maps, or has no such stage, and should.
    """
    channels = feature_channels(model, stages, role) if maps else []
    width = getattr(model, "head_hidden_size", None) or getattr(model, "num_features", None)
    classes = getattr(model, "num_classes", None)
    return ModelInfo(tuple(channels), int(width or 0), int(classes or 0), classifier_of(model))


def classifier_of(model: Any) -> nn.Linear | None:
    """Return the layer that makes a model's logits, where it is one linear layer."""
    layer = model.get_classifier() if hasattr(model, "get_classifier") else None
    return layer if isinstance(layer, nn.Linear) else None


def train_token(student: Any) -> None:
    """Let a student's distillation token answer by itself in training.

    Raises:
        ValueError: if it has none.
    """
    if not hasattr(student, "set_distilled_training"):
        raise ValueError(
            f"the student {type(student).__name__} has no distillation token: take one of timm's "
            "*_distilled_*, such as student.name=deit_tiny_distilled_patch16_224, or the loss "
            "hard_cross_entropy"
        )
    student.set_distilled_training(True)


def feature_channels(model: nn.Module, stages: Sequence[int], role: str) -> list[int]:
    """Return the channels of a model's stages; see `model_info` for errors."""
    info = getattr(model, "feature_info", None)
    if not info or not hasattr(model, "forward_intermediates"):
        name = type(model).__name__
        raise ValueError(
            f"the {role} {name} gives no feature maps: leave out the terms that read features"
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
    declared, training = model_info(model, stages, role, maps=True), model.training
    channels = list(declared.channels)
    try:
        with torch.inference_mode():
            _, given = forward_with_features(model.eval(), torch.zeros(1, *shape), stages)
        actual = [m.shape[1] if m.ndim == 4 else 0 for m in given.maps]
        why = "" if actual == channels else f"maps of {actual} channels, and it declares {channels}"
        if not why and given.embedding.shape != (1, declared.embedding):
            why = f"embeddings {list(given.embedding.shape)}, and it declares {declared.embedding}"
    except Exception as error:  # a model fails in its own way
        why = first_line(error)
    finally:
        model.train(training)
    if why:
        name = type(model).__name__
        raise ValueError(
            f"the {role} {name} gives no features that could be compared ({why}): leave out the "
            "terms that read them, or change objective.stages"
        )


def forward_with_features(
    model: Any, images: Tensor, stages: Sequence[int]
) -> tuple[Tensor, Features]:
    """Return logits `[N, K]` and the features, with the maps of the stages in their order."""
    final, maps = model.forward_intermediates(images, indices=list(stages))
    layer = classifier_of(model)
    if layer is None:
        embedding, answer = model.forward_head(final, pre_logits=True), model.forward_head(final)
    else:
        with inputs_of(layer) as seen:  # in the one pass: another would draw another dropout
            answer = model.forward_head(final)
        (embedding,) = seen
    logits, token = answer if isinstance(answer, tuple) else (answer, answer)
    return logits, Features(maps, embedding, token)


@contextmanager
def inputs_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Note what a layer is given."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        yield seen
    finally:
        hook.remove()
