"""Any labelled folder is judged as the bundle was: its names, size, crop and temperature."""

import json
import logging
import shutil

import numpy as np
import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

import distill
from distill.config.overrides import CONF
from distill.data.module import configured
from distill.data.sources.folder import folder
from distill.deploy.predict import Predictor
from distill.metrics import fit_temperature
from distill.run import evaluate

CLASSES = ["owl", "fox", "ant"]  # not in the order of the alphabet
VECTOR = {"scale": [1.0, 2.0, 0.5], "bias": [0.0, 0.1, -0.1]}


@pytest.fixture
def bundle(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("cifar_resnet8x4", num_classes=3)
    return distill.save_student(
        model, tmp_path / "student", classes=CLASSES, input_size=(3, 32, 48), mean=[0.4] * 3,
        std=[0.2] * 3, interpolation="bicubic", crop_pct=0.8,
        facts={"temperature": 1.7, "vector_scaling": VECTOR},
    )  # fmt: skip


@pytest.fixture
def photos(tmp_path):
    random = np.random.default_rng(0)
    for name in CLASSES:
        (tmp_path / "photos" / "test" / name).mkdir(parents=True)
        for k in range(6):
            pixels = random.integers(0, 256, (60 + k, 70, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / "test" / name / f"{k}.png")
    return tmp_path / "photos"


@pytest.fixture
def judge(tmp_path, bundle, caplog):
    caplog.set_level(logging.INFO, "distill")

    def run(root, *overrides):
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        given = [f"student.checkpoint={bundle}", "data=folder", f"data.root={root}",
                 "data.num_workers=0", "trainer.accelerator=cpu", f"paths.output_dir={out}",
                 f"paths.cache={tmp_path / 'cache'}", *overrides]  # fmt: skip
        with initialize_config_dir(str(CONF), version_base="1.3"):
            evaluate(compose("eval", overrides=given))
        return json.loads((out / "summary.json").read_text()), np.load(out / "predictions.npz")

    return run


def predicted(bundle, files, calibration="none"):
    """Probabilities by class name, as `distill-predict` gives them."""
    predictor = Predictor(bundle, calibration=calibration, topk=3, device="cpu")
    found = predictor.predict([str(file) for file in files])
    return [dict(zip(one.classes, one.probabilities, strict=True)) for one in found]


@pytest.mark.parametrize("place", ["", "test"])
def test_every_picture_is_judged_as_the_bundle_predicts(judge, bundle, photos, place, caplog):
    summary, answers = judge(photos / place)
    assert summary["images"] == {"train": 0, "val": 0, "test": 18}
    assert summary["classes"] == CLASSES
    assert set(answers.files) == {"test_student", "test_target", "test_index"}
    files = [f for name in sorted(CLASSES) for f in sorted((photos / "test" / name).iterdir())]
    expected = predicted(bundle, files)
    shares = torch.from_numpy(answers["test_student"]).softmax(1)
    for file, row, label, answer in zip(
        files, shares.tolist(), answers["test_target"].tolist(), expected, strict=True
    ):
        assert CLASSES[label] == file.parent.name
        assert row == pytest.approx([answer[name] for name in CLASSES], abs=1e-5)
    right = [max(e, key=e.get) == f.parent.name for e, f in zip(expected, files, strict=True)]
    student = summary["student"]
    assert student["top1"] == pytest.approx(np.mean(right))
    for key, calibration in (("nll_after_scaling", "temperature"), ("nll_after_vector", "vector")):
        found = predicted(bundle, files, calibration)
        nll = [-np.log(p[f.parent.name]) for p, f in zip(found, files, strict=True)]
        assert student[key] == pytest.approx(np.mean(nll), abs=1e-4)
    assert (student["temperature_star"], student["temperature_status"]) == (1.7, "given")
    assert student["recall_few"] is None  # nobody knows what it was trained on
    assert summary["validation"] is None
    assert "the bundle's 1.7 is applied, nothing is fitted on" in caplog.text
    assert "18 pictures of 60 × 70 to 65 × 70 shown at 32 × 48 (height × width)" in caplog.text
    assert "was trained for" not in caplog.text


def test_the_pictures_of_the_training_are_recognised(judge, bundle, photos, caplog):
    summary, _ = judge(photos)
    assert not any("was trained on" in note for note in summary["notes"])
    flat = configured(folder, root=str(photos / "test"), image_size=32, val_fraction=0.3)
    assert len(flat.train) < 18  # of which validation and test were cut
    facts = json.loads((bundle / "distill.json").read_text())
    (bundle / "distill.json").write_text(json.dumps({**facts, "pictures": flat.pictures}))
    summary, _ = judge(photos / "test")
    assert any("the student was trained on" in note for note in summary["notes"])
    (photos / "test" / "ant" / "0.png").unlink()
    summary, _ = judge(photos / "test")
    assert not any("was trained on" in note for note in summary["notes"])


def test_a_folder_that_lacks_classes_is_judged_and_a_page_is_written(judge, photos, tmp_path):
    shutil.rmtree(photos / "test" / "owl")
    (photos / "test" / "fox").rename(photos / "test" / "FOX")
    summary, answers = judge(photos)
    assert sorted(set(answers["test_target"].tolist())) == [1, 2]
    assert summary["student"]["recall"][0] is None
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    shutil.rmtree(photos / "test" / "FOX")  # a single class is left
    summary, _ = judge(photos)
    assert summary["images"]["test"] == 6


def test_an_unknown_class_is_refused(judge, photos):
    (photos / "test" / "ant").rename(photos / "test" / "bee")
    with pytest.raises(ValueError, match="does not know bee"):
        judge(photos)


def test_a_refit_is_asked_for_and_is_of_other_pictures(judge, photos):
    summary, answers = judge(photos, "calibration=refit", "data.val_fraction=0.5")
    assert summary["images"] == {"train": 0, "val": 9, "test": 9}
    logits, target = (torch.from_numpy(answers[f"val_{key}"]) for key in ("student", "target"))
    fit = fit_temperature(logits, target)
    assert summary["student"]["temperature_status"] == fit.status
    assert summary["student"]["temperature_star"] == pytest.approx(fit.temperature)


def test_a_validation_split_is_fitted_on_as_before_and_the_bundles_is_asked_for(judge, photos):
    for part in ("train", "val"):
        shutil.copytree(photos / "test", photos / part)
    summary, _ = judge(photos)
    assert summary["images"] == {"train": 18, "val": 18, "test": 18}
    assert summary["student"]["temperature_status"] != "given"
    assert summary["validation"]["top1"] == summary["student"]["top1"]
    summary, _ = judge(photos, "calibration=bundle")
    assert summary["student"]["temperature_star"] == 1.7


def test_what_a_person_gives_wins_and_is_said(judge, photos, caplog):
    judge(photos, "data.image_size=32", "data.view.crop_pct=1")
    assert "add data.image_size=[32,48] data.view.crop_pct=0.8 to judge it as" in caplog.text


def test_a_calibration_that_is_not_there_is_refused(judge, bundle, photos):
    (bundle / "distill.json").unlink()
    with pytest.raises(ValueError, match=r"calibration=bundle: .* is no student bundle"):
        judge(photos, "calibration=bundle")
