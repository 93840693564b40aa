"""Networks of the literature in plain functions: their sizes, names of tensors, maps and answers.

Each is written from the tables of its paper and of Tian et al., 2020, 1910.10699, with the names in
the checkpoints that these publish.
"""

import math

import pytest
import timm
import torch
from torch.nn import functional as F

from distill.models.build import ModelSpec, build_model
from distill.models.weights import DataShape

CLASSES = 100


class Drawn:
    """Draws each tensor under its name in the literature when it is first used."""

    def __init__(self):
        self.weights = {}
        self.generator = torch.Generator().manual_seed(0)

    def tensor(self, name, *shape):
        if name not in self.weights:
            drawn = torch.randn(*shape, generator=self.generator)
            self.weights[name] = drawn / math.prod(shape[1:]) ** 0.5
        return self.weights[name].double()

    def conv(self, x, name, width, kernel=1, stride=1, groups=1):
        weight = self.tensor(f"{name}.weight", width, x.shape[1] // groups, kernel, kernel)
        return F.conv2d(x, weight, None, stride, kernel // 2, groups=groups)

    def norm(self, x, name):
        """Normalise by the statistics of the first images that are seen."""
        width = x.shape[1]
        variance, mean = torch.var_mean(x, (0, 2, 3))
        self.weights.setdefault(f"{name}.running_mean", mean.float())
        self.weights.setdefault(f"{name}.running_var", variance.float())
        mean, variance, scale, shift = (
            self.tensor(f"{name}.{key}", width)[:, None, None]
            for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    def layer(self, x, names, width, kernel=1, stride=1, groups=1):
        """A convolution and its norm, under their two names."""
        return self.norm(self.conv(x, names[0], width, kernel, stride, groups), names[1])

    def answer(self, x, name):
        weight = self.tensor(f"{name}.weight", CLASSES, x.shape[1])
        return x.mean((2, 3)) @ weight.T + self.tensor(f"{name}.bias", CLASSES)


def shuffled(x, groups):
    """The first channel of each group, then the second of each, and so on."""
    size = x.shape[1] // groups
    return x[:, [group * size + i for i in range(size) for group in range(groups)]]


def mobilenetv2(net, x):
    x = net.layer(x, ("conv1.0", "conv1.1"), 16, 3, 2).relu()
    maps = []
    table = [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
             (6, 160, 3, 2), (6, 320, 1, 1)]  # fmt: skip
    for i, (expansion, width, depth, first_stride) in enumerate(table):
        for j in range(depth):
            stride = 1 if j else first_stride
            wide = expansion * x.shape[1]
            names = [f"blocks.{i}.{j}.conv.{k}" for k in range(8)]
            y = net.layer(x, names[0:2], wide).relu()
            y = net.layer(y, names[3:5], wide, 3, stride, wide).relu()
            y = net.layer(y, names[6:8], width // 2)
            x = x + y if stride == 1 and x.shape[1] == width // 2 else y
        maps += [x] if i in (1, 2, 4, 6) else []
    x = net.layer(x, ("conv2.0", "conv2.1"), 1280).relu()
    return net.answer(x, "classifier.0"), maps


def in_stages(block, net, x, table):
    """Stages of a table of widths, depths and strides; what each of them gives."""
    maps = []
    for i, (width, depth, stride) in enumerate(table, start=1):
        for j in range(depth):
            names = [(f"layer{i}.{j}.conv{k}", f"layer{i}.{j}.bn{k}") for k in range(1, 6)]
            x = block(net, x, names, width, 1 if j else stride)
        maps.append(x)
    return maps


def shufflenet_v1(net, x):
    def block(net, x, names, width, stride):
        added = width - x.shape[1] if stride == 2 else width
        groups = 1 if x.shape[1] == 24 else 3
        y = shuffled(net.layer(x, names[0], added // 4, groups=groups).relu(), groups)
        y = net.layer(y, names[1], added // 4, 3, stride, added // 4).relu()
        y = net.layer(y, names[2], added, groups=3)
        if stride == 1:
            return (x + y).relu()
        return torch.cat([y, F.avg_pool2d(x, 3, 2, padding=1)], 1).relu()

    x = net.layer(x, ("conv1", "bn1"), 24).relu()
    maps = in_stages(block, net, x, [(240, 4, 2), (480, 8, 2), (960, 4, 2)])
    return net.answer(maps[-1], "linear"), maps


def shufflenet_v2(net, x):
    def branch(net, x, names, half, stride):
        y = net.layer(x, names[0], half).relu()
        y = net.layer(y, names[1], half, 3, stride, half)
        return net.layer(y, names[2], half).relu()

    def block(net, x, names, width, stride):
        half = width // 2
        if stride == 1:
            first, second = x[:, :half], branch(net, x[:, half:], names, half, 1)
        else:
            first = net.layer(x, names[0], x.shape[1], 3, 2, x.shape[1])
            first = net.layer(first, names[1], half).relu()
            second = branch(net, x, names[2:], half, 2)
        return shuffled(torch.cat([first, second], 1), 2)

    x = net.layer(x, ("conv1", "bn1"), 24).relu()
    maps = in_stages(block, net, x, [(116, 4, 2), (232, 8, 2), (464, 4, 2)])
    x = net.layer(maps[-1], ("conv2", "bn2"), 1024).relu()
    return net.answer(x, "linear"), maps


def resnet50(net, x):
    def block(net, x, names, width, stride):
        y = net.layer(x, names[0], width // 4).relu()
        y = net.layer(y, names[1], width // 4, 3, stride).relu()
        y = net.layer(y, names[2], width)
        if x.shape != y.shape:
            name = names[0][0].replace("conv1", "shortcut")
            x = net.layer(x, (f"{name}.0", f"{name}.1"), width, 1, stride)
        return (x + y).relu()

    x = net.layer(x, ("conv1", "bn1"), 64, 3).relu()
    table = [(256, 3, 1), (512, 4, 2), (1024, 6, 2), (2048, 3, 2)]
    maps = in_stages(block, net, x, table)
    return net.answer(maps[-1], "linear"), maps


NETWORKS = {"cifar_mobilenetv2": mobilenetv2, "cifar_shufflenet_v1": shufflenet_v1,
            "cifar_shufflenet_v2": shufflenet_v2, "cifar_resnet50": resnet50}  # fmt: skip


@pytest.fixture(scope="module", params=NETWORKS)
def literature(request):
    """A network's name here, its tensors there, images, and what it makes of them."""
    net = Drawn()
    images = torch.randn(2, 3, 32, 32, generator=net.generator, dtype=torch.float64)
    logits, maps = NETWORKS[request.param](net, images)
    return request.param, net.weights, images, logits, maps


def test_parameters_are_those_of_the_table(literature):
    name, weights, *_ = literature
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=CLASSES)
    expected = sum(v.numel() for key, v in weights.items() if ".running_" not in key)
    assert sum(p.numel() for p in model.parameters()) == expected


@torch.no_grad()
def test_a_checkpoint_gives_the_same_maps_and_answers(literature, tmp_path):
    name, weights, images, logits, maps = literature
    torch.save({"epoch": 240, "model": weights}, tmp_path / "ckpt_epoch_240.pth")
    spec = ModelSpec(name, checkpoint=str(tmp_path / "ckpt_epoch_240.pth"))
    model = build_model(spec, DataShape(CLASSES, 3, (32, 32)), "teacher").double().eval()
    torch.testing.assert_close(model(images), logits, rtol=1e-9, atol=1e-9)
    own = model.forward_intermediates(images, intermediates_only=True)
    torch.testing.assert_close(own, maps, rtol=1e-9, atol=1e-9)
