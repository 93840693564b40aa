"""Pillow's own memory, lent without a copy."""

import gc

import numpy as np
import pytest
from PIL import Image

from distill.utils.arrow import lent_pixels

pytestmark = pytest.mark.skipif(
    not hasattr(Image.Image, "__arrow_c_array__"), reason="this Pillow does not lend its memory"
)


def noise(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_the_pixels_are_the_images():
    values = noise(37, 53)
    assert np.array_equal(lent_pixels(Image.fromarray(values))[..., :3], values)


def test_they_outlive_the_image():
    values = noise(300, 400)
    pixels = lent_pixels(Image.fromarray(values))[10:50, 20:60]
    gc.collect()
    others = [Image.fromarray(noise(300, 400, seed)) for seed in range(1, 9)]
    assert np.array_equal(pixels[..., :3], values[10:50, 20:60])
    assert len(others) == 8


def test_an_opened_file_is_decoded_first(tmp_path):
    Image.fromarray(noise(8, 9)).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert np.array_equal(lent_pixels(image)[..., :3], noise(8, 9))


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "I;16"])
def test_other_modes_are_not_lent(mode):
    assert lent_pixels(Image.new(mode, (4, 4))) is None


def test_what_lies_in_pieces_is_not_lent():
    assert lent_pixels(Image.new("RGB", (4096, 2048))) is None


def test_an_older_pillow_lends_nothing(monkeypatch):
    monkeypatch.delattr(Image.Image, "__arrow_c_array__")
    assert lent_pixels(Image.new("RGB", (4, 4))) is None
