"""Views: what a model sees of a sample, a pure function of (seed, epoch, index)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

from distill.data.sources.decoders import Decoder, pillow
from distill.data.views.crop import ResizedCrop
from distill.data.views.draws import (
    Draw,
    Draws,
    beta,
    between,
    keyed_integers,
    keyed_words,
    log_uniform,
)
from distill.data.views.pixels import (
    ONE,
    bilinear,
    black,
    blend,
    box_sides,
    extent,
    grey,
    half_pixels,
    mean_grey,
    mirrored,
    outside,
    turn_hue,
    weighted,
    windows,
)
from distill.data.views.undecoded import Undecoded
from distill.utils.numbers import is_number

RECIPE = 2  # of the views: raised when the same options come to show something else
CLEAN = -1  # the epoch that names the view without augmentation: evaluation


@dataclass(frozen=True)
class ResidentView:
    """Augment whole batches of small images by tensor operations; all is off by default.

    A view is cropped, turned, shifted and mirrored in one resampling; then its colours change;
    then a box of it is erased. What is shown of beyond the image is black. `mixed` adds another
    sample's view to it.

    Args:
        pad: pixels of zero padding on each side before the crop back to size: shifts of up to
            `pad` pixels either way.
        flip: whether half of the views are mirrored left to right.
        crop_scale: least and largest share of the area that a resized crop shows, or None.
        crop_ratio: least and largest ratio of a crop's width to its height, drawn log-uniformly.
        rotate: largest turn either way in degrees.
        translate: largest shift either way as a share of the height and of the width.
        zoom: least and largest magnification, or None.
        shear: largest slant along the rows either way in degrees.
        brightness: b of a factor from [max(0, 1 − b), 1 + b] on the pixels.
        contrast: the same on their difference from the view's mean grey.
        saturation: the same on their difference from their own grey.
        hue: largest turn of the hue either way, as a share of the colour circle, at most 0.5.
        erase: probability that a box is made black.
        erase_scale: least and largest share of the area that the box covers.
        erase_ratio: least and largest ratio of its width to its height, drawn log-uniformly.
        mixup: α of the Beta(α, α) that a sample's share of a blend with another is drawn from.
        cutmix: α of the Beta(α, α) that a sample's share is drawn from where a box of it is
            replaced by another's; with `mixup` too, a fair draw decides between them.

    Reference:
        Mixup: Zhang et al., 1710.09412. Cutmix: Yun et al., 1905.04899. Erasing: Zhong et al.,
        1708.04896. Colours: torchvision's `ColorJitter`, in this order.
    """

    pad: int = 0
    flip: bool = False
    crop_scale: Sequence[float] | None = None
    crop_ratio: Sequence[float] = (3 / 4, 4 / 3)
    rotate: float = 0.0
    translate: float = 0.0
    zoom: Sequence[float] | None = None
    shear: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    erase: float = 0.0
    erase_scale: Sequence[float] = (0.02, 1 / 3)
    erase_ratio: Sequence[float] = (0.3, 10 / 3)
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        check_view(self)

    @property
    def resamples(self) -> bool:
        """Whether pixels of a view lie between pixels of the image."""
        moves = (self.rotate, self.translate, self.shear)
        return any(moves) or self.crop_scale is not None or self.zoom is not None

    @property
    def needs_colour(self) -> list[str]:
        """The names of the options in use that mean nothing for grey images."""
        return [name for name in ("saturation", "hue") if getattr(self, name)]

    @property
    def mixes(self) -> bool:
        """Whether views hold two samples, whose labels are then class probabilities."""
        return bool(self.mixup or self.cutmix)

    def __call__(self, images: Tensor, seed: int, epoch: int, index: Tensor) -> Tensor:
        """Return the unmixed views `[N, C, H, W]` of uint8 images `[N, C, H, W]`, uint8 too."""
        if epoch == CLEAN:
            return images
        return self.shown(images, Draws.of(seed, epoch, index))

    def shown(self, images: Tensor, draws: Draws) -> Tensor:
        """Return the unmixed views of uint8 images `[N, C, H, W]` for these draws, uint8 too."""
        placed = self._resampled(images, draws) if self.resamples else self._shifted(images, draws)
        return self._erased(self._coloured(placed, draws), draws)

    def partners(self, seed: int, epoch: int, index: Tensor, count: int | Tensor) -> Tensor:
        """Return with which of `count` samples (of one number, or `[N]`) each is mixed, `[N]`."""
        return keyed_integers(seed, epoch, index, Draw.MIX_PARTNER, count)

    def mixed(
        self, views: Tensor, others: Tensor, seed: int, epoch: int, index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what `blended` does for the draws of a key."""
        return self.blended(views, others, Draws.of(seed, epoch, index))

    def blended(self, views: Tensor, others: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Return views mixed with their partners' views, and each sample's share of its view.

        The share is that of the pixels really kept: a box is cut off at the image's edge.

        Args:
            views: the samples' own views, uint8 `[N, C, H, W]`.
            others: the partners' own views, uint8 `[N, C, H, W]`.
            draws: those of the samples.

        Returns:
            Views, uint8 `[N, C, H, W]`, and shares in [0, 1], float64 `[N]`.
        """
        height, width = views.shape[-2:]
        kept = self._kept(draws, height, width)
        pixels = weighted(views.int(), others.int(), kept)
        total = kept.expand(-1, 1, height, width).sum((1, 2, 3), dtype=torch.int64)
        return pixels.to(torch.uint8), total.double() * (1 / (ONE * height * width))

    def _shifted(self, images: Tensor, draws: Draws) -> Tensor:
        if self.pad:
            down = draws.integers(Draw.SHIFT_DOWN, 2 * self.pad + 1)
            right = draws.integers(Draw.SHIFT_RIGHT, 2 * self.pad + 1)
            images = windows(F.pad(images, (self.pad,) * 4), images.shape, down, right)
        return mirrored(images, draws.integers(Draw.FLIP, 2)) if self.flip else images

    def _resampled(self, images: Tensor, draws: Draws) -> Tensor:
        height, width = images.shape[-2:]
        down = draws.integers(Draw.SHIFT_DOWN, 2 * self.pad + 1) - self.pad
        right = draws.integers(Draw.SHIFT_RIGHT, 2 * self.pad + 1) - self.pad
        flips = draws.integers(Draw.FLIP, 1 + self.flip)
        rows = half_pixels(height, down, torch.zeros_like(flips))
        columns = half_pixels(width, right, flips)
        return bilinear(images, rows, columns, self._positions(draws, height, width))

    def _positions(self, draws: Draws, height: int, width: int) -> Tensor:
        """Return where the image is read, `[2, 3, N]`: y and x of (rows, columns, 1), in pixels.

        An output pixel is at p from the centre; its source is `crop ∘ S⁻¹ ∘ R⁻¹ (p − t) / zoom`.
        """
        sine = draws.lookup(Draw.ROTATE, between(math.sin, self.rotate, draws.words.device))
        cosine = draws.lookup(Draw.ROTATE, between(math.cos, self.rotate, draws.words.device))
        slant = draws.lookup(Draw.SHEAR, between(math.tan, self.shear, draws.words.device))
        zoom = draws.uniform(Draw.ZOOM, *(self.zoom or (1.0, 1.0)))
        top, left, crop_height, crop_width = self._crop(draws, height, width)
        y_scale, x_scale = crop_height * (1 / height) / zoom, crop_width * (1 / width) / zoom
        matrix = torch.stack([cosine, -sine, sine - slant * cosine, cosine + slant * sine])
        matrix = matrix.view(2, 2, -1) * torch.stack([y_scale, x_scale])[:, None]
        down = draws.uniform(Draw.TRANSLATE_DOWN, -self.translate, self.translate) * height
        right = draws.uniform(Draw.TRANSLATE_RIGHT, -self.translate, self.translate) * width
        moved = matrix[:, 0] * down + matrix[:, 1] * right
        middle = torch.stack([top + crop_height * 0.5, left + crop_width * 0.5]) - 0.5
        return torch.cat([matrix, (middle - moved)[:, None]], dim=1)

    def _crop(self, draws: Draws, height: int, width: int) -> tuple[Tensor, ...]:
        """Return top, left, height and width of the resized crop in pixels, float64 `[N]` each."""
        if self.crop_scale is None:
            whole = torch.zeros_like(draws.words[0], dtype=torch.float64)
            return whole, whole, whole + height, whole + width
        share = draws.uniform(Draw.CROP_AREA, *self.crop_scale)
        ratio = draws.lookup(Draw.CROP_RATIO, log_uniform(self.crop_ratio, share.device))
        sides = box_sides(share, ratio, height, width)
        top = draws.uniform(Draw.CROP_TOP) * (height - sides[0])
        return top, draws.uniform(Draw.CROP_LEFT) * (width - sides[1]), sides[0], sides[1]

    def _coloured(self, images: Tensor, draws: Draws) -> Tensor:
        changes = (
            (self.brightness, Draw.BRIGHTNESS, black),
            (self.contrast, Draw.CONTRAST, mean_grey),
            (self.saturation, Draw.SATURATION, grey),
        )
        pixels = images
        for strength, draw, reference in changes:
            if strength:
                factor = draws.uniform(draw, max(0.0, 1 - strength), 1 + strength)
                pixels = blend(pixels.int(), reference(pixels.int()), factor)
        if self.hue:
            pixels = turn_hue(pixels.int(), draws.uniform(Draw.HUE, -self.hue, self.hue))
        return pixels.to(torch.uint8)

    def _erased(self, images: Tensor, draws: Draws) -> Tensor:
        if not self.erase:
            return images
        height, width = images.shape[-2:]
        share = draws.uniform(Draw.ERASE_AREA, *self.erase_scale)
        ratio = draws.lookup(Draw.ERASE_RATIO, log_uniform(self.erase_ratio, share.device))
        sides = box_sides(share, ratio, height, width).round().long()
        sides *= draws.happens(Draw.ERASE, self.erase)
        corner = draws.places(Draw.ERASE_TOP, extent(height, width, sides.device) + 1 - sides)
        return images * outside(height, width, corner, sides)

    def _kept(self, draws: Draws, height: int, width: int) -> Tensor:
        """Return the samples' share of their pixels in 1/65,536, int32 `[N, 1, 1 | H, 1 | W]`."""
        device, kinds = draws.words.device, []
        if self.mixup:
            share = draws.lookup(Draw.MIXUP_SHARE, beta(self.mixup, device))
            kinds.append((share * ONE).round().int()[:, None, None, None])
        if self.cutmix:
            whole = extent(height, width, device)
            share = draws.lookup(Draw.CUTMIX_SHARE, beta(self.cutmix, device))
            half = ((1 - share).sqrt() * 0.5 * whole).long()
            corner = draws.places(Draw.CUTMIX_ROW, whole) - half
            kinds.append(outside(height, width, corner, 2 * half).int() * ONE)
        if len(kinds) == 1:
            return kinds[0]
        second = draws.integers(Draw.MIX_KIND, 2).bool()[:, None, None, None]
        return torch.where(second, kinds[1], kinds[0])


def check_view(view: ResidentView) -> None:
    """Refuse options that are out of range."""
    if not isinstance(view.pad, int) or isinstance(view.pad, bool) or view.pad < 0:
        raise ValueError(f"data.view.pad must be whole pixels, at least 0, got {view.pad!r}")
    if not isinstance(view.flip, bool):
        raise ValueError(f"data.view.flip must be true or false, got {view.flip!r}")
    for name, (meaning, most) in NUMBERS.items():
        value = getattr(view, name)
        if not (is_number(value) and 0 <= value <= most):
            raise ValueError(f"data.view.{name} must be {meaning} from 0 to {most}, got {value!r}")
    for name, (meaning, least, largest) in RANGES.items():
        pair = getattr(view, name)
        off = pair is None and ResidentView.__dataclass_fields__[name].default is None
        if not (off or is_range(pair, least, largest)):
            raise ValueError(f"data.view.{name} must be two {meaning}, got {pair!r}")


# What each option is, and its largest value.
NUMBERS = {
    "rotate": ("degrees", 180),
    "translate": ("a share", 1),
    "shear": ("degrees", 80),
    "brightness": ("a strength", 8),
    "contrast": ("a strength", 8),
    "saturation": ("a strength", 8),
    "hue": ("a share", 0.5),
    "erase": ("a probability", 1),
    "mixup": ("the α of a Beta distribution", 100),
    "cutmix": ("the α of a Beta distribution", 100),
}
# What each option is, with its smallest and largest value.
RANGES = {
    "crop_scale": ("shares 0 < lo ≤ hi ≤ 1", 1e-6, 1),
    "crop_ratio": ("ratios 0.01 ≤ lo ≤ hi ≤ 100", 0.01, 100),
    "zoom": ("factors 0.01 ≤ lo ≤ hi ≤ 100", 0.01, 100),
    "erase_scale": ("shares 0 < lo ≤ hi ≤ 1", 1e-6, 1),
    "erase_ratio": ("ratios 0.01 ≤ lo ≤ hi ≤ 100", 0.01, 100),
}


def is_range(value: Any, least: float, most: float) -> bool:
    """Return whether a value is two numbers, least ≤ lo ≤ hi ≤ most."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        return False
    return all(map(is_number, value)) and least <= value[0] <= value[1] <= most


@dataclass(frozen=True)
class StreamedView:
    """Show pictures on disk: by a keyed crop, and by any transform, whose generators are seeded.

    Args:
        train: the augmenting transform, PIL image → uint8 tensor `[C, H, W]`; of what `crop` shows,
            if there is one, and then None leaves it as it is.
        clean: the transform of evaluation, PIL image → uint8 tensor `[C, H, W]`.
        preprocessing: what `clean` does, as timm's model configurations say it.
        mixing: how views are mixed afterwards: only its `mixup` and `cutmix` are used.
        crop: what training shows of a picture; None leaves that to `train`.
        channels: of the pictures.
        decoder: of JPEG files, for `crop`; all others, and evaluation, have Pillow's.
    """

    train: Callable[[Any], Tensor] | None
    clean: Callable[[Any], Tensor]
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    mixing: ResidentView = field(default_factory=ResidentView)
    crop: ResizedCrop | None = None
    channels: int = 3
    decoder: Decoder = field(default_factory=pillow)

    @property
    def mixes(self) -> bool:
        """Whether views hold two samples, whose labels are then class probabilities."""
        return self.mixing.mixes

    def decoded_by(self, clean: bool) -> str:
        """Return which library decodes JPEG files for views, with what decides its bits."""
        return str(pillow() if clean or self.crop is None else self.decoder)

    def __call__(self, image: Any, seed: int, epoch: int, index: int) -> Tensor:
        """Return the view `[C, H, W]` of one decoded image."""
        if epoch == CLEAN:
            return self.clean(image)
        key = seed, epoch, index
        if self.crop is None:
            return self._augmented(image, *key)
        drawn = self.crop.drawn(seed, epoch, torch.tensor([index]))[0]
        return self._augmented(self.crop.shown(image, drawn), *key)

    def batch(self, load: Any, seed: int, epoch: int, index: Tensor) -> Tensor | Undecoded:
        """Return the views of a loader's pictures, uint8 `[N, C, H, W]`.

        Where their files are decoded on a device, it is views that are yet to be made there.

        Args:
            load: index → PIL image, and, where pictures are files, `open`: index → file.
            seed: the seed of the views.
            epoch: the epoch, or CLEAN.
            index: the pictures' indices, int64 `[N]`.
        """
        crop, indices = self.crop, index.tolist()
        if crop is None or epoch == CLEAN:
            return torch.stack([self(load(i), seed, epoch, i) for i in indices])
        if self.decoder.on_device:
            drawn = crop.drawn(seed, epoch, index)
            return Undecoded.read(crop, load, indices, drawn, self.channels, self.decoder)
        shown = (
            crop.read(load, i, drawn, self.channels, self.decoder)
            for i, drawn in zip(indices, crop.drawn(seed, epoch, index), strict=True)
        )
        views = [
            self._augmented(view, seed, epoch, i) for view, i in zip(shown, indices, strict=True)
        ]
        # Unlike `torch.stack` it puts a worker's into shared memory at once.
        batch: Tensor = default_collate(views)
        return batch

    def _augmented(self, image: Any, seed: int, epoch: int, index: int) -> Tensor:
        if self.train is None:
            assert isinstance(image, Tensor)
            return image
        word = int(keyed_words(seed, epoch, torch.tensor([index]), 0))
        state, numpy_state = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(word)  # `torch.manual_seed` reseeds GPUs too
                random.seed(word)
                np.random.seed(word)
                return self.train(image)
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)
