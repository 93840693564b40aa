"""One loss of an objective, with its weight and options."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from distill.losses import LOSSES, Loss, class_balanced_weights
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
    def _options(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.loss.function).parameters)

    def takes(self, option: str) -> bool:
        """Whether the loss has an option of that name."""
        return option in self._options

    def __call__(self, given: Mapping[str, Any]) -> Tensor:
        """Return the loss's values `[N]`; `given` holds tensors and what the objective knows."""
        shared = {key: given[key] for key in SHARED if self.takes(key) and key in given}
        tensors = (given[name] for name in self.loss.inputs)
        values = self.loss.function(*tensors, **{**shared, **self.options})
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
    parameters = inspect.signature(loss.function).parameters
    known = list(parameters)[len(loss.inputs) :]
    for option, value in options.items():
        if option not in known:
            accepted = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ValueError(f"objective.terms.{name} has no option {option!r}; {accepted}")
        if is_number(parameters[option].default) and not is_number(value):
            raise ValueError(f"objective.terms.{name}.{option} must be a number, got {value!r}")
    return Term(loss, weight, options, reweight)


def find_loss(name: str) -> Loss:
    """Return the loss of that name, or the function at that dotted path."""
    if name in LOSSES:
        return LOSSES[name]
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ValueError(f"unknown loss {name!r}; there are {', '.join(sorted(LOSSES))}")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import the loss {name!r}: {error}") from error
    parameters = list(inspect.signature(function).parameters) if callable(function) else []
    inputs = tuple(n for n in ("student", "teacher", "target") if n in parameters)
    if parameters[: len(inputs)] != list(inputs) or "student" not in inputs:
        raise ValueError(
            f"{name} must take student, then teacher or target, as its first arguments"
        )
    return Loss(function, inputs)
