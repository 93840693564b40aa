"""Small students, and what onnxruntime says of the files they become."""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn
from torch.nn.functional import cross_entropy

import distill
from distill.config import build
from distill.config.overrides import CONF
from distill.data.views.views import CLEAN
from distill.models.build import DataShape, ModelSpec, build_model

SMALL = {"layers": [1, 1, 1, 1], "channels": [4, 8, 16, 32], "stem_type": "deep", "stem_width": 4}


def small_student(images):
    """A ResNet whose batch norms have seen images `[N, C, H, W]`, so that folding them matters."""
    torch.manual_seed(0)
    shape = DataShape(10, images.shape[1], (32, 32))
    model = build_model(ModelSpec("resnet18", SMALL), shape, "student").train()
    with torch.no_grad():
        for _ in range(30):
            model(images[:256])
    return model.eval()


def train(model, images, labels):
    """Train for a second or two, to be right most of the time."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for rows in torch.randperm(len(images), generator=generator)[:896].split(32):
            optimizer.zero_grad()
            cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    return model.eval()


def digits():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return build.build_data(compose("export"))


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    """A student bundle for digits whose fitted temperature is 1.7."""
    data = digits()
    images = data.training_views(CLEAN, torch.arange(len(data.train))) / 255
    images = (images - 0.4) / 0.3
    model = train(small_student(images), images, data.train.labels)
    return distill.save_student(
        model, tmp_path_factory.mktemp("student") / "student", classes=data.classes,
        input_size=(1, 32, 32), mean=[0.4], std=[0.3], facts={"temperature": 1.7},
    )  # fmt: skip


@pytest.fixture
def composed(tmp_path):
    def make(*overrides, name="export"):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose(name, overrides=[f"paths.output_dir={tmp_path}", *overrides])

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
