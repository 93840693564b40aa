"""Images in, views out: sources, pure views, and the Lightning data module."""

import distill.utils.torchvision_operators  # noqa: F401  (before others import torchvision)

from distill.data.module import DataModule

__all__ = ["DataModule"]
