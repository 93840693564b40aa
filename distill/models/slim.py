"""Narrow ResNets for small images, the defaults of teacher and student, as timm models `slim_*`.

Importing this module registers them: `timm.create_model("slim_resnet10_4", num_classes=10)`. Each
is timm's own `resnet18` with other arguments, and says so of itself: what is saved of one loads
with stock timm, which has never heard of these names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
from timm.models import generate_default_cfgs, register_model
from torch import nn

__all__: list[str] = []

STOCK = "resnet18"


def _slim(width: int, stem_width: int) -> dict[str, Any]:
    """Depth 10: a deep stem and one basic block in each of four stages, each twice as wide."""
    channels = [width, 2 * width, 4 * width, 8 * width]
    layers = [1, 1, 1, 1]
    return {"layers": layers, "channels": channels, "stem_type": "deep", "stem_width": stem_width}


_ARCHITECTURES = {
    f"slim_resnet10_{width}": _slim(width, stem_width)
    for width, stem_width in ((4, 4), (8, 8), (16, 8), (32, 16))
}
_SETTINGS: dict[str, Any] = {
    "input_size": (3, 32, 32),
    "pool_size": (1, 1),
    "crop_pct": 1.0,
    "first_conv": "conv1.0",
    "classifier": "fc",
}
_NO_WEIGHTS: dict[str, Any] = {"url": "", "hf_hub_id": None, "test_input_size": None}

# The name under which timm's register_model looks a module's configurations up.
default_cfgs = generate_default_cfgs(dict.fromkeys(_ARCHITECTURES, _SETTINGS))


def _entrypoint(name: str, arguments: dict[str, Any]) -> Callable[..., nn.Module]:
    def create(
        pretrained: bool = False,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        overlay = {**_SETTINGS, **_NO_WEIGHTS, **(pretrained_cfg_overlay or {})}
        return timm.create_model(
            STOCK, pretrained, pretrained_cfg_overlay=overlay, **{**arguments, **kwargs}
        )

    create.__name__ = create.__qualname__ = name  # timm registers a function under its own name
    create.__doc__ = f"Build `{name}`, a narrow ResNet-10."
    return create


for _name, _arguments in _ARCHITECTURES.items():
    globals()[_name] = register_model(_entrypoint(_name, _arguments))
