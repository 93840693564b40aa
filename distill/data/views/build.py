"""From `data.view` to how views are made: own ones of images in memory, timm's of streamed ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from PIL import Image

from distill.data.sources.decoders import Decoder, chosen_decoder
from distill.data.sources.images import MODES
from distill.data.sources.sizes import Size, as_size
from distill.data.sources.splits import Resident, Split
from distill.data.views.crop import INTERPOLATIONS, ResizedCrop
from distill.data.views.erasing import MODES as MODES_OF_ERASING
from distill.data.views.erasing import Erasing
from distill.data.views.timm_names import in_own_names
from distill.data.views.views import CLEAN, ResidentView, StreamedView, is_range
from distill.utils.numbers import is_number

# The keywords of timm.data.create_transform that mean something for views of uint8 pixels.
TRAINING = (
    *("scale", "ratio", "hflip", "vflip", "color_jitter", "color_jitter_prob", "grayscale_prob"),
    *("gaussian_blur_prob", "auto_augment", "interpolation", "train_crop_mode", "no_aug"),
)
EVALUATION = ("crop_pct", "crop_mode")  # what timm's configurations record, and so a bundle does
CROP_MODES = ("center", "squash", "border")
CLEAN_VIEW = {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}
ERASING = {"re_prob": 0.0, "re_mode": "const", "re_count": 1}  # timm's, and its defaults
MIXING = ("mixup", "cutmix")  # as of views of images in memory
# What timm's transforms take, or views of images in memory do, and what to give in its place.
INSTEAD = {
    "input_size": "give data.image_size",
    "is_training": "training views are augmented, and those of evaluation are not",
    **dict.fromkeys(("normalize", "mean", "std"), "each model normalises the shared view itself"),
    **dict.fromkeys(("use_prefetcher", "separate"), "views are whole, and made by data workers"),
    **dict.fromkeys(
        ("naflex", "patch_size", "max_seq_len", "patchify", "patchify_channels_last",
         "patchify_flatten"),
        "views are pictures of one size, data.image_size",
    ),
    "tf_preprocessing": "TensorFlow draws by itself, and not by sample; leave it out",
    "crop_border_pixels": "no bundle records it; crop_pct below 1 crops as well",
    "re_num_splits": "a view does not depend on its batch; lower re_prob",
    "pad": "give scale and ratio",
    "flip": "give hflip=0.5",
    "crop_scale": "give scale",
    "crop_ratio": "give ratio",
    "erase": "give re_prob",
    **dict.fromkeys(("erase_scale", "erase_ratio"), "give re_prob, re_mode and re_count"),
    **dict.fromkeys(
        ("brightness", "contrast", "saturation", "hue"),
        "give color_jitter=[brightness,contrast,saturation,hue]",
    ),
    **dict.fromkeys(
        ("rotate", "translate", "zoom", "shear"), "give auto_augment, such as rand-m5-n2"
    ),
}  # fmt: skip


def build_view(
    split: Split,
    options: Mapping[str, Any],
    image_size: int | Sequence[int],
    channels: int,
    preprocessing: Mapping[str, Any] | None = None,
    decoder: str = "auto",
) -> ResidentView | StreamedView:
    """Return how views of this split are made."""
    jpeg = chosen_decoder(decoder)
    resident = isinstance(split, Resident)
    timms = [*TRAINING, *EVALUATION, *ERASING]
    own = [f.name for f in fields(ResidentView)] if resident else [*timms, *MIXING]
    for name in options:
        if not resident and name in INSTEAD:
            raise ValueError(f"data.view.{name} is not taken: {INSTEAD[name]}")
        if name not in own and name not in timms:
            raise ValueError(f"data.view has no option {name}; there are {', '.join(own)}")
    if resident:
        check_streamed(options)
        return resident_view(in_own_names(options, channels), channels)
    return streamed_view(options, as_size(image_size), channels, preprocessing or {}, jpeg)


def build_second_view(
    count: int,
    split: Split,
    view: ResidentView | StreamedView,
    options: Mapping[str, Any],
    changes: Mapping[str, Any],
    image_size: int | Sequence[int],
    channels: int,
    decoder: str = "auto",
) -> ResidentView | StreamedView | None:
    """Return how the second view of each sample in a step is made; None where there is one.

    Args:
        count: how many there are.
        split: the samples.
        view: how the first is made.
        options: those of the first.
        changes: options that take the place of these.
        image_size: as for `build_view`.
        channels: of the images.
        decoder: of JPEG files.

    Raises:
        ValueError: for a count that is not 1 or 2, for options that are refused, and for views that
            mix samples, whose targets would differ.
    """
    if count not in (1, 2):
        raise ValueError(f"data.views_per_step must be 1 or 2, got {count!r}")
    if count == 1:
        return None
    if isinstance(view, StreamedView) and view.decoder.on_device:
        raise ValueError(
            f"data.decoder={view.decoder.name} shows one view of a picture, and "
            "data.views_per_step is 2: give data.decoder=auto"
        )
    try:
        second = build_view(split, {**options, **changes}, image_size, channels, decoder=decoder)
    except ValueError as error:
        raise ValueError(str(error).replace("data.view", "data.strong_view")) from error
    for name, one in (("view", view), ("strong_view", second)):
        if one.mixes:
            raise ValueError(
                f"data.{name} mixes two samples, and data.views_per_step=2 shows two views of one: "
                "leave one of the two out"
            )
    return second


def unlike_notes(split: Split, preprocessing: Mapping[str, Any] | None) -> list[str]:
    """Return a note of how a trained model was shown pictures, where those in memory are not."""
    given = preprocessing or {}
    unlike = [f"{k}={given[k]}" for k, own in CLEAN_VIEW.items() if given.get(k, own) != own]
    if not unlike or not isinstance(split, Resident):
        return []
    return [
        f"the model was shown pictures with {', '.join(unlike)}; those in memory are shown whole, "
        "and were resized bilinearly"
    ]


def resident_view(options: Mapping[str, Any], channels: int) -> ResidentView:
    """Return the view of these options, which images of so many channels must allow."""
    view = ResidentView(**options)
    if channels != 3 and view.needs_colour:
        raise ValueError(
            f"data.view.{view.needs_colour[0]} needs colours (3 channels), and these images have "
            f"{channels}"
        )
    return view


def streamed_view(
    options: Mapping[str, Any],
    size: Size,
    channels: int,
    preprocessing: Mapping[str, Any],
    decoder: Decoder,
) -> StreamedView:
    """Return timm's transforms, tried on a blank image so that mistakes show before training.

    The crop and the flips of training, where they are the usual ones, are keyed instead of timm's.
    """
    from timm.data import create_transform

    check_streamed(options)
    height, width = size
    # Of a square timm is told the side: a pair it would squash where nothing is augmented.
    common: dict[str, Any] = {"input_size": height if height == width else size, "normalize": False}
    if channels == 1:
        common["mean"] = (0.5,)  # what is uncovered by turning or shifting is filled with this
    shares: dict[str, Any] = {name: options[name] or 0.0 for name in MIXING if name in options}
    mixing = ResidentView(**shares)
    training = {name: value for name, value in options.items() if name in TRAINING}
    asked = {k: v for k, v in options.items() if k in EVALUATION and v is not None}
    known = {key: preprocessing[key] for key in CLEAN_VIEW if key in preprocessing}
    clean = {**CLEAN_VIEW, **known, **asked}
    if options.get("interpolation", "random") != "random":
        clean["interpolation"] = options["interpolation"]
    try:
        crop = resized_crop(options, size)
        train = create_transform(is_training=True, separate=bool(crop), **common, **training)
        if training.get("no_aug") and height != width:  # timm would squash
            train = create_transform(is_training=False, crop_pct=1.0, **common)
        if crop:
            train = after_the_crop(train)
        view = StreamedView(
            train=erased(train, options, channels),
            clean=create_transform(
                is_training=False, **{**common, "mean": border(channels)}, **clean
            ),
            preprocessing={key: clean[key] for key in CLEAN_VIEW},
            mixing=mixing,
            crop=crop,
            channels=channels,
            decoder=decoder,
        )
        blank = Image.new(MODES[channels], (width + 3, height))
        views = [view(blank, 0, epoch, 0) for epoch in (CLEAN, 0)]
    except Exception as error:  # timm asserts, looks up and calls without checking
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"data.view={dict(options)} was refused: {why}") from error
    assert all(v.shape == (channels, height, width) for v in views)
    assert all(v.dtype == torch.uint8 for v in views)
    check_on_device(view)
    return view


def check_on_device(view: StreamedView) -> None:
    """Refuse what data workers do to views, where these are made on a device."""
    if not view.decoder.on_device:
        return
    if view.crop is None:
        problem = "data.view crops as data workers do (no_aug, train_crop_mode, interpolation)"
    elif view.train is not None:
        problem = (
            "data.view changes colours (as timm does where color_jitter is not 0) or erases, which "
            "data workers do"
        )
    elif view.mixes:
        problem = "data.view mixes pictures, which data workers do"
    else:
        return
    raise ValueError(
        f"data.decoder={view.decoder.name} crops and flips where the model is, and {problem}: "
        "turn that off, or give data.decoder=auto"
    )


def resized_crop(options: Mapping[str, Any], size: Size) -> ResizedCrop | None:
    """Return the crop and the flips of training; None where the options ask for another kind."""
    given = {name: value for name, value in options.items() if value is not None}
    interpolation = given.get("interpolation", "bilinear")
    keyed = interpolation in (*INTERPOLATIONS, "random")
    if not keyed or given.get("no_aug") or given.get("train_crop_mode", "rrc") != "rrc":
        return None
    own = {f.name for f in fields(ResizedCrop)}
    return ResizedCrop(size, **{name: value for name, value in given.items() if name in own})


def after_the_crop(stages: Sequence[Any]) -> Any:
    """Return what timm does to a crop, uint8 `[C, H, W]`; None where that leaves it as it is.

    Args:
        stages: of timm's: crop and flips, colours and shapes, and the conversion to a tensor.
    """
    from torchvision.transforms import ColorJitter, Compose, ToPILImage

    _, secondary, final = stages
    strengths = ("brightness", "contrast", "saturation", "hue")
    if all(
        isinstance(step, ColorJitter) and all(getattr(step, name) is None for name in strengths)
        for step in secondary.transforms
    ):
        return None
    return Compose([ToPILImage(), secondary, final])


def erased(train: Any, options: Mapping[str, Any], channels: int) -> Any:
    """Return a transform whose views are erased afterwards, where the options say so."""
    from timm.data.constants import IMAGENET_DEFAULT_STD
    from torchvision.transforms import Compose

    chosen = {**ERASING, **{k: v for k, v in options.items() if k in ERASING and v is not None}}
    probability, mode, count = chosen.values()
    if not probability:
        return train
    std = sum(IMAGENET_DEFAULT_STD) / 3
    stds = IMAGENET_DEFAULT_STD if channels == 3 else (std,) * channels
    return Compose(
        [*filter(None, [train]), Erasing(probability, mode, count, border(channels), stds)]
    )


def border(channels: int) -> tuple[float, ...]:
    """Return the colour that clean views of `crop_mode=border` are padded with, each from 0 to 1.

    It is the mean that most of timm's models normalise with, for grey images averaged as
    `normalization` does.
    """
    from timm.data.constants import IMAGENET_DEFAULT_MEAN as MEAN

    return MEAN if channels == len(MEAN) else (sum(MEAN) / len(MEAN),) * channels


def check_streamed(options: Mapping[str, Any]) -> None:
    """Refuse what timm takes and draws nonsense with."""
    for name in (
        "hflip",
        "vflip",
        "re_prob",
        "color_jitter_prob",
        "grayscale_prob",
        "gaussian_blur_prob",
    ):
        share = options.get(name)
        if share is not None and not (is_number(share) and 0 <= share <= 1):
            raise ValueError(f"data.view.{name} must be a probability, got {share!r}")
    for name, most in (("scale", 1.0), ("ratio", math.inf)):
        pair = options.get(name)
        if pair is not None and not (is_range(pair, 0, most) and pair[0] > 0):
            raise ValueError(f"data.view.{name} must be two numbers, 0 < lo ≤ hi, got {pair!r}")
    crop = options.get("crop_pct")
    if crop is not None and not (is_number(crop) and 0 < crop <= 1):
        raise ValueError(f"data.view.crop_pct must be a share above 0, got {crop!r}")
    check_erasing(options.get("re_mode"), options.get("re_count"))
    mode = options.get("crop_mode")
    if mode is not None and mode not in CROP_MODES:
        raise ValueError(
            f"data.view.crop_mode must be one of {', '.join(CROP_MODES)}, got {mode!r}"
        )


def check_erasing(mode: Any, count: Any) -> None:
    """Refuse ways of erasing that timm has not."""
    if mode is not None and mode not in MODES_OF_ERASING:
        known = ", ".join(MODES_OF_ERASING)
        raise ValueError(f"data.view.re_mode must be one of {known}, got {mode!r}")
    if count is not None and (type(count) is not int or count < 1):
        raise ValueError(f"data.view.re_count must be a number of boxes, got {count!r}")
