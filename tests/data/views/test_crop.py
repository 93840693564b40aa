"""Keyed crops follow their formula, depend on their key only, and show the same however decoded."""

import io
import math
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_images
from torchvision.transforms import RandomResizedCrop

from distill.data import DataModule
from distill.data.sources import decoders, folder
from distill.data.sources.decoders import SHRINKS, Box, pillow
from distill.data.sources.images import decoded
from distill.data.sources.splits import Streamed
from distill.data.views.build import build_view
from distill.data.views.crop import ResizedCrop
from distill.data.views.views import CLEAN
from tests.data.conftest import refusal

MANY = 4000
PLAIN = {"scale": [0.35, 1.0], "color_jitter": 0.0}
KEYED = [
    {},
    {"interpolation": "bicubic"},
    {"interpolation": "random", "vflip": 0.5},
    {"color_jitter": 0.4},
    {"auto_augment": "rand-m9-mstd0.5"},
    {"re_prob": 1.0},
]


class Files:
    """Position → picture, of files that lie in memory."""

    def __init__(self, *contents, channels=3):
        self.contents, self.channels = contents, channels

    def open(self, position):
        return io.BytesIO(self.contents[position])

    def __call__(self, position):
        return decoded(self.open(position), self.channels)


def photographs():
    return [Image.fromarray(image) for image in load_sample_images().images]


def written(image, form="JPEG", **options):
    file = io.BytesIO()
    image.save(file, form, **({"quality": 90} if form == "JPEG" else {}) | options)
    return file.getvalue()


def view_of(options=None, size=64, channels=3, **more):
    split = Streamed(None, torch.zeros(1), [""])
    return build_view(split, {**PLAIN, **(options or {})}, size, channels, **more)


def boxes(crop, height, width, count=MANY, seed=0):
    drawn = crop.drawn(seed, 0, torch.arange(count))
    return np.array([crop.place(one, height, width) for one in drawn], dtype=np.float64)


def mean_difference(one, other):
    return (one.int() - other.int()).abs().double().mean().item()


# What is drawn


def test_the_share_of_the_area_is_uniform():
    crop = ResizedCrop((64, 64), scale=(0.2, 0.9), ratio=(1.0, 1.0))
    sides = boxes(crop, 5000, 5000)[:, 2:]
    shares = sides.prod(1) / 5000**2
    assert stats.kstest(shares, stats.uniform(0.2, 0.7).cdf).pvalue > 1e-3


def test_the_ratio_is_log_uniform_where_the_picture_holds_all_crops():
    crop = ResizedCrop((64, 64), scale=(0.1, 0.5), ratio=(0.5, 2.0))
    sides = boxes(crop, 5000, 5000)[:, 2:]
    logs = np.log(sides[:, 1] / sides[:, 0])
    assert stats.kstest(logs, stats.uniform(-math.log(2), 2 * math.log(2)).cdf).pvalue > 1e-3


def test_the_place_is_uniform_and_each_side_has_its_own():
    places = boxes(ResizedCrop((64, 64), scale=(0.2, 0.5)), 3000, 4000)
    rest = np.array([3000, 4000]) - places[:, 2:]
    assert (rest >= 0).all()
    where = places[:, :2] / rest
    for side in where.T:
        assert stats.kstest(side, "uniform").pvalue > 1e-3
    assert abs(stats.spearmanr(*where.T).statistic) < 0.06


def plain_crop(rng, height, width, scale, ratio):
    """The formula of the docstring in plain Python, without the last resort."""
    while True:
        area = rng.uniform(*scale) * height * width
        shape = math.exp(rng.uniform(*map(math.log, ratio)))
        wide, tall = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if wide <= width and tall <= height:
            return rng.randint(0, height - tall), rng.randint(0, width - wide), tall, wide


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (300, 900)])
def test_crops_that_a_picture_cannot_hold_are_drawn_again(height, width):
    scale, ratio = (0.08, 0.6), (3 / 4, 4 / 3)
    own = boxes(ResizedCrop((64, 64), scale, ratio), height, width)
    rng = random.Random(1)
    plain = np.array([plain_crop(rng, height, width, scale, ratio) for _ in range(MANY)])
    for one, other in zip(own.T, plain.T, strict=True):
        assert stats.ks_2samp(one, other).pvalue > 1e-3


def test_crops_are_distributed_as_torchvisions():
    image, scale, ratio = torch.empty(3, 375, 500), [0.35, 1.0], [3 / 4, 4 / 3]
    torch.manual_seed(0)
    theirs = [RandomResizedCrop.get_params(image, scale, ratio) for _ in range(MANY)]
    own = boxes(ResizedCrop((64, 64), scale, ratio), 375, 500)
    for one, other in zip(own.T, np.array(theirs).T, strict=True):
        assert stats.ks_2samp(one, other).pvalue > 1e-3


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (100, 120), (1, 1)])
def test_the_last_resort_is_the_middle_as_torchvisions(height, width):
    crop = ResizedCrop((8, 8), scale=(1.0, 1.0), ratio=(0.9, 1.1))
    expected = RandomResizedCrop.get_params(torch.empty(1, height, width), [1.0, 1.0], [0.9, 1.1])
    for found in boxes(crop, height, width, 20):
        assert tuple(found) == expected


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_flips_have_their_probability_and_are_independent(share):
    drawn = ResizedCrop((8, 8), hflip=share, vflip=0.5).drawn(0, 0, torch.arange(MANY))
    mirrored = np.array([one.mirrored for one in drawn])
    below = np.array([one.upside_down for one in drawn])
    assert stats.binomtest(int(mirrored.sum()), MANY, share).pvalue > 1e-3
    assert stats.binomtest(int(below.sum()), MANY).pvalue > 1e-3
    if 0 < share < 1:
        assert stats.chi2_contingency(stats.contingency.crosstab(mirrored, below).count)[1] > 1e-3


def test_random_interpolation_is_either():
    drawn = ResizedCrop((8, 8), interpolation="random").drawn(0, 0, torch.arange(MANY))
    kinds = [one.interpolation for one in drawn]
    assert set(kinds) == {"bilinear", "bicubic"}
    assert stats.binomtest(kinds.count("bicubic"), MANY).pvalue > 1e-3


# Where it lies


@settings(max_examples=200)
@given(
    st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 300), st.integers(1, 300),
    st.integers(0, 2**31),
)  # fmt: skip
def test_a_box_lies_in_the_picture_and_keeps_the_pixels_that_are_shown(
    height, width, tall, wide, index
):
    crop = ResizedCrop((tall, wide), scale=(0.3, 1.0))
    drawn = crop.drawn(0, 0, torch.tensor([index]))[0]
    top, left, crop_height, crop_width = crop.place(drawn, height, width)
    box = crop.box(drawn, height, width)
    assert box.shrink in SHRINKS
    whole = box.at(1)
    assert 0 <= whole.top <= whole.top + whole.height <= height
    assert 0 <= whole.left <= whole.left + whole.width <= width
    assert min(whole.height, whole.width) >= 1
    if box.shrink > 1:
        assert box.height >= tall
        assert box.width >= wide
    larger = 2 * box.shrink
    if larger in SHRINKS:
        assert crop_height < larger * tall or crop_width < larger * wide
    moved = np.array(whole[:4]) - (top, left, crop_height, crop_width)
    assert abs(moved).max() < 2 * box.shrink


def test_a_box_at_a_larger_scale_is_the_same_part():
    assert Box(1, 2, 3, 4, 8).at(2) == Box(4, 8, 12, 16, 2)
    assert Box(1, 2, 3, 4).at(1) == Box(1, 2, 3, 4)


# Purity


@pytest.mark.parametrize("options", KEYED)
def test_views_depend_on_their_key_only(options):
    view = view_of(options, 32)
    load = Files(*(written(one) for one in photographs()), written(photographs()[0], "PNG"))
    assert view.crop is not None
    whole = view.batch(load, 3, 1, torch.tensor([0, 1, 2]))
    assert (whole.dtype, tuple(whole.shape)) == (torch.uint8, (3, 3, 32, 32))
    random.seed(1)
    torch.manual_seed(1)
    for index in (2, 0, 1):
        assert torch.equal(view.batch(load, 3, 1, torch.tensor([index]))[0], whole[index])
    for other in ((4, 1), (3, 2)):
        assert not torch.equal(view.batch(load, *other, torch.tensor([0]))[0], whole[0])


def write_photographs(root, count=8):
    for number in range(count):
        path = root / ("even", "odd")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photographs()[number % 2].crop((number, number, 500 + number, 375)).save(path)
    return root


def test_views_do_not_depend_on_workers_and_batches(tmp_path):
    source = folder(str(write_photographs(tmp_path)), verify="none")

    def views(workers, size, skip=0):
        data = DataModule(
            source, view=PLAIN, image_size=32, batch_size=size, num_workers=workers,
            val_fraction=0.25, test_fraction=0.25,
        )  # fmt: skip
        loader = data.train_dataloader()
        loader.position = lambda: skip
        batches = [(batch.index, batch.view) for batch in loader]
        return {int(i): v for index, view in batches for i, v in zip(index, view, strict=True)}

    expected = views(0, 1)
    assert len(expected) >= 4
    for found in (views(0, 2), views(1, 2), views(0, 1, skip=1)):
        assert found
        assert all(torch.equal(view, expected[index]) for index, view in found.items())
    assert len(views(0, 1, skip=1)) == len(expected) - 1


# What is shown


def reference(image, crop, drawn):
    """The view by Pillow alone, of the picture decoded whole."""
    box = crop.box(drawn, image.height, image.width).at(1)
    kinds = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    part = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
    shown = part.resize((crop.size[1], crop.size[0]), kinds[drawn.interpolation])
    if drawn.mirrored:
        shown = shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if drawn.upside_down:
        shown = shown.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return torch.from_numpy(np.array(shown)).permute(2, 0, 1)


@pytest.mark.parametrize("size", [(224, 224), (96, 128), (64, 64)])
def test_a_view_is_its_part_of_the_picture_resized(size):
    crop = ResizedCrop(size, (0.35, 1.0), vflip=0.5, interpolation="random")
    for index, drawn in enumerate(crop.drawn(0, 0, torch.arange(12))):
        image = photographs()[index % 2]
        assert mean_difference(crop.shown(image, drawn), reference(image, crop, drawn)) < 0.25


@pytest.mark.parametrize(("size", "shrinks"), [(224, {1}), (160, {1, 2}), (64, {4}), (40, {4, 8})])
def test_a_view_decoded_at_a_smaller_scale_is_that_of_the_whole_picture(size, shrinks):
    """In the mean over a view 4 grey levels at most, over views 2.5; alike where it is not."""
    load = Files(*map(written, photographs()))
    crop = ResizedCrop((size, size), (0.35, 1.0), interpolation="random")
    differences, met = [], set()
    for index, drawn in enumerate(crop.drawn(0, 0, torch.arange(16))):
        image = load(index % 2)
        met.add(crop.box(drawn, image.height, image.width).shrink)
        small = crop.read(load, index % 2, drawn, 3, pillow())
        differences.append(mean_difference(small, crop.shown(image, drawn)))
    assert met == shrinks
    assert max(differences) < 4
    assert np.mean(differences) < 2.5
    if shrinks == {1}:
        assert max(differences) == 0


def test_less_is_decoded_where_the_crop_allows_it(monkeypatch):
    whole, sizes = decoders.part_of, []

    def part_of(picture, box):
        sizes.append(picture.size)
        return whole(picture, box)

    monkeypatch.setattr(decoders, "part_of", part_of)
    load = Files(written(photographs()[0].resize((2000, 1500))))
    view_of({"scale": [0.9, 1.0]}, 224, decoder="pil").batch(load, 0, 0, torch.tensor([0]))
    assert sizes[-1] == (500, 375)


# Whatever files hold


def colours(channels):
    photo = photographs()[0].resize((320, 240))
    alpha = Image.linear_gradient("L").resize(photo.size)
    wide = np.asarray(photo.convert("L")).astype(np.uint16) * 257
    return {
        "a colour JPEG": written(photo),
        "a grey JPEG": written(photo.convert("L")),
        "a progressive JPEG": written(photo, progressive=True),
        "a JPEG without subsampling": written(photo, subsampling=0),
        "a CMYK JPEG": written(photo.convert("CMYK")),
        "a PNG": written(photo, "PNG"),
        "a transparent PNG": written(Image.merge("RGBA", [*photo.split(), alpha]), "PNG"),
        "a palette": written(photo.convert("P"), "PNG"),
        "16 bits": written(Image.fromarray(wide), "PNG"),
        "a WebP": written(photo, "WEBP"),
        "a GIF": written(photo, "GIF"),
    }


@pytest.mark.parametrize("channels", [1, 3])
def test_whatever_a_file_holds_is_shown_as_its_decoded_picture_is(channels):
    for name, content in colours(channels).items():
        load = Files(content, channels=channels)
        view = view_of(size=160, channels=channels)  # no crop of these is decoded smaller
        expected = view(load(0), 0, 5, 0)
        assert torch.equal(view.batch(load, 0, 5, torch.tensor([0]))[0], expected), name
        assert len(expected) == channels


def test_grey_values_of_a_colour_picture_decoded_smaller_are_those_of_its_colours():
    load, view = Files(written(photographs()[0]), channels=1), view_of(size=64, channels=1)
    small = view.batch(load, 0, 0, torch.tensor([0]))[0]
    assert mean_difference(small, view(load(0), 0, 0, 0)) < 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(640, 424), (637, 419)])
def test_a_turned_picture_is_shown_upright(orientation, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    load = Files(written(photographs()[1].resize(size), exif=exif))
    crop = ResizedCrop((64, 64), (0.35, 1.0))
    exact = size[0] % 8 or size[1] % 8
    for drawn in crop.drawn(0, 0, torch.arange(4)):
        shown = crop.read(load, 0, drawn, 3, pillow())
        difference = mean_difference(shown, crop.shown(load(0), drawn))
        assert difference < 4
        if exact and orientation != 1:
            assert difference == 0


def test_a_loader_without_files_gives_its_pictures():
    photo, view = photographs()[0], view_of()
    found = view.batch(lambda index: photo, 0, 0, torch.tensor([7]))[0]
    assert torch.equal(found, view(photo, 0, 0, 7))


def test_broken_pictures_are_named(tmp_path):
    path = write_photographs(tmp_path) / "even" / "0.jpg"
    path.write_bytes(path.read_bytes()[:5000])
    split = folder(str(tmp_path), verify="none").train
    refusal(lambda: view_of().batch(split.load, 0, 0, torch.tensor([0])), "broken image", path)
    path.unlink()
    refusal(lambda: view_of().batch(split.load, 0, 0, torch.tensor([0])), path)


# Which options are keyed


@pytest.mark.parametrize("options", KEYED)
def test_the_usual_crops_are_keyed(options):
    assert view_of(options).crop is not None


@pytest.mark.parametrize(
    "options",
    [{"train_crop_mode": "rkrc"}, {"no_aug": True}, {"interpolation": "lanczos"}],
)
def test_other_crops_are_timms(options):
    view = view_of(options)
    assert view.crop is None
    assert view.decoded_by(clean=False) == str(pillow())


def test_nothing_follows_a_plain_crop():
    assert view_of().train is None
    assert view_of({"color_jitter": [0, 0, 0]}).train is None
    assert view_of({"color_jitter": 0.1}).train is not None


def test_clean_views_are_those_of_the_picture_decoded_whole():
    load = Files(*map(written, photographs()))
    view = view_of({"crop_pct": 0.9}, 64)
    found = view.batch(load, 0, CLEAN, torch.tensor([0, 1]))
    from timm.data import create_transform

    exact = create_transform(64, crop_pct=0.9, interpolation="bilinear", normalize=False)
    for index, image in enumerate(map(Image.open, map(io.BytesIO, load.contents))):
        assert torch.equal(found[index], exact(image.convert("RGB")))


def test_what_is_drawn_again_is_another_draw():
    drawn = ResizedCrop((8, 8)).drawn(0, 0, torch.arange(100))
    assert all(len(set(one.shares)) == len(one.shares) == 10 for one in drawn)
    for first, second in pairwise(np.array([one.shares for one in drawn]).T):
        assert abs(stats.spearmanr(first, second).statistic) < 0.4
