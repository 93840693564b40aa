"""What becomes of a student: files for other runtimes, predictions, the Hub."""

import distill.utils.torchvision_operators  # noqa: F401  (before others import torchvision)
