"""Shared fixtures. Importing distill first makes torchvision importable (see its _torchvision)."""

import distill  # noqa: F401
