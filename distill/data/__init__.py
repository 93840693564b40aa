"""Images in, views out: sources, pure views, and the Lightning data module."""

from distill.data.module import DataModule

__all__ = ["DataModule"]
