"""Whose class is whose: teachers that know the data's classes in another order, or more of them."""

import json
import logging
from dataclasses import replace

import pytest
import timm
import torch

from distill.models.build import ModelSpec, build_matched, build_model, published_label_set
from distill.models.bundle import save_student
from distill.models.checkpoint import Checkpoint, read_checkpoint
from distill.models.classes import LabelSet, MappedClasses, imagenet_names, matched, read_groups
from distill.models.features import feature_channels, forward_with_features
from distill.models.weights import DataShape
from distill.training.cache import identity

ARGS = {"layers": [1, 1, 1, 1], "channels": [4, 8, 16, 32], "stem_type": "deep", "stem_width": 4}
CLASSES = ("ape", "bee", "cat", "dog", "eel")
ORDER = [3, 0, 4, 1, 2]  # of the permuted bundle: dog, ape, eel, bee, cat
LAST_BITS = {"rtol": 1e-5, "atol": 1e-6}  # which differ by a column's place in the last product
SHAPE = DataShape(5, 1, (32, 32), CLASSES)


def resnet(classes=5):
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=classes, in_chans=1, **ARGS).eval()


def save(model, path, classes):
    return save_student(model, path, classes=classes, input_size=(1, 32, 32), mean=[0.5], std=[0.5])


def permuted(model, order):
    """The same model, whose class k is the original's class order[k]."""
    twin = resnet(len(order))
    state = model.state_dict()
    rows = {name: state[name][order] for name in ("fc.weight", "fc.bias")}
    twin.load_state_dict({**state, **rows})
    return twin


@pytest.fixture
def images():
    return torch.rand(6, 1, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def bundles(tmp_path):
    model = resnet()
    names = [CLASSES[k] for k in ORDER]
    first = save(model, tmp_path / "first", CLASSES)
    return first, save(permuted(model, ORDER), tmp_path / "second", names)


def answers(model, images):
    with torch.inference_mode():
        return model.eval()(images)


def test_a_bundle_in_another_order_answers_exactly_as_the_one_in_order(bundles, images, caplog):
    caplog.set_level(logging.INFO, "distill")
    first = build_matched(ModelSpec(checkpoint=str(bundles[0])), SHAPE, "teacher")
    assert not caplog.records
    second = build_matched(ModelSpec(checkpoint=str(bundles[1])), SHAPE, "teacher")
    torch.testing.assert_close(*(answers(m, images) for m in (first, second)), **LAST_BITS)
    assert "another order: they are matched by name" in caplog.text
    taken = build_model(ModelSpec(checkpoint=str(bundles[1])), SHAPE, "teacher")
    assert (answers(taken, images) - answers(first, images)).abs().max() > 1e-2  # as it was
    assert second.num_classes == 5
    assert identity(second) != identity(first)


def test_a_model_that_knows_more_gives_the_rows_of_the_datas_classes(bundles, images):
    shape = replace(SHAPE, num_classes=2, classes=("Cat", "bee"))
    whole = build_matched(ModelSpec(checkpoint=str(bundles[0])), SHAPE, "teacher")
    part = build_matched(ModelSpec(checkpoint=str(bundles[1])), shape, "teacher")
    expected = answers(whole, images)[:, [2, 1]]
    torch.testing.assert_close(answers(part, images), expected, **LAST_BITS)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("ape", "bee", "cat", "dog", "fox"), "is called 'fox': it knows dog, ape, eel"),
        (("ape", "fox"), "has 5 classes and the data have 2, and none of its is called 'fox'"),
        (("ape", "Ape", "cat"), "its ape is both 'ape' and 'Ape'"),
    ],
)
def test_classes_of_other_names_are_refused_and_shown(bundles, classes, message):
    shape = replace(SHAPE, num_classes=len(classes), classes=classes)
    with pytest.raises(ValueError, match=message) as caught:
        build_matched(ModelSpec(checkpoint=str(bundles[1])), shape, "teacher")
    assert "\n" not in str(caught.value)


def test_weights_without_names_are_taken_in_the_datas_order_and_that_is_said(
    bundles, images, tmp_path, caplog
):
    path = tmp_path / "plain.pth"
    torch.save(resnet().state_dict(), path)
    spec = ModelSpec("resnet18", ARGS, checkpoint=str(path))
    model = build_matched(spec, SHAPE, "teacher")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "plain.pth does not say what its 5 classes are" in record.getMessage()
    assert torch.equal(answers(model, images), answers(resnet(), images))
    with pytest.raises(ValueError, match=r"has 5 classes and the data have 2.*teacher\.classes"):
        build_matched(spec, replace(SHAPE, num_classes=2, classes=("ape", "bee")), "teacher")


def test_a_table_maps_several_classes_to_one_as_probabilities(bundles, images, tmp_path):
    table = tmp_path / "classes.csv"
    table.write_text("own,teacher\nmammal,cat\nmammal,ape\nmammal,3\nfish,EEL\n", encoding="utf-8")
    shape = replace(SHAPE, num_classes=2, classes=("fish", "mammal"))
    spec = ModelSpec(checkpoint=str(bundles[0]))
    found = answers(build_matched(spec, shape, "teacher", str(table)), images).softmax(1)
    p = answers(build_matched(spec, SHAPE, "teacher"), images).softmax(1)
    expected = torch.stack([p[:, 4], p[:, 0] + p[:, 2] + p[:, 3]], dim=1)
    torch.testing.assert_close(found, expected / expected.sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,1\ny,2\ny", "line 3 has 1 cells, not two"),
        ("x,1\nz,2", "line 2: 'z' is not a class: name one of 'x', 'y'"),
        ("x,1\ny,gnu", "line 2: 'gnu' is no class of teacher"),
        ("x,1\ny,7", "a number from 0 to 3"),
        ("x,1\ny,crane", "could be a .crane. and b .crane.: give a number"),
        ("x,1\nx,2", "no line for 'y': each class needs one"),
        ("x,1\ny,1", "its b .crane. is both 'x' and 'y'"),
        ("x,1\nx,1\ny,2", "its b .crane. is 'x' twice"),
        ("", "no line for 'x', 'y'"),
    ],
)
def test_what_is_wrong_in_a_table_is_said(tmp_path, text, message):
    path = tmp_path / "t.csv"
    path.write_text(text, encoding="utf-8")
    known = LabelSet(4, [["a", "crane"], ["b", "crane"], ["c"], ["d"]], "teacher")
    with pytest.raises(ValueError, match=message):
        read_groups(str(path), known, ["x", "y"])


def test_a_table_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"teacher\.classes=.*No such file"):
        read_groups(str(tmp_path / "none.csv"), LabelSet(1, None, "teacher"), ["x"])


def test_imagenets_classes_are_found_by_synset_or_by_any_one_name():
    known = published_label_set(ModelSpec("resnet18.a1_in1k", pretrained=True), "teacher")
    classes = ["golden_retriever", "n01440764", "Toilet-Paper", "Tinca tinca"]
    assert matched(known, classes[:3], "teacher", None) == [[207], [0], [999]]
    with pytest.raises(ValueError, match="'n01440764' and 'Tinca tinca'"):
        matched(known, classes, "teacher", None)
    with pytest.raises(ValueError, match=r"'crane' could be n02012849 \(crane\) or n03126707"):
        matched(known, ["tench", "crane"], "teacher", None)


def test_other_imagenets_are_known_by_their_count_and_any_other_is_not():
    assert imagenet_names(11821) is not None
    for count in (11821, 21841, 21843):
        assert ["n01440764", "tench", "Tinca tinca"] in imagenet_names(count)
    assert imagenet_names(10000) is None


def test_a_thousand_classes_that_are_not_imagenets_keep_their_order(caplog):
    known = LabelSet(1000, imagenet_names(1000), "teacher", of_imagenet=True)
    assert matched(known, [str(k) for k in range(1000)], "teacher", None) is None
    assert "their order is taken for the data's" in caplog.text
    assert matched(known, [names[0] for names in known.names], "teacher", None) is None


def test_features_come_with_mapped_logits_and_all_else_is_the_models_own(images):
    model = resnet()
    mapped = MappedClasses(model, [[k] for k in ORDER])
    logits, (maps, embedding, _) = forward_with_features(mapped, images, [1, 2])
    expected, (others, theirs, _) = forward_with_features(model, images, [1, 2])
    assert torch.equal(embedding, theirs)
    assert torch.equal(logits, expected[:, ORDER])
    assert all(map(torch.equal, maps, others))
    assert feature_channels(mapped, [1, 2], "teacher") == feature_channels(model, [1, 2], "teacher")
    assert mapped.pretrained_cfg == model.pretrained_cfg
    with pytest.raises(AttributeError, match="nothing"):
        _ = mapped.nothing
    assert identity(mapped) != identity(MappedClasses(model, [[k] for k in range(5)]))


@pytest.mark.parametrize("name", ["local-dir", "checkpoint"])
def test_a_bundle_of_timms_own_is_matched_by_its_label_names(bundles, images, name):
    (bundles[1] / "distill.json").unlink()
    spec = {"checkpoint": ModelSpec(checkpoint=str(bundles[1])),
            "local-dir": ModelSpec(f"local-dir:{bundles[1]}", pretrained=True)}[name]  # fmt: skip
    found = answers(build_matched(spec, SHAPE, "teacher"), images)
    torch.testing.assert_close(found, answers(resnet(), images))


def test_a_damaged_list_of_names_is_refused(bundles):
    facts = bundles[0] / "distill.json"
    for names, message in ((["a", "b"], "2 class names and 5 classes"), ([1] * 5, "list of names")):
        facts.write_text(json.dumps({"classes": names}))
        with pytest.raises(ValueError, match=message):
            build_matched(ModelSpec(checkpoint=str(bundles[0])), SHAPE, "teacher")


def test_a_lightning_checkpoint_knows_its_classes(tmp_path):
    state = {f"student.{name}": value for name, value in resnet().state_dict().items()}
    about = {"student_model": {"name": "resnet18", "args": ARGS}, "classes": list(CLASSES)}
    torch.save({"state_dict": state, "distill": about}, tmp_path / "last.ckpt")
    assert list(read_checkpoint(tmp_path / "last.ckpt").classes) == list(CLASSES)


def test_a_student_starts_from_the_rows_of_the_classes_it_knows(bundles, images):
    spec = ModelSpec(checkpoint=str(bundles[1]))
    same = build_model(spec, SHAPE, "student", any_classes=True)
    torch.testing.assert_close(answers(same, images), answers(resnet(), images))

    shape = DataShape(3, 1, (32, 32), ("cat", "fox", "ape"))
    found = build_model(spec, shape, "student", any_classes=True).fc.weight
    own = resnet().fc.weight
    assert torch.equal(found[[0, 2]], own[[2, 0]])
    assert not found[1].any()  # a class that it does not know begins with no opinion

    other = replace(shape, classes=("x", "y", "z"))
    assert not build_model(spec, other, "s", any_classes=True).fc.weight.any()


def test_names_that_are_no_names_are_refused():
    with pytest.raises(ValueError, match="its classes are not a list of names"):
        Checkpoint(resnet().state_dict(), classes=[1, 2])


@pytest.mark.parametrize("published", [True, False])
def test_a_model_of_imagenet_teaches_the_classes_it_has(tmp_path, caplog, published):
    caplog.set_level(logging.INFO, "distill")
    torch.manual_seed(0)
    whole = timm.create_model("test_resnet", num_classes=1000).eval()
    path = tmp_path / "imagenet.pth"
    torch.save(whole.state_dict(), path)
    shape = DataShape(2, 3, (64, 64), ("golden_retriever", "n01440764"))
    overlay = {"pretrained_cfg_overlay": {"file": str(path)}}
    spec = ModelSpec("test_resnet", overlay, pretrained=True) if published else ModelSpec(
        "test_resnet", checkpoint=str(path))  # fmt: skip
    model = build_matched(spec, shape, "teacher")
    images = torch.rand(2, 3, 64, 64)
    expected = answers(whole, images)[:, [207, 0]]
    torch.testing.assert_close(answers(model, images), expected)
    assert "has 1000 classes, of which the data's 2 are taken by name: golden_retriever = n020" in (
        caplog.text
    )
    assert ("names no classes, and is taken for one of ImageNet's" in caplog.text) != published


def test_a_strangers_names_command_no_terminal(caplog):
    caplog.set_level(logging.INFO, "distill")
    known = LabelSet(3, [["a\x1b[2J"], ["b"], ["c"]], "teacher")
    matched(known, ["a\x1b[2J", "b"], "teacher", None)
    with pytest.raises(ValueError, match="none of its is called") as caught:
        matched(known, ["z\x1b"], "teacher", None)
    for text in (caplog.records[0].getMessage(), str(caught.value)):
        assert text.isprintable()


def test_a_table_for_a_model_that_says_nothing_of_its_classes_is_refused():
    with pytest.raises(ValueError, match="nothing says which classes the teacher has"):
        build_matched(ModelSpec("resnet18", ARGS), SHAPE, "teacher", "classes.csv")
