"""Knowledge distillation: a frozen timm teacher, a compact timm student, honest numbers.

The public names are imported on first use, so that `import distill` and the commands' `--help`
cost nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from distill.utils import torchvision_operators

torchvision_operators.install()

__version__ = "0.1.0"

_HOME = {
    "Annealing": "distill.training.callbacks.annealing",
    "Distiller": "distill.training.module",
    "Objective": "distill.objective.objective",
    "Teacher": "distill.teacher.teacher",
    "load_student": "distill.models.bundle",
    "save_student": "distill.models.bundle",
}
__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from distill.models.bundle import load_student as load_student
    from distill.models.bundle import save_student as save_student
    from distill.objective.objective import Objective as Objective
    from distill.teacher.teacher import Teacher as Teacher
    from distill.training.callbacks.annealing import Annealing as Annealing
    from distill.training.module import Distiller as Distiller


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'distill' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
