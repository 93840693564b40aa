"""Files that are decoded where the model is show what decoding them in data workers shows."""

import io
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from pytorch_lightning.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision
from sklearn.datasets import load_sample_images
from torchvision import io as vision

from distill.data import DataModule
from distill.data.sources import decoders, folder
from distill.data.sources.decoders import Decoder, by_pillow, plain_jpeg
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


@pytest.mark.parametrize("kept", [10, 3000, -40])
def test_a_broken_picture_is_named(photographs, decoder_of_a_gpu, tmp_path, kept):
    for label in ("flower", "temple"):
        (tmp_path / label).mkdir()
        for source in (photographs / label).glob("*.jpg"):
            (tmp_path / label / source.name).write_bytes(source.read_bytes())
    data = module(tmp_path)
    first = data.train.names[int(data.train.index[0])]
    (tmp_path / first).write_bytes((tmp_path / first).read_bytes()[:kept])
    refusal(lambda: data.training_views(0, torch.tensor([0])), first)


def test_a_file_that_is_broken_in_the_middle_is_named_by_its_index(monkeypatch):
    content = jpeg(64)
    content[2:40] = 7
    refusal(lambda: decoded_on(torch.device("cpu"), [content], [5], 3), "index 5", "data.verify")


def test_colours_that_are_stored_as_they_are_go_to_pillow(tmp_path):
    image = Image.fromarray(load_sample_images().images[0])
    for keep in (False, True):
        image.save(tmp_path / "it.jpg", keep_rgb=keep)
        assert (plain_jpeg((tmp_path / "it.jpg").read_bytes()) is None) == keep


@pytest.mark.parametrize(
    "precision", [HalfPrecision("bf16-true"), HalfPrecision(), DoublePrecision(),
                  MixedPrecision("bf16-mixed", "cpu")],
)  # fmt: skip
def test_every_precision_leaves_them_as_they_are(photographs, decoder_of_a_gpu, precision):
    batch = next(iter(module(photographs).train_dataloader()))
    view = precision.convert_input(batch).to("cpu").view
    assert torch.equal(view, batch.to("cpu").view)


def test_a_device_holds_so_many_pixels_at_once(photographs, decoder_of_a_gpu, monkeypatch):
    data, rows = module(photographs), torch.arange(14)
    sizes = []

    def decode(device, contents, indices, channels):
        sizes.append(len(contents))
        return decoded_on(device, contents, indices, channels)

    expected = data.training_views(0, rows)
    monkeypatch.setattr(undecoded, "decoded_on", decode)
    monkeypatch.setattr(undecoded, "AT_ONCE", 2 * 500 * 380)
    assert torch.equal(data.training_views(0, rows), expected)
    assert len(sizes) > 1
    assert max(sizes) == 2
    monkeypatch.setattr(undecoded, "AT_ONCE", 1)
    assert torch.equal(data.training_views(0, rows), expected)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"view": {}}, "color_jitter is not 0"),
        ({"view": {**PLAIN, "color_jitter": 0.4}}, "or erases"),
        ({"view": {**PLAIN, "re_prob": 0.5}}, "or erases"),
        ({"view": {**PLAIN, "mixup": 0.2}}, "mixes pictures"),
        ({"view": {**PLAIN, "train_crop_mode": "rkrc"}}, "crops as data workers do"),
        (
            {"views_per_step": 2, "strong_view": {"color_jitter": 0.4}},
            "shows one view of a picture",
        ),
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


@pytest.fixture
def nvjpeg(monkeypatch):
    """What was asked of a stand-in for nvJPEG, which refuses files of as many bytes as `odd`."""
    asked = []

    def decode_jpeg(files, kind, device):
        asked.append((len(files), kind, device))
        assert isinstance(files, list)
        assert all(len(file) and file.dtype == torch.uint8 and not file.is_cuda for file in files)
        for words, bad in refused.items():
            if any(len(file) == len(bad) for file in files):
                raise RuntimeError(words)
        return [f"by nvJPEG: {len(file)}" for file in files]

    refused = {}
    stream = SimpleNamespace(synchronize=lambda: asked.append("waited"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(vision, "decode_jpeg", decode_jpeg)
    on_the_device = SimpleNamespace(to=lambda device: f"by Pillow on {device}")
    monkeypatch.setattr(undecoded, "whole_picture", lambda *given: on_the_device)
    undecoded.try_nvjpeg.cache_clear()
    yield SimpleNamespace(asked=asked, refused=refused)
    undecoded.try_nvjpeg.cache_clear()


@pytest.mark.parametrize(("channels", "mode"), [(1, "GRAY"), (3, "RGB")])
def test_nvjpeg_is_given_all_files_at_once_and_waited_for_first(nvjpeg, channels, mode):
    files = [jpeg(32), jpeg(48)]
    for _ in range(2):
        found = decoded_on(GPU, files, [0, 1], channels)
        assert found == [f"by nvJPEG: {len(file)}" for file in files]
    both = (2, vision.ImageReadMode[mode], GPU)
    tried = (1, vision.ImageReadMode.RGB, GPU)
    assert nvjpeg.asked == ["waited", tried, "waited", both, "waited", both]


def test_what_nvjpeg_refuses_pillow_decodes_and_that_is_said(nvjpeg):
    odd, plain = jpeg(48), jpeg(32)
    nvjpeg.refused["nvjpegDecode failed: 4\nmore of it"] = odd
    with pytest.warns(UserWarning, match=r"nvJPEG refuses \(nvjpegDecode failed: 4\)$"):
        found = decoded_on(GPU, [plain, plain, odd, plain], range(4), 3)
    other = f"by nvJPEG: {len(plain)}"
    assert found == [other, other, "by Pillow on cuda", other]
    assert [one[0] for one in nvjpeg.asked if one != "waited"] == [1, 4, 2, 2, 1, 1]


@pytest.mark.parametrize("words", ["CUDA out of memory. Tried", "CUDA error: an illegal access"])
def test_what_is_not_the_files_fault_ends_the_run(nvjpeg, words):
    nvjpeg.refused[words] = jpeg(48)
    with pytest.raises(RuntimeError, match=words):
        decoded_on(GPU, [jpeg(48), jpeg(32)], [0, 1], 3)


def test_a_gpu_that_decodes_nothing_is_refused(nvjpeg, monkeypatch):
    def decode_jpeg(files, kind, device):
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")

    monkeypatch.setattr(vision, "decode_jpeg", decode_jpeg)
    refusal(lambda: decoded_on(GPU, [jpeg(32)], [0], 3), "on cuda", "not compiled", "decoder=auto")


@pytest.mark.gpu
@pytest.mark.parametrize("size", [16, 48, 220])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_nvjpeg_agrees_with_pillow(photographs, size, interpolation):
    """Within 4 grey levels in the mean, as `docs/data.md` says of decoders at different scales."""
    rows, view = torch.arange(14), {**PLAIN, "interpolation": interpolation}
    expected = module(photographs, "pil", size, view=view).training_views(0, rows)
    data = module(photographs, size=size, view=view, num_workers=2)
    [batch] = data.in_order(data.train, 0, [rows], GPU)
    made = (batch.view * 255).round().byte().cpu()
    assert grey_levels_apart(made, expected).mean((1, 2, 3)).max() <= 4


@pytest.mark.gpu
def test_memory_that_queued_work_reads_is_not_written_to(photographs):
    """As in pytorch/vision's pull request 9606: what is freed while it is still to be read."""
    data, rows = module(photographs), torch.arange(14)
    expected = data.training_views(0, rows).to(GPU)
    sums = []
    for _ in range(50):
        known = [torch.full((3, 400, 500), 1, dtype=torch.uint8, device=GPU) for _ in range(20)]
        torch.cuda._sleep(20_000_000)
        sums.append(torch.stack([one.sum() for one in known]))
        del known
        [batch] = data.in_order(data.train, 0, [rows], GPU)
        apart = (batch.view * 255 - expected.float()).abs().mean()
        assert apart <= 4
    assert all((one == 3 * 400 * 500).all() for one in sums)
