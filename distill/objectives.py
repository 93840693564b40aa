"""What a student is trained on: weighted loss terms under one temperature."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from distill.losses import LOSSES, Loss


@dataclass(frozen=True)
class Term:
    """One loss of an objective, with its weight and the loss's own options."""

    loss: Loss
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def uses_teacher(self) -> bool:
        """Whether the loss compares the student with a teacher."""
        return "teacher" in self.loss.inputs

    def __call__(self, tensors: Mapping[str, Tensor], temperature: float) -> Tensor:
        """Return the loss's batch mean, at the objective's temperature if it takes one."""
        options = dict(self.options)
        if "temperature" in inspect.signature(self.loss.function).parameters:
            options.setdefault("temperature", temperature)
        return self.loss.function(*(tensors[name] for name in self.loss.inputs), **options).mean()


class Objective(nn.Module):
    r"""A weighted sum of loss terms under one temperature.

    `loss = Σ_i a_i·w_i·mean_n ℓ_i(n)`, where `a_i` is `α` for the terms that use the teacher and
    `1 − α` for those that use labels only; without `alpha` every `a_i` is 1. Losses that know a
    temperature are given the objective's, unless the term's options name their own.

    Args:
        terms: name → loss, given as a name in `distill.losses.LOSSES`, the dotted path of a
            function `(student, [teacher], [target], ...) -> [N]`, or a mapping with `loss`,
            `weight` (default 1) and the loss's own options.
        temperature: τ > 0, moved by annealing.
        alpha: the teacher's share in [0, 1], or None.

    Raises:
        ValueError: for an unknown loss, a wrong option or a value out of range.

    Example:
        >>> import torch
        >>> kd = Objective({"ce": "cross_entropy", "kl": "kl_divergence"}, temperature=4, alpha=0.9)
        >>> s, z, y = torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 2])
        >>> {name: round(value.item(), 4) for name, value in kd(s, z, y).items()}
        {'loss': 0.1099, 'ce': 1.0986, 'kl': 0.0}

    Reference:
        Hinton, Vinyals and Dean, 1503.02531.
    """

    def __init__(
        self,
        terms: Mapping[str, str | Mapping[str, Any]],
        temperature: float = 1.0,
        alpha: float | None = None,
    ) -> None:
        super().__init__()
        if not terms:
            raise ValueError("an objective needs at least one term")
        self.terms = {name: build_term(name, spec) for name, spec in terms.items()}
        self.weights = {name: term.weight for name, term in self.terms.items()}
        self.temperature = temperature
        self.alpha = alpha
        if not any(self._factor(name) for name in self.terms):
            raise ValueError(
                "every term of the objective has weight zero: nothing would be learned"
            )

    @property
    def temperature(self) -> float:
        """The temperature τ that the terms share."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"objective.temperature must be positive and finite, got {value}")
        self._temperature = float(value)

    @property
    def alpha(self) -> float | None:
        """The teacher's share of the loss, or None where the weights stand alone."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float | None) -> None:
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"objective.alpha must lie in [0, 1], got {value}")
        self._alpha = None if value is None else float(value)

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares the student with a teacher."""
        return any(term.uses_teacher for term in self.terms.values())

    def get(self, name: str) -> float:
        """Return the value that annealing moves: `temperature`, `alpha` or `terms.NAME.weight`."""
        value = self.weights[term] if (term := self._weight_of(name)) else getattr(self, name)
        if value is None:
            raise ValueError(f"this objective has no {name} to anneal")
        return value

    def set(self, name: str, value: float) -> None:
        """Set the value that annealing moves: `temperature`, `alpha` or `terms.NAME.weight`."""
        if term := self._weight_of(name):
            self.weights[term] = checked_weight(term, value)
        else:
            setattr(self, name, value)

    def state(self) -> dict[str, Any]:
        """Return what annealing has moved, in plain values, for a checkpoint."""
        return {"temperature": self.temperature, "alpha": self.alpha, "weights": dict(self.weights)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned."""
        self.temperature, self.alpha = state["temperature"], state["alpha"]
        self.weights.update(state["weights"])

    def forward(self, student: Tensor, teacher: Tensor | None, target: Tensor) -> dict[str, Tensor]:
        """Return `loss` and each term's unweighted batch mean.

        Args:
            student: logits `[N, K]`.
            teacher: logits `[N, K]`, or None where no term uses a teacher.
            target: labels `[N]`, or class probabilities `[N, K]` for the losses that take them.
        """
        if teacher is None and self.needs_teacher:
            raise ValueError("this objective compares with a teacher, and there is none")
        tensors = {"student": student, "target": target}
        if teacher is not None:
            tensors["teacher"] = teacher
        values = {name: term(tensors, self.temperature) for name, term in self.terms.items()}
        loss = sum(self._factor(name) * value for name, value in values.items())
        return {"loss": loss, **values}  # type: ignore[dict-item]

    def _factor(self, name: str) -> float:
        if self.alpha is None:
            return self.weights[name]
        share = self.alpha if self.terms[name].uses_teacher else 1 - self.alpha
        return share * self.weights[name]

    def _weight_of(self, name: str) -> str | None:
        if name in ("temperature", "alpha"):
            return None
        term = name.removeprefix("terms.").removesuffix(".weight")
        if term not in self.terms or name != f"terms.{term}.weight":
            known = ", ".join(["temperature", "alpha", *(f"terms.{t}.weight" for t in self.terms)])
            raise ValueError(f"cannot anneal {name!r}; this objective has {known}")
        return term


def checked_weight(name: str, value: float) -> float:
    """Return a term's weight, refusing what is negative or not finite."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(
            f"objective.terms.{name}.weight must be at least 0 and finite, got {value}"
        )
    return float(value)


def build_term(name: str, spec: str | Mapping[str, Any]) -> Term:
    """Return the term that a configuration describes."""
    options: dict[str, Any] = {"loss": spec} if isinstance(spec, str) else dict(spec)
    if "loss" not in options:
        raise ValueError(f"objective.terms.{name} does not name its loss")
    loss = find_loss(options.pop("loss"))
    weight = checked_weight(name, options.pop("weight", 1.0))
    known = list(inspect.signature(loss.function).parameters)[len(loss.inputs) :]
    for option in options:
        if option not in known:
            accepted = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ValueError(f"objective.terms.{name} has no option {option!r}; {accepted}")
    return Term(loss, weight, options)


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
    parameters = list(inspect.signature(function).parameters)
    inputs = tuple(n for n in ("student", "teacher", "target") if n in parameters)
    if parameters[: len(inputs)] != list(inputs) or "student" not in inputs:
        raise ValueError(
            f"{name} must take student, then teacher or target, as its first arguments"
        )
    return Loss(function, inputs)
