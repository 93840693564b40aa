"""Decoders of JPEG files: which is chosen, what it is called, and that they agree."""

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, features
from sklearn.datasets import load_sample_images

from distill.data.sources import decoders
from distill.data.sources.decoders import Box, chosen_decoder, opened_jpeg, pillow
from tests.data.conftest import refusal


def usable(name):
    try:
        return chosen_decoder(name).name == name
    except ValueError:
        return False


def jpeg(mode="RGB", size=(640, 427), index=0):
    image = Image.fromarray(load_sample_images().images[index]).resize(size).convert(mode)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def region(decoder, content, box):
    pixels = decoder.decode(content, opened_jpeg(content), box)
    return pixels[..., :3] if pixels.ndim == 3 else pixels


def fraction_of(content, colours, height, width):
    """Decode with Pillow at the smallest of 1/8, …, 1/1 that has at least this size."""
    picture = Image.open(io.BytesIO(content))
    for shrink in (8, 4, 2, 1):
        if -(-picture.height // shrink) >= height and -(-picture.width // shrink) >= width:
            break
    picture.draft(None, (picture.width // shrink, picture.height // shrink))
    return np.array(picture.convert({"GRAY": "L", "RGB": "RGB"}[colours]))


@pytest.fixture
def simplejpeg(monkeypatch):
    """What simplejpeg documents, on top of Pillow: it is installed in few places."""

    def decode_jpeg(data, colorspace="rgb", min_height=0, min_width=0):
        pixels = fraction_of(data, colorspace, min_height, min_width)
        return pixels[:, :, None] if pixels.ndim == 2 else pixels

    monkeypatch.setitem(sys.modules, "simplejpeg", SimpleNamespace(decode_jpeg=decode_jpeg))
    monkeypatch.setattr(decoders, "version", lambda name: f"9.9 of {name}")


def test_pillow_is_named_with_the_library_that_decides_its_bits():
    library = features.version("libjpeg_turbo") or features.version("jpg")
    assert str(pillow()).startswith("pil (libjpeg")
    assert library in str(pillow())
    assert str(chosen_decoder("pil")) == str(pillow())


def test_auto_is_simplejpeg_where_it_loads(simplejpeg):
    assert str(chosen_decoder("auto")) == "simplejpeg (9.9 of simplejpeg)"


def test_auto_is_pillow_where_simplejpeg_does_not_load(monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    assert str(chosen_decoder("auto")) == str(pillow())


def test_auto_is_pillow_where_simplejpeg_is_broken(simplejpeg, monkeypatch):
    monkeypatch.setattr(sys.modules["simplejpeg"], "decode_jpeg", None)
    assert chosen_decoder("auto").name == "pil"


def test_other_names_are_refused():
    refusal(lambda: chosen_decoder("opencv"), "data.decoder must be one of auto, pil", "opencv")
    refusal(lambda: chosen_decoder(None), "data.decoder must be one of")


@pytest.mark.parametrize("name", ["simplejpeg", "torchvision"])
def test_a_library_that_is_not_there_is_refused(name, monkeypatch):
    module = "simplejpeg" if name == "simplejpeg" else "torchvision.io"
    monkeypatch.setitem(sys.modules, module, None)
    words = f"data.decoder={name} cannot decode", "give auto or pil"
    line = refusal(lambda: chosen_decoder(name), *words)
    assert ("pip install 'distill-kd[data]'" in line) == (name == "simplejpeg")


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(640, 424), (639, 427)])
def test_simplejpeg_is_asked_for_just_this_scale(simplejpeg, mode, shrink, size):
    content, box = jpeg(mode, size), Box(3, 5, 40, 50, shrink)
    found = region(decoders.simplejpeg(), content, box)
    assert found.shape == ((40, 50) if mode == "L" else (40, 50, 3))
    assert np.array_equal(found, region(pillow(), content, box))


def test_another_size_than_was_asked_for_is_refused(simplejpeg, monkeypatch):
    wrong = SimpleNamespace(decode_jpeg=lambda *_, **__: np.zeros((9, 9, 3), np.uint8))
    monkeypatch.setitem(sys.modules, "simplejpeg", wrong)
    with pytest.raises(ValueError, match=r"gave \(9, 9\) instead of \(214, 320\)"):
        region(decoders.simplejpeg(), jpeg(), Box(0, 0, 9, 9, 2))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_torchvision_is_given_the_same_part_of_the_whole_picture(monkeypatch, mode):
    from torchvision import io as vision

    def decode_jpeg(data, kind):
        name = {vision.ImageReadMode.GRAY: "L", vision.ImageReadMode.RGB: "RGB"}[kind]
        pixels = np.array(Image.open(io.BytesIO(data.numpy().tobytes())).convert(name))
        return torch.from_numpy(pixels).view(*pixels.shape[:2], -1).permute(2, 0, 1)

    monkeypatch.setattr(vision, "decode_jpeg", decode_jpeg)
    content = jpeg(mode)
    found = region(decoders.torchvision(), content, Box(3, 5, 40, 50, 4))
    assert np.array_equal(found, region(pillow(), content, Box(12, 20, 160, 200)))


@pytest.mark.parametrize("name", ["simplejpeg", "torchvision"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_decoders_that_load_agree_with_pillow(name, mode):
    """Within 1 grey level in the mean: they are all libjpeg-turbo, in versions of their own."""
    if not usable(name):
        pytest.skip(f"{name} does not load here")
    for index in (0, 1):
        content = jpeg(mode, index=index)
        found = region(chosen_decoder(name), content, Box(100, 50, 200, 300))
        expected = region(pillow(), content, Box(100, 50, 200, 300))
        assert np.abs(found.astype(int) - expected.astype(int)).mean() < 1


def test_other_files_are_not_taken_for_plain_jpegs():
    assert opened_jpeg(jpeg("CMYK")) is None
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    assert opened_jpeg(file.getvalue()) is None
    assert opened_jpeg(jpeg()).mode == "RGB"
