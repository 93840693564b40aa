"""Weights of any origin as a start: wrapped, prefixed, renamed, for other classes and images."""

import re
from dataclasses import asdict

import pytest
import timm
import torch
from torch import nn

from distill.models.build import ModelSpec, build_model
from distill.models.bundle import load_student, save_student
from distill.models.weights import DataShape, renamed, shared_prefix
from distill.training.fit import built_as

NAME = "slim_resnet10_4"
SHAPE = DataShape(7, 3, (32, 32))


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(3)
    return timm.create_model(NAME, num_classes=7).state_dict()


def prefixed(weights, prefix):
    return {prefix + name: value for name, value in weights.items()}


def equal(model, weights):
    found = model.state_dict()
    return found.keys() == weights.keys() and all(torch.equal(found[k], weights[k]) for k in found)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: {"net": prefixed(w, "module.")},
        lambda w: {"model_state_dict": w, "epoch": 3, "optimizer": {"state": {}}},
        lambda w: {"state_dict": prefixed(w, "model.")},
        lambda w: {"model": prefixed(w, "module.student."), "opt": {"lr": 0.1}},
        lambda w: prefixed(w, "_orig_mod."),
        lambda w: {"checkpoint": {"model": w}},
        lambda w: {"state_dict": {k: v + 1 for k, v in w.items()}, "state_dict_ema": w},
        lambda w: {**w, "total_ops": torch.zeros(1), "layer1.total_params": torch.zeros(1)},
        lambda w: {k: v for k, v in w.items() if not k.endswith("num_batches_tracked")},
        lambda w: {**prefixed(w, "encoder."), "projector.weight": torch.zeros(4, 4)},
    ],
)
def test_the_same_weights_in_the_forms_found_in_the_wild(weights, wrap, tmp_path):
    torch.save(wrap(weights), tmp_path / "w.pth")
    spec = ModelSpec(NAME, checkpoint=str(tmp_path / "w.pth"))
    assert equal(build_model(spec, SHAPE, "teacher"), weights)


def test_two_models_in_one_file_are_not_chosen_between(weights, tmp_path):
    both = prefixed(weights, "student.") | prefixed(weights, "teacher.")
    for content in (both, {"model": weights, "net": weights}):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=r"w\.pth: it holds several .*models: \w+"):
            build_model(ModelSpec(NAME, checkpoint=str(tmp_path / "w.pth")), SHAPE, "teacher")


def test_a_map_of_keys_is_an_order_or_patterns(weights, tmp_path):
    others = {f"_{k}.{name.rpartition('.')[2]}": v for k, (name, v) in enumerate(weights.items())}
    torch.save(others, tmp_path / "w.pth")
    path = str(tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"does not fit the architecture: .* nearest to"):
        build_model(ModelSpec(NAME, checkpoint=path), SHAPE, "teacher")
    spec = ModelSpec(NAME, checkpoint=path, key_map="order")
    assert equal(build_model(spec, SHAPE, "teacher"), weights)

    untracked = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    torch.save({f"{k}": v for k, v in enumerate(untracked.values())}, tmp_path / "w.pth")
    assert equal(build_model(spec, SHAPE, "teacher"), weights)

    theirs = {re.sub(r"^layer(\d)", r"block_\1", name): v for name, v in weights.items()}
    torch.save(theirs, tmp_path / "w.pth")
    spec = ModelSpec(NAME, checkpoint=path, key_map={r"^block_(\d)": r"layer\1"})
    assert equal(build_model(spec, SHAPE, "teacher"), weights)
    with pytest.raises(ValueError, match="key_map gives two tensors the name x"):
        build_model(ModelSpec(NAME, checkpoint=path, key_map={r".*": "x"}), SHAPE, "teacher")
    torch.save(dict(list(theirs.items())[1:]), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"key_map=order pairs \d+ tensors with the model's \d+"):
        build_model(ModelSpec(NAME, checkpoint=path, key_map="order"), SHAPE, "teacher")


def published(monkeypatch, name, weights, classes=12):
    """Let timm find weights of an architecture as it finds published ones, without a network."""
    overlay = {"state_dict": weights, "num_classes": classes}
    create = timm.create_model

    def offline(model_name, pretrained=False, **options):
        if pretrained and "pretrained_cfg_overlay" not in options:
            options["pretrained_cfg_overlay"] = overlay
        return create(model_name, pretrained=pretrained, **options)

    monkeypatch.setattr(timm, "create_model", offline)


@pytest.mark.parametrize("source", ["published", "file"])
def test_other_classes_and_channels_give_a_new_head_and_timms_own_first_layer(
    source, monkeypatch, tmp_path
):
    torch.manual_seed(1)
    full = timm.create_model("resnet10t", num_classes=12).state_dict()
    shape = DataShape(5, 1, (32, 32))
    expected = timm.create_model(
        "resnet10t", pretrained=True, num_classes=5, in_chans=1,
        pretrained_cfg_overlay={"state_dict": dict(full), "num_classes": 12},
    ).state_dict()  # fmt: skip
    if source == "file":
        torch.save(full, tmp_path / "w.pth")
        spec = ModelSpec("resnet10t", checkpoint=str(tmp_path / "w.pth"))
    else:
        monkeypatch.setattr("distill.models.build.published_config", lambda name: {
            **timm.get_pretrained_cfg(name).to_dict(), "num_classes": 12})  # fmt: skip
        published(monkeypatch, "resnet10t", full)
        spec = ModelSpec("resnet10t", pretrained=True)
    with pytest.raises(ValueError, match="has 12 classes and the data have 5: teacher=finetuned"):
        build_model(spec, shape, "teacher")
    said = []
    found = build_model(spec, shape, "student", any_classes=True, note=said.append).state_dict()
    assert [k for k, v in found.items() if not torch.equal(v, expected[k])] == [
        "fc.weight", "fc.bias"]  # fmt: skip
    assert found["fc.weight"].shape == (5, 512)
    assert not found["fc.weight"].any()  # it begins with no opinion
    assert "of 12 classes, and the data have 5; the last layer starts anew" in said[0]
    assert "for 3 channels, and the data have 1; the first layer is adapted" in said[1]


def test_position_embeddings_are_resampled_as_timm_does(tmp_path):
    torch.manual_seed(1)
    full = timm.create_model("test_vit", num_classes=5).state_dict()
    torch.save({"model": full}, tmp_path / "w.pth")
    spec = ModelSpec("test_vit", checkpoint=str(tmp_path / "w.pth"))
    said = []
    model = build_model(spec, DataShape(5, 3, (96, 96)), "teacher", note=said.append)
    expected = timm.create_model(
        "test_vit", pretrained=True, num_classes=5, img_size=96,
        pretrained_cfg_overlay={"state_dict": dict(full), "num_classes": 5},
    )  # fmt: skip
    assert equal(model, expected.state_dict())
    assert model.pos_embed.shape != full["pos_embed"].shape
    assert said == [f"teacher.checkpoint={tmp_path}/w.pth: position embeddings are resampled for "
                    "96 × 96 pixels"]  # fmt: skip
    assert "state_dict" not in model.pretrained_cfg or model.pretrained_cfg["state_dict"] is None


LITERATURE = {
    "cifar_resnet20": {
        "stem.0.": "conv1.", "stem.1.": "bn1.", "stages.0.": "layer1.", "stages.1.": "layer2.",
        "stages.2.": "layer3.", ".norm": ".bn", ".shortcut.": ".downsample.", "head.fc.": "fc.",
    },
    "cifar_wrn_16_1": {
        "stem.": "conv1.", "norm.0.": "bn1.", "stages.0.": "block1.layer.",
        "stages.1.": "block2.layer.", "stages.2.": "block3.layer.", ".norm": ".bn",
        ".shortcut.": ".convShortcut.", "head.fc.": "fc.",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LITERATURE)
def test_the_names_of_the_literatures_cifar_checkpoints(name, tmp_path):
    torch.manual_seed(2)
    own = timm.create_model(name, num_classes=7).state_dict()
    theirs = {}
    for key, value in own.items():
        for here, there in LITERATURE[name].items():
            key = there + key.removeprefix(here) if key.startswith(here) else (
                key.replace(here, there) if here.startswith(".") else key)  # fmt: skip
        theirs[key] = value
    assert not theirs.keys() & own.keys()
    torch.save({"epoch": 240, "model": theirs}, tmp_path / "ckpt_epoch_240.pth")
    spec = ModelSpec(name, checkpoint=str(tmp_path / "ckpt_epoch_240.pth"))
    assert equal(build_model(spec, SHAPE, "teacher"), own)


class LiteratureVgg(nn.Module):
    """VGG-8 with batch norm as the literature's code numbers its layers."""

    def __init__(self, widths=(64, 128, 256, 512, 512)):
        super().__init__()
        chs = 3
        for k, width in enumerate(widths):
            block = nn.Sequential(nn.Conv2d(chs, width, 3, padding=1), nn.BatchNorm2d(width))
            setattr(self, f"block{k}", block)
            chs = width
        self.classifier = nn.Linear(chs, 7)

    def forward(self, x):
        for k in range(5):
            x = torch.relu(getattr(self, f"block{k}")(x))
            x = nn.functional.max_pool2d(x, 2) if k < 3 else x
        return self.classifier(x.mean((2, 3)))


def test_a_vgg_of_the_literature_gives_the_same_answers(tmp_path):
    torch.manual_seed(4)
    theirs = LiteratureVgg().eval()
    torch.save({"model": theirs.state_dict()}, tmp_path / "vgg8.pth")
    spec = ModelSpec("cifar_vgg8", checkpoint=str(tmp_path / "vgg8.pth"))
    ours = build_model(spec, SHAPE, "teacher").eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


def test_a_prefix_is_what_the_models_names_have_in_common():
    own = {"a.weight": 0, "b.weight": 0, "c.bias": 0}
    assert shared_prefix({"x.a.weight": 1, "x.b.weight": 1, "x.c.bias": 1}, own) == "x."
    assert shared_prefix({"a.weight": 1, "b.weight": 1, "c.bias": 1}, own) == ""
    assert shared_prefix({"q": 1}, own) == ""
    model = nn.Linear(2, 2)
    assert renamed({"other.kind": torch.zeros(1)}, model, None).keys() == {"other.kind"}


def test_a_model_of_one_size_comes_back_at_the_size_it_was_trained_for(tmp_path):
    """Stock timm, a bundle and a Lightning checkpoint all build it for the same images."""
    torch.manual_seed(1)
    shape = DataShape(5, 3, (96, 96))
    model = build_model(ModelSpec("test_vit"), shape, "student").eval()
    save_student(model, tmp_path / "bundle", input_size=(3, 96, 96))
    content = {
        "state_dict": prefixed(model.state_dict(), "student."),
        "distill": {
            "student_model": asdict(built_as(ModelSpec("test_vit"), shape)),
            "classes": list("abcde"),
            "preprocessing": {"input_size": [3, 96, 96], "mean": [0.5] * 3, "std": [0.5] * 3},
        },
    }
    torch.save(content, tmp_path / "last.ckpt")
    images = torch.rand(2, 3, 96, 96)
    with torch.inference_mode():
        expected = model(images)
        for again in (
            load_student(tmp_path / "bundle"),
            load_student(tmp_path / "last.ckpt"),
            timm.create_model(f"local-dir:{tmp_path}/bundle", pretrained=True).eval(),
            build_model(ModelSpec(checkpoint=str(tmp_path / "bundle")), shape, "teacher").eval(),
        ):
            torch.testing.assert_close(again(images), expected)


def test_a_deep_stem_is_folded_for_grey_images_as_any_first_layer_is(weights, tmp_path):
    model = timm.create_model(NAME, num_classes=7)
    model.load_state_dict(weights)
    save_student(model, tmp_path / "bundle", input_size=(3, 32, 32))
    said = []
    spec = ModelSpec(checkpoint=str(tmp_path / "bundle"))
    grey = build_model(spec, DataShape(7, 1, (32, 32)), "student", note=said.append).eval()
    folded = weights["conv1.0.weight"].sum(dim=1, keepdim=True)
    torch.testing.assert_close(grey.state_dict()["conv1.0.weight"], folded)
    image = torch.rand(2, 1, 32, 32)
    with torch.inference_mode():  # what it says of the grey image shown in three equal channels
        torch.testing.assert_close(grey(image), model.eval()(image.expand(-1, 3, -1, -1)))
    assert "for 3 channels, and the data have 1; the first layer is adapted" in said[0]
