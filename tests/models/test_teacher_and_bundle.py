"""Students on disk and models from names and files, judged by stock timm."""

import json
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch

import distill
from distill.models.build import ModelSpec, Normalize, build_model, normalization
from distill.models.bundle import read_facts, save_student
from distill.models.checkpoint import read_checkpoint
from distill.models.weights import DataShape

VECTOR = {"scale": [1.0, 2.0, 0.5, 1.0, 1.0, 1.0, 1.0], "bias": [0.5, -0.5, 0, 0, 0, 0, 0]}
SHAPE = DataShape(num_classes=7, in_chans=1, image_size=(32, 32))
ARGS = {"layers": [1, 1, 1, 1], "channels": [4, 8, 16, 32], "stem_type": "deep", "stem_width": 4}
SPEC = ModelSpec("resnet18", ARGS)
STOCK = """
import sys, torch
from pathlib import Path
import importlib.util
# A CPU torch beside the index's CUDA torchvision lacks two operators that importing it refers to.
library = next(Path(importlib.util.find_spec("torchvision").origin).parent.glob("_C*.so"))
try:
    torch.ops.load_library(str(library))
except OSError:
    missing = torch.library.Library("torchvision", "DEF")
    missing.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    missing.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import timm
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
with torch.inference_mode():
    logits = model(torch.load(sys.argv[2], weights_only=True))
torch.save({"logits": logits, "mean": config["mean"], "std": config["std"],
            "size": config["input_size"]}, sys.argv[3])
assert "distill" not in sys.modules
"""


@pytest.fixture
def student():
    torch.manual_seed(0)
    model = build_model(SPEC, SHAPE, "student").train()
    with torch.no_grad():
        model(torch.randn(64, 1, 32, 32))  # batch statistics of its own
    return model.eval()


@pytest.fixture
def bundle(student, tmp_path):
    return save_student(
        student, tmp_path / "student", classes=list("abcdefg"), input_size=(1, 32, 32),
        mean=[0.25], std=[0.5], facts={"temperature": 2.0}, card="# a card\n",
    )  # fmt: skip


@pytest.fixture
def images():
    return torch.randn(5, 1, 32, 32, generator=torch.Generator().manual_seed(1))


def test_stock_timm_gives_the_same_logits_without_this_package(student, bundle, images, tmp_path):
    torch.save(images, tmp_path / "images.pt")
    arguments = [bundle, tmp_path / "images.pt", tmp_path / "logits.pt"]
    subprocess.run([sys.executable, "-c", STOCK, *map(str, arguments)], check=True, cwd=tmp_path)
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    contiguous = student.to(memory_format=torch.contiguous_format)
    with torch.inference_mode():
        assert torch.equal(found["logits"], contiguous(images))
    assert tuple(found["mean"]) == (0.25,)
    assert tuple(found["std"]) == (0.5,)
    assert tuple(found["size"]) == (1, 32, 32)


def test_load_student_gives_raw_logits_or_divides_by_the_fitted_temperature(
    student, bundle, images
):
    raw = distill.load_student(bundle)(images)
    torch.testing.assert_close(raw, student(images), rtol=1e-5, atol=1e-5)
    assert torch.equal(distill.load_student(bundle, calibrated=True)(images), raw / 2.0)


def test_a_bundle_without_a_fitted_temperature_is_never_scaled(student, images, tmp_path):
    path = save_student(student, tmp_path / "b", facts={"temperature": None})
    calibrated, raw = distill.load_student(path, calibrated=True), distill.load_student(path)
    assert torch.equal(calibrated(images), raw(images))


def test_a_bundle_inherits_no_licence_or_paper_and_names_its_classes(bundle):
    config = json.loads((bundle / "config.json").read_text())
    settings = config["pretrained_cfg"]
    assert not any(settings.get(key) for key in ("license", "paper_ids", "tag", "origin_url"))
    assert config["label_names"] == list("abcdefg")
    assert read_facts(bundle)["classes"] == list("abcdefg")
    assert {p.name for p in bundle.iterdir()} == {
        "config.json", "distill.json", "model.safetensors", "README.md",
    }  # fmt: skip


def test_saving_replaces_a_bundle_whole_and_failing_leaves_the_old_one(
    student, bundle, tmp_path, monkeypatch
):
    before = (bundle / "model.safetensors").read_bytes()
    with torch.no_grad():
        student.conv1[0].weight.mul_(2)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="No space left"):
        save_student(student, bundle)
    assert (bundle / "model.safetensors").read_bytes() == before
    monkeypatch.undo()
    save_student(student, bundle)
    assert (bundle / "model.safetensors").read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["student"]


@pytest.mark.parametrize("kind", ["bundle", "safetensors", "pth", "nested pth", "lightning"])
def test_every_kind_of_checkpoint_gives_the_same_model(student, bundle, images, tmp_path, kind):
    weights = {k: v.contiguous() for k, v in student.state_dict().items()}
    path = {"bundle": bundle, "safetensors": tmp_path / "w.safetensors"}.get(kind)
    if kind == "safetensors":
        safetensors.torch.save_file(weights, path)
    elif "pth" in kind:
        path = tmp_path / "w.pth"
        torch.save({"state_dict": weights} if kind.startswith("nested") else weights, path)
    elif kind == "lightning":
        path = tmp_path / "w.ckpt"
        spec = {"name": "resnet18", "args": ARGS}
        state = {f"student.{k}": v for k, v in weights.items()}
        torch.save({"state_dict": state, "distill": {"student_model": spec}}, path)
    knows_itself = kind in ("bundle", "lightning")
    spec = ModelSpec(checkpoint=str(path)) if knows_itself else ModelSpec(
        "resnet18", ARGS, checkpoint=str(path)
    )  # fmt: skip
    model = build_model(spec, SHAPE, "student").eval()
    with torch.inference_mode():
        assert torch.equal(model(images), student(images))


def test_a_mismatch_names_both_numbers(bundle):
    with pytest.raises(ValueError, match="has 7 classes and the data have 10"):
        build_model(ModelSpec(checkpoint=str(bundle)), DataShape(10, 1, (32, 32)), "teacher")


def test_a_student_of_other_classes_keeps_the_backbone_of_its_checkpoint(student, bundle):
    torch.manual_seed(5)
    fresh = build_model(SPEC, DataShape(10, 1, (32, 32)), "student").state_dict()
    torch.manual_seed(5)
    spec = ModelSpec(checkpoint=str(bundle))
    with pytest.raises(ValueError, match="has 7 classes and the data have 10"):
        build_model(spec, DataShape(10, 1, (32, 32)), "student")  # to be judged, not trained
    torch.manual_seed(5)
    model = build_model(spec, DataShape(10, 1, (32, 32)), "student", any_classes=True)
    found = model.state_dict()
    for name, value in student.state_dict().items():
        if name.startswith("fc."):
            assert found[name].shape == fresh[name].shape
            assert not found[name].any()  # it begins with no opinion
        else:
            assert torch.equal(found[name], value)


def test_published_weights_of_other_classes_are_no_teacher():
    with pytest.raises(ValueError, match=r"has 1000 classes and the data have\s+7"):
        build_model(ModelSpec("resnet18", pretrained=True), SHAPE, "teacher")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ModelSpec("resnet81"), r"no model 'resnet81'.*did you mean resnet"),
        (ModelSpec(None), r"give student\.name"),
        (ModelSpec("resnet18", {"layrs": [1]}), "student: timm cannot build resnet18"),
        (ModelSpec("resnet34", ARGS | {"channels": [4, 8, 8, 8]}, checkpoint="BUNDLE"), None),
        (ModelSpec("tnt_s_legacy_patch16_224", {"img_size": 224}), "does not take 1×32×32 images"),
    ],
)
def test_wrong_models_are_explained(spec, message, bundle):
    if message is None:  # a bundle brings its own architecture, whatever the name says
        model = build_model(ModelSpec(spec.name, spec.args, checkpoint=str(bundle)), SHAPE, "s")
        assert model.fc.in_features == 32
        return
    with pytest.raises(ValueError, match=message):
        build_model(spec, SHAPE, "student")


def test_weights_of_another_architecture_are_refused(bundle, tmp_path):
    other = timm.create_model("resnet18", num_classes=7, in_chans=1, **ARGS | {"stem_width": 8})
    torch.save(other.state_dict(), tmp_path / "w.pth")
    spec = ModelSpec("resnet18", ARGS, checkpoint=str(tmp_path / "w.pth"))
    with pytest.raises(ValueError, match=r"does not fit the architecture: \d+ of \d+ t") as caught:
        build_model(spec, SHAPE, "student")
    own = build_model(SPEC, SHAPE, "student").state_dict()
    differing = [k for k, v in own.items() if v.shape != other.state_dict()[k].shape]
    said = str(caught.value).partition("does not fit")[2]
    assert f"{len(differing)} of {len(own.keys() | other.state_dict().keys())} tensors" in said
    assert [name for name in own if f"{name} (" in said] == differing[:3]  # the first ones
    assert "conv1.0.weight (8×1×3×3 for 4×1×3×3)" in said
    assert len(said) <= 200


class Payload:
    def __reduce__(self):
        return (exec, ("open('ran', 'w').close()",))


@pytest.mark.parametrize("name", ["x.pth", "x.ckpt", "x.safetensors"])
def test_a_hostile_or_broken_file_is_refused_and_runs_nothing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for content in ({"state_dict": {"a": Payload()}}, None):
        if content:
            torch.save(content, tmp_path / name)
        else:
            (tmp_path / name).write_bytes(b"not a checkpoint")
        with pytest.raises(ValueError, match=name):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_missing_and_damaged_bundles_are_refused(bundle, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="not a student bundle"):
        distill.load_student(tmp_path)
    (bundle / "config.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        distill.load_student(bundle)
    (bundle / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="does not hold an object"):
        distill.load_student(bundle)


def test_a_bundle_brings_its_own_normalisation(bundle):
    model = build_model(ModelSpec(checkpoint=str(bundle)), SHAPE, "teacher")
    assert normalization(model, 1).mean.flatten().tolist() == [0.25]
    assert normalization(model, 1).std.flatten().tolist() == [0.5]


def test_normalisation_is_the_models_own_and_no_part_of_its_weights():
    model = timm.create_model(
        "resnet18", in_chans=3, pretrained_cfg_overlay={"mean": (0.1, 0.2, 0.3)}
    )
    colour = normalization(model, 3)
    assert colour.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert normalization(model, 1).mean.flatten().tolist() == pytest.approx([0.2])
    assert not colour.state_dict()
    x = torch.rand(2, 1, 3, 3)
    torch.testing.assert_close(Normalize([0.5], [0.25])(x), (x - 0.5) / 0.25)


def test_a_student_is_calibrated_as_it_is_asked_to_be(student, tmp_path):
    images = torch.randn(5, 1, 32, 32)
    facts = {"temperature": 2.5, "vector_scaling": VECTOR}
    save_student(student, tmp_path / "both", facts=facts)
    with torch.inference_mode():
        raw = student(images)
        scaled = distill.load_student(tmp_path / "both", calibrated=True)(images)
        vector = distill.load_student(tmp_path / "both", calibrated="vector")(images)
    torch.testing.assert_close(scaled, raw / 2.5)
    torch.testing.assert_close(
        vector, raw * torch.tensor(VECTOR["scale"]) + torch.tensor(VECTOR["bias"])
    )
    with pytest.raises(
        ValueError, match="calibrated must be True, False or 'vector', not 'isotonic'"
    ):
        distill.load_student(tmp_path / "both", calibrated="isotonic")

    save_student(student, tmp_path / "none", facts={"temperature": None, "vector_scaling": None})
    for kind in (False, True, "vector"):
        with torch.inference_mode():
            assert torch.equal(distill.load_student(tmp_path / "none", kind)(images), raw)
