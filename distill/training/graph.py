"""The whole training step as one function of static buffers, which a GPU replays as one graph.

An eager step is launched operation by operation, and a small student leaves a GPU waiting for
Python. Captured once, a step is one launch: views, teacher or its stored answers, student,
objective, backward pass, clipping, optimiser and the epoch's means. What changes from step to step
lies in buffers that are written before: which samples, which view of them, rates, temperature,
weights.

On a CPU the same function is called instead, so that all but the capture itself runs anywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW

from distill.data import DataModule
from distill.data.batch import Batch
from distill.training.module import Distiller, Learned
from distill.training.presented import (
    Made,
    Presentation,
    SharedPresentation,
    Sources,
    sources_of,
)
from distill.training.replay import Outputs, Replay, in_fixed_places
from distill.training.snapshot import Snapshot
from distill.utils.errors import first_line

log = logging.getLogger(__name__)

TRIAL = 20  # steps that a captured step has to repeat
CLOSE = 1e-3  # of the way that weights have gone, which rounding in another order may change
OPTIMIZERS = (SGD, Adam, AdamW)


@dataclass(frozen=True)
class Settings:
    """What a step does with its batch.

    Args:
        numbers: what the objective is computed with.
        rates: the learning rate of each group of parameters.
        reads_no_labels: whether the objective leaves its terms on labels out.
    """

    numbers: dict[str, float]
    rates: list[float]
    reads_no_labels: bool


class Buffers:
    """Where a captured step finds its settings and leaves what it gave.

    Args:
        presentation: the batch that it learns from.
        settings: of the first step; others have other values.
        device: where it is taken.
    """

    def __init__(
        self, presentation: Presentation, settings: Settings, device: torch.device
    ) -> None:
        self.presentation = presentation
        # In double precision they act as Python's numbers do; optimisers take single rates.
        self.numbers = {
            name: torch.zeros((), dtype=torch.float64, device=device) for name in settings.numbers
        }
        self.rates = [torch.zeros((), dtype=torch.float32, device=device) for _ in settings.rates]
        self.replay: Replay = lambda: None
        self.names: tuple[str, ...] = ()  # of the values
        self.losses: tuple[str, ...] = ()  # the first of these
        self.values = torch.empty(0)
        self.teacher: Tensor | None = None
        self.asked: Tensor | None = None  # the teacher's answers that are to be kept
        self._written: list[float] = []

    def write(self, settings: Settings) -> None:
        """Put a step's settings in their places; a number travels with the launch that writes it.

        On a GPU nothing waits for it then.
        """
        numbers = [*settings.numbers.values(), *settings.rates]
        places = [*self.numbers.values(), *self.rates]
        for k, (place, number) in enumerate(zip(places, numbers, strict=True)):
            if not self._written or self._written[k] != number:
                place.fill_(number)
        self._written = numbers


class GraphedStep:
    """A training step that is captured once it has been seen to give what eager steps give.

    Args:
        module: whose step it is.
        data: its data, which leave the views to the step.
        trainer: its trainer.
        trial: how many steps are first taken eagerly, and repeated by the captured one; 0 trusts
            it after the first.
    """

    def __init__(
        self, module: Distiller, data: DataModule, trainer: pl.Trainer, trial: int = TRIAL
    ) -> None:
        self.module, self.data, self.trainer = module, data, trainer
        self.trial, self.must = trial, not trial
        self.device = trainer.strategy.root_device
        self.replayed = False  # whether the step at hand needs no more of Lightning
        self.steps = 0  # that were replayed
        self.off = False
        self.last: Replay | None = None  # takes the step again that was replayed last
        self._buffers: dict[Hashable, Buffers] = {}
        self._has_optimizer_state = False
        self._start: Snapshot | None = None
        self._recorded: list[tuple[Sources, Settings]] = []  # the trial's eager steps
        self._losses: list[Tensor] = []  # that these gave, `[terms]` each
        data.views_by_step = True

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphedStep:
        return self  # weight averaging copies the module that holds it

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The run's one optimiser."""
        return self.trainer.optimizers[0]

    def shown(self, batch: Any) -> Any:
        """Return a batch with its views made, for an eager step."""
        made = not isinstance(batch, Batch) or batch.view.is_floating_point()
        return batch if made else self.data.once(batch, "shown", self.data.with_views)

    def step(self, batch: Any) -> dict[str, Any] | None:
        """Take a whole step, if this one can be replayed, and return what `training_step` returns.

        Returns:
            None where the step is to be taken eagerly: the first, those of a trial, and all where
            they cannot be captured.
        """
        self.replayed = False
        if self.off or not isinstance(batch, Batch):
            return None
        if not self._has_optimizer_state:
            self._has_optimizer_state = True  # once this step has been taken
            self._prepare()
            return None
        sources = self.data.once(batch, self._shows(), self._sources)
        settings = self._settings()
        if len(self._recorded) < self.trial:
            self._record(sources, settings)
            return None
        if self.trial and not self._holds():
            return None
        return self._replay(batch, sources, settings)

    def _record(self, sources: Sources, settings: Settings) -> None:
        """Note a step of the trial, and before the first where it began."""
        try:
            self._start = self._start or self._snapshot()
        except torch.OutOfMemoryError:
            self._turn_off("there is no memory to try captured steps in")
        else:
            self._recorded.append((sources, settings))

    def taken(self, losses: dict[str, Tensor]) -> None:
        """Note the losses that an eager step gave, for the trial."""
        if len(self._losses) < len(self._recorded):
            self._losses.append(torch.stack([value.float() for value in losses.values()]))

    def _shows(self) -> Hashable:
        """Return what runs that take turns have to have in common to be shown the same."""
        cached, data = self.module.cached_teacher, self.data
        store = cached.stores.get("train") if cached else None
        teacher = id(cached.teacher) if cached else None
        kept = (teacher, store and store.folder, self.module.objective.needs_teacher_features)
        return id(data.pool), data.seed, data.views, data.views_per_step, *kept

    def _sources(self, batch: Batch) -> Sources:
        logits_only = not self.module.objective.needs_teacher_features
        return sources_of(batch, self.module.cached_teacher, logits_only, self.device)

    def _settings(self) -> Settings:
        objective = self.module.objective
        numbers = {name: float(number) for name, number in objective.numbers().items()}
        return Settings(numbers, self._rates(), objective.reads_no_labels)

    def _rates(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def _prepare(self) -> None:
        """Prepare the optimiser before it makes its state, or turn off where it cannot be."""
        if type(self.optimizer) not in OPTIMIZERS:
            self._turn_off(f"the optimiser {type(self.optimizer).__name__} cannot be captured")
        elif self.device.type == "cuda":
            make_capturable(self.optimizer, self.device)
            objective = self.module.objective
            if objective.class_counts is not None:  # a capture sends nothing to the device
                objective.class_counts = torch.tensor(
                    list(objective.class_counts), dtype=torch.float64, device=self.device
                )

    def _turn_off(self, why: str) -> None:
        log.info("trainer.graph: off, steps are taken eagerly (%s)", why)
        self.off, self.data.views_by_step = True, False
        self._buffers = {}
        self._end_trial()

    def _end_trial(self) -> None:
        self.trial, self._start, self._recorded, self._losses = 0, None, [], []

    def _replay(self, batch: Batch, sources: Sources, settings: Settings) -> dict[str, Any] | None:
        try:
            buffers = self._prepared(sources, settings, batch.index)
        except Exception as error:
            if self.must:
                raise
            self._turn_off(f"the step cannot be captured: {first_line(error)}")
            return None
        buffers.write(settings)
        buffers.presentation.show(sources, batch.index)
        buffers.replay()
        if buffers.asked is not None and self.module.cached_teacher is not None:
            self.module.cached_teacher.keep(batch, buffers.asked)
        self.last, self.replayed, self.steps = buffers.replay, True, self.steps + 1
        self.module.means.count(buffers.names, len(sources))
        given = dict(zip(buffers.names, buffers.values.clone().unbind(), strict=True))
        losses = {name: given[name] for name in buffers.losses}
        return {"loss": losses["loss"], "losses": losses, "teacher_logits": buffers.teacher}

    def _prepared(
        self, sources: Sources, settings: Settings, index: Tensor | None = None
    ) -> Buffers:
        """Return the buffers of the step for such a batch and settings, captured if need be."""
        key = sources.key(), settings.reads_no_labels
        if key not in self._buffers:
            buffers = Buffers(self._presentation(sources), settings, self.device)
            buffers.write(settings)
            buffers.presentation.show(sources, index)
            before, rates = self._snapshot(), self._rates()
            if self.device.type == "cuda":  # a number would be captured as it is
                set_rates(self.optimizer, buffers.rates)
            try:
                self._capture(buffers)
            finally:
                set_rates(self.optimizer, rates)
                self.optimizer.zero_grad()
                before.restore()
            self._buffers[key] = buffers
        return self._buffers[key]

    def _presentation(self, sources: Sources) -> Presentation:
        sharing = self.data.sharing
        kind = SharedPresentation if sharing.active else Presentation
        cached = self.module.cached_teacher
        return sharing.once(
            (self._shows(), sources.key()), lambda: kind(sources, self.data, cached, self.device)
        )

    def _capture(self, buffers: Buffers) -> None:
        """Let the buffers' replay take the step, and leave there what it gives."""

        def compute() -> Outputs:
            made = buffers.presentation.made()
            learned = self._learned(buffers, made)
            buffers.names, buffers.losses = tuple(learned.values), tuple(learned.losses)
            return torch.stack(list(learned.values.values())), learned.teacher, made.asked

        outputs, buffers.replay = in_fixed_places(compute, self.device)
        values, buffers.teacher, buffers.asked = outputs
        assert values is not None
        buffers.values = values

    def _learned(self, buffers: Buffers, made: Made) -> Learned:
        """Take a step from a batch, and return what it gave."""
        module, optimizer = self.module, self.optimizer
        # Another name for the same views: no answer to those that lay there before is theirs.
        view = made.view.view_as(made.view)
        labeled, views = buffers.presentation.labeled, self.data.views_per_step
        batch = Batch(view, made.target, labeled=labeled, views=views)
        optimizer.zero_grad()
        learned = module.learned(batch, buffers.numbers, made.answers)
        with torch.autocast(self.device.type, enabled=False):  # as Lightning has it
            learned.losses["loss"].backward()
            module.clip_gradients(
                optimizer,
                gradient_clip_val=self.trainer.gradient_clip_val,
                gradient_clip_algorithm=self.trainer.gradient_clip_algorithm,
            )
            optimizer.step()
        module.means.add_on_device(learned.values, len(batch))
        return learned

    def _snapshot(self) -> Snapshot:
        return Snapshot(self.module, self.optimizer, self.module.means.sums.values())

    def _holds(self) -> bool:
        """Whether captured steps give what the trial's eager ones gave, from the same state."""
        start, recorded, rates = self._start, self._recorded, self._rates()
        assert start is not None
        end: Snapshot | None = None
        try:
            end = self._snapshot()
            again, ours = (self._repeated(start, recorded, eager) for eager in (True, False))
        except Exception as error:  # whatever it is, eager steps go on without it
            self._turn_off(f"the step cannot be captured: {first_line(error)}")
            return False
        finally:
            if end is not None:
                end.restore()
            set_rates(self.optimizer, rates)
        first = torch.stack(self._losses), end
        allowed, found = 2 * apart(start, first, again) + CLOSE, apart(start, first, ours)
        if not found <= allowed:
            self._turn_off(
                f"{self.trial} captured steps end {found:.2g} of the way from eager ones, and "
                f"{allowed:.2g} is allowed"
            )
            return False
        log.info("trainer.graph: on, %d captured steps gave what eager ones gave", self.trial)
        self._end_trial()
        return True

    def _repeated(
        self, start: Snapshot, recorded: Sequence[tuple[Sources, Settings]], eager: bool
    ) -> tuple[Tensor, Snapshot]:
        """Return the losses `[steps, terms]` and the state of a trial's steps, taken again."""
        start.restore()
        given = []
        for sources, settings in recorded:
            buffers = self._prepared(sources, settings)
            buffers.write(settings)
            buffers.presentation.show(sources, None)
            set_rates(self.optimizer, settings.rates)
            if eager:
                learned = self._learned(buffers, buffers.presentation.made())
                values = torch.stack(list(learned.losses.values())).detach()
            else:
                buffers.replay()
                values = buffers.values[: len(buffers.losses)]
            given.append(values.float().clone())
        self.optimizer.zero_grad()
        return torch.stack(given), self._snapshot()


def apart(start: Snapshot, one: tuple[Tensor, Snapshot], other: tuple[Tensor, Snapshot]) -> float:
    """Return how far two courses of training lie apart, as a share of what either has gone.

    Args:
        start: where both began.
        one: its losses, `[steps, terms]`, and where it ended.
        other: the same of the other.
    """
    (losses, end), (others, elsewhere) = one, other
    of_losses = (losses - others).abs().max() / losses.abs().max()
    of_weights = end.way(elsewhere) / end.way(start)
    return float(torch.stack([of_losses.double(), of_weights]).max())


def set_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float | Tensor]) -> None:
    """Set the learning rate of each group of parameters."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Let an optimiser do all its work, and count its steps, on a device."""
    for group in optimizer.param_groups:
        own = {"fused": True, "foreach": False, "capturable": True}
        group.update({key: value for key, value in own.items() if key in group})
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].to(device)
