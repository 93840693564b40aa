"""`distill-predict`, judged by stock timm's own preprocessing."""

import csv
import io
import json
import os
import subprocess

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import distill
from distill.data.sources.images import decoded
from distill.data.sources.splits import Streamed
from distill.data.views.build import build_view
from distill.data.views.views import CLEAN
from distill.deploy import predict
from distill.models.build import normalization
from distill.utils.files import plain_cell
from tests.conftest import BIN

ARGS = {"layers": [1, 1, 1, 1], "channels": [4, 8, 16, 32], "stem_type": "deep", "stem_width": 4}
CLASSES = ["=cmd", "owl", "fox"]
PLAIN = {"calibration": "temperature", "topk": None, "device": "cpu"}


@pytest.fixture
def bundle(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=3, in_chans=3, **ARGS)
    vector = {"scale": [1.0, 2.0, 3.0], "bias": [0.1, 0.2, 0.3]}
    return distill.save_student(
        model, tmp_path / "student", classes=CLASSES, input_size=(3, 32, 32),
        mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.1], interpolation="bicubic", crop_pct=0.9,
        facts={"temperature": 2.0, "vector_scaling": vector},
    )  # fmt: skip


@pytest.fixture
def photos(tmp_path):
    random = np.random.default_rng(0)
    (tmp_path / "photos" / "deeper").mkdir(parents=True)
    for name, mode, shape in (
        ("=1.png", "RGB", (40, 50, 3)), ("b.jpg", "RGB", (31, 32, 3)),
        ("deeper/grey.png", "L", (64, 33)), ("deeper/clear.webp", "RGBA", (50, 50, 4)),
    ):  # fmt: skip
        pixels = random.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels, mode).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n1234")
    (tmp_path / "photos" / "empty.jpg").write_bytes(b"")
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


def probabilities(bundle, file, change=lambda logits: logits / 2.0):
    """Return what stock timm makes of an image file, with its own transforms."""
    model = timm.create_model(f"local-dir:{bundle}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    image = Image.open(file)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    with torch.inference_mode():
        view = timm.data.create_transform(**config)(image.convert("RGB"))
        return change(model(view[None])[0]).softmax(0)


def test_every_image_gets_the_calibrated_probabilities_of_stock_timm(bundle, photos, capsys):
    predict.run(bundle, [str(photos)], None, None, 2, **PLAIN)
    printed = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(printed.out)))
    assert [row["path"] for row in rows] == sorted(
        str(photos / name) for name in ("=1.png", "b.jpg", "deeper/grey.png", "deeper/clear.webp")
    )
    for row in rows:
        expected = probabilities(bundle, row["path"])
        found = {row[f"class_{k}"].lstrip("'"): float(row[f"probability_{k}"]) for k in (1, 2, 3)}
        assert list(found.values()) == sorted(found.values(), reverse=True)
        for name, p in zip(CLASSES, expected, strict=True):
            assert found[name] == pytest.approx(p.item(), abs=2e-6)
    assert "'=cmd" in printed.out
    broken, empty, counted = printed.err.splitlines()
    assert broken.startswith(f"distill-predict: {photos / 'broken.png'}: ")
    assert empty.endswith("empty.jpg: it is not an image that Pillow reads")
    assert counted == "distill-predict: 4 images, 2 skipped"


def test_a_missing_path_is_skipped_and_counted_like_a_broken_one(bundle, photos, capsys):
    given = [str(photos / "gone.png"), str(photos / "b.jpg"), str(photos / "empty.jpg")]
    predict.run(bundle, given, None, "jsonl", 2, **PLAIN)
    printed = capsys.readouterr()
    assert [json.loads(line)["path"] for line in printed.out.splitlines()] == given[1:2]
    missing, _, counted = printed.err.splitlines()
    assert missing == f"distill-predict: {given[0]}: No such file or directory"
    assert counted == "distill-predict: 1 image, 2 skipped"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_a_bundle_sees_the_clean_views_that_it_was_judged_by(photos, tmp_path, channels, mode):
    model = timm.create_model("resnet18", num_classes=3, in_chans=channels, **ARGS)
    data = build_view(Streamed(None, torch.zeros(1), [""]), {"crop_mode": mode, "crop_pct": 0.9},
                      32, channels)  # fmt: skip
    normalize = normalization(model, channels)
    path = distill.save_student(
        model, tmp_path / "judged", input_size=(channels, 32, 32), **data.preprocessing,
        mean=normalize.mean.flatten().tolist(), std=normalize.std.flatten().tolist(),
    )  # fmt: skip
    predictor = predict.Predictor(path, device="cpu")
    for name in ("=1.png", "deeper/grey.png"):
        judged = data(decoded(photos / name, channels), 0, CLEAN, 0)
        seen = predictor.read(str(photos / name))
        assert torch.allclose(seen, normalize(judged[None] / 255)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("calibration", "change"),
    [
        ("none", lambda logits: logits),
        ("vector", lambda x: x * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor([0.1, 0.2, 0.3])),
    ],
)
def test_calibrations_and_json_lines_from_a_list_on_stdin(
    bundle, photos, tmp_path, monkeypatch, calibration, change
):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{photos / 'b.jpg'}\n\n{photos / 'gone.jpg'}\n"))
    options = {**PLAIN, "calibration": calibration, "topk": 2}
    predict.run(bundle, ["-"], tmp_path / "out.jsonl", None, 64, **options)
    (line,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    expected = probabilities(bundle, photos / "b.jpg", change)
    values, indices = expected.topk(2)
    assert line["path"] == str(photos / "b.jpg")
    assert [answer["class"] for answer in line["classes"]] == [CLASSES[k] for k in indices]
    assert [answer["probability"] for answer in line["classes"]] == pytest.approx(
        values.tolist(), abs=2e-6
    )


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_name_that_is_not_utf8_costs_nothing(bundle, photos, tmp_path, ending):
    odd = os.fsdecode(b"odd-\xff.jpg")
    os.rename(photos / "b.jpg", tmp_path / odd)
    out = tmp_path / f"out.{ending}"
    predict.run(bundle, [str(tmp_path / odd)], out, None, 8, **PLAIN)
    if ending == "csv":
        assert b"odd-\xff.jpg" in out.read_bytes()
    else:
        assert json.loads(out.read_bytes())["path"].endswith("odd-\\udcff.jpg")


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@sum", "\tx", "plain", "", "a=b"])
def test_no_cell_is_a_formula(text):
    cell = plain_cell(text)
    assert not cell or cell[0] not in "=+-@\t\r"
    assert cell.removeprefix("'") == text


def test_a_normalisation_for_other_channels_is_the_bundles_fault_and_not_the_images(bundle, photos):
    content = json.loads((bundle / "config.json").read_text())
    content["pretrained_cfg"].update(mean=[0.5, 0.5], std=[0.5, 0.5])
    (bundle / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"damaged: its mean is of 2 channels and .* have 3"):
        predict.run(bundle, [str(photos / "b.jpg")], None, None, 8, **PLAIN)


class Mps:
    """Logits on a device without float64."""

    def __init__(self, logits):
        self.logits = logits

    def double(self):
        raise TypeError("the MPS framework doesn't support float64")

    def cpu(self):
        return self.logits


def test_a_device_without_float64_answers_alike(bundle, photos):
    predictor = predict.Predictor(bundle, device="cpu")
    (expected,) = predictor.predict([str(photos / "b.jpg")])
    predictor.model.register_forward_hook(lambda model, images, logits: Mps(logits))
    (found,) = predictor.predict([str(photos / "b.jpg")])
    assert found == expected


def test_mistakes_leave_no_file(bundle, photos, tmp_path):
    out = tmp_path / "out.csv"
    (tmp_path / "bare").mkdir()
    for given, options, message in (
        (["nowhere.png"], {}, "there is no nowhere.png"),
        ([str(photos / "broken.png")], {}, "none of 1 images could be read"),
        ([str(tmp_path / "bare")], {}, "there are no images in"),
        ([str(photos)], {"topk": 4}, "--topk 4 is not from 1 to the student's 3"),
        ([str(photos)], {"device": "gpu7"}, "--device gpu7"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            predict.run(bundle, given, out, None, 8, **{**PLAIN, **options})
        assert not out.exists()


def test_the_command_predicts_and_a_closed_pipe_is_no_error(command, bundle, photos, tmp_path):
    done = command("distill-predict", bundle, photos, "--topk", "1", "--output", "found.csv")
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == "distill-predict: 4 images, 2 skipped"
    assert len((tmp_path / "found.csv").read_text().splitlines()) == 5
    closed = subprocess.run(
        f"yes {photos / 'b.jpg'} | head -5000 | distill-predict {bundle} - | head -1",
        shell=True, capture_output=True, text=True, cwd=tmp_path, timeout=300,
        env={**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
    )  # fmt: skip
    assert closed.stdout.startswith("path,class_1,")
    assert "Traceback" not in closed.stderr
    done = command("distill-predict", photos, photos, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("distill-predict: ")
    assert "is not a student bundle" in line


def test_hidden_images_of_a_folder_are_counted_and_not_read(tmp_path, capsys):
    for place in ("a.png", "in/b.png", "in/._b.png", ".ipynb_checkpoints/c.png"):
        (tmp_path / "photos" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / place).touch()
    found = predict.images_in(tmp_path / "photos")
    assert found == [str(tmp_path / "photos" / place) for place in ("a.png", "in/b.png")]
    assert "2 images in hidden files or folders not read" in capsys.readouterr().err
