"""The frozen teacher."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from lightning_utilities import apply_to_collection
from torch import Tensor, nn

from distill.models.features import Features, forward_with_features
from distill.teacher.ensemble import Ensemble
from distill.teacher.precision import INT8, computes_in, reduce_precision, widened
from distill.utils.inputs import as_float, logits_of
from distill.utils.sharing import Recent

T = TypeVar("T")


class Teacher:
    """A model that answers and never changes.

    It is a plain object, not a module: inside the student's module tree it would leak into
    checkpoints, be flipped to training mode, be wrapped by DDP and be copied by weight averaging.
    It is always in eval mode and answers under `inference_mode`, in whatever autocast its caller
    runs; its answer is therefore an inference tensor. `in_precision` and `placed_on` give it a
    precision and a device of its own: then views are sent there, and answers back.

    Args:
        model: views `[N, C, H, W]` in [0, 1] → logits `[N, K]`.
        normalize: the model's own input normalisation, or None.
        batch_size: how many views it is always shown at once, more in turns and fewer with empty
            ones beside them: kernels choose their path by the batch size, and then an answer would
            depend, in its last bits, on how many others were asked for. None shows them as they
            come.
        shared: whether several runs that take turns ask it about the same views, one after the
            other: then the last few answers are kept for them.
    """

    def __init__(
        self,
        model: nn.Module,
        normalize: nn.Module | None = None,
        batch_size: int | None = None,
        shared: bool = False,
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.normalize = normalize or nn.Identity()
        self.batch_size = batch_size
        self.validation_logits: dict[str, Tensor] = {}  # by the fingerprint of their data
        self.precision: str | None = None  # None: as whoever asks computes
        self.device: torch.device | None = None  # None: where the student is
        self._recent = Recent() if shared else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self

    def to(self, device: torch.device) -> Teacher:
        """Move the teacher to a device, or to its own if it has one."""
        self.model.to(self.device or device)
        self.normalize.to(self.device or device)
        return self

    def placed_on(self, device: torch.device | None) -> Teacher:
        """Give the teacher a device of its own, which views are sent to and answers come from."""
        self.device = device
        return self if device is None else self.to(device)

    def in_precision(self, precision: str) -> Teacher:
        """Keep the weights in `fp32`, `bf16`, `fp16` or `int8`; answers are float32.

        Images are normalised in float32 before. Autocast of whoever asks holds for `int8` alone.

        Raises:
            ValueError: if there is no such precision.
        """
        for model in self.models:
            reduce_precision(model, precision)
        self.precision = precision
        return self

    @property
    def models(self) -> list[nn.Module]:
        """The model, or those of an ensemble, each without its normalisation."""
        if not isinstance(self.model, Ensemble):
            return [self.model]
        members = self.model.members
        return [one[-1] if isinstance(one, nn.Sequential) else one for one in members]

    @property
    def num_classes(self) -> int | None:
        """The number of classes the model declares, where it does."""
        return getattr(self.model, "num_classes", None)

    @torch.inference_mode()
    def __call__(self, view: Tensor, step: int | None = None) -> Tensor:
        """Return logits `[N, K]` for views `[N, C, H, W]`; `step` is given in training."""
        when = step if isinstance(self.model, Ensemble) else None
        detail = when, computed_in(view)
        return self._once(view, detail, lambda: self._logits(view, step))

    @torch.inference_mode()
    def with_features(self, view: Tensor, stages: Sequence[int]) -> tuple[Tensor, Features]:
        """Return logits `[N, K]` and the features, with the maps of the stages."""
        detail = tuple(stages), computed_in(view)
        return self._once(view, detail, lambda: self._features(view, stages))

    def _once(self, view: Tensor, detail: Hashable, answer: Callable[[], T]) -> T:
        return self._recent.answer(view, detail, answer) if self._recent else answer()

    def _logits(self, view: Tensor, step: int | None) -> Tensor:
        if self.batch_size is None or len(view) == self.batch_size:
            return self._answer(view, step)
        return torch.cat([self._padded(part, step) for part in view.split(self.batch_size)])

    def _padded(self, view: Tensor, step: int | None) -> Tensor:
        assert self.batch_size is not None
        empty = view.new_zeros(self.batch_size - len(view), *view.shape[1:])
        return self._answer(torch.cat([view, empty]), step)[: len(view)]

    def _answer(self, view: Tensor, step: int | None) -> Tensor:
        more = (step,) if isinstance(self.model, Ensemble) else ()
        with self._computing(view):
            logits = logits_of(self.model(self._prepared(view), *more), "teacher")
        if logits.shape != (len(view), self.num_classes or logits.shape[-1]):
            raise ValueError(
                f"the teacher answers {len(view)} images with {list(logits.shape)}, and not with "
                f"[{len(view)}, {self.num_classes or 'classes'}]"
            )
        return logits.to(view.device)

    def _features(self, view: Tensor, stages: Sequence[int]) -> tuple[Tensor, Features]:
        """Return logits and features, asked for in parts where a batch is larger than its own."""
        parts = [
            self._features_of(part, stages) for part in view.split(self.batch_size or len(view))
        ]
        if len(parts) == 1:
            return parts[0]
        logits, features = zip(*parts, strict=True)
        maps = [torch.cat(stage) for stage in zip(*(one.maps for one in features), strict=True)]
        embedding, token = (
            torch.cat(values) for values in zip(*(one[1:] for one in features), strict=True)
        )
        return torch.cat(logits), Features(maps, embedding, token)

    def _features_of(self, view: Tensor, stages: Sequence[int]) -> tuple[Tensor, Features]:
        with self._computing(view):
            images = self._prepared(view)
            if self.precision is not None:  # which only a call of the whole model does by itself
                images = images.to(computes_in(self.model))
            answer = forward_with_features(self.model, images, stages)
        if self.precision is not None:
            answer = widened(answer)
        back: tuple[Tensor, Features] = apply_to_collection(answer, Tensor, Tensor.to, view.device)
        return back

    @contextmanager
    def _computing(self, view: Tensor) -> Iterator[None]:
        """Leave the autocast of whoever asks, where the teacher has a precision of its own."""
        if self.precision in (None, INT8):
            yield
            return
        with torch.autocast((self.device or view.device).type, enabled=False):
            yield

    def _prepared(self, view: Tensor) -> Tensor:
        if self.model.training:
            self.model.eval()
        images = as_float(view)
        if self.device is not None:
            images = images.to(self.device)
        if self.precision is not None:
            return self.normalize(images.float())
        parameter = next(self.model.parameters(), None)
        if parameter is not None:  # under bf16-true the views arrive narrower than the weights
            images = images.to(parameter.dtype)
        return self.normalize(images)


def computed_in(view: Tensor) -> torch.dtype:
    """Return the type that a model would compute in: an autocast's, or else the view's own."""
    kind = view.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else view.dtype
