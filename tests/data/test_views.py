"""Views are pure functions of (seed, epoch, index), and their draws are uniform and independent."""

import random
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from timm.data import create_transform

from distill.data.views import (
    CLEAN,
    ResidentView,
    StreamedView,
    keyed_integers,
    keyed_uniform,
    keyed_words,
    mix,
)

COUNT = 24
MASK = 0xFFFFFFFF
VIEW = ResidentView(pad=2, flip=True)

unhurried = settings(deadline=None, max_examples=50)
seeds = st.integers(0, 2**32 - 1)
epochs = st.integers(0, 10_000)


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
@given(seeds, epochs, st.randoms(use_true_random=False))
def test_a_view_does_not_depend_on_order(seed, epoch, rng):
    images, index = pictures(), torch.arange(COUNT) * 31
    order = torch.tensor(rng.sample(range(COUNT), COUNT))
    whole = VIEW(images, seed, epoch, index)
    assert torch.equal(VIEW(images[order], seed, epoch, index[order]), whole[order])


@unhurried
@given(seeds, epochs, st.integers(1, COUNT))
def test_a_view_does_not_depend_on_the_batch(seed, epoch, size):
    images, index = pictures(), torch.arange(COUNT)
    batches = zip(images.split(size), index.split(size), strict=True)
    parts = [VIEW(part, seed, epoch, where) for part, where in batches]
    assert torch.equal(torch.cat(parts), VIEW(images, seed, epoch, index))


@unhurried
@given(seeds, epochs, st.integers(1, 4))
def test_a_view_does_not_depend_on_the_rank(seed, epoch, ranks):
    images, index = pictures(), torch.arange(COUNT)
    together = torch.empty_like(images)
    for rank in range(ranks):
        mine = index[rank::ranks]
        together[mine] = VIEW(images[mine], seed, epoch, mine)
    assert torch.equal(together, VIEW(images, seed, epoch, index))


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


@pytest.mark.parametrize(
    ("options", "name"),
    [({"pad": -1}, "pad"), ({"pad": 1.5}, "pad"), ({"pad": "2"}, "pad"), ({"flip": "no"}, "flip")],
)
def test_options_out_of_range_are_refused_by_name(options, name):
    with pytest.raises(ValueError, match=rf"data\.view\.{name} must be"):
        ResidentView(**options)


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
