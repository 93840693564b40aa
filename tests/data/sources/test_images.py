"""Whatever an image file holds comes out upright, in 8 bits, and in the size that was asked for."""

import numpy as np
import pytest
import torch
from PIL import Image

from distill.data.sources.folder import FileLoader
from distill.data.sources.images import decoded, resize
from distill.data.sources.pieces import Piece, Pieces
from tests.data.conftest import refusal


def loaded(path, channels=3):
    return np.asarray(FileLoader(Pieces.of(path.parent, [Piece(path)]), channels)(0))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.png"


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_images_keep_their_range(path, channels):
    values = np.array([[0, 257, 257 * 128, 65535]], np.uint16)
    Image.fromarray(values).save(path)
    pixels = loaded(path, channels).reshape(4, channels)
    assert pixels.tolist() == [[v] * channels for v in (0, 1, 128, 255)]


def test_transparent_pixels_are_white_and_half_transparent_ones_half(path):
    values = np.array([[[9, 9, 9, 0], [100, 0, 0, 255], [0, 0, 0, 127]]], np.uint8)
    Image.fromarray(values).save(path)
    assert loaded(path).tolist() == [[[255] * 3, [100, 0, 0], [128] * 3]]


def test_palettes_with_and_without_transparency(path):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    image.save(path)
    assert loaded(path).tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    image.save(path, transparency=bytes([255, 0, 255]))
    assert loaded(path).tolist() == [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]


def test_black_and_white_and_cmyk(path):
    Image.fromarray(np.array([[True, False]])).save(path)
    assert loaded(path, 1).tolist() == [[255, 0]]
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(path.with_suffix(".jpg"))
    assert (loaded(path.with_suffix(".jpg")) > 250).all()


def test_the_first_frame_of_an_animation(path):
    frames = [Image.new("RGB", (4, 4), c) for c in ("#0a141e", "#ff0000")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert loaded(path)[0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_says(path, orientation):
    upright = np.zeros((3, 5, 3), np.uint8)
    upright[0, 0], upright[0, -1], upright[-1, 0] = 50, 100, 200
    # How a camera stores the picture, per the table of the EXIF standard.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    assert np.array_equal(loaded(path), upright)


def test_float_images_are_refused(path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(path.with_suffix(".tif"))
    refusal(lambda: loaded(path.with_suffix(".tif")), "x.tif", "floating-point")


def test_resizing_keeps_constants_corners_and_ramps():
    images = torch.full((2, 1, 4, 4), 77, dtype=torch.uint8)
    assert resize(images, 9).unique().tolist() == [77]
    assert resize(images, 4) is images
    ramp = torch.arange(0, 160, 10, dtype=torch.uint8).expand(1, 1, 16, 16)
    half = torch.arange(0, 160, 10).float().view(8, 2).mean(1)  # away from the edges: the mean
    assert (resize(ramp, 8)[0, 0, 3, 1:-1].float() - half[1:-1]).abs().max() <= 0.5


def test_rare_formats_are_known_before_a_thread_asks_for_one(path, monkeypatch):
    Image.new("RGB", (2, 2)).save(path)
    known, real = [], Image.open

    def opened(file):
        known.append(Image._initialized)
        return real(file)

    monkeypatch.setattr(Image, "_initialized", 1)
    monkeypatch.setattr(Image, "open", opened)
    decoded(path, 3)
    assert known == [2]
