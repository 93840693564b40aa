"""What timm's names of augmentations mean for views of images in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill.utils.numbers import is_number

# Of timm's transforms, what views of images in memory show whatever is said.
SAID_ANYWAY = {
    **dict.fromkeys(("hflip", "vflip", "color_jitter", "re_prob"), 0),
    **dict.fromkeys(("grayscale_prob", "gaussian_blur_prob", "no_aug"), 0),
    **{"crop_pct": 1, "crop_mode": "center", "interpolation": "bilinear"},
}
RENAMED = {"scale": "crop_scale", "ratio": "crop_ratio"}
COLOURS = ("brightness", "contrast", "saturation", "hue")  # in timm's order
# What timm's transforms take and views of images in memory do not, and what to give in its place.
IN_MEMORY = {
    "hflip": "give 0 or 0.5",
    "vflip": "views are mirrored left to right only, by flip",
    "color_jitter_prob": "the colours of every view change; lower color_jitter",
    "grayscale_prob": "give saturation=1, which draws how grey a view is",
    "gaussian_blur_prob": "give data.resident=false, which decodes and blurs them as needed",
    "auto_augment": "give rotate, shear, translate, zoom and color_jitter",
    "interpolation": "they are resized bilinearly",
    "train_crop_mode": "give scale and ratio",
    "no_aug": "give scale=null and hflip=0",
    "crop_pct": "clean views show them whole",
    "crop_mode": "they were centre cropped when they were decoded",
    "re_prob": "give erase",
    **dict.fromkeys(("re_mode", "re_count"), "give erase, erase_scale and erase_ratio"),
}
TIMMS = {*RENAMED, *IN_MEMORY, "color_jitter"}


def in_own_names(options: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """Return options of views of images in memory, some of which may have timm's names.

    Raises:
        ValueError: for one that such views have not, or that another one contradicts.
    """
    translated = {name: value for name, value in options.items() if name not in TIMMS}
    for name in (name for name in options if name in TIMMS):
        for own, meant in own_options(name, options[name], channels).items():
            if options.get(own, meant) != meant:
                raise ValueError(
                    f"data.view.{name}={options[name]} and data.view.{own}={options[own]} "
                    f"contradict each other: give data.view.{own} and data.view.{name}=null"
                )
            translated[own] = meant
    return translated


def own_options(name: str, value: Any, channels: int) -> dict[str, Any]:
    """Return what an option of timm's transforms is called for images in memory: nothing for null.

    Raises:
        ValueError: if they have nothing like it.
    """
    if value is None or (name in SAID_ANYWAY and value == SAID_ANYWAY[name]):
        return {}
    if name in RENAMED:
        return {RENAMED[name]: value}
    if name == "hflip" and value == 0.5:
        return {"flip": True}
    if name == "color_jitter":
        return colour_options(value, channels)
    raise ValueError(
        f"data.view.{name}={value} is not taken for images in memory: {IN_MEMORY[name]}"
    )


def colour_options(jitter: Any, channels: int) -> dict[str, float]:
    """Return the strengths of a colour jitter that are not 0, by their names.

    As in timm a single one is that of brightness, contrast and saturation; grey images have none of
    the last.
    """
    strengths = jitter if isinstance(jitter, Sequence) else [jitter] * (3 if channels == 3 else 2)
    each = isinstance(jitter, Sequence) and len(jitter) not in (3, 4)
    if each or not all(map(is_number, strengths)):
        raise ValueError(
            "data.view.color_jitter must be a strength, or a list of brightness, contrast, "
            f"saturation and, if given, hue, got {jitter!r}"
        )
    return {name: x for name, x in zip(COLOURS, strengths, strict=False) if x}
