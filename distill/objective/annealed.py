"""The numbers of an objective that annealing can move, by name."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING

from distill.objective.term import checked_weight

if TYPE_CHECKING:
    from distill.objective.objective import Objective


class AnnealedValues(MutableMapping[str, float]):
    """Read and set the values of an objective that annealing can move.

    They are `terms.NAME.weight` of each term, `alpha` where there is one, `temperature` where a
    term takes it and it is not learned, `curriculum.strength` where it is, and
    `sample_selection.small_loss` where samples are selected by it.

    Args:
        objective: whose values they are. Nothing is copied: what is set here, it computes with.

    Raises:
        ValueError: for another name, or a value out of range.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def __iter__(self) -> Iterator[str]:
        objective = self._objective
        yield from (f"terms.{name}.weight" for name in objective.terms)
        if objective.alpha is not None:
            yield "alpha"
        if objective.sample_selection.small_loss is not None:
            yield "sample_selection.small_loss"
        if objective.curriculum is not None:
            yield "curriculum.strength"
        elif objective.uses_temperature:
            yield "temperature"

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return any(name == own for own in self)

    def __getitem__(self, name: str) -> float:
        owner, attribute = self._owner(name)
        value: float = owner[attribute] if isinstance(owner, dict) else getattr(owner, attribute)
        return value

    def __setitem__(self, name: str, value: float) -> None:
        owner, attribute = self._owner(name)
        if isinstance(owner, dict):
            owner[attribute] = checked_weight(attribute, value)
        else:
            setattr(owner, attribute, value)

    def __delitem__(self, name: str) -> None:
        raise TypeError("an objective's values can be set, not removed")

    def _owner(self, name: str) -> tuple[object, str]:
        """Return what holds a value, and what it is called there."""
        if name not in self:
            raise ValueError(f"cannot anneal {name!r}; this objective has {', '.join(self)}")
        owner, _, attribute = name.rpartition(".")
        if owner.startswith("terms."):
            return self._objective.weights, owner.removeprefix("terms.")
        return getattr(self._objective, owner) if owner else self._objective, attribute
