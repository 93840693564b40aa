"""Dead channels: found, and taken out without a trace in the logits."""

import subprocess
import sys

import pytest
import timm
import torch

from distill.models.build import ModelSpec
from distill.models.bundle import save_student
from distill.models.channels import channel_groups, without_dead_channels
from tests.models.test_teacher_and_bundle import STOCK

WIDTHS = {"channels": [16, 16, 24, 32]}
SMALL = {"layers": [1, 1, 1, 1], "channels": [4, 8, 16, 32], "stem_type": "deep", "stem_width": 4}
ARCHITECTURES = {
    "basic": ("resnet18", {}),
    "students": ("resnet18", {**SMALL, "in_chans": 1}),
    "basic, deep, layer1 on the stem": ("resnet18d", {**WIDTHS, "stem_width": 8}),
    "tiered": ("resnet14t", {"channels": [8, 8, 8, 8], "act_layer": "silu"}),
    "bottleneck": ("resnet26", WIDTHS),
    "bottleneck, deep": ("resnet26d", {**WIDTHS, "stem_width": 8}),
    "dilated": ("resnet26t", {"channels": [8, 8, 8, 8], "stem_width": 16, "output_stride": 8}),
    "blurred": ("resnetblur18", {"channels": [64, 8, 8, 8]}),
}


def trained(name, args):
    """Return a float64 model whose norms all do something."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **args).double()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(layer.weight)
            torch.nn.init.normal_(layer.bias)
    with torch.no_grad():
        model.train()(torch.randn(8, model.in_chans, 32, 32).double())
    return model.eval()


def kill(model, dead):
    """Set channels to zero; `dead` gives the mask of a group of C channels."""
    parameters = dict(model.named_parameters())
    for group in channel_groups(model):
        for name in group.tensors:
            mask = dead(group.name, len(parameters[name]))
            parameters[name].data[mask] = 0


def at_random(share, seed=0):
    masks = {}
    generator = torch.Generator().manual_seed(seed)

    def dead(name, count):
        if name not in masks:
            masks[name] = torch.rand(count, generator=generator) < share
        return masks[name]

    return dead


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_smaller_model_gives_the_same_logits(kind):
    name, args = ARCHITECTURES[kind]
    full = trained(name, args)
    state = {key: value.clone() for key, value in full.state_dict().items()}
    images = torch.randn(4, full.in_chans, 48, 48).double()
    size = parameters(full)
    for share in (0.3, 0.8, 1.0):
        full.load_state_dict(state)
        kill(full, at_random(share, seed=len(kind)))
        small, widths = without_dead_channels(full, ModelSpec(name, args))
        with torch.inference_mode():
            error = (small(images) - full(images)).abs().max()
        assert error <= 1e-12
        assert parameters(small) < size
        size = parameters(small)
        assert [new <= old for old, new in widths.values()] == [True] * 5


def test_a_model_without_dead_channels_is_returned_as_it_is():
    full = trained("resnet18", SMALL)
    assert without_dead_channels(full, ModelSpec("resnet18", SMALL)) == (full, {})


def test_the_widths_are_the_smallest_that_timm_can_build():
    full = trained("resnet18", SMALL)
    alive = {"stem.0": 2, "stem.1": 1, "stem": 4, "layer1": 3, "layer1.0.bn1": 4, "layer2": 5,
             "layer2.0.bn1": 2, "layer3": 0, "layer3.0.bn1": 0, "layer4": 32,
             "layer4.0.bn1": 1}  # fmt: skip
    kill(full, lambda name, count: torch.arange(count) >= alive[name])
    small, widths = without_dead_channels(full, ModelSpec("resnet18", SMALL))
    # Two would hold the stem: but then timm would leave out layer1's projection, 4 → 4 channels.
    assert widths == {"stem": [4, 3], "layer1": [4, 4], "layer2": [8, 5], "layer3": [16, 1],
                      "layer4": [32, 32]}  # fmt: skip
    assert (small.layer4[0].conv1.weight[1:] == 0).all()  # what fills up is zero
    assert (small.layer4[0].conv2.weight[:, 1:] == 0).all()


def test_a_channel_lives_as_long_as_one_block_writes_it():
    full = trained("resnet26d", WIDTHS)
    groups = {group.name: group.tensors for group in channel_groups(full)}
    assert groups["layer2"] == (
        "layer2.0.bn3.weight", "layer2.0.bn3.bias", "layer2.0.downsample.2.weight",
        "layer2.0.downsample.2.bias", "layer2.1.bn3.weight", "layer2.1.bn3.bias",
    )  # fmt: skip
    named = dict(full.named_parameters())
    for name in groups["layer2"][:-1]:
        named[name].data[:] = 0
    small, widths = without_dead_channels(full, ModelSpec("resnet26d", WIDTHS))
    assert small is full
    assert widths == {}


def test_stock_timm_builds_the_smaller_model_from_its_bundle(tmp_path):
    architecture, args = ARCHITECTURES["bottleneck, deep"]
    full = trained(architecture, args).float()
    kill(full, at_random(0.6))
    small, _ = without_dead_channels(full, ModelSpec(architecture, args))
    images = torch.randn(5, full.in_chans, 32, 32)
    torch.save(images, tmp_path / "images.pt")
    save_student(small, tmp_path / "student", input_size=(full.in_chans, 32, 32))
    arguments = [tmp_path / "student", tmp_path / "images.pt", tmp_path / "logits.pt"]
    subprocess.run([sys.executable, "-c", STOCK, *map(str, arguments)], check=True, cwd=tmp_path)
    found = torch.load(tmp_path / "logits.pt", weights_only=True)["logits"]
    with torch.inference_mode():
        torch.testing.assert_close(found, full(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "args", "reason"),
    [
        ("mobilenetv3_small_050", {}, "arguments of timm's ResNet, and this is a MobileNetV3"),
        ("vgg11_bn", {}, "this is a VGG"),
        ("cifar_resnet8", {}, "this is a CifarNet"),
        ("seresnet18", {}, "attention layers follow from its channels"),
        ("resnext50_32x4d", {}, "grouped, or wider"),
        ("wide_resnet50_2", {}, "grouped, or wider"),
        ("resnet18", {"act_layer": "sigmoid"}, "Sigmoid does not keep zero"),
        ("resnet18", {"norm_layer": "groupnorm"}, "not batch norms"),
        ("resnet18", {"replace_stem_pool": True}, "pooling of its stem"),
        ("resnet18", {"global_pool": "catavgmax"}, "reads each channel twice"),
    ],
)
def test_where_timm_cannot_build_it_the_reason_is_said(name, args, reason):
    model = timm.create_model(name, num_classes=4, **args)
    with pytest.raises(ValueError, match=f"no channel of {name} is removed: .*{reason}"):
        without_dead_channels(model, ModelSpec(name, args))
    convolutions = [layer for layer in model.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert len(channel_groups(model)) == len(convolutions)
