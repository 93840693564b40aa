"""Corrupted images: pure functions of seed and index, each checked against another reckoning."""

import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from distill.data import DataModule
from distill.data.condition.image_corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    ImageCorruption,
    chosen,
)
from distill.data.sources.splits import Source
from distill.data.views.views import CLEAN
from tests.data.conftest import refusal
from tests.data.test_module import streamed

RANDOM = ("gaussian_noise", "shot_noise", "impulse_noise")


@pytest.fixture(scope="module", params=[1, 3])
def images(request):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(24, request.param, 6, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (28, 20), mode="bilinear")
    return (smooth * 255).to(torch.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_what_is_done_to_an_image_does_not_depend_on_the_others(images, name):
    index = torch.arange(24) * 7
    before = images.clone()
    for severity in (1, 5):
        whole = ImageCorruption(name, severity)(images, index)
        assert whole.dtype == torch.uint8
        assert whole.shape == images.shape
        part = torch.tensor([11, 3, 20])
        assert torch.equal(ImageCorruption(name, severity)(images[part], index[part]), whole[part])
        other = ImageCorruption(name, severity, seed=1)(images, index)
        assert torch.equal(other, whole) == (name not in RANDOM)
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_higher_severity_changes_more(images, name):
    clean = images.double()
    changes = [
        (ImageCorruption(name, severity)(images, torch.arange(24)).double() - clean).abs().mean()
        for severity in SEVERITIES
    ]
    assert changes[0] > 0.05
    if name == "pixelate":  # the box's edges fall where they may
        assert changes[-1] > changes[0]
    else:
        assert all(a < b for a, b in pairwise(changes))


def test_noise_has_the_moments_of_its_distribution():
    grey = torch.full((400, 1, 16, 16), 102, dtype=torch.uint8)  # 0.4
    index = torch.arange(400)
    values = ImageCorruption("gaussian_noise", 5)(grey, index).double() / 255
    assert values.mean() == pytest.approx(0.4, abs=2e-3)
    assert values.std() == pytest.approx(0.10, rel=0.02)
    photons = ImageCorruption("shot_noise", 5)(grey, index).double() / 255
    assert photons.mean() == pytest.approx(0.4, abs=2e-3)
    assert photons.std() == pytest.approx((0.4 / 50) ** 0.5, rel=0.02)
    impulses = ImageCorruption("impulse_noise", 5)(grey, index)
    for value in (0, 255):
        assert (impulses == value).double().mean() == pytest.approx(0.035, abs=3e-3)
    neighbours = torch.stack([values[:, 0, :, :-1].flatten(), values[:, 0, :, 1:].flatten()])
    assert abs(torch.corrcoef(neighbours)[0, 1]) < 0.02
    images = torch.stack([values[:-1].flatten(), values[1:].flatten()])
    assert abs(torch.corrcoef(images)[0, 1]) < 0.02


def test_black_has_no_photons_and_little_else():
    black = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    index = torch.arange(2)
    for name in ("shot_noise", "contrast", "pixelate", "gaussian_blur"):
        assert not ImageCorruption(name, 5)(black, index).any()
    assert (ImageCorruption("brightness", 5)(black, index) == round(0.3 * 255)).all()


@pytest.mark.parametrize("severity", SEVERITIES)
def test_blur_and_contrast_are_those_of_other_libraries(images, severity):
    index = torch.arange(24)
    deviation = (0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1]
    blurred = ImageCorruption("gaussian_blur", severity)(images, index)
    expected = gaussian_filter(
        images.double().numpy(), (0, 0, deviation, deviation), mode="nearest"
    )
    assert np.abs(blurred.numpy() - expected).max() <= 0.5 + 1e-6
    factor = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    flat = ImageCorruption("contrast", severity)(images, index).double()
    assert flat.mean((2, 3)) == pytest.approx(images.double().mean((2, 3)), abs=0.5)
    assert flat.std((2, 3)) == pytest.approx(factor * images.double().std((2, 3)), abs=0.5)


def test_brightness_is_that_of_hsv(images):
    import colorsys

    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    bright = ImageCorruption("brightness", 3)(images, torch.arange(24))
    for n, y, x in ((0, 3, 4), (5, 20, 9), (23, 27, 19)):
        hue, saturation, value = colorsys.rgb_to_hsv(*(images[n, :, y, x] / 255).tolist())
        expected = colorsys.hsv_to_rgb(hue, saturation, min(value + 0.15, 1))
        assert bright[n, :, y, x].tolist() == pytest.approx([255 * c for c in expected], abs=0.51)


def test_jpeg_is_what_pillow_reads_back(images):
    changed = ImageCorruption("jpeg_compression", 2)(images, torch.arange(24))
    array = images[7].permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(array.squeeze()).save(file, "JPEG", quality=65)
    expected = np.asarray(Image.open(file)).reshape(array.shape)
    assert (changed[7].permute(1, 2, 0).numpy() == expected).all()


def test_streamed_views_are_corrupted_alike_by_workers():
    made = Source("painted", ["even", "odd"], 3, streamed(40))
    found = []
    for workers in (0, 1):
        data = DataModule(made, batch_size=4, image_size=8, num_workers=workers)
        corruption = ImageCorruption("gaussian_noise", 4)
        positions = torch.arange(len(data.test)).split(3)
        cpu = torch.device("cpu")
        clean = torch.cat([b.view for b in data.in_order(data.test, CLEAN, positions, cpu)])
        noisy = torch.cat(
            [b.view for b in data.in_order(data.test, CLEAN, positions, cpu, corruption)]
        )
        assert (noisy - clean).std() == pytest.approx(0.09, rel=0.4)
        found.append(noisy)
    assert torch.equal(*found)


def test_corruptions_are_chosen_by_name():
    assert chosen(True) == list(CORRUPTIONS)
    assert chosen(False) == chosen([]) == []
    assert chosen(["contrast", "contrast"]) == chosen("contrast") == ["contrast"]
    refusal(lambda: chosen(["frost"]), "there is no frost", "jpeg_compression", error=ValueError)
