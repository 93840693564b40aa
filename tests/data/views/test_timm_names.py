"""Options by timm's names mean the same for pictures in memory, or are refused in one line."""

import pytest
import torch

from distill.data.sources.splits import Resident
from distill.data.views.build import ERASING, EVALUATION, TRAINING, build_view
from distill.data.views.timm_names import TIMMS
from distill.data.views.views import ResidentView

STREAMED = {"scale": [0.35, 1.0], "hflip": 0.5, "color_jitter": 0.0, "crop_pct": None, "mixup": 0,
            "cutmix": 0}  # fmt: skip
COLOURS = ("brightness", "contrast", "saturation")
JITTER = {"brightness": 0.1, "contrast": 0.2, "saturation": 0.3}


def view(channels=3, **options):
    split = Resident(torch.zeros(2, channels, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]))
    return build_view(split, options, 4, channels)


def test_every_option_of_timms_is_meant_or_refused():
    assert set(TIMMS) == {*TRAINING, *EVALUATION, *ERASING}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {}),
        (dict.fromkeys((*TRAINING, *EVALUATION, *ERASING)), {}),
        (STREAMED, {"crop_scale": [0.35, 1.0], "flip": True}),
        ({**STREAMED, "scale": None, "pad": 4}, {"pad": 4, "flip": True}),
        ({**STREAMED, "hflip": 0, "scale": None}, {}),
        ({"scale": [0.5, 1], "ratio": [1, 2]}, {"crop_scale": [0.5, 1], "crop_ratio": [1, 2]}),
        ({"color_jitter": 0.4}, dict.fromkeys(COLOURS, 0.4)),
        ({"color_jitter": [0.1, 0.2, 0]}, {"brightness": 0.1, "contrast": 0.2}),
        ({"color_jitter": [0.1, 0.2, 0.3, 0.4]}, {"hue": 0.4, **JITTER}),
        ({"crop_pct": 1.0, "crop_mode": "center", "interpolation": "bilinear"}, {}),
        ({"vflip": 0, "re_prob": 0.0, "no_aug": False, "grayscale_prob": 0}, {}),
        ({"hflip": 0.5, "flip": True}, {"flip": True}),
        ({"hflip": 0, "flip": True}, {"flip": True}),
        ({"color_jitter": 0, "hue": 0.1, "mixup": 0.2}, {"hue": 0.1, "mixup": 0.2}),
    ],
)
def test_options_mean_what_timm_means_by_them(options, expected):
    assert view(**options) == ResidentView(**expected)


def test_grey_pictures_have_no_saturation():
    assert view(1, color_jitter=0.4) == ResidentView(brightness=0.4, contrast=0.4)
    with pytest.raises(ValueError, match="saturation needs colours"):
        view(1, color_jitter=[0.4, 0.4, 0.4])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"hflip": 0.3}, r"data\.view\.hflip=0\.3 is not taken for images in memory: give 0 or 0"),
        ({"hflip": 2}, r"data\.view\.hflip must be a probability"),
        ({"scale": [0.5, 2]}, r"data\.view\.scale must be two numbers"),
        ({"scale": 0.5}, r"data\.view\.scale must be two numbers"),
        ({"ratio": [0, 1]}, r"data\.view\.ratio must be two numbers"),
        ({"crop_pct": 0.9}, r"data\.view\.crop_pct=0\.9 is not taken .*: clean views show them"),
        ({"color_jitter": "much"}, r"data\.view\.color_jitter must be a strength, or a list"),
        ({"color_jitter": [0.1, 0.2]}, r"data\.view\.color_jitter must be a strength, or a list"),
        ({"color_jitter": -1}, r"data\.view\.brightness must be a strength"),
        ({"auto_augment": "rand-m9"}, r"auto_augment=rand-m9 .*: give rotate"),
        ({"re_prob": 0.2}, r"re_prob=0\.2 .*: give erase"),
        ({"re_mode": "pixel"}, r"re_mode=pixel .*: give erase"),
        ({"vflip": 0.5}, "vflip"),
        ({"interpolation": "bicubic"}, "interpolation=bicubic .*: they are resized bilinearly"),
        ({"color_jitter_prob": 0}, "color_jitter_prob=0 .*: the colours of every view change"),
        ({"scale": [0.5, 1], "crop_scale": [0.2, 1]},
         r"scale=\[0\.5, 1\] and data\.view\.crop_scale=\[0\.2, 1\] contradict .*scale=null"),
        ({"hflip": 0.5, "flip": False}, r"hflip=0\.5 and data\.view\.flip=False contradict"),
        ({"color_jitter": 0.4, "hue": 0, "contrast": 0.1}, "contrast=0.1 contradict"),
    ],
)  # fmt: skip
def test_what_pictures_in_memory_have_not_is_refused_in_one_line(options, word):
    with pytest.raises(ValueError, match=word) as caught:
        view(**options)
    assert len(str(caught.value).splitlines()) == 1
