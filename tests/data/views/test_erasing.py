"""Erasing is timm's, as it would be of the normalised view, and pure."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN as MEAN

from distill.data.sources.splits import Streamed
from distill.data.views.build import build_view
from distill.data.views.views import CLEAN

SPLIT = Streamed(lambda _: None, torch.zeros(1), [""])
PLAIN = {"scale": [1, 1], "ratio": [1, 1], "hflip": 0, "color_jitter": 0.0}
PIXELS = np.random.default_rng(1).integers(0, 100, (32, 32, 3), dtype=np.uint8)


def views(mode="const", probability=1.0, count=1, numbers=range(20)):
    options = {**PLAIN, "re_prob": probability, "re_mode": mode, "re_count": count}
    view = build_view(SPLIT, options, 32, 3)
    return [view(Image.fromarray(PIXELS), 0, number, 5) for number in numbers]


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_a_box_is_erased_and_all_else_is_as_it_was(mode):
    image = torch.from_numpy(PIXELS).permute(2, 0, 1)
    for view in views(mode):
        changed = (view != image).any(0)
        rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
        height, width = (int(x.max() - x.min()) + 1 for x in (rows, columns))
        # 2 to 33 % of the area, to a rounded side
        assert 0.015 * 1024 <= height * width <= 0.37 * 1024
        box = view[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        if mode == "const":  # what timm's zero is, before normalisation
            assert box.unique(dim=1).shape[1] == 1
            assert box[:, 0, 0].tolist() == [round(255 * mean) for mean in MEAN]
        if mode == "rand":
            assert len(box.flatten(1).unique(dim=1).T) == 1
        if mode == "pixel":
            assert len(box.flatten(1).unique(dim=1).T) > height * width / 2


def test_erasing_is_a_function_of_the_key_and_happens_with_its_probability():
    first, again = views("pixel"), views("pixel")
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], first[1])
    image = torch.from_numpy(PIXELS).permute(2, 0, 1)
    erased = sum(not torch.equal(v, image) for v in views("const", 0.3, numbers=range(300)))
    assert 60 < erased < 120
    (clean,) = views("const", numbers=[CLEAN])
    assert torch.equal(clean, image)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"re_prob": 1.5}, "re_prob must be a probability"),
        ({"re_mode": "black"}, "re_mode must be one of const, rand, pixel"),
        ({"re_count": 0}, "re_count must be a number of boxes"),
    ],
)
def test_ways_of_erasing_that_timm_has_not_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        build_view(SPLIT, options, 32, 3)
