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
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW

from distill.data import DataModule
from distill.data.batch import Batch
from distill.teacher.cached import Answers, read, sent
from distill.training.snapshot import Snapshot
from distill.utils.errors import first_line

if TYPE_CHECKING:
    from distill.training.module import Distiller

log = logging.getLogger(__name__)

TRIAL = 20  # steps that a captured step has to repeat
WARM = 3  # calls before a capture, in which libraries choose their kernels
CLOSE = 1e-3  # of the way that weights have gone, which rounding in another order may change
OPTIMIZERS = (SGD, Adam, AdamW)

Replay = Callable[[], None]


@dataclass
class Inputs:
    """What one step is computed from.

    Args:
        tensors: by name, on any device: `positions`, or `view` and `target`; `index`, where stored
            answers lie on the device; `answers`, where they were read.
        view_number: which view of the samples is shown.
        labeled: how many samples, the first ones, have a label; None is all.
        numbers: what the objective is computed with.
        rates: the learning rate of each group of parameters.
        structure: what else decides which operations there are.
    """

    tensors: dict[str, Tensor]
    view_number: int | None
    labeled: int | None
    numbers: dict[str, float]
    rates: list[float]
    structure: tuple[Hashable, ...] = ()

    def key(self) -> Hashable:
        """Return what has to be equal for one graph to serve two steps."""
        shapes = [(name, t.shape, t.dtype) for name, t in self.tensors.items()]
        return (*shapes, self.labeled, *self.structure)


Recorded = tuple[Inputs, Tensor]  # of an eager step, with the losses that it gave


@dataclass
class Buffers:
    """Where a graph finds its inputs and leaves its outputs."""

    tensors: dict[str, Tensor]
    words: Tensor | None
    numbers: dict[str, Tensor]
    rates: list[Tensor]
    labeled: int | None
    answers: Answers | None
    written: dict[str, float] = field(default_factory=dict)
    view_number: int | None = None
    names: tuple[str, ...] = ()
    values: Tensor | None = None
    loss_names: tuple[str, ...] = ()
    teacher: Tensor | None = None
    replay: Replay = lambda: None

    def write(self, inputs: Inputs, words: Tensor | None) -> None:
        """Put a step's inputs in their places, without waiting for the device."""
        for name, tensor in inputs.tensors.items():
            self.tensors[name].copy_(tensor, non_blocking=True)
        if words is not None and inputs.view_number != self.view_number:
            assert self.words is not None
            self.words.copy_(words)
        self.view_number = inputs.view_number
        rates = {f"rate {k}": rate for k, rate in enumerate(inputs.rates)}
        places = self.numbers | {f"rate {k}": place for k, place in enumerate(self.rates)}
        for name, number in (inputs.numbers | rates).items():
            if self.written.get(name) != number:
                places[name].fill_(number)  # the number travels with the launch
                self.written[name] = number


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
        self.trial = trial
        self.device = trainer.strategy.root_device
        self.replayed = False  # whether the step at hand needs no more of Lightning
        self.steps = 0  # that were replayed
        self.off = False
        self._buffers: dict[Hashable, Buffers] = {}
        self._has_optimizer_state = False
        self._start: Snapshot | None = None
        self._recorded: list[Recorded] = []
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
        return batch if made else self.data.with_views(batch)

    def step(self, batch: Any) -> dict[str, Any] | None:
        """Take a whole step, if this one can be replayed, and return what `training_step` returns.

        Returns:
            None where the step is to be taken eagerly: of a trial, or for answers of the teacher
            that are not kept yet.
        """
        self.replayed = False
        if self.off or not isinstance(batch, Batch):
            return None
        if not self._has_optimizer_state:
            self._has_optimizer_state = True  # once this step has been taken
            self._check_optimizer()
            return None
        inputs = self._inputs(batch)
        if inputs is None:
            return None
        if len(self._recorded) < self.trial:
            self._start = self._start or self._snapshot()
            self._recorded.append((inputs, torch.empty(0)))
            return None
        if self.trial and not self._holds():
            return None
        return self._replay(inputs)

    def taken(self, outputs: dict[str, Any]) -> None:
        """Note what an eager step gave, for the trial."""
        if self._recorded and not self._recorded[-1][1].numel():
            values = torch.stack([value.float() for value in outputs["losses"].values()])
            self._recorded[-1] = self._recorded[-1][0], values

    def _check_optimizer(self) -> None:
        """Prepare the optimiser, before it makes its state, or turn off where it cannot be."""
        if type(self.optimizer) not in OPTIMIZERS:
            self._turn_off(f"the optimiser {type(self.optimizer).__name__} cannot be captured")
        elif self.device.type == "cuda":
            make_capturable(self.optimizer, self.device)

    def _turn_off(self, why: str) -> None:
        log.info("trainer.graph: off, steps are taken eagerly (%s)", why)
        self.off, self.data.views_by_step = True, False
        self._buffers, self._start, self._recorded = {}, None, []

    def _inputs(self, batch: Batch) -> Inputs | None:
        """Return what a step on a batch is computed from; None where the teacher must be asked."""
        module, objective = self.module, self.module.objective
        tensors = {"positions": batch.view}
        if batch.view.ndim > 1:
            tensors = {"view": batch.view, "target": batch.target}
        cached, kind = module.cached_teacher, "none"
        if cached is not None:
            kind = "live"
            store = None if objective.needs_features else cached.stores.get("train")
            if store is not None and batch.index is not None:
                if cached.resident(batch, self.device) is not None:
                    kind, tensors["index"] = "resident", batch.index
                else:
                    logits, there = read(store, batch.view_number, batch.index)
                    if not there.all():
                        return None
                    kind, tensors["answers"] = "read", sent(logits, self.device)
        numbers = {name: float(number) for name, number in objective.numbers().items()}
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        structure = (kind, objective.reads_no_labels)
        return Inputs(tensors, batch.view_number, batch.labeled, numbers, rates, structure)

    def _replay(self, inputs: Inputs) -> dict[str, Any]:
        buffers = self._prepared(inputs)
        buffers.write(inputs, self._words(inputs))
        buffers.replay()
        self.replayed, self.steps = True, self.steps + 1
        samples = len(next(iter(inputs.tensors.values())))
        self.module.means.count(buffers.names, samples)
        assert buffers.values is not None
        found = dict(zip(buffers.names, buffers.values.clone().unbind(), strict=True))
        losses = {name: found[name] for name in buffers.loss_names}
        teacher = None if buffers.teacher is None else buffers.teacher.clone()
        return {"loss": losses["loss"], "losses": losses, "teacher_logits": teacher}

    def _words(self, inputs: Inputs) -> Tensor | None:
        if "positions" not in inputs.tensors:
            return None
        assert inputs.view_number is not None
        return self.data.resident_on(self.device).words(inputs.view_number)

    def _prepared(self, inputs: Inputs) -> Buffers:
        """Return the buffers of the graph that serves these inputs, captured if need be."""
        key = inputs.key()
        if key not in self._buffers:
            words, cached = self._words(inputs), self.module.cached_teacher
            like = {n: torch.empty_like(t, device=self.device) for n, t in inputs.tensors.items()}
            buffers = Buffers(
                like,
                None if words is None else words.clone(),
                # In double precision they act as Python's numbers do.
                {name: self._place(torch.float64) for name in inputs.numbers},
                [self._place(torch.float32) for _ in inputs.rates],
                inputs.labeled,
                cached.answers if cached is not None and "index" in like else None,
            )
            buffers.write(inputs, words)
            buffers.replay = self._captured(buffers)
            self._buffers[key] = buffers
        return self._buffers[key]

    def _place(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros((), dtype=dtype, device=self.device)

    def _captured(self, buffers: Buffers) -> Replay:
        def compute() -> None:
            self.compute(buffers)

        if self.device.type != "cuda":
            return compute
        before, rates = self._snapshot(), [group["lr"] for group in self.optimizer.param_groups]
        set_rates(self.optimizer, buffers.rates)  # a number would be captured as it is
        try:
            return captured(compute)
        finally:
            set_rates(self.optimizer, rates)
            self.optimizer.zero_grad()
            before.restore()

    def compute(self, buffers: Buffers) -> None:
        """Take a step from what lies in the buffers, and leave there what it gave."""
        module, optimizer = self.module, self.optimizer
        optimizer.zero_grad()
        view, target = buffers.tensors.get("view"), buffers.tensors.get("target")
        if view is None or target is None:
            assert buffers.words is not None
            resident = self.data.resident_on(self.device)
            view, target = resident(buffers.tensors["positions"], buffers.words)
        batch = Batch(view.float().div_(255), target, labeled=buffers.labeled)
        answers = buffers.tensors.get("answers")
        if buffers.answers is not None:
            answers = buffers.answers(buffers.tensors["index"])
        learned = module.learned(batch, buffers.numbers, answers)
        with torch.autocast(self.device.type, enabled=False):  # as Lightning has it
            learned.losses["loss"].backward()
            module.clip_gradients(
                optimizer,
                gradient_clip_val=self.trainer.gradient_clip_val,
                gradient_clip_algorithm=self.trainer.gradient_clip_algorithm,
            )
            optimizer.step()
        module.means.add_on_device(learned.values, len(batch))
        buffers.names, buffers.loss_names = tuple(learned.values), tuple(learned.losses)
        buffers.values = torch.stack(list(learned.values.values()))
        buffers.teacher = learned.teacher

    def _snapshot(self) -> Snapshot:
        return Snapshot(self.module, self.optimizer, self.module.means.sums.values())

    def _holds(self) -> bool:
        """Whether captured steps give what the trial's eager ones gave, from the same state."""
        assert self._start is not None
        start, end, recorded = self._start, self._snapshot(), self._recorded
        rates = [group["lr"] for group in self.optimizer.param_groups]
        try:
            again, ours = (self._repeated(start, recorded, eager) for eager in (True, False))
        except (RuntimeError, TypeError, ValueError) as error:
            self._turn_off(f"the step cannot be captured: {first_line(error)}")
            return False
        finally:
            end.restore()
            set_rates(self.optimizer, rates)
        first = torch.stack([values for _, values in recorded]), end
        allowed, found = 2 * apart(start, first, again) + CLOSE, apart(start, first, ours)
        if not found <= allowed:
            self._turn_off(
                f"{self.trial} captured steps end {found:.2g} of the way from eager ones, and "
                f"{allowed:.2g} is allowed"
            )
            return False
        log.info("trainer.graph: on, %d captured steps gave what eager ones gave", self.trial)
        self.trial, self._start, self._recorded = 0, None, []
        return True

    def _repeated(
        self, start: Snapshot, recorded: Sequence[Recorded], eager: bool
    ) -> tuple[Tensor, Snapshot]:
        """Return the losses `[steps, terms]` and the state of a trial's steps, taken again."""
        start.restore()
        given = []
        for inputs, _ in recorded:
            buffers = self._prepared(inputs)
            buffers.write(inputs, self._words(inputs))
            set_rates(self.optimizer, inputs.rates)
            self.compute(buffers) if eager else buffers.replay()
            assert buffers.values is not None
            given.append(buffers.values[: len(buffers.loss_names)].float().clone())
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
    """Let an optimiser whose state is there do all its work, and count its steps, on a device."""
    for group in optimizer.param_groups:
        own = {"fused": True, "foreach": False, "capturable": True}
        group.update({key: value for key, value in own.items() if key in group})
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].to(device)


def captured(compute: Callable[[], None]) -> Replay:
    """Return what replays a function of static buffers, which is called a few times before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM):
            compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # What other threads do, such as a loader's pinning of memory, is no part of it.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        compute()
    return graph.replay
