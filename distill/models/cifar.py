"""The CIFAR networks of the distillation literature, as timm models named `cifar_*`.

Importing this module registers them: `timm.create_model("cifar_resnet8x4", num_classes=100)`.
The set and its conventions are those of Tian et al., "Contrastive Representation Distillation",
2020, https://arxiv.org/abs/1910.10699, so that parameter counts match the published tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from timm.layers import ClassifierHead
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["BasicBlock", "CifarNet", "PreActBlock", "conv_block"]

CIFAR_MEAN = (0.5071, 0.4865, 0.4409)
CIFAR_STD = (0.2673, 0.2564, 0.2762)


def _taken_stages(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Return which stages timm's `indices` name: all, the last so many, or these, −1 the last."""
    if isinstance(indices, int):
        if not 0 < indices <= count:
            raise ValueError(f"the last {indices} of {count} stages are asked for")
        return list(range(count - indices, count))
    stages = [i + count if i < 0 else i for i in (range(count) if indices is None else indices)]
    if not stages or min(stages) < 0 or max(stages) >= count:
        raise ValueError(f"stages {indices} are asked for, of {count}")
    return stages


def _conv3x3(in_chs: int, out_chs: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(in_chs, out_chs, 3, stride, padding=1, bias=bias)


def conv_block(in_chs: int, out_chs: int, stride: int = 1, bias: bool = True) -> nn.Sequential:
    """Max-pool by the stride, 3×3 convolution, batch norm, ReLU: a layer of VGG.

    Shapes: (N, in_chs, H, W) → (N, out_chs, H/stride, W/stride).

    Reference: Simonyan and Zisserman, 2015, https://arxiv.org/abs/1409.1556.
    """
    # The norm makes the bias redundant; the literature's VGG has it, and counts it.
    layers = [_conv3x3(in_chs, out_chs, bias=bias), nn.BatchNorm2d(out_chs), nn.ReLU()]
    return nn.Sequential(*([nn.MaxPool2d(stride)] if stride > 1 else []), *layers)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions added to a shortcut, activated after the sum.

    Shapes: (N, in_chs, H, W) → (N, out_chs, H/stride, W/stride).

    Reference: He et al., 2016, https://arxiv.org/abs/1512.03385, shortcut option B.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_chs, out_chs, stride)
        self.norm1 = nn.BatchNorm2d(out_chs)
        self.conv2 = _conv3x3(out_chs, out_chs)
        self.norm2 = nn.BatchNorm2d(out_chs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_chs != out_chs:
            projection = nn.Conv2d(in_chs, out_chs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_chs))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_chs, H, W) to (N, out_chs, H/stride, W/stride)."""
        # Nowhere in place: what a hook caught on a norm has to stay what the norm gave.
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class PreActBlock(nn.Module):
    """Two 3×3 convolutions, each normalised and activated before, added to a shortcut.

    Shapes: (N, in_chs, H, W) → (N, out_chs, H/stride, W/stride).

    Reference: Zagoruyko and Komodakis, 2016, https://arxiv.org/abs/1605.07146.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_chs)
        self.conv1 = _conv3x3(in_chs, out_chs, stride)
        self.norm2 = nn.BatchNorm2d(out_chs)
        self.conv2 = _conv3x3(out_chs, out_chs)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_chs != out_chs:
            self.shortcut = nn.Conv2d(in_chs, out_chs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_chs, H, W) to (N, out_chs, H/stride, W/stride)."""
        y = F.relu(self.norm1(x))
        # A projection reads the activated input; an identity carries the raw one.
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return shortcut + self.conv2(F.relu(self.norm2(self.conv1(y))))


class CifarNet(nn.Module):
    """Stem, stages of equal blocks, global pooling and one linear layer, for small images.

    Shapes: (N, in_chans, H, W) → (N, num_classes), or (N, num_features) for no classes.

    Reference: Tian et al., 2020, https://arxiv.org/abs/1910.10699.

    Args:
        block: Makes a block from its input channels, output channels and stride.
        depths: Blocks in each stage.
        widths: Channels of each stage.
        strides: Stride of the first block of each stage.
        stem_width: Channels of the stem; 0 leaves the stem out.
        num_classes: Classes; 0 leaves the linear layer out.
        in_chans: Channels of the images.
        drop_rate: Dropout before the linear layer.
        global_pool: Pooling as timm names it; "" for none.
    """

    def __init__(
        self,
        block: Callable[[int, int, int], nn.Module],
        depths: Sequence[int],
        widths: Sequence[int],
        strides: Sequence[int] = (1, 2, 2),
        stem_width: int = 16,
        num_classes: int = 100,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.num_features = widths[-1]

        # Pre-activated blocks hand on raw sums: nothing to normalise before them, all of it after.
        preact = block is PreActBlock
        self.stem: nn.Module = nn.Identity()
        if stem_width:
            conv = _conv3x3 if preact else conv_block
            self.stem = conv(in_chans, stem_width, bias=False)
        self.stages = nn.Sequential()
        self.feature_info: list[dict[str, Any]] = []
        chs, reduction = stem_width or in_chans, 1
        for i, (depth, width, stride) in enumerate(zip(depths, widths, strides, strict=True)):
            rest = (block(width, width, 1) for _ in range(depth - 1))
            self.stages.append(nn.Sequential(block(chs, width, stride), *rest))
            chs, reduction = width, reduction * stride
            info = {"num_chs": chs, "reduction": reduction, "module": f"stages.{i}"}
            self.feature_info.append(info)
        self.norm = nn.Sequential(nn.BatchNorm2d(chs), nn.ReLU()) if preact else nn.Identity()
        self.head = ClassifierHead(chs, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.head_hidden_size = self.head.num_features
        self.literature_keys: dict[str, str] = {}  # names in others' files → those here
        self.apply(_init_he)

    def get_classifier(self) -> nn.Module:
        """Return the linear layer, or the identity where there is none."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Draw a new linear layer for so many classes, and change the pooling if one is named."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self.head_hidden_size = self.head.num_features
        # A head without a layer cannot tell where its new one belongs.
        self.head.to(next(self.stages.parameters()))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute the features together with the feature maps of chosen stages.

        Args:
            x: Images (N, in_chans, H, W).
            indices: The stages: the last so many, these, or all for None.
            norm: Apply the final norm to the last stage's map (the only one it fits).
            stop_early: Compute no stage after the last one chosen.
            output_fmt: Only "NCHW".
            intermediates_only: Return the maps alone.

        Returns:
            The features (N, num_features, h, w) and the list of maps (N, num_chs, h, w).
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', not {output_fmt!r}")
        taken = _taken_stages(len(self.stages), indices)
        last = max(taken)
        x = self.stem(x)
        maps = []
        for stage in list(self.stages)[: last + 1 if stop_early else None]:
            x = stage(x)
            maps.append(x)
        if len(maps) == len(self.stages):
            x = self.norm(x)
            if norm:
                maps[-1] = x
        maps = [maps[i] for i in sorted(set(taken))]
        return maps if intermediates_only else (x, maps)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map (N, in_chans, H, W) to the last feature map (N, num_features, h, w)."""
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map (N, num_features, h, w) to logits, or to what the linear layer reads."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_chans, H, W) to logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _init_he(module: nn.Module) -> None:
    """Draw a convolution's weights as He et al., 2015, https://arxiv.org/abs/1502.01852."""
    # The linear layer keeps PyTorch's own draw, which is also what reset_classifier gives it.
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _resnet(depth: int, stem_width: int = 16, width: int = 16) -> dict[str, Any]:
    """Depth 6n + 2: three stages of n blocks with two convolutions, the stem, the linear layer."""
    return {
        "block": BasicBlock,
        "depths": 3 * ((depth - 2) // 6,),
        "widths": (width, 2 * width, 4 * width),
        "stem_width": stem_width,
    }


def _wide_resnet(depth: int, widen: int) -> dict[str, Any]:
    """Depth 6n + 4: three stages of n blocks with two convolutions, the stem, three projections."""
    return {
        "block": PreActBlock,
        "depths": 3 * ((depth - 4) // 6,),
        "widths": (16 * widen, 32 * widen, 64 * widen),
    }


def _vgg(*depths: int) -> dict[str, Any]:
    """Depth 3 + Σ depths: the two large linear layers of ImageNet's VGG are counted, not built."""
    return {
        "block": conv_block,
        "depths": depths,
        "widths": (64, 128, 256, 512, 512),
        # Three poolings leave four pixels a side, and the last stage keeps them.
        "strides": (1, 2, 2, 2, 1),
        "stem_width": 0,
    }


_ARCHITECTURES = {
    **{f"cifar_resnet{depth}": _resnet(depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"cifar_resnet{depth}x4": _resnet(depth, 32, 64) for depth in (8, 32)},
    **{f"cifar_wrn_{d}_{k}": _wide_resnet(d, k) for d in (16, 40) for k in (1, 2)},
    "cifar_vgg8": _vgg(1, 1, 1, 1, 1),
    "cifar_vgg11": _vgg(1, 1, 2, 2, 2),
    "cifar_vgg13": _vgg(2, 2, 2, 2, 2),
    "cifar_vgg16": _vgg(2, 2, 3, 3, 3),
    "cifar_vgg19": _vgg(2, 2, 4, 4, 4),
}


def _literature_keys(
    block: Callable[..., nn.Module],
    depths: Sequence[int],
    strides: Sequence[int] = (1, 2, 2),
    **_: Any,
) -> dict[str, str]:
    """Return the names of tensors in the literature's checkpoints → those here, by regexes.

    Source: the state dicts of Tian et al., 2020, whose names later repositories keep.
    """
    stages = range(len(depths))
    if block is conv_block:  # there the layers of a stage are counted through, and pool elsewhere
        layers = {
            rf"^block{i}\.{3 * j + k}\.": f"stages.{i}.{j}.{k + (strides[i] > 1 and j == 0)}."
            for i in stages
            for j in range(depths[i])
            for k in (0, 1)
        }
        return {**layers, r"^classifier\.": "head.fc."}
    inside = {r"(stages\.\d+\.\d+)\.bn": r"\1.norm", r"^fc\.": "head.fc."}
    if block is PreActBlock:
        trunk = {rf"^block{i + 1}\.layer\.": f"stages.{i}." for i in stages}
        ends = {r"^conv1\.": "stem.", r"^bn1\.": "norm.0.", r"\.convShortcut\.": ".shortcut."}
    else:
        trunk = {rf"^layer{i + 1}\.": f"stages.{i}." for i in stages}
        ends = {r"^conv1\.": "stem.0.", r"^bn1\.": "stem.1.", r"\.downsample\.": ".shortcut."}
    return {**trunk, **ends, **inside}


_FIRST_CONV = {BasicBlock: "stem.0", PreActBlock: "stem", conv_block: "stages.0.0.0"}


def _cfg(block: Callable[..., nn.Module], strides: Sequence[int] = (1, 2, 2), **_: Any) -> dict:
    side = 32 // math.prod(strides)
    return {
        "input_size": (3, 32, 32),
        "pool_size": (side, side),
        "crop_pct": 1.0,
        "mean": CIFAR_MEAN,
        "std": CIFAR_STD,
        "num_classes": 100,
        "first_conv": _FIRST_CONV[block],
        "classifier": "head.fc",
    }


# The name under which timm's register_model looks a module's configurations up.
default_cfgs = generate_default_cfgs({name: _cfg(**a) for name, a in _ARCHITECTURES.items()})


def _entrypoint(name: str, architecture: dict[str, Any]) -> Callable[..., CifarNet]:
    def create(pretrained: bool = False, **kwargs: Any) -> CifarNet:
        stages = tuple(range(len(architecture["depths"])))
        features = {"out_indices": stages, "flatten_sequential": True}
        kwargs = {**architecture, **kwargs}
        model = build_model_with_cfg(CifarNet, name, pretrained, feature_cfg=features, **kwargs)
        model.literature_keys = _literature_keys(**architecture)
        return model

    create.__name__ = create.__qualname__ = name  # timm registers a function under its own name
    create.__doc__ = f"Build `{name}`, a CifarNet."
    return create


for _name, _architecture in _ARCHITECTURES.items():
    globals()[_name] = register_model(_entrypoint(_name, _architecture))
