"""The recipe: a bundle in, files and their numbers out."""

import logging
import math
import shutil
import sys

import pytest
import torch
from PIL import Image

import distill
from distill.config import build
from distill.config.explain import one_line, refuse
from distill.deploy.export import (
    FILES,
    WRITERS,
    NotAllWritten,
    TooMuchLost,
    check,
    export,
    load,
    program,
    rounded_answers,
    verify,
)
from distill.deploy.export import onnx as formats
from distill.deploy.export.verify import calibration_images, print_rows
from distill.metrics import evaluate
from distill.models.build import DataShape, ModelSpec, build_model
from distill.run import evaluate as evaluate_run
from tests.deploy.export.conftest import SMALL, record


def clean(data):
    """Return the test split in [0, 1], without the module under test."""
    return data.clean_test_images(torch.arange(len(data.test))).float() / 255


@pytest.fixture
def job(bundle, composed):
    return lambda *overrides: composed(f"student.checkpoint={bundle}", *overrides)


@pytest.mark.slow
def test_every_file_is_judged_by_its_own_answers_to_the_whole_test_split(
    job, bundle, tmp_path, capsys
):
    cfg = job("export.max_drop=100", "export.study=true")
    export(cfg)
    data = build.build_data(cfg)
    images, written = clean(data), record(tmp_path)
    with torch.no_grad():
        reference = distill.load_student(bundle, calibrated=True)((images - 0.4) / 0.3)
    assert (written["temperature"], written["failed"]) == (1.7, [])
    assert list(written["formats"]) == ["torch float", *FILES]
    for name, row in written["formats"].items():
        logits = reference if name == "torch float" else answer(tmp_path / row["file"], images)
        expected = evaluate(logits, data.test.labels, reference)
        for key in ("top1", "nll", "ece", "agreement"):
            assert row[key] == pytest.approx(expected[key], abs=1e-5), (name, key)
        assert 0 < row["ms_batch1"] < row["ms_batch64"]
        if name != "onnx_int8":
            assert torch.allclose(logits, reference, atol=1e-4)
            assert row["agreement"] == 1
    assert 0.9 < written["formats"]["onnx_int8"]["agreement"] < 1
    assert len(written["study"]) == 6
    small, whole = written["study"]["per channel, weights only"], written["formats"]["onnx"]
    assert small["bytes"] < whole["bytes"] / 2
    assert small["bytes"] == (tmp_path / "study" / small["file"]).stat().st_size
    printed = capsys.readouterr().out
    for word in ("torch float", *FILES, "per tensor, weights only", "logits", "probabilities"):
        assert word in printed


def answer(path, images):
    run = program.open_program(path) if path.suffix == ".pt2" else formats.open_onnx(path)
    return run(images)


def test_a_file_that_loses_too_much_fails_the_export_after_its_table(
    bundle, composed, tmp_path, capsys
):
    """All logits shifted alike: the same float student, with weights that 8 bits cannot hold."""
    student = distill.load_student(bundle)
    with torch.no_grad():
        student.fc.weight += 300 * torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    distill.save_student(student, tmp_path / "fragile", mean=[0.4], std=[0.3])
    cfg = composed(f"student.checkpoint={tmp_path / 'fragile'}", "export.activations=false")
    with pytest.raises(TooMuchLost, match=r"onnx_int8 loses \d+\.\d\d points of top-1") as failed:
        export(cfg)
    with pytest.raises(SystemExit) as stopped:
        refuse(failed.value)
    assert stopped.value.code == 3
    assert "export.max_drop=0.5" in str(failed.value)
    written = record(tmp_path)
    assert written["failed"] == ["onnx_int8"]
    rows = written["formats"]
    assert abs(rows["onnx"]["top1"] - rows["torch float"]["top1"]) < 0.005
    assert rows["onnx_int8"]["top1"] < rows["torch float"]["top1"] - 0.1
    assert "onnx_int8" in capsys.readouterr().out


def test_a_broken_bundle_ends_in_one_line(bundle, composed, tmp_path):
    shutil.copytree(bundle, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no weights")
    for name, kind in (("broken", ValueError), ("nowhere", FileNotFoundError)):
        with pytest.raises(kind, match=name) as refused:
            export(composed(f"student.checkpoint={tmp_path / name}"))
        assert "\n" not in one_line(refused.value)
    assert not list(tmp_path.rglob("*.onnx"))


def test_calibration_shows_training_views_that_the_seed_decides(job):
    data = build.build_data(job())

    def shown(seed, count=40):
        twin = data.with_options(seed=seed, batch_size=32)
        return torch.cat(list(calibration_images(twin, count, lambda images: images)))

    first = shown(0)
    assert first.shape == (40, 1, 32, 32)
    assert torch.equal(first, shown(0))
    assert torch.equal(first[:7], shown(0, 7))
    assert not torch.equal(first, shown(1))
    views = data.with_options(seed=0, batch_size=32).training_views(
        0, torch.arange(len(data.train))
    )
    known = {view.numpy().tobytes() for view in views}
    assert {(255 * view).round().byte().numpy().tobytes() for view in first} <= known


def test_rounded_answers_keep_their_bounds_and_say_what_is_lost():
    logits = torch.tensor([[9.0, 0.0, -3.0], [0.0, 6.5, 1.0], [2.0, 1.0, 0.0]])
    target = torch.tensor([2, 1, 0])
    rows = rounded_answers(logits, target)
    exact = verify.scores(logits, target, logits)
    assert rows["logits"]["step"] == pytest.approx(9 / 127)
    assert abs(rows["logits"]["nll"] - exact["nll"]) <= 9 / 127
    assert rows["probabilities"]["nll"] == math.inf  # of exp(−12) at the first label
    assert rows["probabilities"]["share_of_labels_at_0"] == pytest.approx(1 / 3)
    assert rows["probabilities"]["top1"] == exact["top1"] == pytest.approx(2 / 3)


def test_a_missing_package_is_named_by_its_extra(job, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"onnx_int8 needs pip install 'distill-kd\[export\]'"):
        check(job("export.formats=[torch_export,onnx_int8]"))
    check(job("export.formats=[torch_export]"))  # torch alone writes and runs it


@pytest.fixture
def photos(tmp_path):
    for name, colour in (("owl", (200, 80, 10)), ("fox", (10, 80, 200))):
        (tmp_path / "photos" / "train" / name).mkdir(parents=True)
        for i in range(12):
            image = Image.new("RGB", (40 + i, 50), colour)
            image.save(tmp_path / "photos" / "train" / name / f"{i}.png")
    return ["data=folder", f"data.root={tmp_path / 'photos'}", "data.num_workers=0",
            "data.batch_size=4"]  # fmt: skip


def trained_on(cfg, folder):
    """A bundle whose student was trained on the data of a configuration."""
    data = build.build_data(cfg)
    shape = DataShape(data.num_classes, data.in_chans, data.image_size)
    model = build_model(ModelSpec("resnet18", SMALL), shape, "student")
    channels = [0.5] * data.in_chans
    return distill.save_student(model, folder, classes=data.classes, mean=channels, std=channels,
                                **data.preprocessing)  # fmt: skip


TRAINED = ["data.image_size=[32,48]", "data.view.crop_pct=0.875",
           "+data.view.interpolation=bicubic", "+data.view.crop_mode=squash"]  # fmt: skip


def test_a_bundle_brings_the_preprocessing_that_it_was_trained_for(composed, photos, tmp_path):
    path = trained_on(composed(*photos, *TRAINED), tmp_path / "student")
    job = load(composed(*photos, f"student.checkpoint={path}"))
    expected = build.build_data(composed(*photos, *TRAINED)).preprocessing
    assert job.facts["input"]["shape"][1:] == list(expected.pop("input_size")) == [3, 32, 48]
    assert expected.items() <= job.facts["input"].items()
    assert job.data.preprocessing.items() >= expected.items()


@pytest.mark.parametrize(
    ("kind", "trained", "asked", "told"),
    [
        ("photos", ["data.image_size=48"], ["data.image_size=32"],
         "trained for image_size=48 and .* image_size=32: add data.image_size=48$"),
        ("photos", ["data.image_size=[32,48]"], ["data.image_size=32"],
         r"add data.image_size=\[32,48\]$"),
        ("photos", TRAINED, ["data.view.crop_pct=1", "+data.view.interpolation=bilinear"],
         "interpolation=bicubic, crop_pct=0.875 and .* interpolation=bilinear, crop_pct=1: add"),
        ("photos", TRAINED, ["+data.view.crop_mode=center"], r"add data.view.crop_mode=squash$"),
        ("digits", ["data.image_size=48"], [], "add data.image_size=48$"),
    ],
)  # fmt: skip
def test_another_preprocessing_than_the_bundles_is_named_with_what_to_give(
    kind, trained, asked, told, composed, photos, tmp_path
):
    chosen = photos if kind == "photos" else []
    path = trained_on(composed(*chosen, *trained), tmp_path / "student")
    given = (*chosen, f"student.checkpoint={path}")
    with pytest.raises(ValueError, match=told) as refused:
        load(composed(*given, *asked))
    assert "\n" not in str(refused.value)
    missing = str(refused.value).partition(": add ")[2].split()
    job = load(composed(*given, *asked, *missing))
    expected = build.build_data(composed(*chosen, *trained)).preprocessing
    assert job.facts["input"]["shape"][1:] == list(expected["input_size"])


def test_an_evaluation_at_another_resolution_goes_on_and_says_so(
    bundle, composed, tmp_path, caplog
):
    caplog.set_level(logging.INFO, "distill")
    options = ("trainer.accelerator=cpu", f"student.checkpoint={bundle}")
    evaluate_run(composed(*options, name="eval"))
    assert "was trained for" not in caplog.text
    evaluate_run(composed(*options, "data.image_size=48", name="eval"))
    assert "add data.image_size=32 to judge it as it was trained" in caplog.text
    assert (tmp_path / "summary.json").is_file()


def broken(job, path):
    path.write_text("half of it")
    raise RuntimeError("no kernel for this\nTraceback: …")


def test_a_format_that_fails_keeps_no_other_from_being_written(
    job, tmp_path, monkeypatch, capsys, caplog
):
    monkeypatch.setitem(WRITERS, "onnx_int8", broken)
    with pytest.raises(NotAllWritten, match=r"onnx_int8 was not written: no kernel for this$") as e:
        export(job("export.max_drop=100", "export.formats=[onnx_int8,torch_export]"))
    assert e.value.exit_code == 3
    assert (tmp_path / "student.pt2").is_file()
    assert not (tmp_path / "student_int8.onnx").exists()
    written = record(tmp_path)
    assert written["unwritten"] == {"onnx_int8": "no kernel for this"}
    assert list(written["formats"]) == ["torch float", "torch_export"]
    assert "onnx_int8" in capsys.readouterr().out
    assert "onnx_int8 was not written: no kernel for this" in caplog.text


def test_an_export_of_nothing_says_why(job, tmp_path, monkeypatch):
    monkeypatch.setitem(WRITERS, "onnx_int8", broken)
    with pytest.raises(ValueError, match=r"^no kernel for this$"):
        export(job("export.formats=[onnx_int8]"))
    assert not (tmp_path / "export.json").exists()


def test_in_a_narrow_terminal_columns_give_way_to_the_names_of_the_files(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    row = {"top1": 1.0, "nll": 0.1, "ece": 0.1, "agreement": 1.0, "bytes": 44_812_000}
    times = {"ms_batch1": 12.34, "ms_batch64": 112.34}
    names = ["torch float", "onnx_int8", "torch_export"]
    print_rows({name: row | times for name in names}, "test split")
    printed = capsys.readouterr().out
    assert all(f" {name} " in printed for name in names)
    assert max(map(len, printed.splitlines())) <= 80
    assert "no room for ECE %, NLL: see export.json" in printed
