"""Views are pure functions of (seed, epoch, index), and their draws are uniform and independent."""

import math
import random
import zlib
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from timm.data import create_transform
from torchvision.transforms.v2 import functional as tv

from distill.data.views.draws import (
    Draw,
    Draws,
    beta,
    keyed_integers,
    keyed_uniform,
    keyed_words,
    mix,
)
from distill.data.views.pixels import bilinear, half_pixels
from distill.data.views.views import CLEAN, ResidentView, StreamedView

COUNT = 24
MASK = 0xFFFFFFFF
VIEW = ResidentView(pad=2, flip=True)
CROP = {"crop_scale": [0.2, 1.0]}
AFFINE = {"rotate": 20, "translate": 0.2, "zoom": [0.7, 1.4], "shear": 15}
COLOUR = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.2}
ERASE = {"erase": 0.5}
RECIPES = [
    {"pad": 2, "flip": True},
    {**CROP, "flip": True},
    AFFINE,
    COLOUR,
    ERASE,
    {"pad": 2, "flip": True, **CROP, **AFFINE, **COLOUR, **ERASE},
]

SUMS = [
    2256809357,
    2417974598,
    1641321429,
    3194369021,
    65485995,
    462125870,
]  # of each recipe's views

unhurried = settings(deadline=None, max_examples=50)
seeds = st.integers(0, 2**32 - 1)
epochs = st.integers(0, 10_000)
recipes = st.sampled_from(RECIPES)


def pictures(count=COUNT, channels=3, height=7, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (count, channels, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def photo(index=0, size=(40, 36)):
    rng = np.random.default_rng(index)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def streamed(size=16, **options):
    return StreamedView(
        train=create_transform(size, is_training=True, normalize=False, **options),
        clean=create_transform(size, normalize=False),
    )


def murmur3_finaliser(word):
    """The reference in plain integers, from the published constants."""
    word ^= word >> 16
    word = word * 0x85EBCA6B & MASK
    word ^= word >> 13
    word = word * 0xC2B2AE35 & MASK
    return word ^ word >> 16


# The generator


@unhurried
@given(st.integers(0, MASK))
def test_mix_is_murmur3s_finaliser_in_32_bits(word):
    assert int(mix(torch.tensor([word]))) == murmur3_finaliser(word)


@unhurried
@given(seeds, epochs, st.integers(0, 9), st.integers(0, 2**40))
def test_words_follow_the_chain_of_their_key(seed, epoch, draw, index):
    word = 0
    for part in (seed, epoch, draw):
        word = murmur3_finaliser(word + part * 0x9E3779B9 + 1 & MASK)
    word = murmur3_finaliser(word + index & MASK)
    word = murmur3_finaliser(word + (index >> 32) * 0x9E3779B9 + 1 & MASK)
    assert int(keyed_words(seed, epoch, torch.tensor([index]), draw)) == word


def test_words_of_one_key_never_repeat_below_2_to_the_32():
    words = keyed_words(0, 0, torch.arange(2_000_000), 0)
    assert len(torch.unique(words)) == 2_000_000
    assert int(words.min()) >= 0
    assert int(words.max()) <= MASK


def test_indices_that_share_their_low_32_bits_differ():
    low, high = torch.tensor([5]), torch.tensor([5 + 2**32])
    assert keyed_words(0, 0, low, 0) != keyed_words(0, 0, high, 0)


@pytest.mark.parametrize("key", [(0, 0, 0), (1, 0, 0), (0, 17, 0), (0, 0, 3), (2**32 - 1, 299, 1)])
def test_draws_are_uniform(key):
    seed, epoch, draw = key
    values = keyed_uniform(seed, epoch, torch.arange(50_000), draw).numpy()
    assert values.min() >= 0
    assert values.max() < 1
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    counts = np.histogram(values, bins=100, range=(0, 1))[0]
    assert stats.chisquare(counts).pvalue > 1e-3


def test_draws_are_uniform_over_epochs_and_over_seeds_for_one_sample():
    index = torch.tensor([3])
    over_epochs = [float(keyed_uniform(0, epoch, index, 0)) for epoch in range(3000)]
    over_seeds = [float(keyed_uniform(seed, 0, index, 0)) for seed in range(3000)]
    assert stats.kstest(over_epochs, "uniform").pvalue > 1e-3
    assert stats.kstest(over_seeds, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("below", [2, 3, 5, 10])
def test_integers_are_uniform_and_in_range(below):
    values = keyed_integers(4, 2, torch.arange(60_000), 1, below)
    assert set(values.tolist()) == set(range(below))
    assert stats.chisquare(torch.bincount(values).numpy()).pvalue > 1e-3


def test_draws_are_uncorrelated_over_index_epoch_draw_and_seed():
    count = 40_000
    index = torch.arange(count)
    keys = list(product((0, 1), (0, 1, 2), (0, 1, 2)))
    draws = torch.stack([keyed_uniform(s, e, index, d) for s, e, d in keys]).double()
    bound = 5 / count**0.5  # five standard deviations of a sample correlation
    between = torch.corrcoef(draws) - torch.eye(len(keys))
    assert between.abs().max() < bound
    for lag in (1, 2, 3, 32, 128, 256):
        pairs = torch.stack([draws[:, :-lag].flatten(), draws[:, lag:].flatten()])
        assert torch.corrcoef(pairs)[0, 1].abs() < bound, lag


def test_each_bit_of_the_index_changes_half_of_the_bits_of_the_word():
    index = torch.arange(4096) * 7919
    for bit in range(31):
        changed = keyed_words(0, 0, index, 0) ^ keyed_words(0, 0, index ^ (1 << bit), 0)
        share = np.unpackbits(changed.numpy().astype(np.uint32).view(np.uint8)).mean()
        assert abs(share - 0.5) < 0.02


# Views of data in memory


@unhurried
@given(recipes, seeds, epochs, st.randoms(use_true_random=False))
def test_a_view_does_not_depend_on_order(recipe, seed, epoch, rng):
    view, images, index = ResidentView(**recipe), pictures(), torch.arange(COUNT) * 31
    order = torch.tensor(rng.sample(range(COUNT), COUNT))
    whole = view(images, seed, epoch, index)
    assert torch.equal(view(images[order], seed, epoch, index[order]), whole[order])


@unhurried
@given(recipes, seeds, epochs, st.integers(1, COUNT))
def test_a_view_does_not_depend_on_the_batch(recipe, seed, epoch, size):
    view, images, index = ResidentView(**recipe), pictures(), torch.arange(COUNT)
    batches = zip(images.split(size), index.split(size), strict=True)
    parts = [view(part, seed, epoch, where) for part, where in batches]
    assert torch.equal(torch.cat(parts), view(images, seed, epoch, index))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size", [1, 7, 128])
def test_a_view_is_the_same_in_any_batch_of_common_sizes_and_in_any_layout(recipe, size):
    view, images = ResidentView(**recipe), pictures(128, height=32, width=29)
    index = torch.randperm(128, generator=torch.Generator().manual_seed(0)) * 1009
    whole = view(images, 5, 2, index)
    batches = zip(images.split(size), index.split(size), strict=True)
    assert torch.equal(torch.cat([view(part, 5, 2, where) for part, where in batches]), whole)
    scattered = images.to(memory_format=torch.channels_last)
    assert torch.equal(view(scattered, 5, 2, index), whole)
    assert whole.dtype == torch.uint8
    assert whole.shape == images.shape
    assert len(view(images[:0], 5, 2, index[:0])) == 0


@unhurried
@given(recipes, seeds, epochs, st.integers(1, 4))
def test_a_view_does_not_depend_on_the_rank(recipe, seed, epoch, ranks):
    view, images, index = ResidentView(**recipe), pictures(), torch.arange(COUNT)
    together = torch.empty_like(images)
    for rank in range(ranks):
        mine = index[rank::ranks]
        together[mine] = view(images[mine], seed, epoch, mine)
    assert torch.equal(together, view(images, seed, epoch, index))


@pytest.mark.parametrize("recipe", RECIPES)
def test_threads_change_nothing_in_a_view(recipe):
    view, images, index = ResidentView(**recipe), pictures(128, 3, 32, 32), torch.arange(128)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(view(images, 0, 1, index))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_views_stay_what_they_were():
    """Answers to views are stored, and runs are resumed: a recipe must show for ever the same."""
    images, index = pictures(64, 3, 16, 16), torch.arange(64)
    sums = [zlib.crc32(ResidentView(**r)(images, 1, 2, index).numpy().data) for r in RECIPES]
    assert sums == SUMS


def slow_view(image, shift_down, shift_right, mirrored, pad):
    """Pad, cut a window, mirror it: one image, in numpy."""
    height, width = image.shape[1:]
    padded = np.zeros((len(image), height + 2 * pad, width + 2 * pad), np.uint8)
    padded[:, pad : pad + height, pad : pad + width] = image
    window = padded[:, shift_down : shift_down + height, shift_right : shift_right + width]
    return window[:, :, ::-1] if mirrored else window


@unhurried
@given(seeds, epochs, st.integers(0, 9), st.booleans(), st.sampled_from([1, 3]))
def test_views_equal_a_reference_that_goes_image_by_image(seed, epoch, pad, flip, channels):
    images, index = pictures(8, channels), torch.arange(8) * 1000 + 5
    views = ResidentView(pad, flip)(images, seed, epoch, index)
    assert views.dtype == torch.uint8
    down, right = (keyed_integers(seed, epoch, index, draw, 2 * pad + 1) for draw in (0, 1))
    mirrored = keyed_integers(seed, epoch, index, 2, 2)
    for k, image in enumerate(images.numpy()):
        expected = slow_view(image, int(down[k]), int(right[k]), flip and bool(mirrored[k]), pad)
        assert np.array_equal(views[k].numpy(), expected)


def test_views_leave_their_images_as_they_were():
    images = pictures()
    before = images.clone()
    VIEW(images, 0, 0, torch.arange(COUNT))
    assert torch.equal(images, before)


def test_shifts_are_uniform_from_minus_pad_to_pad_and_flips_are_half():
    pad, count, size = 2, 20_000, 9
    images = torch.zeros(count, 1, size, size, dtype=torch.uint8)
    images[:, :, 4, 4], images[:, :, 4, 5] = 1, 2  # a mark, and its right-hand neighbour
    views = ResidentView(pad, flip=True)(images, 0, 0, torch.arange(count))
    marks = (views == 1).nonzero()[:, 2:]
    neighbours = (views == 2).nonzero()[:, 2:]
    assert len(marks) == len(neighbours) == count
    mirrored = neighbours[:, 1] < marks[:, 1]
    assert stats.binomtest(int(mirrored.sum()), count).pvalue > 1e-3
    for axis in (0, 1):
        shifts = (marks - 4)[:, axis]
        assert set(shifts.tolist()) == set(range(-pad, pad + 1))
        assert stats.chisquare(torch.bincount(shifts + pad).numpy()).pvalue > 1e-3
    table = stats.contingency.crosstab(marks[:, 0].numpy(), marks[:, 1].numpy(), mirrored.numpy())
    assert stats.chi2_contingency(table.count).pvalue > 1e-3


def test_the_clean_view_and_the_view_without_options_are_the_image():
    images, index = pictures(), torch.arange(COUNT)
    assert torch.equal(VIEW(images, 0, CLEAN, index), images)
    assert torch.equal(ResidentView()(images, 0, 3, index), images)


@unhurried
@given(seeds, epochs)
def test_other_epochs_and_seeds_give_other_views(seed, epoch):
    images, index = pictures(), torch.arange(COUNT)
    views = VIEW(images, seed, epoch, index)
    for other in ((seed, epoch + 1), ((seed + 1) % 2**32, epoch)):
        assert not torch.equal(VIEW(images, *other, index), views)


def test_same_images_under_other_indices_are_seen_differently():
    images = pictures(1).expand(COUNT, -1, -1, -1)
    views = VIEW(images, 0, 0, torch.arange(COUNT))
    assert len(torch.unique(views, dim=0)) > COUNT // 2


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("pad", [-1, 1.5, "2", True, NAN, None]),
        ("flip", ["no", 1, None]),
        ("rotate", [-1, 181, "15", True, NAN, None]),
        ("translate", [-0.1, 1.1, NAN, [0.1, 0.1]]),
        ("shear", [-1, 81, NAN]),
        *((name, [-0.1, 9, NAN, INF, "much"]) for name in ("brightness", "contrast", "saturation")),
        ("hue", [-0.1, 0.51, NAN]),
        ("erase", [-0.1, 1.1, NAN, True]),
        *((name, [-0.1, 101, NAN, INF, "0.2", True]) for name in ("mixup", "cutmix")),
        ("crop_scale", [[0, 1], [0.5, 1.1], [0.8, 0.2], [0.5], 0.5, "ab", [NAN, 1], [0.1, NAN]]),
        ("erase_scale", [[0, 1], [0.5, 0.1], None, [0.1, 0.2, 0.3]]),
        ("zoom", [[0, 1], [2, 1], [0.5, INF], [NAN, NAN], 2, [True, True], {"lo": 1, "hi": 2}]),
        *(
            (name, [[0, 1], [2, 1], [1, 101], None, ["1", "2"]])
            for name in ("crop_ratio", "erase_ratio")
        ),
    ],
)
def test_options_out_of_range_are_refused_by_name(name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"data\.view\.{name} must be") as caught:
            ResidentView(**{name: value})
        message = str(caught.value)
        assert message.endswith(f", got {value!r}")
        assert len(message.splitlines()) == 1


def test_a_refusal_says_what_would_do():
    with pytest.raises(ValueError, match="must be two shares 0 < lo ≤ hi ≤ 1, got"):
        ResidentView(crop_scale=[0.5, 0.2])
    with pytest.raises(ValueError, match=r"must be a share from 0 to 0\.5, got 3"):
        ResidentView(hue=3)


# The draws of views in memory


def test_no_draw_shares_its_number():
    assert [int(draw) for draw in Draw] == list(range(29))
    assert [Draw.SHIFT_DOWN, Draw.SHIFT_RIGHT, Draw.FLIP] == [0, 1, 2]  # as it was from the first


def test_draws_made_together_are_those_made_alone():
    index = torch.arange(50) * 77
    draws = Draws.of(3, 4, index)
    for draw in Draw:
        assert torch.equal(draws.words[draw], keyed_words(3, 4, index, draw))
        assert torch.equal(draws.integers(draw, 7), keyed_integers(3, 4, index, draw, 7))
        assert torch.equal(draws.uniform(draw), keyed_uniform(3, 4, index, draw).double())
    spread = draws.uniform(Draw.ZOOM, -2.0, 3.0)
    assert torch.allclose(spread, keyed_uniform(3, 4, index, Draw.ZOOM).double() * 5 - 2)


@pytest.mark.parametrize(
    "others",
    [{"pad": 1}, {"flip": True}, CROP, {"hue": 0.2, "saturation": 0.5}, {"mixup": 1.0}],
)
def test_switching_an_option_on_does_not_move_the_draws_of_another(others):
    white = torch.full((256, 3, 12, 12), 255, dtype=torch.uint8)
    inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))  # a shift lets the border in
    alone = ResidentView(erase=0.5)(white, 0, 0, torch.arange(256))[inside]
    assert torch.equal(
        ResidentView(erase=0.5, **others)(white, 0, 0, torch.arange(256))[inside], alone
    )
    assert 0 < (alone == 0).float().mean() < 0.5


# Geometry


def read(images, matrix):
    """Read images where a matrix `[2, 3]` says, of (rows, columns, 1) from the centre."""
    count, (height, width) = len(images), images.shape[-2:]
    still = torch.zeros(count, dtype=torch.long)
    rows, columns = half_pixels(height, still, still), half_pixels(width, still, still)
    positions = torch.tensor(matrix, dtype=torch.float64)[..., None].expand(2, 3, count)
    return bilinear(images, rows, columns, positions)


def test_whole_turns_steps_and_mirrors_are_exact():
    images = pictures(4, height=8, width=8)
    middle = 3.5
    assert torch.equal(read(images, [[1, 0, middle], [0, 1, middle]]), images)
    assert torch.equal(read(images, [[0, 1, middle], [-1, 0, middle]]), images.rot90(1, (2, 3)))
    assert torch.equal(read(images, [[0, -1, middle], [1, 0, middle]]), images.rot90(-1, (2, 3)))
    assert torch.equal(read(images, [[-1, 0, middle], [0, 1, middle]]), images.flip(2))
    down = read(images, [[1, 0, middle - 3], [0, 1, middle]])
    assert torch.equal(down[:, :, 3:], images[:, :, :-3])
    assert down[:, :, :3].eq(0).all()
    assert read(images, [[1, 0, 90], [0, 1, middle]]).eq(0).all()


def test_between_pixels_are_their_means():
    images = pictures(4, height=8, width=8)
    found = read(images, [[1, 0, 3.5], [0, 1, 4.0]])[..., :-1].int()
    pair = images[..., :-1].int() + images[..., 1:].int()
    assert torch.equal(found, (pair + 1) // 2)


def test_resampling_agrees_with_shifting_where_both_can():
    images, index = pictures(64, height=9, width=9), torch.arange(64)
    exact = {"pad": 2, "flip": True}
    whole = {"crop_scale": [1, 1], "crop_ratio": [1, 1]}
    for epoch in range(5):
        expected = ResidentView(**exact)(images, 1, epoch, index)
        for same in (whole, {"zoom": [1, 1]}):
            assert torch.equal(ResidentView(**exact, **same)(images, 1, epoch, index), expected)


def angles(draws, draw, degrees):
    steps = (draws.words[draw] >> 20).double().numpy()
    return np.radians(degrees) * ((steps + 0.5) / 2048 - 1)


def slow_affine(image, turn, slant, zoom, down, right, box):
    """Turn, slant, enlarge and shift what a box shows: one image, in float64, in (x, y)."""
    height, width = image.shape[1:]
    top, left, tall, wide = box
    turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    inverse = np.linalg.inv(turned @ np.array([[1, np.tan(slant)], [0, 1]]) * zoom)
    y, x = np.mgrid[:height, :width]
    shown = np.stack([x - (width - 1) / 2 - right, y - (height - 1) / 2 - down]).reshape(2, -1)
    x, y = inverse @ shown * np.array([[wide / width], [tall / height]])
    x, y = x + left + wide / 2 - 0.5, y + top + tall / 2 - 0.5
    edge = np.pad(image.astype(float), ((0, 0), (1, 1), (1, 1)), mode="edge")
    x0, y0 = np.floor(x).clip(-1, width - 1), np.floor(y).clip(-1, height - 1)
    total = 0
    for dy, dx in product((0, 1), (0, 1)):
        weight = np.abs(1 - dy - (y - y0)) * np.abs(1 - dx - (x - x0))
        total = total + weight * edge[:, (y0 + dy + 1).astype(int), (x0 + dx + 1).astype(int)]
    beyond = np.maximum(
        np.abs(x - (width - 1) / 2) - width / 2, np.abs(y - (height - 1) / 2) - height / 2
    )
    return np.where(beyond > 0, 0, total).reshape(image.shape), np.abs(beyond).reshape(
        height, width
    )


@settings(deadline=None, max_examples=25)
@given(
    seeds, epochs, st.sampled_from([{}, AFFINE, {"rotate": 180}, {"zoom": [0.5, 2]}]), st.booleans()
)
def test_resampled_views_equal_a_reference_that_goes_image_by_image(seed, epoch, options, crop):
    view = ResidentView(**{**options, **(CROP if crop else {"shear": 10})})
    images, index = pictures(6, height=12, width=10), torch.arange(6) * 999
    views, draws = view(images, seed, epoch, index), Draws.of(seed, epoch, index)
    turn = angles(draws, Draw.ROTATE, view.rotate)
    slant = angles(draws, Draw.SHEAR, view.shear)
    zoom = draws.uniform(Draw.ZOOM, *(view.zoom or (1, 1)))
    down = (2 * draws.uniform(Draw.TRANSLATE_DOWN) - 1) * view.translate * 12
    right = (2 * draws.uniform(Draw.TRANSLATE_RIGHT) - 1) * view.translate * 10
    share = draws.uniform(Draw.CROP_AREA, *CROP["crop_scale"])
    steps = ((draws.words[Draw.CROP_RATIO] >> 20).double() + 0.5) / 4096
    ratio = 0.75 * (16 / 9) ** steps
    for k, image in enumerate(images.numpy()):
        box = (0, 0, 12, 10)
        if crop:
            tall = min(12, math.sqrt(share[k] * 120 / ratio[k]))
            wide = min(10, math.sqrt(share[k] * 120 * ratio[k]))
            top, left = (draws.uniform(d)[k] for d in (Draw.CROP_TOP, Draw.CROP_LEFT))
            box = (float(top) * (12 - tall), float(left) * (10 - wide), tall, wide)
        moved = (float(value[k]) for value in (zoom, down, right))
        expected, margin = slow_affine(image, turn[k], slant[k], *moved, box)
        sure = margin > 1e-3  # on the very edge, rounding decides
        # A weight is rounded down to 1/256 along each side: at most a level each.
        assert np.abs(views[k].numpy() - expected)[:, sure].max() <= 2.6


def test_a_crop_never_shows_what_lies_beyond_the_image():
    white = torch.full((2000, 1, 8, 8), 255, dtype=torch.uint8)
    for scale in ([0.05, 1.0], [1.0, 1.0]):
        views = ResidentView(crop_scale=scale)(white, 0, 0, torch.arange(2000))
        assert views.eq(255).all()


def test_crops_are_of_their_share_of_the_area():
    steps = torch.arange(64, dtype=torch.uint8) * 4
    index = torch.arange(400)
    across = steps.expand(400, 1, 64, 64).contiguous()
    view = ResidentView(crop_scale=[0.25, 0.25], crop_ratio=[0.5, 2.0])
    slopes = []
    for images in (across, across.transpose(2, 3)):
        views = view(images, 0, 0, index).double()
        line = views[:, 0, 32] if images is across else views[:, 0, :, 32]
        slopes.append((line[:, 60] - line[:, 4]) / (56 * 4))
    assert (slopes[0] * slopes[1] - 0.25).abs().max() < 0.02
    ratio = (slopes[0] / slopes[1]).log() / math.log(2)
    assert stats.kstest(ratio.numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-3


# Colours


@pytest.mark.parametrize(
    ("name", "draw", "levels"),
    [
        ("brightness", Draw.BRIGHTNESS, 1),
        ("contrast", Draw.CONTRAST, 2),
        ("saturation", Draw.SATURATION, 2),
        ("hue", Draw.HUE, 3),
    ],
)
def test_colours_change_as_in_torchvision(name, draw, levels):
    images, index = pictures(32, height=16, width=15), torch.arange(32)
    images[:4] = images[:4, :1]  # grey ones
    strength = 0.5
    views = ResidentView(**{name: strength})(images, 2, 3, index)
    low = -strength if name == "hue" else 1 - strength
    factors = Draws.of(2, 3, index).uniform(draw, low, 1 + strength if name != "hue" else strength)
    adjust = getattr(tv, f"adjust_{name}")
    expected = torch.stack([adjust(i, float(f)) for i, f in zip(images, factors, strict=True)])
    assert (views.int() - expected.int()).abs().max() <= levels
    assert not torch.equal(views, images)


def test_colours_change_in_their_order():
    images, index = pictures(16, height=9, width=9), torch.arange(16)
    together = ResidentView(**COLOUR)(images, 0, 0, index).int()
    one_by_one = images
    for name in ("brightness", "contrast", "saturation", "hue"):
        one_by_one = ResidentView(**{name: COLOUR[name]})(one_by_one, 0, 0, index)
    assert torch.equal(together, one_by_one.int())


def test_grey_images_stay_grey():
    images, index = pictures(16)[:, :1].expand(-1, 3, -1, -1), torch.arange(16)
    views = ResidentView(**COLOUR)(images, 0, 0, index).int()
    assert (views - views[:, :1]).abs().max() <= 1
    grey = ResidentView(brightness=0.4, contrast=0.4)(images[:, :1], 0, 0, index).int()
    alike = ResidentView(brightness=0.4, contrast=0.4)(images, 0, 0, index).int()
    assert (grey - alike).abs().max() <= 1


# Erasing


def test_erased_boxes_have_their_chance_share_and_ratio_anywhere_inside():
    count, side = 6000, 40
    white = torch.full((count, 1, side, side), 255, dtype=torch.uint8)
    options = {"erase_scale": [0.1, 0.2], "erase_ratio": [0.5, 2.0]}
    gone = ResidentView(erase=0.3, **options)(white, 0, 0, torch.arange(count))[:, 0] == 0
    found = gone.any((1, 2))
    assert stats.binomtest(int(found.sum()), count, 0.3).pvalue > 1e-3
    rows, columns = gone[found].any(2), gone[found].any(1)
    tall, wide = rows.sum(1), columns.sum(1)
    assert torch.equal(gone[found].sum((1, 2)), tall * wide)  # a box, in one piece
    share = (tall * wide).double() / side**2
    assert 0.09 < share.min() < 0.105
    assert 0.195 < share.max() < 0.215
    assert abs(share.mean() - 0.15) < 0.003
    ratio = (wide / tall).log2()
    assert ratio.abs().max() < 1.15
    assert abs(ratio.mean()) < 0.05
    for first, length in ((rows.int().argmax(1), tall), (columns.int().argmax(1), wide)):
        place = first.double() / (side - length).double()
        assert place.min() == 0
        assert place.max() == 1
        assert abs(place.mean() - 0.5) < 0.02


def test_a_box_larger_than_the_image_is_the_image():
    images = pictures(50)
    view = ResidentView(erase=1, erase_scale=[1, 1], erase_ratio=[1, 1])
    assert (
        view(images, 0, 0, torch.arange(50))[:, :, :, :].float().mean() < images.float().mean() / 5
    )


# Mixing


def mixing(count=4000, side=10, **options):
    """Return white views mixed with black ones, and the shares."""
    white = torch.full((count, 1, side, side), 255, dtype=torch.uint8)
    return ResidentView(**options).mixed(white, 0 * white, 0, 0, torch.arange(count))


@pytest.mark.parametrize("alpha", [0.01, 0.2, 1.0, 4.0, 100.0])
def test_shares_of_mixup_are_beta(alpha):
    views, share = mixing(mixup=alpha)
    spread = 1 / (4 * (2 * alpha + 1))
    assert abs(share.mean() - 0.5) < 5 * (spread / 4000) ** 0.5
    assert abs(((share - 0.5) ** 2).mean() - spread) < 0.06 * spread
    if alpha >= 1:  # below, most shares are next to 0 or 1, and steps of 1/65,536 show
        assert stats.kstest(share.numpy(), stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert (views.double() / 255 - share[:, None, None, None]).abs().max() <= 0.5 / 255 + 1e-9
    assert share.min() >= 0
    assert share.max() <= 1


@pytest.mark.parametrize("alpha", [0.01, 0.2, 1.0, 100.0])
def test_tables_are_of_the_quantiles(alpha):
    table = beta(alpha, torch.device("cpu"))
    assert table.isfinite().all()
    middles = stats.beta(alpha, alpha).cdf(table.numpy())
    sure = (table > 1e-9) & (table < 1 - 1e-9)
    assert np.abs(middles - (np.arange(4096) + 0.5) / 4096)[sure].max() < 1e-6


def test_blends_are_rounded_to_the_nearest():
    views, others, index = pictures(seed=1), pictures(seed=2), torch.arange(COUNT)
    mixed, share = ResidentView(mixup=1.0).mixed(views, others, 0, 0, index)
    weight = share[:, None, None, None]
    expected = weight * views.double() + (1 - weight) * others.double()
    assert (mixed.double() - expected).abs().max() <= 0.5 + 1e-6


def test_cutmix_replaces_a_box_and_counts_its_pixels():
    count, side = 4000, 20
    views, share = mixing(count, side, cutmix=1.0)
    gone = views[:, 0] == 0
    assert torch.allclose(share, 1 - gone.double().mean((1, 2)))
    assert torch.equal(gone.sum((1, 2)), gone.any(2).sum(1) * gone.any(1).sum(1))
    draws = Draws.of(0, 0, torch.arange(count))
    wanted = draws.lookup(Draw.CUTMIX_SHARE, beta(1.0, torch.device("cpu")))
    row, column = (draws.integers(d, side) for d in (Draw.CUTMIX_ROW, Draw.CUTMIX_COLUMN))
    half = (torch.sqrt(1 - wanted) * side / 2).floor().long()
    for k in range(100):
        expected = torch.zeros(side, side, dtype=torch.bool)
        r, c, h = int(row[k]), int(column[k]), int(half[k])
        expected[max(r - h, 0) : r + h, max(c - h, 0) : c + h] = True
        assert torch.equal(gone[k], expected)
    assert (share - wanted > -1e-9).all()  # the edge cuts boxes off


def test_of_mixup_and_cutmix_each_sample_gets_one_by_a_fair_draw():
    views, share = mixing(mixup=1.0, cutmix=1.0)
    alone = {name: mixing(**{name: 1.0}) for name in ("mixup", "cutmix")}
    kind = {name: (views == one[0]).flatten(1).all(1) for name, one in alone.items()}
    assert (kind["mixup"] | kind["cutmix"]).all()
    assert stats.binomtest(int(kind["mixup"].sum()), 4000).pvalue > 1e-3
    clear = kind["mixup"] != kind["cutmix"]  # both may leave a sample as it is
    expected = torch.where(kind["mixup"], alone["mixup"][1], alone["cutmix"][1])
    assert torch.equal(share[clear], expected[clear])


def test_partners_are_uniform_over_the_split():
    found = ResidentView(mixup=1.0).partners(0, 0, torch.arange(20_000), 40)
    assert stats.chisquare(torch.bincount(found, minlength=40).numpy()).pvalue > 1e-3
    pairs = stats.contingency.crosstab(found.numpy() // 8, np.arange(20_000) % 5).count
    assert stats.chi2_contingency(pairs).pvalue > 1e-3


@unhurried
@given(
    st.sampled_from([{"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}]),
    seeds,
    epochs,
    st.integers(1, COUNT),
    st.randoms(use_true_random=False),
)
def test_mixing_does_not_depend_on_batch_and_order(options, seed, epoch, size, rng):
    view, views, others = ResidentView(**options), pictures(seed=1), pictures(seed=2)
    index, order = torch.arange(COUNT) * 7, torch.tensor(rng.sample(range(COUNT), COUNT))
    mixed, share = view.mixed(views, others, seed, epoch, index)
    for batch in order.split(size):
        found = view.mixed(views[batch], others[batch], seed, epoch, index[batch])
        assert torch.equal(found[0], mixed[batch])
        assert torch.equal(found[1], share[batch])


# Views of streamed data


@settings(deadline=None, max_examples=25)
@given(seeds, epochs, st.integers(0, 2**33), st.integers(0, 2**31))
def test_a_streamed_view_depends_on_its_key_only(seed, epoch, index, disturbance):
    view = streamed(color_jitter=0.4, auto_augment="rand-m9-mstd0.5")
    first = view(photo(), seed, epoch, index)
    random.seed(disturbance)
    np.random.seed(disturbance)
    torch.manual_seed(disturbance)
    view(photo(1), seed, epoch, index + 1)
    assert torch.equal(view(photo(), seed, epoch, index), first)


def test_a_streamed_view_leaves_the_shared_generators_alone():
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    streamed(color_jitter=0.4)(photo(), 0, 0, 0)
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected


def test_the_shared_generators_are_put_back_after_a_failure():
    def fails(image):
        random.random(), np.random.rand(), torch.rand(())
        raise ValueError("broken")

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with pytest.raises(ValueError, match="broken"):
        StreamedView(fails, fails)(photo(), 0, 0, 0)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert after == before


def test_a_streamed_view_does_not_reseed_gpus(monkeypatch):
    def reseeded(seed):
        raise AssertionError("torch.cuda was reseeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded)
    streamed()(photo(), 0, 0, 0)


def test_every_generator_that_a_transform_may_draw_from_is_keyed():
    def draws(image):
        return torch.tensor([random.random(), np.random.rand(), float(torch.rand(()))])

    view = StreamedView(draws, draws)
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    table = torch.stack([view(None, *key) for key in keys])
    assert torch.equal(table, torch.stack([view(None, *key) for key in keys]))
    assert len(torch.unique(table)) == table.numel()


def test_the_clean_streamed_view_is_timms_evaluation():
    view = streamed()
    expected = create_transform(16, normalize=False)(photo())
    for seed in (0, 1):
        assert torch.equal(view(photo(), seed, CLEAN, seed), expected)


def test_flips_of_streamed_views_are_half_and_independent_of_their_neighbours():
    left = Image.fromarray(np.tile(np.arange(16, dtype=np.uint8), (16, 1)))
    view = streamed(scale=(1.0, 1.0), ratio=(1.0, 1.0), color_jitter=0.0, interpolation="bilinear")
    flips = torch.tensor([int(view(left, 0, 0, i)[0, 0, 0]) > 7 for i in range(1500)])
    assert stats.binomtest(int(flips.sum()), len(flips)).pvalue > 1e-3
    pairs = stats.contingency.crosstab(flips[:-1].numpy(), flips[1:].numpy()).count
    assert stats.chi2_contingency(pairs).pvalue > 1e-3
