"""Small students, and what onnxruntime says of the files they become."""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

import distill
from distill.cli import CONF
from distill.models.build import DataShape, ModelSpec, build_model

SMALL = {"layers": [1, 1, 1, 1], "channels": [4, 8, 16, 32], "stem_type": "deep", "stem_width": 4}


def small_student(channels=1):
    """A ResNet whose batch norms have seen images, so that folding them matters."""
    torch.manual_seed(0)
    shape = DataShape(10, channels, (32, 32))
    model = build_model(ModelSpec("resnet18", SMALL), shape, "student").train()
    for _ in range(3):
        model(torch.rand(64, channels, 32, 32))
    return model.eval()


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    """A student bundle for digits whose fitted temperature is 1.7."""
    path = tmp_path_factory.mktemp("student") / "student"
    return distill.save_student(
        small_student(), path, classes=[str(k) for k in range(10)], input_size=(1, 32, 32),
        mean=[0.4], std=[0.3], facts={"temperature": 1.7},
    )  # fmt: skip


@pytest.fixture
def composed(tmp_path):
    def make(*overrides):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("export", overrides=[f"paths.output_dir={tmp_path}", *overrides])

    return make


class Plain(nn.Module):
    """Two convolutions and a linear layer: every activation is some layer's input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.num_classes = 10
        self.first, self.second = nn.Conv2d(1, 8, 3, stride=2), nn.Conv2d(8, 8, 3, stride=2)
        self.head = nn.Linear(8 * 7 * 7, 10)

    def forward(self, images):
        features = self.second(self.first(images - 0.5).relu()).relu()
        return self.head(features.flatten(1))


@pytest.fixture
def plain():
    return Plain().eval()


def record(folder):
    return json.loads((folder / "export.json").read_text())
