"""Training one model: the Lightning module, its callbacks, what is kept and how it goes on."""

import distill.utils.torchvision_operators  # noqa: F401  (before others import torchvision)
