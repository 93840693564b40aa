"""Teachers, students, and students on disk."""

import distill.utils.torchvision_operators  # noqa: F401  (before others import torchvision)
