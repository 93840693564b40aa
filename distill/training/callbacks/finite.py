"""A loss that is not finite: training stops and says where, or leaves the update out."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from distill.data.batch import Batch

log = logging.getLogger(__name__)

CHOICES = ("stop", "skip")
EVERY = 50  # steps between looks at what a GPU has found
SHOWN = 8  # images of a batch that are named


@dataclass(frozen=True)
class Seen:
    """What one batch gave: its step, losses by name, images' indices `[N]`, the teacher's answers.

    Of the answers it is the logits `[N, K]`, or on a GPU, where many batches wait to be looked at,
    the largest of their absolute values.
    """

    step: int
    losses: Mapping[str, Tensor]
    index: Tensor | None = None
    teacher: Tensor | None = None

    def culprits(self) -> list[str]:
        """Return the losses that are not finite: the terms, or the sum where only that is."""
        bad = [name for name, value in self.losses.items() if not math.isfinite(value.item())]
        return [name for name in bad if name != "loss"] or bad

    def described(self) -> str:
        """Return what is not finite, in words."""
        terms = f"the loss is not finite ({', '.join(self.culprits())})"
        if self.teacher is None or bool(self.teacher.isfinite().all()):
            return terms
        return f"{terms}, nor are the teacher's answers"


class FiniteLoss(pl.Callback):
    """Look after the loss without making a GPU wait.

    With `stop` the losses stay on the device and are looked at together, every 50 steps, at an
    epoch's end, and before any checkpoint is written, so that none holds what came after the first
    loss that is not finite. With `skip` a flag follows the forward pass to the host while the
    device is at the backward pass, and the host waits for that flag alone; where it is down, the
    optimiser finds no gradients and changes nothing.

    Args:
        on_nan: `stop` or `skip`.

    Raises:
        ValueError: for another word; while training, where it stops, or where the student itself is
            not finite.
    """

    def __init__(self, on_nan: str = "stop") -> None:
        if on_nan not in CHOICES:
            raise ValueError(f"on_nan={on_nan} is unknown; there are {', '.join(CHOICES)}")
        self.skip = on_nan == "skip"
        self.skipped = 0
        self._stepped = False  # whether the batch at hand ends with an update
        self._seen: list[Seen] = []
        self._flags: list[tuple[Tensor, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """Return how many updates were left out."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped = state_dict["skipped"]

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Send the flag of this batch on its way."""
        if self.skip:
            self._flags.append(sent(loss.detach().isfinite()))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Take the gradients away, if a loss behind them is not finite."""
        self._stepped = True
        flags, self._flags = self._flags, []
        fine = all([arrived(*flag) for flag in flags])
        if not self.skip or trainer.strategy.reduce_boolean_decision(fine):
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        self.skipped += 1
        if not is_finite(pl_module):
            raise ValueError(
                f"the student itself is not finite at step {trainer.global_step}: lower "
                "optimizer.lr or set trainer.gradient_clip_val; the last checkpoint is kept"
            )
        if self.skipped == 1:
            log.warning(
                "step %d: the loss is not finite; updates of such batches are left out, and counted"
                " as train/skipped",
                trainer.global_step,
            )

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Note the losses; look at them at once where that costs nothing."""
        if self.skip:
            return
        step, self._stepped = trainer.global_step - self._stepped, False
        losses = outputs["losses"]
        teacher, on_cpu = outputs["teacher_logits"], losses["loss"].device.type == "cpu"
        if teacher is not None and not on_cpu:
            teacher = teacher.abs().amax()
        self._seen.append(Seen(step, losses, Batch.of(batch).index, teacher))
        if on_cpu or len(self._seen) >= EVERY:
            self.look()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the rest of the epoch, and log how many updates it was without."""
        self.look()
        if self.skipped:
            pl_module.log("train/skipped", float(self.skipped))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what is not finite out of checkpoints."""
        self.look()

    def look(self) -> None:
        """Stop at the first loss that is not finite, of those not looked at yet."""
        seen, self._seen = self._seen, []
        if not seen or all_finite([one.losses["loss"] for one in seen]):
            return
        first = next(one for one in seen if one.culprits())
        raise ValueError(
            f"step {first.step}: {first.described()}; "
            f"{named(first.index)}look at these images, lower optimizer.lr, or set on_nan=skip; "
            "the last checkpoint is from before"
        )


def all_finite(values: list[Tensor]) -> bool:
    """Return whether scalars are finite, in one look at the device."""
    if len(values) == 1:
        return math.isfinite(values[0].item())
    return bool(torch.stack(values).isfinite().all())


def sent(flag: Tensor) -> tuple[Tensor, Any]:
    """Return a flag on its way to the host, and what tells of its arrival."""
    if flag.device.type != "cuda":
        return flag, None
    here = torch.empty((), dtype=torch.bool, pin_memory=True)
    here.copy_(flag, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return here, event


def arrived(flag: Tensor, event: Any) -> bool:
    """Return a flag, once it is there."""
    if event is not None:
        event.synchronize()
    return bool(flag)


def is_finite(module: nn.Module) -> bool:
    """Return whether all of a module's weights and running statistics are finite."""
    values = (value for value in module.state_dict().values() if value.is_floating_point())
    return all(bool(value.isfinite().all()) for value in values)


def named(index: Tensor | None) -> str:
    """Return which images a batch held, for people."""
    if index is None:
        return ""
    numbers = list(dict.fromkeys(index.tolist()))  # of two views each is there twice
    more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
    return f"training images {', '.join(map(str, numbers[:SHOWN]))}{more}: "
