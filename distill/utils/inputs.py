"""What code of one's own hands over, images, targets and answers, taken or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

ROUNDING = 1e-2  # by which the sum of probabilities may differ from 1, as half precision does


def as_float(view: Tensor) -> Tensor:
    """Return images as floating-point numbers; bytes, 0 to 255, become 0 to 1.

    Raises:
        ValueError: for other whole numbers, whose range nobody knows.
    """
    if not isinstance(view, Tensor):
        raise ValueError(f"images are a tensor [N, C, H, W], and not a {type(view).__name__}")
    if view.is_floating_point():
        return view
    if view.dtype is not torch.uint8:
        raise ValueError(
            f"images are {kind(view)}: give floating-point numbers in [0, 1], or uint8, 0 to 255"
        )
    return view.float().div_(255)


def as_labels(target: Any) -> Tensor:
    """Return targets as class indices `[N]`, int64, or class probabilities `[N, K]`.

    Raises:
        ValueError: for what is neither by its type and shape.
    """
    if not isinstance(target, Tensor):
        raise ValueError(f"targets are a tensor, and not a {type(target).__name__}")
    whole = not target.is_floating_point() and target.dtype is not torch.bool
    if target.ndim == 1 and whole:
        return target.long()
    if target.ndim == 2 and target.is_floating_point():
        return target
    raise ValueError(
        f"targets are {kind(target)}: give class indices [N] as whole numbers, or class "
        "probabilities [N, K] as floating-point numbers"
    )


def check_targets(target: Tensor, classes: int) -> None:
    """Refuse labels out of range, and rows that are no distribution; waits for the device.

    Args:
        target: class indices `[N]`, or class probabilities `[N, K]`.
        classes: K.

    Raises:
        ValueError: saying which value is wrong.
    """
    if not target.numel():
        return
    if not target.is_floating_point():
        for value in (int(target.min()), int(target.max())):
            if not 0 <= value < classes:
                raise ValueError(
                    f"a target is {value}, but labels of {classes} classes go from 0 to "
                    f"{classes - 1}"
                )
        return
    if target.shape[-1] != classes:
        raise ValueError(f"targets are {kind(target)}, and there are {classes} classes")
    low, sums = float(target.min()), target.float().sum(1)
    worst = float(sums[(sums - 1).abs().nan_to_num(torch.inf).argmax()])
    if not (low >= 0 and abs(worst - 1) <= ROUNDING):
        wrong = f"one is {low:.4g}" if not low >= 0 else f"one row sums to {worst:.4g}"
        raise ValueError(
            f"targets [N, K] are class probabilities, at least 0 with rows that sum to 1, and "
            f"{wrong}: several labels for an image, or other numbers, are not distilled here"
        )


def logits_of(answer: Any, who: str) -> Tensor:
    """Return a model's logits: its answer, or what that holds under the name `logits`.

    Raises:
        ValueError: if it answers with several things of which none is called so.
    """
    if isinstance(answer, Tensor):
        return answer
    logits = (
        answer.get("logits") if isinstance(answer, Mapping) else getattr(answer, "logits", None)
    )
    if isinstance(logits, Tensor):
        return logits
    what = type(answer).__name__
    if isinstance(answer, Mapping):
        what += f" of {', '.join(map(str, answer))}"
    elif isinstance(answer, list | tuple):
        what += f" of {len(answer)}"
    raise ValueError(
        f"the {who} answers with a {what}, not with logits [N, K]: wrap it in a module that "
        "returns these alone"
    )


def check_logits(logits: Tensor, count: int, classes: int) -> Tensor:
    """Return a student's logits, refusing a shape that is not `[N, K]`."""
    if logits.shape != (count, classes):
        raise ValueError(
            f"the student answers {count} images with {list(logits.shape)}, and not with "
            f"[{count}, {classes}]: num_classes is another, or it does not return logits"
        )
    return logits


def number_of_classes(student: Any) -> int:
    """Return how many classes a model says it has, 0 where it does not."""
    said = getattr(student, "num_classes", None)
    said = said or getattr(getattr(student, "config", None), "num_labels", None)
    return said if isinstance(said, int) else 0


def kind(tensor: Tensor) -> str:
    """Return a tensor's type and shape, for people."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
