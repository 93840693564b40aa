"""Numbers that annealing can move, by name, wherever they are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from distill.objective.term import checked_weight


class AnnealedValues(MutableMapping[str, float]):
    """Read and set numbers of an objective by their configuration names.

    Nothing is copied: what is set here, the objective computes with.

    Args:
        places: name → the object that keeps the number and its attribute, or the dictionary of
            term weights and the term.

    Raises:
        ValueError: for another name, or a value out of range.
    """

    def __init__(self, places: Mapping[str, tuple[Any, str]]) -> None:
        self._places = places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> float:
        owner, attribute = self._place(name)
        value: float = owner[attribute] if isinstance(owner, dict) else getattr(owner, attribute)
        return value

    def __setitem__(self, name: str, value: float) -> None:
        owner, attribute = self._place(name)
        if isinstance(owner, dict):
            owner[attribute] = checked_weight(attribute, value)
        else:
            setattr(owner, attribute, value)

    def __delitem__(self, name: str) -> None:
        raise TypeError("an objective's values can be set, not removed")

    def _place(self, name: str) -> tuple[Any, str]:
        if name not in self:
            raise ValueError(f"cannot anneal {name!r}; this objective has {', '.join(self)}")
        return self._places[name]
