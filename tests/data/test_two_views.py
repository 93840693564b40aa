"""Two views of each sample in a step: the first as ever, the second pure and its own."""

import copy
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from distill.data import DataModule
from distill.data.batch import Batch
from distill.data.sources.splits import Resident, Source, Streamed
from distill.data.views.draws import second_seed
from distill.data.views.views import CLEAN, ResidentView
from tests.data.conftest import refusal

WEAK, STRONG = {"pad": 1, "flip": True}, {"rotate": 20, "brightness": 0.5, "erase": 1.0}
TIMMS = {"scale": [0.3, 1.0], "hflip": 0.5}
STREAMED_STRONG = {"auto_augment": "rand-m9-n2-mstd101-inc1", "re_prob": 1}


def noise(count=60, size=8, channels=1):
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (count, channels, size, size), generator=generator)
    return Resident(images.to(torch.uint8), torch.arange(count) % 3)


def module(batch_size=7, views_per_step=2, **options):
    options = {"view": WEAK, "strong_view": STRONG, "seed": 3, **options}
    source = Source("noise", list("abc"), 1, noise())
    return DataModule(source, batch_size=batch_size, views_per_step=views_per_step, **options)


class Noisy:
    """Position → a picture of noise; pickles into workers."""

    def __call__(self, position):
        return Image.fromarray(noise(60, 24, 3).images[position].permute(1, 2, 0).numpy())


def streamed(batch_size=4, workers=0, **options):
    split = Streamed(Noisy(), torch.arange(60) % 3, [f"{k}" for k in range(60)])
    options = {"view": TIMMS, "strong_view": STREAMED_STRONG, "views_per_step": 2, **options}
    return DataModule(
        Source("noise", list("abc"), 3, split), batch_size=batch_size, image_size=16,
        num_workers=workers, seed=3, **options,
    )  # fmt: skip


MODULES = pytest.mark.parametrize("make", [module, streamed])


def shown(data, epoch=2, skip=0):
    """Return the training batches of an epoch with their views made."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    loader.position = lambda: skip
    return [data.on_after_batch_transfer(batch, 0) for batch in loader]


def by_index(found, view):
    """Return index → what one of the views of each sample is."""
    halves = [batch.by_view()[view] for batch in found]
    return {
        int(i): image for half in halves for i, image in zip(half.index, half.view, strict=True)
    }


@MODULES
def test_the_first_view_is_that_of_a_run_of_one_view_and_the_second_is_another(make):
    twice, once = shown(make()), shown(make(views_per_step=1))
    assert len(twice) == len(once) > 3
    for both, one in zip(twice, once, strict=True):
        first, second = both.by_view()
        assert (both.views, both.samples, len(both)) == (2, len(one), 2 * len(one))
        assert torch.equal(first.view, one.view)
        for half in (first, second):
            assert torch.equal(half.target, one.target)
            assert torch.equal(half.index, one.index)
            assert (half.views, half.split, half.view_number) == (1, "train", 2)
        assert torch.equal(both.index, one.index.repeat(2))
        assert (first.view != second.view).flatten(1).any(1).all()


@MODULES
def test_with_the_same_recipe_the_second_view_still_has_draws_of_its_own(make):
    found = shown(make(strong_view={}))
    first, second = by_index(found, 0), by_index(found, 1)
    differ = [index for index, view in first.items() if not torch.equal(view, second[index])]
    assert len(differ) > 0.8 * len(first)


def test_the_second_view_is_its_recipe_for_a_seed_that_follows_from_the_runs():
    data, recipe = module(), ResidentView(**{**WEAK, **STRONG})
    for batch in shown(data):
        second = batch.by_view()[1]
        images = noise().images[second.index]
        expected = recipe(images, second_seed(3), 2, second.index)
        assert torch.equal((second.view * 255).round().byte(), expected)


def test_a_streamed_second_view_is_its_recipe_for_that_seed():
    recipe = streamed(view={**TIMMS, **STREAMED_STRONG}, strong_view={}).view
    second = by_index(shown(streamed()), 1)
    for index in list(second)[:5]:
        expected = recipe(Noisy()(index), second_seed(3), 2, index)
        assert torch.equal((second[index] * 255).round().byte(), expected)


@pytest.mark.parametrize(("make", "size", "workers"),
                         [(module, 1, 0), (module, 20, 0), (streamed, 6, 2)])  # fmt: skip
def test_the_second_view_does_not_depend_on_batch_workers_or_where_an_epoch_goes_on(
    make, size, workers
):
    options = {"workers": workers} if workers else {}
    expected = by_index(shown(make()), 1)
    for found in (shown(make(size, **options)), shown(make(size, **options), skip=1)):
        other = by_index(found, 1)
        both = expected.keys() & other.keys()
        assert len(both) > 15
        assert all(torch.equal(expected[index], other[index]) for index in both)
    later = by_index(shown(make(), epoch=3), 1)
    assert any(not torch.equal(view, later[index]) for index, view in expected.items())


def test_ranks_share_a_batch_of_two_views():
    data, parts = module(8), []
    for rank in range(2):
        part = module(4)
        part.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        parts.append(shown(part))
    expected = [by_index(shown(data), view) for view in (0, 1)]
    for found in parts:
        for view in (0, 1):
            own = by_index(found, view)
            assert all(torch.equal(image, expected[view][index]) for index, image in own.items())
    assert len(by_index(parts[0] + parts[1], 1)) == len(expected[1])


def test_images_that_lie_on_a_device_are_shown_by_position_alike():
    data = module()
    resident, positions = data.resident_on(torch.device("cpu")), torch.tensor([4, 11, 2])
    views, target = resident(positions.repeat(2), resident.words(2))
    assert torch.equal(views, data.training_views(2, positions))
    assert torch.equal(target, data.train.labels[positions].repeat(2))


def test_a_few_views_come_again_both_of_them():
    data = module(views=2)
    rows = torch.arange(5)
    assert torch.equal(data.training_views(1, rows), data.training_views(3, rows))
    assert not torch.equal(data.training_views(1, rows), data.training_views(2, rows))


@MODULES
def test_evaluation_shows_each_sample_once(make):
    data = make()
    for loader in (data.val_dataloader(), data.test_dataloader()):
        for batch in loader:
            assert batch.views == 1
    assert len(data.training_views(CLEAN, torch.arange(3))) == 3


def test_pictures_without_labels_follow_the_labelled_in_each_view():
    more = Source("more", list("abc"), 1, noise(30).subset(torch.arange(9, 29)))
    data = module(8, unlabeled=more, unlabeled_share=0.25)
    for batch in shown(data):
        for half in batch.by_view():
            assert (half.labeled, len(half)) == (6, 8)
            assert half.target[:6].ge(0).all()
            assert half.target[6:].eq(-1).all()


def test_seeds_of_second_views_are_apart_from_each_other_and_from_those_of_first_ones():
    def scrambled(word):  # MurmurHash3's finaliser
        word = (word ^ word >> 16) * 0x85EBCA6B % 2**32
        word = (word ^ word >> 13) * 0xC2B2AE35 % 2**32
        return word ^ word >> 16

    seeds = [second_seed(seed) for seed in range(2000)]
    assert seeds == [scrambled((seed * 0x9E3779B9 + 2) % 2**32) for seed in range(2000)]
    assert len({*seeds, *range(2000)}) == 4000


def test_a_batch_keeps_its_views_where_it_is_moved_and_tells_them_apart_without_indices():
    batch = Batch(torch.arange(8.0).view(4, 2), torch.tensor([1, 2, 1, 2]), views=2)
    assert batch.to("cpu").views == 2
    first, second = batch.by_view()
    assert (first.index, second.index) == (None, None)
    assert torch.equal(torch.cat([first.view, second.view]), batch.view)
    assert second.view.tolist() == [[4, 5], [6, 7]]
    alone = Batch(batch.view, batch.target)
    assert alone.by_view() == [alone]
    assert alone.samples == 4


def test_a_twin_may_show_each_sample_once_and_the_original_is_left_alone():
    data = module()
    twin = data.with_options(seed=3, batch_size=7, two_views=False)
    assert (data.views_per_step, twin.views_per_step) == (2, 1)
    assert all(batch.views == 1 for batch in shown(twin))
    assert copy.copy(data).with_options(seed=1, batch_size=7).views_per_step == 2


def test_what_it_costs_is_said():
    (note,) = [note for note in module().notes if "twice" in note]
    assert "data.strong_view" in note
    assert not any("twice" in note for note in module(views_per_step=1).notes)


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (module, {"views_per_step": 3}, ("data.views_per_step must be 1 or 2, got 3",)),
        (module, {"view": {"mixup": 1.0}}, ("data.view mixes", "data.views_per_step=2")),
        (module, {"strong_view": {"cutmix": 1.0}}, ("data.strong_view mixes",)),
        (module, {"strong_view": {"pd": 1}}, ("data.strong_view has no option pd",)),
        (module, {"strong_view": {"rotate": 200}}, ("data.strong_view.rotate must be degrees",)),
        (module, {"strong_view": {"saturation": 1}}, ("data.strong_view.saturation", "3 channels")),
        (module, {"strong_view": STREAMED_STRONG},
         ("data.strong_view.auto_augment", "images in memory", "give rotate")),
        (streamed, {"view": {"mixup": 1.0}}, ("data.view mixes",)),
        (streamed, {"strong_view": {"rotate": 9}}, ("data.strong_view.rotate is not taken",)),
        (streamed, {"strong_view": {"auto_augment": "none-such"}}, ("data.strong_view=",)),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_twice_is_refused_in_one_line(make, options, words):
    refusal(lambda: make(**options), *words, error=ValueError)
