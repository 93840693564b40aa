"""What a model says of the size of its images, before it is built."""

from __future__ import annotations

import timm

from distill.data.sources.sizes import ModelSize, as_size
from distill.models.build import ModelSpec, architecture
from distill.models.checkpoint import read_checkpoint


def declared_size(spec: ModelSpec) -> ModelSize | None:
    """Return the size that a model was trained at or is made for; None where it does not say.

    It is what its checkpoint recorded, its argument `img_size`, or else the `input_size` of timm's
    configuration; timm's larger `test_input_size` is not for training.
    """
    checkpoint = read_checkpoint(spec.checkpoint) if spec.checkpoint else None
    if checkpoint is not None and "input_size" in checkpoint.preprocessing:
        _, height, width = checkpoint.preprocessing["input_size"]
        return ModelSize((height, width), exact=True)
    name, args = architecture(spec, checkpoint)
    if args.get("img_size") is not None:
        return ModelSize(as_size(args["img_size"]), exact=True)
    config = timm.models.get_pretrained_cfg(name, allow_unregistered=True) if name else None
    if config is None:
        return None
    height, width = config.input_size[-2:]
    return ModelSize((height, width), exact=bool(config.fixed_input_size))
