"""The CIFAR networks of the distillation literature, as timm models named `cifar_*`.

Importing this module registers them: `timm.create_model("cifar_resnet8x4", num_classes=100)`.
The set and its conventions are those of Tian et al., "Contrastive Representation Distillation",
2020, https://arxiv.org/abs/1910.10699, so that parameter counts match the published tables. All
but MobileNetV2, which timm can build, are a `CifarNet`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from timm.layers import ClassifierHead
from timm.models import EfficientNet, build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from distill.models.cifar_blocks import (
    SHUFFLE_STEM_WIDTH,
    BasicBlock,
    Bottleneck,
    PreActBlock,
    ShuffleV1Block,
    ShuffleV2Block,
    conv3x3,
    conv_block,
)

__all__ = ["CifarMobileNetV2", "CifarNet"]

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


def init_he(module: nn.Module) -> None:
    """Draw a convolution's weights as He et al., whatever its groups.

    The draw is normal of variance `2/(k²·out_chs)` for k×k kernels.

    Reference: He et al., 2015, https://arxiv.org/abs/1502.01852.
    """
    # The linear layer keeps PyTorch's own draw, which is also what reset_classifier gives it.
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


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
        stem_kernel: Height and width of the stem's convolution.
        final_width: Channels of a 1×1 convolution after the stages; 0 leaves it out.
        num_classes: Classes; 0 leaves the linear layer out.
        in_chans: Channels of the images.
        drop_rate: Dropout before the linear layer.
        global_pool: Pooling as timm names it; "" for none.
        init_fn: Draws the weights of a module; None leaves them as PyTorch draws them.
    """

    def __init__(
        self,
        block: Callable[[int, int, int], nn.Module],
        depths: Sequence[int],
        widths: Sequence[int],
        strides: Sequence[int] = (1, 2, 2),
        stem_width: int = 16,
        stem_kernel: int = 3,
        final_width: int = 0,
        num_classes: int = 100,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        init_fn: Callable[[nn.Module], None] | None = init_he,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.num_features = final_width or widths[-1]

        # Pre-activated blocks hand on raw sums: nothing to normalise before them, all of it after.
        preact = block is PreActBlock
        self.stem: nn.Module = nn.Identity()
        if stem_width and preact:
            self.stem = conv3x3(in_chans, stem_width)
        elif stem_width:
            self.stem = conv_block(in_chans, stem_width, bias=False, kernel_size=stem_kernel)
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
        self.final_conv: nn.Module = nn.Identity()
        if final_width:
            self.final_conv = conv_block(chs, final_width, bias=False, kernel_size=1)
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate
        )
        self.head_hidden_size = self.head.num_features
        self.literature_keys: dict[str, str] = {}  # names in others' files → those here
        if init_fn is not None:
            self.apply(init_fn)

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
            x = self.final_conv(x)
        maps = [maps[i] for i in sorted(set(taken))]
        return maps if intermediates_only else (x, maps)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map (N, in_chans, H, W) to the last feature map (N, num_features, h, w)."""
        return self.final_conv(self.norm(self.stages(self.stem(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map (N, num_features, h, w) to logits, or to what the linear layer reads."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_chans, H, W) to logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))


class CifarMobileNetV2(EfficientNet):
    """MobileNetV2 at half its width, for small images: timm's EfficientNet with other arguments.

    Shapes: (N, in_chans, H, W) → (N, num_classes), or (N, 1280) for no classes.

    Beside timm's own MobileNetV2 the second stage does not stride, the first block has a 1×1
    convolution where the others widen, and ReLU does not end at 6. Weights are drawn as those of
    the other CIFAR networks: timm draws a 3×3 convolution of each of C channels √C times as wide,
    which the norm after it hides from the answers and not from the optimiser.

    Reference: Sandler et al., 2018, https://arxiv.org/abs/1801.04381.

    Args:
        **kwargs: Arguments of timm's EfficientNet that do not change its layers: `num_classes`,
            `in_chans`, `drop_rate`, `drop_path_rate`, `global_pool`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            block_args=[
                _inverted_residuals(1, 8, 1, 1),
                _inverted_residuals(6, 12, 2, 1),
                _inverted_residuals(6, 16, 3, 2),
                _inverted_residuals(6, 32, 4, 2),
                _inverted_residuals(6, 48, 3, 1),
                _inverted_residuals(6, 80, 3, 2),
                _inverted_residuals(6, 160, 1, 1),
            ],
            stem_size=16,
            num_features=1280,
            round_chs_fn=int,  # timm's would make a multiple of eight of 12
            **kwargs,
        )
        self.apply(init_he)
        self.reset_classifier(self.num_classes)


def _inverted_residuals(
    expansion: int, width: int, depth: int, stride: int
) -> list[dict[str, Any]]:
    """Return a stage as timm's EfficientNet takes it, which strides in the first block alone."""
    block = {"block_type": "ir", "exp_ratio": expansion, "out_chs": width, "act_layer": None}
    return [{**block, "stride": stride} for _ in range(depth)]


def _resnet(depth: int, stem_width: int = 16, width: int = 16) -> dict[str, Any]:
    """Depth 6n + 2: three stages of n blocks with two convolutions, the stem, the linear layer."""
    return {
        "block": BasicBlock,
        "depths": 3 * ((depth - 2) // 6,),
        "widths": (width, 2 * width, 4 * width),
        "stem_width": stem_width,
    }


def _bottleneck_resnet(*depths: int) -> dict[str, Any]:
    """Depth 2 + 3·Σ depths: ImageNet's, without the pooling and the stride of its stem."""
    return {
        "block": Bottleneck,
        "depths": depths,
        "widths": (256, 512, 1024, 2048),
        "strides": (1, 2, 2, 2),
        "stem_width": 64,
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


def _shufflenet(
    block: Callable[..., nn.Module], width: int, final_width: int = 0
) -> dict[str, Any]:
    """ImageNet's of that width, without the pooling and the stride of its stem."""
    return {
        "block": block,
        "depths": (4, 8, 4),
        "widths": (width, 2 * width, 4 * width),
        "strides": (2, 2, 2),
        "stem_width": SHUFFLE_STEM_WIDTH,
        "stem_kernel": 1,
        "final_width": final_width,
        "init_fn": None,  # in the literature, too, PyTorch draws their weights
    }


_ARCHITECTURES = {
    **{f"cifar_resnet{depth}": _resnet(depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"cifar_resnet{depth}x4": _resnet(depth, 32, 64) for depth in (8, 32)},
    "cifar_resnet50": _bottleneck_resnet(3, 4, 6, 3),
    **{f"cifar_wrn_{d}_{k}": _wide_resnet(d, k) for d in (16, 40) for k in (1, 2)},
    "cifar_vgg8": _vgg(1, 1, 1, 1, 1),
    "cifar_vgg11": _vgg(1, 1, 2, 2, 2),
    "cifar_vgg13": _vgg(2, 2, 2, 2, 2),
    "cifar_vgg16": _vgg(2, 2, 3, 3, 3),
    "cifar_vgg19": _vgg(2, 2, 4, 4, 4),
    "cifar_shufflenet_v1": _shufflenet(ShuffleV1Block, 240),
    "cifar_shufflenet_v2": _shufflenet(ShuffleV2Block, 116, final_width=1024),
}

# The names of the literature's strided block of ShuffleNetV2, which counts the shortcut's layers
# first: five convolutions, of which two are the shortcut's.
_STRIDED_SHUFFLE_KEYS = {
    **{
        rf"(stages\.\d+\.0)\.{layer}{i + 1}\.": rf"\1.shortcut.{2 * i + k}."
        for i in (0, 1)
        for k, layer in enumerate(("conv", "norm"))
    },
    **{rf"(stages\.\d+\.0\.(conv|norm)){i + 2}\.": rf"\g<1>{i}." for i in (1, 2, 3)},
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
    inside = {r"(stages\.\d+\.\d+)\.bn": r"\1.norm", r"^(fc|linear)\.": "head.fc."}
    if block is PreActBlock:
        trunk = {rf"^block{i + 1}\.layer\.": f"stages.{i}." for i in stages}
        ends = {r"^conv1\.": "stem.", r"^bn1\.": "norm.0.", r"\.convShortcut\.": ".shortcut."}
    else:
        trunk = {rf"^layer{i + 1}\.": f"stages.{i}." for i in stages}
        ends = {r"^conv1\.": "stem.0.", r"^bn1\.": "stem.1.", r"\.downsample\.": ".shortcut."}
    if block is ShuffleV2Block:
        final = {r"^conv2\.": "final_conv.0.", r"^bn2\.": "final_conv.1."}
        return {**trunk, **ends, **final, **inside, **_STRIDED_SHUFFLE_KEYS}
    return {**trunk, **ends, **inside}


_MOBILENETV2_KEYS = {
    **{rf"^conv{i}\.0\.": f"conv_{there}." for i, there in ((1, "stem"), (2, "head"))},
    **{rf"^conv{i}\.1\.": f"bn{i}." for i in (1, 2)},
    **{
        rf"^(blocks\.\d+\.\d+)\.conv\.{3 * i + k}\.": rf"\1.{there}."
        for i, conv in enumerate(("conv_pw", "conv_dw", "conv_pwl"))
        for k, there in enumerate((conv, f"bn{i + 1}"))
    },
    r"^classifier\.0\.": "classifier.",
}


def _settings(reduction: int, first_conv: str, classifier: str) -> dict[str, Any]:
    side = 32 // reduction
    return {
        "input_size": (3, 32, 32),
        "pool_size": (side, side),
        "crop_pct": 1.0,
        "mean": CIFAR_MEAN,
        "std": CIFAR_STD,
        "num_classes": 100,
        "first_conv": first_conv,
        "classifier": classifier,
    }


_FIRST_CONV = {PreActBlock: "stem", conv_block: "stages.0.0.0"}


def _cfg(block: Callable[..., nn.Module], strides: Sequence[int] = (1, 2, 2), **_: Any) -> dict:
    return _settings(math.prod(strides), _FIRST_CONV.get(block, "stem.0"), "head.fc")


# The name under which timm's register_model looks a module's configurations up.
default_cfgs = generate_default_cfgs(
    {
        **{name: _cfg(**architecture) for name, architecture in _ARCHITECTURES.items()},
        "cifar_mobilenetv2": _settings(16, "conv_stem", "classifier"),
    }
)


def _entrypoint(
    name: str,
    network: Callable[..., nn.Module],
    architecture: dict[str, Any],
    stages: int,
    literature_keys: dict[str, str],
) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        features = {"out_indices": tuple(range(stages)), "flatten_sequential": True}
        kwargs = {**architecture, **kwargs}
        model: Any = build_model_with_cfg(network, name, pretrained, feature_cfg=features, **kwargs)
        model.literature_keys = literature_keys
        return model

    create.__name__ = create.__qualname__ = name  # timm registers a function under its own name
    create.__doc__ = f"Build `{name}`, a {network.__name__}."
    return create


for _name, _architecture in _ARCHITECTURES.items():
    globals()[_name] = register_model(
        _entrypoint(
            _name,
            CifarNet,
            _architecture,
            stages=len(_architecture["depths"]),
            literature_keys=_literature_keys(**_architecture),
        )
    )
cifar_mobilenetv2 = register_model(
    _entrypoint(
        "cifar_mobilenetv2",
        CifarMobileNetV2,
        {},
        stages=4,  # of which timm gives maps: those before a stride, and the last
        literature_keys=_MOBILENETV2_KEYS,
    )
)
