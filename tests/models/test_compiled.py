"""Compiled models in and out: what is saved has the names of the model that is not compiled."""

import pytest
import timm
import torch
from torch import nn

import distill
from distill import Distiller
from distill.models.build import DataShape, ModelSpec, build_model
from distill.models.compiled import compiled_in_place, uncompiled

ARGS = {"layers": [1] * 4, "channels": [4, 8, 16, 32], "stem_type": "deep", "stem_width": 4}


def student():
    return timm.create_model("resnet18", num_classes=4, in_chans=1, **ARGS)


def seen_by(programs):
    """A backend that notes what it is asked to compile."""
    return lambda graph, _: programs.append(graph) or graph.forward


def test_a_compiled_student_has_plain_names_and_stays_compiled():
    plain, programs = student().eval(), []
    expected = plain(torch.ones(2, 1, 32, 32))
    module = Distiller(torch.compile(plain, backend=seen_by(programs))).eval()
    names = {f"student.{name}" for name in plain.state_dict()}
    assert {n for n in module.state_dict() if n.startswith("student.")} == names
    torch.testing.assert_close(module(torch.ones(2, 1, 32, 32)), expected)
    assert programs


def test_a_part_that_is_compiled_has_plain_names():
    model = student()
    names = set(model.state_dict())
    model.layer1 = torch.compile(model.layer1, backend="eager")
    assert set(model.state_dict()) != names
    assert set(uncompiled(model).state_dict()) == names
    assert compiled_in_place(nn.Linear(1, 1)).weight.shape == (1, 1)


@pytest.mark.parametrize("wrap", [torch.compile, lambda model: model])
def test_a_bundle_of_a_compiled_student_is_that_of_the_student(wrap, tmp_path):
    model = student().eval()
    given = wrap(model, backend="eager") if wrap is torch.compile else model
    path = distill.save_student(given, tmp_path / "student", input_size=(1, 32, 32))
    saved = distill.load_student(path).state_dict()
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    assert (wrap is torch.compile) == hasattr(given, "_orig_mod")  # what was given is as it was


def test_a_checkpoint_of_a_compiled_student_starts_another_run(tmp_path):
    model = student()
    weights = {f"student._orig_mod.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "x.ckpt")  # as older versions wrote it
    spec = ModelSpec("resnet18", ARGS, checkpoint=str(tmp_path / "x.ckpt"))
    built = build_model(spec, DataShape(4, 1, (32, 32)), "student").state_dict()
    assert all(torch.equal(built[name], value) for name, value in model.state_dict().items())
