"""Random erasing of views that are not normalised yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MODES = ("const", "rand", "pixel")


@dataclass(frozen=True)
class Erasing:
    """timm's random erasing as it would be of the normalised view, on 8-bit pixels.

    What timm erases with 0 is the mean colour, and what it draws from N(0, 1) is drawn from
    N(mean, std²) and cut off at black and white. Pixels outside of the boxes stay what they are.

    Args:
        probability: that a view is erased.
        mode: `const`, the mean colour; `rand`, a drawn colour; `pixel`, a drawn colour each pixel.
        count: the most boxes of a view, which share their area.
        mean: of the normalisation, for each channel, from 0 to 1.
        std: of the normalisation, for each channel.

    Reference:
        Zhong et al., 1708.04896.
    """

    probability: float
    mode: str
    count: int
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, view: Tensor) -> Tensor:
        """Return the erased view of a view, uint8 `[C, H, W]`, from the shared generators."""
        from timm.data.random_erasing import RandomErasing

        erase = RandomErasing(self.probability, mode=self.mode, max_count=self.count, device="cpu")
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        normal = erase((view.double() / 255 - mean) / std)
        return (255 * (normal * std + mean)).round().clamp(0, 255).to(torch.uint8)
