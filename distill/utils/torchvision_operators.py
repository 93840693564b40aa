"""Let torchvision import beside a torch it was not compiled for.

The package index's torchvision is built for CUDA. Beside a CPU-only torch its compiled operators do
not load and importing it fails, and timm, Lightning and torchmetrics with it. Only its Python parts
are needed here, so the two operators that they refer to at import are declared without an
implementation. With a matching pair of packages nothing is done. The work waits for the first
`import torchvision`, so that `import distill` stays instant.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

_declared: list[object] = []  # torch withdraws a declaration when its Library is collected


class _BeforeTorchvision:
    """An import finder that finds nothing, but prepares torch when torchvision is imported."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(cls)
            declare_missing_operators()
        return None


def declare_missing_operators() -> None:
    """Declare torchvision's compiled operators where its library cannot be loaded."""
    spec = importlib.util.find_spec("torchvision")
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    library = next(iter([*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]), None)
    if spec is None or library is None or _declared:
        return
    import torch

    try:
        torch.ops.load_library(str(library))
    except OSError:
        operators = torch.library.Library("torchvision", "DEF")
        operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(operators)


def install() -> None:
    """Prepare torch for torchvision, at the latest when torchvision is first imported."""
    if "torchvision" not in sys.modules and _BeforeTorchvision not in sys.meta_path:
        sys.meta_path.insert(0, _BeforeTorchvision)
