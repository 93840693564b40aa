"""Let torchvision import beside a torch it was not compiled for.

The package index's torchvision is built for CUDA. Beside a CPU-only torch its compiled operators do
not load and importing it fails, and timm, Lightning and torchmetrics with it. Only its Python parts
are needed here, so the two operators that they refer to at import are declared without an
implementation. With a matching pair of packages nothing is done. Importing this module does it: the
packages here that import torchvision, or what imports it, import this before.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path


def declare_missing_operators() -> object | None:
    """Declare torchvision's compiled operators where its library cannot be loaded.

    Returns:
        The declaration, or None where none was needed.
    """
    spec = importlib.util.find_spec("torchvision")
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    library = next(iter([*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]), None)
    if spec is None or library is None:
        return None
    import torch

    try:
        torch.ops.load_library(str(library))
    except OSError:
        operators = torch.library.Library("torchvision", "DEF")
        operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return operators
    return None


DECLARED = declare_missing_operators()  # kept: torch withdraws what is collected
