"""One loss of an objective, with its weight and options."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import Any

from torch import Tensor, nn

from distill.losses import INPUTS, LOSSES, Loss, ModelInfo, class_balanced_weights
from distill.utils.numbers import is_number

SHARED = ("temperature", "class_counts")  # which the objective gives to losses that take them


@dataclass(frozen=True)
class Term:
    """One loss of an objective, with its weight and the loss's own options.

    Args:
        loss: the function and the tensors it is called with.
        weight: its weight before annealing.
        options: the loss's own options; what it takes and these leave out, the objective gives.
        reweight: β in [0, 1) of class-balanced weights that multiply the values, or None.
    """

    loss: Loss
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    reweight: float | None = None

    @property
    def uses_teacher(self) -> bool:
        """Whether the loss compares the student with a teacher."""
        return any(name.startswith("teacher") for name in self.loss.inputs)

    @property
    def uses_labels(self) -> bool:
        """Whether the loss reads labels."""
        return "target" in self.loss.inputs

    @property
    def teaches_unlabeled(self) -> bool:
        """Whether it uses the teacher alone: neither the loss nor its weights read labels."""
        return self.uses_teacher and not self.uses_labels and self.reweight is None

    @property
    def needs_class_counts(self) -> bool:
        """Whether the term corrects an imbalance that nobody has told it of."""
        asks = self.takes("class_counts") and "class_counts" not in self.options
        return asks or self.reweight is not None

    @cached_property
    def _shared(self) -> frozenset[str]:
        """What the objective gives: a loss that learns has its options from the start."""
        return frozenset() if self.loss.learns else frozenset(self.loss.options) & {*SHARED}

    def takes(self, option: str) -> bool:
        """Whether the loss takes a number that terms share."""
        return option in self._shared

    def module(self, student: ModelInfo, teacher: ModelInfo) -> nn.Module:
        """Return what learns with the student, for a loss that does.

        Raises:
            ValueError: if the loss cannot compare these two, or for an option out of range.
        """
        module: nn.Module = self.loss.function(student, teacher, **self.options)
        return module

    def __call__(self, given: Mapping[str, Any], module: nn.Module | None = None) -> Tensor:
        """Return the loss's values `[N]`.

        Args:
            given: the tensors by the names of `Loss.inputs`, and what the terms share.
            module: what `module` returned, for a loss that learns.
        """
        tensors = (given[name] for name in self.loss.inputs)
        if module is None:
            shared = {key: given[key] for key in self._shared if key in given}
            values: Tensor = self.loss.function(*tensors, **{**shared, **self.options})
        else:
            values = module(*tensors)
        if self.reweight is not None:
            weights = class_balanced_weights(given["class_counts"], self.reweight).to(values)
            target = given["target"]  # labels, or the shares of several
            soft = target.is_floating_point()
            values = values * (target.to(values) @ weights if soft else weights[target])
        return values


def checked_weight(name: str, value: float) -> float:
    """Return a term's weight, refusing what is negative or not finite."""
    if not (is_number(value) and math.isfinite(value) and value >= 0):
        raise ValueError(
            f"objective.terms.{name}.weight must be at least 0 and finite, got {value}"
        )
    return float(value)


def build_term(name: str, spec: str | Mapping[str, Any]) -> Term:
    """Return the term that a configuration describes."""
    if not isinstance(spec, str | Mapping):
        raise ValueError(f"objective.terms.{name} must be a loss or a mapping, got {spec!r}")
    options: dict[str, Any] = {"loss": spec} if isinstance(spec, str) else dict(spec)
    if not isinstance(options.get("loss"), str):
        raise ValueError(f"objective.terms.{name} does not name its loss")
    loss = find_loss(options.pop("loss"))
    weight = checked_weight(name, options.pop("weight", 1.0))
    reweight = options.pop("reweight", None)
    if reweight is not None and not (is_number(reweight) and 0 <= reweight < 1):
        raise ValueError(f"objective.terms.{name}.reweight must lie in [0, 1), got {reweight}")
    accepted = loss.options
    for option, value in options.items():
        if option not in accepted:
            takes = f"it takes {', '.join(accepted)}" if accepted else "it takes none"
            raise ValueError(f"objective.terms.{name} has no option {option!r}; {takes}")
        if is_number(accepted[option].default) and not is_number(value):
            raise ValueError(f"objective.terms.{name}.{option} must be a number, got {value!r}")
    return Term(loss, weight, options, reweight)


def find_loss(name: str) -> Loss:
    """Return the loss of that name, or the function or class of modules at that dotted path."""
    if name in LOSSES:
        return LOSSES[name]
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ValueError(f"unknown loss {name!r}; there are {', '.join(sorted(LOSSES))}")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import the loss {name!r}: {error}") from error
    inputs = tuple(takewhile(INPUTS.__contains__, call_parameters(function)))
    if not any(one.startswith("student") for one in inputs):
        raise ValueError(
            f"{name} must take student (or student_maps, student_embedding), then what else it "
            f"reads of {', '.join(INPUTS)}, as its first arguments"
        )
    return Loss(function, inputs)


def call_parameters(function: Any) -> list[str]:
    """Return the names of what a function, or a module of a class, is called with."""
    if isinstance(function, type):
        forward = getattr(function, "forward", None)
        return list(inspect.signature(forward).parameters)[1:] if callable(forward) else []
    return list(inspect.signature(function).parameters) if callable(function) else []
