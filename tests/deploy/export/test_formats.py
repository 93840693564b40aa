"""Each file against the module it was made from, in its own runtime."""

import json

import onnx
import pytest
import torch
from torch import nn

from distill.deploy.export import onnx as formats
from distill.deploy.export import program
from distill.deploy.export.program import Deployed
from distill.models.build import Normalize
from distill.models.cifar_blocks import ShuffleV1Block, ShuffleV2Block
from tests.conftest import ROOT
from tests.deploy.export.conftest import small_student

MEAN, STD = [0.1, 0.4, 0.7], [0.2, 0.3, 0.4]
FACTS = {"classes": ["é", "b"], "temperature": 1.7, "distill": "1"}


@pytest.fixture(scope="module")
def deployed():
    """A student for colour images, with preprocessing and temperature."""
    student = small_student(torch.randn(64, 3, 32, 32)).to(memory_format=torch.channels_last)
    return Deployed(student, Normalize(MEAN, STD), 1.7).eval()


@pytest.fixture(scope="module")
def files(deployed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    traced = program.trace(deployed, (3, 32, 32))
    formats.write_onnx(formats.as_onnx(traced), folder / "student.onnx", FACTS)
    program.write_program(traced, folder / "student.pt2", FACTS)
    return folder


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_a_file_answers_like_the_student_for_any_batch_size(kind, deployed, files):
    open_file = {"onnx": formats.open_onnx, "pt2": program.open_program}[kind]
    run = open_file(files / f"student.{kind}")
    for size in (1, 7, 64):
        images = torch.rand(size, 3, 32, 32)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        with torch.no_grad():
            expected = deployed.student((images - mean) / std) / 1.7
        assert torch.allclose(run(images), expected, atol=1e-5)


def test_a_file_is_one_file_that_says_what_it_is_and_not_where_it_was_made(files):
    assert sorted(path.name for path in files.iterdir()) == ["student.onnx", "student.pt2"]
    model = onnx.load(files / "student.onnx")
    onnx.checker.check_model(model, full_check=True)
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(said["classes"]) == ["é", "b"]
    assert (said["temperature"], said["distill"]) == ("1.7", "1")
    (images,), (logits,) = model.graph.input, model.graph.output
    assert (images.name, logits.name) == ("images", "logits")
    for value in (images, logits):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    extra = {"distill.json": ""}
    torch.export.load(files / "student.pt2", extra_files=extra)
    assert json.loads(extra["distill.json"])["classes"] == ["é", "b"]
    for path in files.iterdir():
        content = path.read_bytes()
        assert b"site-packages" not in content
        assert str(ROOT).encode() not in content


def test_without_preprocessing_and_temperature_a_file_holds_the_bare_student(tmp_path, plain):
    bare = Deployed(plain, None, None).eval()
    path = tmp_path / "student.onnx"
    formats.write_onnx(formats.as_onnx(program.trace(bare, (1, 32, 32))), path, {})
    images = torch.randn(3, 1, 32, 32)
    with torch.no_grad():
        assert torch.allclose(formats.open_onnx(path)(images), plain(images), atol=1e-5)
    assert {node.op_type for node in onnx.load(path).graph.node} & {"Div"} == set()


class Branching(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


class Exotic(nn.Module):
    def forward(self, images):
        return torch.special.i1e(images).mean((2, 3))


def test_what_cannot_be_exported_is_said_in_one_line(capfd):
    with pytest.raises(ValueError, match="cannot be exported: ") as refused:
        program.trace(Branching(), (2, 4, 4))
    assert "\n" not in str(refused.value)
    traced = program.trace(Exotic(), (2, 4, 4))
    with pytest.raises(ValueError, match=r"cannot be written as ONNX: .*i1e") as refused:
        formats.as_onnx(traced)
    assert "\n" not in str(refused.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_shuffled_channels_are_exported(kind, tmp_path):
    torch.manual_seed(0)
    blocks = nn.Sequential(ShuffleV1Block(48, 48), ShuffleV2Block(48, 48)).eval()
    traced = program.trace(blocks, (48, 4, 4))
    path = tmp_path / f"blocks.{kind}"
    if kind == "onnx":
        formats.write_onnx(formats.as_onnx(traced), path, FACTS)
    else:
        program.write_program(traced, path, FACTS)
    run = {"onnx": formats.open_onnx, "pt2": program.open_program}[kind](path)
    images = torch.rand(3, 48, 4, 4)
    with torch.no_grad():
        assert torch.allclose(run(images), blocks(images), atol=1e-5)
