"""Models as they are built for training: their memory layout must not change their gradients."""

import copy

import pytest
import torch
from torch.nn import functional as F

from distill.models.build import ModelSpec, build_model
from distill.models.weights import DataShape

SHAPE = DataShape(num_classes=7, in_chans=1, image_size=(32, 32))
LIGHT = ("cifar_shufflenet_v1", "cifar_shufflenet_v2", "cifar_mobilenetv2")


def small(*channels):
    args = {"layers": [1, 1, 1, 1], "channels": list(channels), "stem_type": "deep"}
    return ModelSpec("resnet18", {**args, "stem_width": channels[0]})


def gradients(model, images, labels):
    F.cross_entropy(model(images), labels).backward()
    return {name: p.grad.double() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        (small(4, 8, 16, 32), 32),
        (small(16, 16, 24, 32), 32),
        *((ModelSpec(name), 8) for name in LIGHT),
    ],
)
def test_the_gradients_are_those_of_float64_in_the_plain_layout(spec, count, monkeypatch):
    """Narrow strided 1×1 convolutions in channels-last are wrong on CPUs that have only AVX2."""
    # In deep networks some rectifier is so near its kink that rounding decides its gradient.
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: F.silu(x))
    torch.manual_seed(0)
    model = build_model(spec, SHAPE, "student").train()
    reference = copy.deepcopy(model).to(memory_format=torch.contiguous_format).double()
    images, labels = torch.rand(count, 1, 32, 32), torch.arange(count) % 7
    expected = gradients(reference, images.double(), labels)
    for name, found in gradients(model, images, labels).items():
        assert (found - expected[name]).norm() <= 1e-3 * expected[name].norm() + 1e-6, name


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (small(4, 8, 16, 32), False),
        (small(16, 16, 24, 32), True),
        (ModelSpec("mobilenetv3_small_050"), True),
        *((ModelSpec(name), True) for name in ("cifar_mobilenetv2", "cifar_resnet50")),
    ],
)
def test_only_models_that_it_breaks_are_left_in_the_plain_layout(spec, expected):
    model = build_model(spec, DataShape(7, 3, (32, 32)), "student")
    kernels = [p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert {p.is_contiguous(memory_format=torch.channels_last) for p in kernels} == {expected}
