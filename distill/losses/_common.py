"""What every loss does first: checks for people, wide arithmetic, a teacher without gradient.

No check reads a value of a tensor, so none makes an accelerator wait for the CPU.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

Temperature: TypeAlias = float | Tensor


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def upcast(tensor: Tensor) -> Tensor:
    """Return a tensor as float32 or wider, which autograd can save."""
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.float()
    # Autograd refuses to save a tensor made in inference mode; its copy made outside is accepted.
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        tensor = tensor.clone()
    return tensor


def student_logits(student: Tensor, classes: int = 1) -> Tensor:
    require(
        student.dim() == 2 and student.is_floating_point(),
        "student logits must be a floating-point tensor of shape [N, K], "
        f"got {student.dtype} of shape {list(student.shape)}",
    )
    require(
        student.shape[1] >= classes,
        f"this loss needs at least {classes} classes, the logits have {student.shape[1]}",
    )
    return upcast(student)


def logit_pair(student: Tensor, teacher: Tensor, classes: int = 1) -> tuple[Tensor, Tensor]:
    require(
        student.shape == teacher.shape and teacher.is_floating_point(),
        "teacher logits must be floating point and of the student's shape: student "
        f"{list(student.shape)}, teacher {list(teacher.shape)} ({teacher.dtype})",
    )
    return student_logits(student, classes), upcast(teacher.detach())


def labels(student: Tensor, target: Tensor) -> Tensor:
    require(
        not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool),
        f"this loss needs class indices, got a target of type {target.dtype}; "
        "targets mixed from several classes have no single label",
    )
    require(
        target.shape == student.shape[:1],
        f"target must hold one label per example, shape [{student.shape[0]}], "
        f"got shape {list(target.shape)}",
    )
    index = target.long()
    return index.clone() if index.is_inference() else index


def other_classes(name: str, logits: Tensor) -> None:
    require(
        logits.shape[1] >= 3,
        f"{name} distillation compares how the classes beside the label share what is left; "
        "with two classes there is only one, use kl_divergence",
    )


def labels_or_probabilities(student: Tensor, target: Tensor) -> Tensor:
    if not target.is_floating_point():
        return labels(student, target)
    require(
        target.shape == student.shape,
        f"target probabilities must have the logits' shape {list(student.shape)}, "
        f"got {list(target.shape)}",
    )
    return upcast(target).to(student.dtype)


def checked_temperature(temperature: Temperature, logits: Tensor) -> Temperature:
    if not isinstance(temperature, Tensor):
        return positive("temperature", temperature)
    require(
        temperature.is_floating_point() and temperature.shape in ((), (logits.shape[0], 1)),
        f"a temperature tensor must be floating point of shape [] or [{logits.shape[0]}, 1], "
        f"got {temperature.dtype} of shape {list(temperature.shape)}",
    )
    return upcast(temperature)


def per_example(temperature: Temperature) -> Temperature:
    """The temperature as a factor of `[N]` values."""
    if isinstance(temperature, Tensor) and temperature.dim() == 2:
        return temperature.squeeze(1)
    return temperature


def finite(name: str, value: float) -> float:
    require(math.isfinite(value), f"{name} must be a finite number, got {value}")
    return float(value)


def positive(name: str, value: float) -> float:
    require(math.isfinite(value) and value > 0, f"{name} must be positive and finite, got {value}")
    return float(value)


def non_negative(name: str, value: float) -> float:
    require(math.isfinite(value) and value >= 0, f"{name} must be finite and ≥ 0, got {value}")
    return float(value)


def largest_other(student: Tensor, label: Tensor) -> Tensor:
    """The largest logit of each row beside the label's, `[N]`."""
    return without_label(student, label).max(dim=1).values


def without_label(student: Tensor, label: Tensor, fill: float = -math.inf) -> Tensor:
    return student.scatter(1, label.unsqueeze(1), fill)


def at_least_one(name: str, value: int) -> int:
    require(
        type(value) is int and value >= 1,
        f"{name} must be a whole number of at least 1, got {value}",
    )
    return value


def at_label(values: Tensor, label: Tensor) -> Tensor:
    return values.gather(1, label.unsqueeze(1)).squeeze(1)


def confident_cross_entropy(student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy with the label, weighted by the teacher's probability of it."""
    confidence = at_label(torch.softmax(teacher, dim=1), label)
    return confidence * F.cross_entropy(student, label, reduction="none")


def unit(x: Tensor) -> Tensor:
    """Vectors along the last dimension at length 1; zeros stay zeros, with a finite slope."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length > 0, length, 1.0)


def matrix_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in the precision of a and b, also under autocast."""
    if not torch.amp.is_autocast_available(a.device.type):  # the meta device
        return a @ b
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def world_size() -> int:
    # Only training steps are taken by all ranks together; in validation one may have a batch more.
    if not torch.is_grad_enabled():
        return 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1
