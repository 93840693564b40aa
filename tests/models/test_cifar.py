"""The CIFAR networks: published sizes, and what timm expects of a model."""

import math
import re

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.models import save_for_hf
from torch import nn

from distill import load_student, save_student
from distill.models import cifar

# Parameters in millions with 100 classes, from the tables of the distillation literature.
PUBLISHED = {
    "cifar_resnet20": "0.28",
    "cifar_resnet32": "0.47",
    "cifar_resnet56": "0.86",
    "cifar_resnet110": "1.74",
    "cifar_resnet8x4": "1.23",
    "cifar_resnet32x4": "7.43",
    "cifar_wrn_16_2": "0.70",
    "cifar_wrn_40_1": "0.57",
    "cifar_wrn_40_2": "2.26",
    "cifar_vgg8": "3.97",
    "cifar_vgg13": "9.46",
    "cifar_mobilenetv2": "0.81",
    "cifar_shufflenet_v1": "0.95",
    "cifar_shufflenet_v2": "1.36",
    "cifar_resnet50": "23.71",
}
NAMES = [
    *(f"cifar_resnet{depth}" for depth in (8, 14, 20, 32, 44, 56, 110)),
    *("cifar_resnet8x4", "cifar_resnet32x4"),
    *("cifar_wrn_16_1", "cifar_wrn_16_2", "cifar_wrn_40_1", "cifar_wrn_40_2"),
    *(f"cifar_vgg{depth}" for depth in (8, 11, 13, 16, 19)),
    *("cifar_resnet50", "cifar_shufflenet_v1", "cifar_shufflenet_v2", "cifar_mobilenetv2"),
]
FAMILIES = ["cifar_resnet8", "cifar_resnet8x4", "cifar_wrn_16_2", "cifar_vgg8",
            "cifar_shufflenet_v1", "cifar_shufflenet_v2", "cifar_mobilenetv2"]  # fmt: skip
FINAL_WIDTHS = {"cifar_shufflenet_v2": 1024, "cifar_mobilenetv2": 1280}  # of a last convolution
REDUCTIONS = {"vgg": (1, 2, 4, 8, 8), "resnet50": (1, 2, 4, 8), "shufflenet": (2, 4, 8),
              "mobilenet": (2, 4, 8, 16)}  # fmt: skip

each_family = pytest.mark.parametrize("name", FAMILIES)
each_block = pytest.mark.parametrize("name", [*FAMILIES, "cifar_resnet50"])


def images(n=2, channels=3, side=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, channels, side, side, generator=generator, dtype=dtype)


def build(name, **kwargs):
    """A model in evaluation mode whose batch norms normalise, and are not the identity."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, 0, 0.1)
    with torch.no_grad():
        model(torch.randn(2, model.in_chans, 32, 32))
    return model.eval()


def reload(model, folder, **kwargs):
    save_for_hf(model, folder, safe_serialization=True)
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


def test_registered():
    assert sorted(timm.list_models(module="cifar")) == sorted(NAMES)
    assert set(NAMES) < set(cifar.__all__)
    assert all(callable(getattr(cifar, name)) for name in cifar.__all__)


@pytest.mark.parametrize(("name", "millions"), PUBLISHED.items())
def test_published_parameter_count(name, millions):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=100)
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" == millions


@pytest.mark.parametrize("name", [name for name in NAMES if re.search(r"net\d|wrn|vgg", name)])
def test_depth_is_the_name_s(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    convs = [key for key, module in model.named_modules()
             if isinstance(module, nn.Conv2d) and "shortcut" not in key]  # fmt: skip
    # Also counted: a ResNet's linear layer, a WRN's three projections, VGG's three linear layers.
    others = 1 if "resnet" in name else 3
    assert len(convs) + others == int(re.search(r"\d+", name)[0])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_shapes_and_stage_maps(name):
    x = images(1)
    model = build(name, num_classes=10)
    assert model(x).shape == (1, 10)
    assert model.num_features == FINAL_WIDTHS.get(name, model.feature_info[-1]["num_chs"])

    extractor = timm.create_model(name, features_only=True)
    reductions = next((r for family, r in REDUCTIONS.items() if family in name), (1, 2, 4))
    assert len(extractor.feature_info) == len(reductions) == len(extractor(x))
    assert tuple(extractor.feature_info.reduction()) == reductions
    channels = extractor.feature_info.channels()
    for map_, chs, reduction in zip(extractor(x), channels, reductions, strict=True):
        assert map_.shape == (1, chs, 32 // reduction, 32 // reduction)
    assert model.pretrained_cfg["pool_size"] == map_.shape[-2:]


@each_family
def test_features_only_agrees_with_forward_intermediates(name, tmp_path):
    x, model = images(), build(name)
    features, maps = model.forward_intermediates(x)
    assert torch.equal(features, model.forward_features(x))
    for extra in ({}, {"feature_cls": "getter", "out_indices": range(len(maps))}):
        extractor = reload(model, tmp_path, features_only=True, **extra)
        torch.testing.assert_close(extractor(x), maps, rtol=0, atol=0)
    extractor = reload(model, tmp_path, features_only=True, out_indices=(0, 2))
    torch.testing.assert_close(extractor(x), [maps[0], maps[2]], rtol=0, atol=0)


@each_family
@torch.no_grad()
def test_forward_intermediates_options(name):
    x, model = images(), build(name)
    features, maps = model.forward_intermediates(x)
    last = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    # A norm fits the last map; the convolution that widens it does not.
    expected = maps[-1] if name in FINAL_WIDTHS else features
    torch.testing.assert_close(last, [expected], rtol=0, atol=0)
    reached, taken = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
    torch.testing.assert_close(taken, maps[:2], rtol=0, atol=0)
    assert torch.equal(reached, maps[1])
    with pytest.raises((ValueError, AssertionError), match="NCHW"):  # the latter is timm's
        model.forward_intermediates(x, output_fmt="NHWC")


@torch.no_grad()
def test_only_the_last_map_of_wide_resnet_and_mobilenet_is_not_yet_activated():
    for name in FAMILIES:
        features, maps = build(name).forward_intermediates(images())
        assert features.min() >= 0
        assert (maps[-1].min() < 0) == ("wrn" in name or "mobilenet" in name)


@each_family
@torch.no_grad()
def test_no_classes_gives_pooled_features(name, tmp_path):
    x, model = images(), build(name)
    features = model.forward_features(x)
    pooled = features.mean((2, 3))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
    torch.testing.assert_close(model.get_classifier()(pooled), model(x))
    headless = reload(model, tmp_path, num_classes=0)
    torch.testing.assert_close(headless(x), pooled)
    assert isinstance(headless.get_classifier(), nn.Identity)


@each_family
@torch.no_grad()
def test_global_pool(name):
    x = images()
    model = build(name, num_classes=0, global_pool="max")
    assert torch.equal(model(x), model.forward_features(x).amax((2, 3)))
    model.reset_classifier(0, "")
    assert torch.equal(model(x), model.forward_features(x))
    model.reset_classifier(4, "catavgmax")
    assert model(x).shape == (2, 4)
    assert model.head_hidden_size == 2 * model.num_features


@each_family
@torch.no_grad()
def test_reset_classifier(name):
    x, model = images(dtype=torch.float64), build(name).double()
    features = model.forward_features(x)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(5)
    assert model.num_classes == 5
    assert model(x).shape == (2, 5)
    # The new layer joins the others, here in double precision, even where there was none before.
    assert model.get_classifier().weight.dtype == torch.float64
    assert torch.equal(model.forward_features(x), features)


@each_block
@torch.no_grad()
def test_save_and_reload_exactly(name, tmp_path):
    x, model = images(channels=1), build(name, in_chans=1, num_classes=7)
    again = reload(model, tmp_path / "built")
    assert (again.in_chans, again.num_classes) == (1, 7)
    assert torch.equal(again(x), model(x))
    model.reset_classifier(3)
    assert torch.equal(reload(model, tmp_path / "reset")(x), model(x))


@each_block
@torch.no_grad()
def test_a_bundle_is_a_student_again(name, tmp_path):
    x, model = images(), build(name, num_classes=7)
    save_student(model, tmp_path / "student", input_size=(3, 32, 32))
    assert torch.equal(load_student(tmp_path / "student")(x), model(x))


@each_family
@torch.no_grad()
def test_reload_for_other_channels_and_classes(name, tmp_path):
    """With first_conv and classifier named rightly, timm adapts the one and drops the other."""
    x, model = images(channels=1), build(name).double()
    again = reload(model, tmp_path, in_chans=1, num_classes=11).double()
    assert again(x.double()).shape == (2, 11)
    grey = model.forward_features(x.double().expand(-1, 3, -1, -1))
    # timm adds the weights up in single precision.
    torch.testing.assert_close(again.forward_features(x.double()), grey, rtol=1e-4, atol=1e-4)


@each_block
def test_gradient_reaches_every_parameter(name):
    # In evaluation mode: batch statistics would cancel the bias of a convolution before the norm.
    model = build(name)
    nn.functional.cross_entropy(model(images()), torch.tensor([3, 14])).backward()
    for parameter in model.parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


@each_family
@torch.no_grad()
def test_evaluation_treats_images_apart(name):
    x, model = images(4, dtype=torch.float64), build(name).double()
    apart = torch.cat([model(image) for image in x.split(1)])
    torch.testing.assert_close(model(x), apart, rtol=1e-9, atol=1e-9)
    assert (apart[0] - apart[1]).abs().max() > 1e-3


@each_family
@torch.no_grad()
def test_other_image_sizes(name):
    assert build(name)(images(side=48)).shape == (2, 100)


@each_family
@torch.no_grad()
def test_nothing_overwrites_what_a_norm_gave(name):
    model, caught = build(name), []
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.register_forward_hook(
            lambda _module, _inputs, output: caught.append((output, output.clone()))
        )
    model(images())
    assert len(caught) == len(norms)
    assert all(torch.equal(output, given) for output, given in caught)


@torch.no_grad()
def test_dropout_is_before_the_linear_layer_and_in_training_only():
    model = build("cifar_resnet8", drop_rate=1.0)
    x, bias = images(), model.get_classifier().bias
    assert not torch.allclose(model(x)[0], bias)
    assert torch.equal(model.train()(x), bias.expand(2, -1))


def convolutions(model):
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize("name", ["cifar_vgg8", "cifar_mobilenetv2"])
def test_convolutions_are_drawn_as_he(name):
    torch.manual_seed(0)
    for conv in convolutions(timm.create_model(name)):
        std = (2 / (math.prod(conv.kernel_size) * conv.out_channels)) ** 0.5
        # Six standard errors of the standard deviation of n normal draws.
        assert abs(conv.weight.std().item() / std - 1) < 6 / (2 * conv.weight.numel()) ** 0.5
        assert conv.bias is None or not conv.bias.any()


@pytest.mark.parametrize("name", ["cifar_shufflenet_v1", "cifar_shufflenet_v2"])
def test_shufflenets_are_drawn_as_pytorch_does(name):
    torch.manual_seed(0)
    for conv in convolutions(timm.create_model(name)):
        bound = conv.weight[0].numel() ** -0.5
        assert 0.8 * bound < conv.weight.abs().max() <= bound


def test_mobilenet_s_linear_layer_is_drawn_as_the_others_are():
    weight = timm.create_model("cifar_mobilenetv2").get_classifier().weight
    assert 0.99 * 1280**-0.5 < weight.abs().max() <= 1280**-0.5


def test_default_configuration():
    for name in NAMES:
        cfg = timm.get_pretrained_cfg(name)
        assert (cfg.architecture, cfg.num_classes, cfg.license) == (name, 100, None)
        data = resolve_data_config(pretrained_cfg=cfg.to_dict())
        assert data["input_size"] == (3, 32, 32)
        assert data["mean"] == (0.5071, 0.4865, 0.4409)
        assert data["std"] == (0.2673, 0.2564, 0.2762)
        # All of an image is seen: nothing resized, nothing cropped.
        assert data["crop_pct"] == 1.0
