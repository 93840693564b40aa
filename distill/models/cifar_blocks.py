"""The blocks that the CIFAR networks of the distillation literature are built from.

Nowhere is anything computed in place: what a hook caught on a norm has to stay what the norm gave.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "SHUFFLE_STEM_WIDTH",
    "BasicBlock",
    "Bottleneck",
    "PreActBlock",
    "ShuffleV1Block",
    "ShuffleV2Block",
    "conv1x1",
    "conv3x3",
    "conv_block",
]

SHUFFLE_STEM_WIDTH = 24


def conv3x3(in_chs: int, out_chs: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Return a 3×3 convolution without a bias, padded by a pixel.

    Shapes: (N, in_chs, H, W) → (N, out_chs, ⌈H/stride⌉, ⌈W/stride⌉).
    """
    return nn.Conv2d(in_chs, out_chs, 3, stride, padding=1, groups=groups, bias=False)


def conv1x1(in_chs: int, out_chs: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Return a 1×1 convolution without a bias.

    Shapes: (N, in_chs, H, W) → (N, out_chs, ⌈H/stride⌉, ⌈W/stride⌉).
    """
    return nn.Conv2d(in_chs, out_chs, 1, stride, groups=groups, bias=False)


def conv_block(
    in_chs: int, out_chs: int, stride: int = 1, bias: bool = True, kernel_size: int = 3
) -> nn.Sequential:
    """Max-pool by the stride, convolution, batch norm, ReLU: a layer of VGG.

    Shapes: (N, in_chs, H, W) → (N, out_chs, H/stride, W/stride).

    Reference: Simonyan and Zisserman, 2015, https://arxiv.org/abs/1409.1556.
    """
    # The norm makes the bias redundant; the literature's VGG has it, and counts it.
    conv = nn.Conv2d(in_chs, out_chs, kernel_size, padding=kernel_size // 2, bias=bias)
    pool = [nn.MaxPool2d(stride)] if stride > 1 else []
    return nn.Sequential(*pool, conv, nn.BatchNorm2d(out_chs), nn.ReLU())


def _projection(in_chs: int, out_chs: int, stride: int) -> nn.Module:
    """Return shortcut option B of He et al.: the identity, or a 1×1 convolution with a norm."""
    if stride == 1 and in_chs == out_chs:
        return nn.Identity()
    return nn.Sequential(conv1x1(in_chs, out_chs, stride), nn.BatchNorm2d(out_chs))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions added to a shortcut, activated after the sum.

    Shapes: (N, in_chs, H, W) → (N, out_chs, H/stride, W/stride).

    Reference: He et al., 2016, https://arxiv.org/abs/1512.03385, shortcut option B.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_chs, out_chs, stride)
        self.norm1 = nn.BatchNorm2d(out_chs)
        self.conv2 = conv3x3(out_chs, out_chs)
        self.norm2 = nn.BatchNorm2d(out_chs)
        self.shortcut = _projection(in_chs, out_chs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_chs, H, W) to (N, out_chs, H/stride, W/stride)."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """A 3×3 convolution of a quarter of the channels between two 1×1, added to a shortcut.

    The 3×3 convolution has the stride; the paper strides the first.

    Shapes: (N, in_chs, H, W) → (N, out_chs, H/stride, W/stride).

    Reference: He et al., 2016, https://arxiv.org/abs/1512.03385, shortcut option B.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1) -> None:
        super().__init__()
        mid_chs = out_chs // 4
        self.conv1 = conv1x1(in_chs, mid_chs)
        self.norm1 = nn.BatchNorm2d(mid_chs)
        self.conv2 = conv3x3(mid_chs, mid_chs, stride)
        self.norm2 = nn.BatchNorm2d(mid_chs)
        self.conv3 = conv1x1(mid_chs, out_chs)
        self.norm3 = nn.BatchNorm2d(out_chs)
        self.shortcut = _projection(in_chs, out_chs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_chs, H, W) to (N, out_chs, H/stride, W/stride)."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


class PreActBlock(nn.Module):
    """Two 3×3 convolutions, each normalised and activated before, added to a shortcut.

    Shapes: (N, in_chs, H, W) → (N, out_chs, H/stride, W/stride).

    Reference: Zagoruyko and Komodakis, 2016, https://arxiv.org/abs/1605.07146.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_chs)
        self.conv1 = conv3x3(in_chs, out_chs, stride)
        self.norm2 = nn.BatchNorm2d(out_chs)
        self.conv2 = conv3x3(out_chs, out_chs)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_chs != out_chs:
            self.shortcut = conv1x1(in_chs, out_chs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_chs, H, W) to (N, out_chs, H/stride, W/stride)."""
        y = F.relu(self.norm1(x))
        # A projection reads the activated input; an identity carries the raw one.
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return shortcut + self.conv2(F.relu(self.norm2(self.conv1(y))))


class ShuffleV1Block(nn.Module):
    """Grouped 1×1 convolution, shuffle, 3×3 of each channel, grouped 1×1, joined with the input.

    At stride 1 the input is added; a strided block puts out_chs − in_chs new channels before the
    3×3 means of the input. What the stem gives is too narrow for groups.

    Where paper and the code of Tian et al. differ, the code is taken, whose numbers are compared
    with: it activates after the 3×3 convolution, too, and narrows to a quarter of the channels that
    a block adds, not of those that it gives.

    Shapes: (N, in_chs, H, W) → (N, out_chs, ⌈H/stride⌉, ⌈W/stride⌉).

    Reference: Zhang et al., 2018, https://arxiv.org/abs/1707.01083.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1, groups: int = 3) -> None:
        super().__init__()
        new_chs = out_chs - in_chs if stride > 1 else out_chs
        mid_chs = new_chs // 4
        self.in_groups = 1 if in_chs == SHUFFLE_STEM_WIDTH else groups
        self.conv1 = conv1x1(in_chs, mid_chs, groups=self.in_groups)
        self.norm1 = nn.BatchNorm2d(mid_chs)
        self.conv2 = conv3x3(mid_chs, mid_chs, stride, groups=mid_chs)
        self.norm2 = nn.BatchNorm2d(mid_chs)
        self.conv3 = conv1x1(mid_chs, new_chs, groups=groups)
        self.norm3 = nn.BatchNorm2d(new_chs)
        self.pool = nn.AvgPool2d(3, stride, padding=1) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_chs, H, W) to (N, out_chs, ⌈H/stride⌉, ⌈W/stride⌉)."""
        y = F.channel_shuffle(F.relu(self.norm1(self.conv1(x))), self.in_groups)
        y = F.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return F.relu(y + x if self.pool is None else torch.cat([y, self.pool(x)], dim=1))


class ShuffleV2Block(nn.Module):
    """1×1 convolution, 3×3 of each channel and 1×1 of one half, shuffled with the other half.

    At stride 1 the first half of the input is handed on as it is. A strided block reads all of the
    input twice: its first half is a 3×3 convolution of each channel and a 1×1.

    Shapes: (N, in_chs, H, W) → (N, out_chs, ⌈H/stride⌉, ⌈W/stride⌉).

    Reference: Ma et al., 2018, https://arxiv.org/abs/1807.11164.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1) -> None:
        super().__init__()
        half = out_chs // 2
        self.conv1 = conv1x1(in_chs if stride > 1 else half, half)
        self.norm1 = nn.BatchNorm2d(half)
        self.conv2 = conv3x3(half, half, stride, groups=half)
        self.norm2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(half, half)
        self.norm3 = nn.BatchNorm2d(half)
        self.shortcut: nn.Module | None = None
        if stride > 1:
            self.shortcut = nn.Sequential(
                conv3x3(in_chs, in_chs, stride, groups=in_chs),
                nn.BatchNorm2d(in_chs),
                conv1x1(in_chs, half),
                nn.BatchNorm2d(half),
                nn.ReLU(),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_chs, H, W) to (N, out_chs, ⌈H/stride⌉, ⌈W/stride⌉)."""
        first, second = x.chunk(2, dim=1) if self.shortcut is None else (self.shortcut(x), x)
        y = F.relu(self.norm1(self.conv1(second)))
        y = self.norm2(self.conv2(y))
        y = F.relu(self.norm3(self.conv3(y)))
        return F.channel_shuffle(torch.cat([first, y], dim=1), 2)
