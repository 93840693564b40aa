"""Files that are decoded where the model is show what decoding them in data workers shows."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision import io as vision

from distill.data import DataModule
from distill.data.sources import decoders, folder
from distill.data.sources.decoders import Decoder, by_pillow
from distill.data.views import undecoded
from distill.data.views.undecoded import Undecoded, decoded_on
from tests.data.conftest import refusal

PLAIN = {"scale": [0.35, 1.0], "hflip": 0.5, "color_jitter": 0.0}
TURNED = Image.Exif()
TURNED[0x0112] = 6
GPU = torch.device("cuda")


@pytest.fixture
def decoder_of_a_gpu(monkeypatch):
    """`data.decoder=gpu` without one: files go where the model is, and Pillow reads them."""
    here = Decoder("gpu", "stand-in", by_pillow, on_device=True)
    monkeypatch.setattr(decoders, "gpu", lambda: here)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two classes of plain, grey, turned and CMYK JPEG files, and a PNG file."""
    root = tmp_path_factory.mktemp("photographs")
    kinds = [("RGB", "jpg", {}), ("L", "jpg", {}), ("RGB", "jpg", {"exif": TURNED}),
             ("CMYK", "jpg", {}), ("RGB", "png", {})]  # fmt: skip
    for label, image in zip(("flower", "temple"), load_sample_images().images, strict=True):
        (root / label).mkdir()
        for number in range(10):
            mode, ext, options = kinds[number % len(kinds)]
            part = Image.fromarray(image).crop((8 * number, 4 * number, 500, 380)).convert(mode)
            part.save(root / label / f"{number}.{ext}", **options)
    return root


def module(root, decoder="gpu", size=220, **options):
    options = {"view": PLAIN, "batch_size": 4, **options}
    return DataModule(folder(str(root)), image_size=size, decoder=decoder, **options)


def grey_levels_apart(one, other):
    return (one.int() - other.int()).abs().double()


def test_views_are_within_a_grey_level_of_those_that_pillow_decodes_whole(
    photographs, decoder_of_a_gpu
):
    rows = torch.arange(14)
    for epoch in (0, 1):
        made = module(photographs).training_views(epoch, rows)
        expected = module(photographs, "pil").training_views(epoch, rows)
        assert made.dtype == torch.uint8
        assert grey_levels_apart(made, expected).max() <= 1


def test_views_that_pillow_shrinks_differ_by_as_much_as_other_decoders(
    photographs, decoder_of_a_gpu
):
    rows = torch.arange(14)
    made = module(photographs, size=48).training_views(0, rows)
    expected = module(photographs, "pil", size=48).training_views(0, rows)
    means = grey_levels_apart(made, expected).mean((1, 2, 3))
    assert 0 < means.max() <= 4


@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
def test_every_interpolation_is_the_drawn_one(photographs, decoder_of_a_gpu, interpolation):
    """Bytes are cut off between rows and columns where a cubic shoots over, and floats are not."""
    view = {**PLAIN, "interpolation": interpolation, "vflip": 0.5}
    rows = torch.arange(14)
    made, expected = (
        module(photographs, decoder, view=view).training_views(0, rows)
        for decoder in ("gpu", "pil")
    )
    assert grey_levels_apart(made, expected).mean((1, 2, 3)).max() < 0.5


def test_grey_pictures(photographs, decoder_of_a_gpu):
    rows = torch.arange(14)
    made, expected = (
        DataModule(
            folder(str(photographs), channels=1), view=PLAIN, image_size=220, decoder=decoder,
            batch_size=4,
        ).training_views(0, rows)
        for decoder in ("gpu", "pil")
    )  # fmt: skip
    assert made.shape == (14, 1, 220, 220)
    assert grey_levels_apart(made, expected).max() <= 1


def test_workers_send_files_and_batches_are_made_where_they_go(photographs, decoder_of_a_gpu):
    data = module(photographs, num_workers=2)
    batches = list(data.train_dataloader())
    assert {type(batch.view) for batch in batches} == {Undecoded}
    assert any(len(batch.view.views) for batch in batches)
    for batch in batches:
        assert len(batch) == 4
        moved = data.on_after_batch_transfer(batch.to("cpu"), 0)
        rows = torch.stack([torch.nonzero(data.train.index == i)[0, 0] for i in batch.index])
        assert torch.equal(moved.view, data.training_views(0, rows).float().div(255))


def test_clean_views_are_pillows(photographs, decoder_of_a_gpu):
    data, plain = module(photographs), module(photographs, "pil")
    assert data.decoded_by("val") == plain.decoded_by("val")
    assert data.decoded_by("train") == "gpu (stand-in)"
    pairs = zip(data.val_dataloader(), plain.val_dataloader(), strict=True)
    assert all(torch.equal(one.view, other.view) for one, other in pairs)


def test_a_broken_picture_is_named(photographs, decoder_of_a_gpu, tmp_path):
    for label in ("flower", "temple"):
        (tmp_path / label).mkdir()
        for source in (photographs / label).glob("*.jpg"):
            (tmp_path / label / source.name).write_bytes(source.read_bytes())
    data = module(tmp_path)
    first = data.train.names[int(data.train.index[0])]
    (tmp_path / first).write_bytes(b"no picture")
    refusal(lambda: data.training_views(0, torch.tensor([0])), first)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"view": {**PLAIN, "color_jitter": 0.4}}, "changes colours or erases"),
        ({"view": {**PLAIN, "re_prob": 0.5}}, "changes colours or erases"),
        ({"view": {**PLAIN, "mixup": 0.2}}, "mixes pictures"),
        ({"view": {**PLAIN, "train_crop_mode": "rkrc"}}, "crops otherwise"),
        ({"views_per_step": 2}, "shows one view of a picture"),
    ],
)
def test_what_data_workers_do_to_views_is_refused(photographs, decoder_of_a_gpu, options, why):
    refusal(lambda: module(photographs, **options), "data.decoder=gpu", why, "data.decoder=auto")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_is_refused(photographs):
    refusal(lambda: module(photographs), "data.decoder=gpu", "no CUDA device", "auto or pil")


def jpeg(side):
    file = io.BytesIO()
    Image.fromarray(load_sample_images().images[0]).resize((side, side)).save(file, "JPEG")
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


@pytest.mark.parametrize(("channels", "mode"), [(1, "GRAY"), (3, "RGB")])
def test_nvjpeg_is_given_all_files_at_once(monkeypatch, channels, mode):
    asked = []

    def decode_jpeg(files, kind, device):
        asked.append((len(files), kind, device))
        return ["pixels"] * len(files)

    monkeypatch.setattr(vision, "decode_jpeg", decode_jpeg)
    assert decoded_on(GPU, [jpeg(16), jpeg(24)], channels) == ["pixels"] * 2
    assert decoded_on(GPU, [], channels) == []
    assert asked == [(2, vision.ImageReadMode[mode], GPU)]


def test_what_nvjpeg_refuses_pillow_decodes_and_that_is_said(monkeypatch):
    def decode_jpeg(files, kind, device):
        if any(len(file) == len(odd) for file in files):
            raise RuntimeError("nvjpegDecode failed: 4\nmore of it")
        return [f"by nvJPEG: {len(file)}" for file in files]

    odd, plain = jpeg(24), jpeg(16)
    on_the_device = SimpleNamespace(to=lambda device: f"by Pillow on {device}")
    monkeypatch.setattr(vision, "decode_jpeg", decode_jpeg)
    monkeypatch.setattr(undecoded, "by_pillow", lambda file, channels: on_the_device)
    with pytest.warns(UserWarning, match=r"nvJPEG refuses \(nvjpegDecode failed: 4\)$"):
        found = decoded_on(GPU, [plain, odd, plain], 3)
    other = f"by nvJPEG: {len(plain)}"
    assert found == [other, "by Pillow on cuda", other]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("size", [48, 220])
def test_nvjpeg_agrees_with_pillow(photographs, size):
    """Within 4 grey levels in the mean, as `docs/data.md` says of decoders at different scales."""
    rows = torch.arange(14)
    expected = module(photographs, "pil", size=size).training_views(0, rows)
    data = module(photographs, size=size)
    [batch] = data.in_order(data.train, 0, [rows], GPU)
    made = (batch.view * 255).round().byte().cpu()
    assert grey_levels_apart(made, expected).mean((1, 2, 3)).max() <= 4
    assert np.isfinite(batch.view.cpu().numpy()).all()
