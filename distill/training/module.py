"""The training step: a student under an objective, watched by metrics."""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from lightning_utilities import apply_to_collection
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection

from distill.config import library
from distill.data.batch import Batch
from distill.metrics import (
    Agreement,
    BalancedAccuracy,
    BrierScore,
    CalibrationError,
    MacroF1,
    MeanReciprocalRank,
    NegativeLogLikelihood,
    TopKAccuracy,
)
from distill.models.compiled import compiled_in_place
from distill.models.features import Features, forward_with_features
from distill.objective.objective import Objective
from distill.teacher.cached import CachedTeacher
from distill.teacher.teacher import Teacher
from distill.training import horizon
from distill.training.means import EpochMeans
from distill.utils.inputs import (
    as_float,
    as_labels,
    check_logits,
    logits_of,
    number_of_classes,
)

log = logging.getLogger(__name__)

DEFAULT_TOPK = (1, 5)
Answers = tuple[Tensor | None, Features | None]


@dataclass(frozen=True)
class Learned:
    """What one batch gave: losses by name, with gradients; what is logged of it; the teacher's."""

    losses: dict[str, Tensor]
    values: dict[str, Tensor]
    teacher: Tensor | None


class WholeStep(Protocol):
    """What takes whole training steps, up to the new weights; see `distill.training.graph`."""

    replayed: bool  # whether it has taken the step at hand

    def step(self, batch: Any) -> dict[str, Any] | None:
        """Take a step and return what `training_step` returns, or None to leave it to Lightning."""

    def shown(self, batch: Any) -> Any:
        """Return a batch with its views made."""

    def taken(self, losses: dict[str, Tensor]) -> None:
        """Learn what a step gave that was left to Lightning."""


class Distiller(pl.LightningModule):
    """Train a student under an objective, with or without a teacher.

    Batches are those of a `DataModule`, or what `distill.data.batch.Batch.of` takes: `(view,
    target)`, `(view, target, index)`, or mappings with the usual names (`image`, `label`). An index
    below zero marks a sampler's padding, which no metric counts. Views of bytes are scaled to
    [0, 1], and of a model that answers with more the `logits` taken.
    Only the student (and what the objective learns) has parameters, gradients and a place in
    checkpoints.

    Args:
        student: views `[N, C, H, W]` → logits `[N, K]`.
        teacher: a `Teacher`, any module (which is then frozen and put outside the module tree), or
            None.
        objective: what to minimise; None is cross-entropy on the labels.
        num_classes: K; None asks the student (timm models know).
        optimizer: keywords of `timm.optim.create_optimizer_v2`.
        scheduler: keywords of `timm.scheduler.create_scheduler_v2` in epochs, or None for a
            constant learning rate.
        topk: the k of the logged top-k accuracies, each below K; None is 1 and 5 where K allows.
        normalize: the student's own input normalisation, or None.

    Raises:
        ValueError: if the parts do not fit together.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | nn.Module | None = None,
        objective: Objective | None = None,
        *,
        num_classes: int | None = None,
        optimizer: Mapping[str, Any] | None = None,
        scheduler: Mapping[str, Any] | None = None,
        topk: Sequence[int] | None = None,
        normalize: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.student = compiled_in_place(student)
        self.teacher = Teacher(teacher) if isinstance(teacher, nn.Module) else teacher
        self.objective = objective or Objective({"ce": "cross_entropy"})
        self.normalize = normalize or nn.Identity()
        self.num_classes = num_classes or number_of_classes(student)
        self.optimizer_options = {"opt": "adamw", "lr": 1e-3, **(optimizer or {})}
        self.scheduler_options = dict(scheduler) if scheduler else None
        check_parts(self)
        self.objective.helpers.connect(student, self.teacher.model if self.teacher else None)
        self.topk = resolve_topk(topk, self.num_classes)
        self.metrics = nn.ModuleDict({stage: self._metrics() for stage in ("val", "test")})
        self.losses = nn.ModuleDict({stage: loss_means(self.objective) for stage in self.metrics})
        # Asked in training and validation; whoever trains may put stores behind it.
        self.cached_teacher = CachedTeacher(self.teacher) if self.teacher else None
        self.metadata: dict[str, Any] = {}  # plain values that checkpoints carry as they are
        self.means = EpochMeans()
        self.graph: WholeStep | None = None  # whoever trains may let steps be captured
        self._said_scaled = False
        self.counted_updates: int | None = None  # of an epoch, where its loader did not say so

    def forward(self, view: Tensor) -> Tensor:
        """Return the student's logits `[N, K]` for views `[N, C, H, W]` in [0, 1]."""
        images = self._images(view)
        return check_logits(
            logits_of(self.student(images), "student"), len(images), self.num_classes
        )

    def setup(self, stage: str) -> None:
        """Move the teacher, which Lightning cannot see, to the student's device.

        Under `64-true` and its like the student takes its precision here: Lightning gives it only
        after a checkpoint's weights have been loaded, which would round them to float32.
        """
        if stage == "fit":
            library.check_callbacks(self.trainer.callbacks)  # type: ignore[attr-defined]
        self.trainer.precision_plugin.convert_module(self)
        if self.teacher is not None:
            self.teacher.to(self.device)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Return the objective's losses on one batch.

        Returns:
            `loss`, which is minimised; `losses`, it and the terms by name, and `teacher_logits`
            `[N, K]` or None, detached: callbacks are handed all of it as `outputs`.
        """
        if self.graph is not None:
            if (outputs := self.graph.step(batch)) is not None:
                return outputs
            batch = self.graph.shown(batch)
        batch = self._taken(batch, batch_idx)
        learned = self.learned(batch, step=self.global_step)
        self.means.add(learned.values, len(batch))
        found = {name: learned.values[name] for name in learned.losses}
        outputs = {
            "loss": learned.losses["loss"],
            "losses": found,
            "teacher_logits": learned.teacher,
        }
        if self.graph is not None:
            self.graph.taken(found)
        return outputs

    def learned(
        self,
        batch: Batch,
        numbers: Mapping[str, Tensor] | None = None,
        answers: Tensor | None = None,
        step: int | None = None,
    ) -> Learned:
        """Return the losses of a batch whose views are made, and what else is logged of it.

        Of two views of each sample each is a batch of its own, to the student's batch norm and to
        the objective, and all that is returned is a mean over both.

        Args:
            batch: the samples.
            numbers: what the objective is computed with; None is what it says itself.
            answers: the teacher's logits `[N, K]`, if they are known; None asks for them.
            step: the optimiser step, for teachers that answer by it.
        """
        teacher = self._teachers(batch, step, answers)
        if batch.views == 1:
            losses, values = self._of_view(batch, numbers, *teacher)
        else:
            pairs = zip(batch.by_view(), rows_by_view(teacher, batch.views), strict=True)
            views = [self._of_view(one, numbers, *known) for one, known in pairs]
            losses, values = map(mean_over_views, zip(*views, strict=True))
        if self.objective.curriculum is not None:
            values["temperature"] = self.objective.curriculum.last_mean  # of the last view
        return Learned(losses, values, teacher[0])

    def _of_view(
        self,
        batch: Batch,
        numbers: Mapping[str, Tensor] | None,
        teacher: Tensor | None,
        theirs: Features | None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the losses of a batch of one view, and what is logged of it."""
        (student, ours), target = self._students(batch), batch.target
        losses = self.objective(
            student, teacher, target, (ours, theirs), labelled=batch.labeled, numbers=numbers
        )
        values = {name: value.detach() for name, value in losses.items()}
        if target.ndim == 1:  # of mixed views no class is the right one
            right = student[: batch.labeled].argmax(dim=1) == target[: batch.labeled]
            values["top1"] = right.float().mean()
        return losses, values

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute the gradients, unless a captured step has done all that follows from them."""
        if self.graph is None or not self.graph.replayed:
            super().backward(loss, *args, **kwargs)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients, unless a captured step has."""
        if self.graph is None or not self.graph.replayed:
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )

    def on_validation_epoch_start(self) -> None:
        """Let the student answer by what it has learned, where a term decides its classifier."""
        self.objective.helpers.set_classifier(self.student)

    def on_train_end(self) -> None:
        """Leave the student as it is to be kept."""
        self.objective.helpers.set_classifier(self.student)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Update the validation metrics."""
        self._evaluate("val", self._taken(batch, batch_idx), batch_idx == 0)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Update the test metrics."""
        self._evaluate("test", self._taken(batch, batch_idx), batch_idx == 0)

    def predict_step(
        self, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Return student (and teacher) logits `[N, K]`, targets and indices `[N]` of one batch."""
        batch = self._taken(batch)
        answers = {"student": self(batch.view).float(), "target": batch.target}
        if self.teacher is not None:
            answers["teacher"] = self.teacher(batch.view).float()
        if batch.index is not None:
            answers["index"] = batch.index
        return answers

    def configure_optimizers(self) -> Any:
        """Return timm's optimiser over what learns and, if asked for, timm's schedule."""
        optimizer = create_optimizer(self.student, self.optimizer_options)
        learned = list(self.objective.parameters())
        if learned:
            optimizer.add_param_group({"params": learned, "weight_decay": 0.0})
        if not has_schedule(self.scheduler_options):
            return optimizer
        horizon.tell_of_unknown_length(self.trainer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._schedule(optimizer), "interval": "step"},
        }

    def _schedule(self, optimizer: torch.optim.Optimizer) -> Any:
        """Return timm's schedule over as much training as is known of."""
        total, each = self._length()
        epochs = total / each if total % each else total // each
        assert self.scheduler_options is not None
        scheduler = create_schedule(optimizer, self.scheduler_options, epochs, each)
        scheduler.laid_out_over = (total, each)  # in its state, as all that it has
        return scheduler

    def _length(self) -> tuple[int, int]:
        """Return how many updates training and an epoch have; one an epoch until it is known."""
        each, total = (f(self.trainer) for f in (horizon.updates_per_epoch, horizon.total_updates))
        return (self.trainer.max_epochs or 1, 1) if each is None or total is None else (total, each)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Give timm's schedule the update that comes next."""
        if horizon.updates_per_epoch(self.trainer) is None:
            return
        if scheduler.laid_out_over != self._length():  # it is known now, or known better
            scheduler.load_state_dict(self._schedule(scheduler.optimizer).state_dict())
        scheduler.step_update(self.global_step)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the epoch's means after its last batch, before any callback asks for them.

        A classifier that a term decides is what the new weights make it. Lookahead's slow weights
        are those that an epoch ends with, as in timm's training.
        """
        self.objective.helpers.set_classifier(self.student)
        if self.trainer.is_last_batch or horizon.ends_here(self.trainer):
            self._log_means()
        if self.trainer.is_last_batch:
            for optimizer in self.trainer.optimizers:
                if hasattr(optimizer, "sync_lookahead"):
                    optimizer.sync_lookahead()

    def on_train_epoch_end(self) -> None:
        """Note how many updates the epoch had, if its loader did not know, for the next one."""
        self._log_means()  # of an epoch that was cut short
        before, self.counted_updates = self.counted_updates, horizon.counted(self.trainer)
        if self.counted_updates != before:
            for one in self.trainer.lr_scheduler_configs:
                self.lr_scheduler_step(one.scheduler, None)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the annealed values as plain numbers."""
        # Not in the state dict: weight averaging saves a copy that was made before annealing.
        checkpoint["distill"] = {"objective": self.objective.state(), **self.metadata}
        checkpoint["distill"]["means"] = self.means.state_dict()
        if self.counted_updates is not None:
            checkpoint["distill"]["counted_updates"] = self.counted_updates

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the annealed values back.

        Raises:
            ValueError: if the objective's helper networks were others.
        """
        check_helpers(checkpoint["state_dict"], self.state_dict())
        if "distill" in checkpoint:
            self.objective.load_state(checkpoint["distill"]["objective"])
            self.counted_updates = checkpoint["distill"].get("counted_updates")
            if "means" in checkpoint["distill"]:
                self.means.load_state_dict(checkpoint["distill"]["means"], self.device)

    def _log_means(self) -> None:
        """Log what training batches gave since it was last logged, over all ranks."""
        for name, (total, samples) in self.means.take().items():
            both = torch.stack([total, torch.full_like(total, samples)])
            if self.trainer.world_size > 1:
                both = self.trainer.strategy.reduce(both, reduce_op="sum")
            mean = both[0] / both[1]
            self.log(
                f"train/{name}", mean, on_step=False, on_epoch=True, batch_size=1, sync_dist=True
            )

    def _metrics(self) -> MetricCollection:
        named = evaluation_metrics(self.topk, self.num_classes, self.teacher is not None)
        check_term_names(self.objective, named)
        return MetricCollection({**named}, compute_groups=False)

    def _images(self, view: Tensor) -> Tensor:
        # Under bf16-true, views made after Lightning's own conversion are wider than the weights.
        return self.normalize(as_float(view).to(self.dtype))

    def _taken(self, given: Any, batch_idx: int | None = None) -> Batch:
        """Return a batch with its views as floating-point numbers and its labels as int64.

        Of an epoch's first, the objective is to look at the targets, unless its data module has.
        """
        batch = Batch.of(given)
        if batch_idx == 0:
            self.objective.checked = batch.split is not None
        view = as_float(batch.view)
        if view is not batch.view and not self._said_scaled:
            self._said_scaled = True
            log.info("images are bytes: they are scaled from 0 … 255 to 0 … 1")
        return replace(batch, view=view, target=as_labels(batch.target))

    def _students(self, batch: Batch) -> tuple[Tensor, Features | None]:
        """Return the student's logits `[N, K]`, and its features where the objective reads them."""
        if not self.objective.needs_student_features:
            return self(batch.view), None
        return forward_with_features(self.student, self._images(batch.view), self.objective.stages)

    def _teachers(
        self, batch: Batch, step: int | None = None, answers: Tensor | None = None
    ) -> Answers:
        """Return the teacher's logits, given or asked for, and its features likewise."""
        if answers is not None or self.teacher is None or self.cached_teacher is None:
            return answers, None
        if self.objective.needs_teacher_features:
            return self.teacher.with_features(batch.view, self.objective.stages)
        return self.cached_teacher(batch, step), None

    def _evaluate(self, stage: str, batch: Batch, first: bool) -> None:
        metrics, means = self.metrics[stage], self.losses[stage]
        assert isinstance(metrics, MetricCollection)
        if first:  # Lightning keeps the metrics themselves, and asks them at the end
            for name, metric in (*metrics.items(), *means.items()):  # type: ignore[operator]
                self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, batch_size=1)
        if batch.target.ndim > 1:
            raise ValueError(
                f"{stage}: targets are class probabilities {list(batch.target.shape)}, and a "
                "student is judged by class indices [N]"
            )
        (student, ours), (teacher, theirs) = self._students(batch), self._teachers(batch)
        answers = (student, teacher, batch.target, (ours, theirs))
        if batch.index is not None and self.trainer.world_size > 1:
            real = (batch.index >= 0).to(batch.view.device)
            if not real.any():
                return
            answers = apply_to_collection(answers, Tensor, operator.itemgetter(real))
        student, teacher, target = answers[0].float(), *answers[1:3]
        if not student.isfinite().all():
            raise ValueError(
                "the student's answers are not finite, so training has diverged: lower optimizer.lr"
            )
        losses = self.objective(*answers)
        metrics.update(
            logits=student,
            probs=student.softmax(dim=1),
            target=target,
            student_logits=student,
            teacher_logits=teacher,
        )  # each takes what it names
        for name, mean in means.items():  # type: ignore[operator]
            mean.update(losses[name], weight=len(target))


def rows_by_view(answers: Answers, views: int) -> list[Answers]:
    """Return what a teacher answers to each view, of rows that are all views one after another."""
    return [
        apply_to_collection(answers, Tensor, lambda rows, k=k: rows.chunk(views)[k])
        for k in range(views)
    ]


def mean_over_views(each: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the means of the values of each view, by name."""
    return {name: torch.stack([one[name] for one in each]).mean(dim=0) for name in each[0]}


def check_helpers(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint whose helper networks have other tensors than the objective's."""
    shapes = [
        {n: list(value.shape) for n, value in state.items() if n.startswith("objective.helpers.")}
        for state in (before, now)
    ]
    differing = sorted(n for n in {*shapes[0], *shapes[1]} if shapes[0].get(n) != shapes[1].get(n))
    if differing:
        first = differing[0]
        raise ValueError(
            "the checkpoint is of another objective: "
            f"{first} is {shapes[0].get(first)} there and {shapes[1].get(first)} here"
        )


def logged_names(
    topk: Sequence[int], num_classes: int, objective: Objective, with_teacher: bool
) -> list[str]:
    """Return the names of what validation and test log; see `check_term_names`."""
    metrics = evaluation_metrics(topk, num_classes, with_teacher)
    check_term_names(objective, metrics)
    return [*metrics, "loss", *objective.terms]


def check_term_names(objective: Objective, metrics: Mapping[str, Metric]) -> None:
    """Refuse a term of the objective that has the name of a metric."""
    if clash := metrics.keys() & objective.terms.keys():
        raise ValueError(f"objective.terms.{min(clash)} has the name of a metric: call it another")


def loss_means(objective: Objective) -> nn.ModuleDict:
    """Return what averages the loss and its terms over an epoch, by name.

    Means of batch means would weigh a ragged batch, or a rank's share, like a full one.
    """
    return nn.ModuleDict({name: MeanMetric() for name in ("loss", *objective.terms)})


def evaluation_metrics(
    topk: Sequence[int], num_classes: int, with_teacher: bool
) -> dict[str, Metric]:
    """Return the metrics of a student that validation and test log, by name."""
    metrics: dict[str, Metric] = {f"top{k}": TopKAccuracy(k) for k in topk}
    metrics |= {
        "mrr": MeanReciprocalRank(),
        "balanced_accuracy": BalancedAccuracy(num_classes),
        "macro_f1": MacroF1(num_classes),
        "nll": NegativeLogLikelihood(num_classes),
        "brier": BrierScore(num_classes),
        "ece": CalibrationError(num_classes),
    }
    if with_teacher:
        metrics["agreement"] = Agreement()
    return metrics


def check_parts(module: Distiller) -> None:
    """Refuse parts that cannot work together."""
    teacher, classes = module.teacher, module.num_classes
    library.check_layers(module.optimizer_options, has_schedule(module.scheduler_options))
    if not isinstance(classes, int) or classes < 2:
        raise ValueError(
            "the student does not say how many classes it has: give num_classes, a whole number of "
            f"at least 2{f', not {classes!r}' if classes else ''}"
        )
    if module.objective.needs_teacher and teacher is None:
        raise ValueError("this objective compares with a teacher: give one, or use supervised")
    if teacher is not None and teacher.num_classes not in (None, classes):
        raise ValueError(
            f"the teacher has {teacher.num_classes} classes and the student {classes}: "
            "they must be trained on the same classes"
        )


def resolve_topk(topk: Sequence[int] | None, num_classes: int) -> tuple[int, ...]:
    """Return the k to report: the caller's, or the default ones that are below K."""
    if topk is None:
        return tuple(k for k in DEFAULT_TOPK if k < num_classes)
    if isinstance(topk, int | str):
        raise ValueError(f"topk is a list, such as [1,3], not {topk!r}")
    for k in topk:
        if not 1 <= k < num_classes:
            raise ValueError(
                f"top-{k} says nothing among {num_classes} classes: 1 ≤ k < {num_classes}"
            )
    return tuple(topk)


def create_optimizer(model: nn.Module, options: Mapping[str, Any]) -> torch.optim.Optimizer:
    """Return timm's optimiser, explaining options it does not know.

    Raises:
        ValueError: if timm refuses it, or would drop part of what was asked.
    """
    library.check_optimizer(options)
    try:
        optimizer = create_optimizer_v2(model, **library.completed(options))
    except (TypeError, AssertionError, ValueError, ImportError) as error:
        raise ValueError(f"optimizer {dict(options)} was refused: {error}") from error
    library.check_steps(str(options["opt"]), optimizer)
    return optimizer


def has_schedule(options: Mapping[str, Any] | None) -> bool:
    """Whether options ask for a schedule: timm calls a constant rate `none`."""
    return bool(options and options.get("sched", "cosine") != "none")


def create_schedule(
    optimizer: torch.optim.Optimizer, options: Mapping[str, Any], epochs: float, updates: int
) -> Any:
    """Return timm's schedule in updates, explaining options it does not know.

    All of it, with its cycles, its cooldown and a warm-up before it, takes `epochs`, unless
    `num_epochs` is given. Milestones m are reached with the first update after m epochs, as the
    literature counts them: timm's own, one earlier.

    Args:
        optimizer: whose rates are scheduled.
        options: keywords of `timm.scheduler.create_scheduler_v2`, in epochs.
        epochs: how long training is.
        updates: of the optimiser in an epoch.

    Raises:
        ValueError: if timm refuses it, or it does not follow the step.
    """
    library.check_schedule(options)
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            **{"num_epochs": library.epochs_of_first_cycle(options, epochs), **options},
            step_on_epochs=False,
            updates_per_epoch=updates,
        )
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"scheduler {dict(options)} was refused: {error}") from error
    if options.get("sched") == "multistep":
        scheduler.decay_t = [update + 1 for update in scheduler.decay_t]
    return scheduler
