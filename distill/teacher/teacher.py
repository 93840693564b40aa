"""The frozen teacher."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from distill.models.features import Features, forward_with_features
from distill.teacher.ensemble import Ensemble
from distill.utils.inputs import as_float, logits_of
from distill.utils.sharing import Recent

T = TypeVar("T")


class Teacher:
    """A model that answers and never changes.

    It is a plain object, not a module: inside the student's module tree it would leak into
    checkpoints, be flipped to training mode, be wrapped by DDP and be copied by weight averaging.
    It is always in eval mode and answers under `inference_mode`, in whatever autocast its caller
    runs; its answer is therefore an inference tensor.

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
        self._recent = Recent() if shared else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self

    def to(self, device: torch.device) -> Teacher:
        """Move the teacher to a device."""
        self.model.to(device)
        self.normalize.to(device)
        return self

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
        return self._once(
            view, detail, lambda: forward_with_features(self.model, self._prepared(view), stages)
        )

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
        images = self._prepared(view)
        more = (step,) if isinstance(self.model, Ensemble) else ()
        logits = logits_of(self.model(images, *more), "teacher")
        if logits.shape != (len(view), self.num_classes or logits.shape[-1]):
            raise ValueError(
                f"the teacher answers {len(view)} images with {list(logits.shape)}, and not with "
                f"[{len(view)}, {self.num_classes or 'classes'}]"
            )
        return logits

    def _prepared(self, view: Tensor) -> Tensor:
        if self.model.training:
            self.model.eval()
        parameter = next(self.model.parameters(), None)
        if parameter is not None:  # under bf16-true the views arrive narrower than the weights
            view = as_float(view).to(parameter.dtype)
        return self.normalize(view)


def computed_in(view: Tensor) -> torch.dtype:
    """Return the type that a model would compute in: an autocast's, or else the view's own."""
    kind = view.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else view.dtype
