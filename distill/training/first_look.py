"""A teacher is looked at before it is believed: what it is worth on validation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from omegaconf import DictConfig
from torch import Tensor

from distill.data import DataModule
from distill.data.views.views import CLEAN
from distill.metrics import balanced_accuracy, fit_temperature, negative_log_likelihood
from distill.objective.objective import Objective
from distill.teacher.teacher import Teacher
from distill.training.cache import known_baseline
from distill.training.trainer import single_device
from distill.utils.ranks import first_of_run

log = logging.getLogger(__name__)

SINGLE = 1e-6  # what was logged was rounded to single precision
GUESSING = (1.5, 0.1)  # times what guessing comes to, or this much of the way from it to 1


@dataclass(frozen=True)
class Look:
    """What a teacher, or an assistant, is worth on the validation split.

    Attributes:
        role: what it is called in messages.
        top1: the share of its right answers.
        balanced_accuracy: the mean of the classes' recalls.
        nll: the mean negative log-likelihood of the labels, in nats.
        majority: the share of the most frequent class.
        most_frequent: that class's name.
        images: how many there are.
        classes: how many of the classes are among them.
    """

    role: str
    top1: float
    balanced_accuracy: float
    nll: float
    majority: float
    most_frequent: str
    images: int
    classes: int

    def described(self) -> str:
        """Return the numbers in one line."""
        return (
            f"{self.role}: validation top-1 {percent(self.top1)}, balanced accuracy "
            f"{percent(self.balanced_accuracy)}, NLL {self.nll:.2f}; always answering the most "
            f"frequent class ({self.most_frequent}) would be right on {percent(self.majority)}"
        )

    @property
    def guesses(self) -> bool:
        """Whether it is hardly better than guessing where each class counts the same."""
        chance, (times, way) = 1 / self.classes, GUESSING
        return self.balanced_accuracy < min(times * chance, chance + way * (1 - chance))

    def doubts(self, baseline: float | None = None) -> list[str]:
        """Return, in sentences, why it may be no teacher.

        Args:
            baseline: validation top-1 of the student that learns without it, where it is known.
        """
        found = []
        own = f"{self.role}: right on {percent(self.top1)} of {self.images:,} validation images"
        if not self.top1 > self.majority:
            found.append(
                f"{own}, and always answering the most frequent class ({self.most_frequent}) would "
                f"be on {percent(self.majority)}, so that there is little to learn from it"
            )
        elif self.guesses:
            found.append(
                f"{own}, but its balanced accuracy is {percent(self.balanced_accuracy)}, where "
                f"guessing comes to {percent(1 / self.classes)}, so that there is little to learn "
                f"from it about other classes than the most frequent ({self.most_frequent})"
            )
        if baseline is not None and self.top1 < baseline - SINGLE:
            found.append(
                f"{own}, and the student that learns without it on {percent(baseline)}, so that it "
                "may do more harm than good"
            )
        return found


def percent(share: float) -> str:
    """Return a share as people read it."""
    return f"{100 * share:.1f} %"


def looked_at(
    cfg: DictConfig, data: DataModule, objective: Objective, teacher: Teacher | None, role: str
) -> Look | None:
    """Return what a teacher is worth, saying it; None where none is asked anything.

    Of several processes that are one run, the first looks.
    """
    if teacher is None or not objective.needs_teacher or not first_of_run():
        return None
    return data.sharing.once(("looked at", id(teacher)), lambda: look(cfg, data, teacher, role))


def look(cfg: DictConfig, data: DataModule, teacher: Teacher, role: str) -> Look:
    """Return what a teacher is worth on validation, and say it."""
    found = measured(*on_validation(cfg, data, teacher), data.classes, role)
    log.info("%s", found.described())
    for doubt in found.doubts():  # now, and not after the baseline or an assistant has trained
        log.warning("%s", doubt)
    return found


def measured(logits: Tensor, target: Tensor, classes: Sequence[str], role: str) -> Look:
    """Return what logits `[N, K]` are worth against labels `[N]`.

    Raises:
        ValueError: if a logit is not finite.
    """
    if not logits.isfinite().all():
        raise ValueError(f"the {role}'s answers are not finite: it cannot teach")
    answers, counts = logits.argmax(dim=1), torch.bincount(target, minlength=len(classes))
    return Look(
        role,
        float((answers == target).double().mean()),
        float(balanced_accuracy(answers, target, len(classes))),
        float(negative_log_likelihood(logits, target)),
        int(counts.max()) / len(target),
        classes[int(counts.argmax())],
        len(target),
        int((counts > 0).sum()),
    )


def warned(cfg: DictConfig, data: DataModule, looks: Sequence[Look]) -> list[str]:
    """Return why the teachers of a run may be none, saying what has not been said.

    The student without a teacher that they are compared with is this run's, or one that an earlier
    run has kept of the same data, student and recipe.
    """
    baseline = known_baseline(cfg, data) if looks else None
    said = [doubt for one in looks for doubt in one.doubts()]
    found = [doubt for one in looks for doubt in one.doubts(baseline)]
    for doubt in [doubt for doubt in found if doubt not in said]:
        data.sharing.once(("doubt", doubt), partial(log.warning, "%s", doubt))
    return found


@torch.inference_mode()
def on_validation(cfg: DictConfig, data: DataModule, teacher: Teacher) -> tuple[Tensor, Tensor]:
    """Return a teacher's logits `[N, K]`, float32, for the validation split, and the labels `[N]`.

    It is asked once, whatever is then made of its answers, and no random state is moved.
    """
    known = teacher.validation_logits
    if data.fingerprint not in known:
        device = single_device(cfg).strategy.root_device
        teacher.to(device)
        batches = torch.arange(len(data.val)).split(data.batch_size)
        with torch.random.fork_rng(
            devices=[]
        ):  # a loader draws from it, whether it needs to or not
            shown = data.in_order(data.val, CLEAN, batches, device)
            logits = torch.cat([teacher(batch.view).float().cpu() for batch in shown])
        known[data.fingerprint] = logits
    return known[data.fingerprint].clone(), data.val.labels


def teacher_temperature(cfg: DictConfig, data: DataModule, teacher: Teacher | None) -> float:
    """Return the temperature that calibrates the teacher on validation.

    Raises:
        ValueError: if there is no teacher, or no temperature is best.
    """
    if teacher is None:
        raise ValueError("objective.temperature=auto asks the teacher, and there is none")
    fit = fit_temperature(*on_validation(cfg, data, teacher))
    if fit.temperature is None:
        why = "it makes no mistake there" if fit.status == "zero" else "its scores say nothing"
        raise ValueError(
            f"objective.temperature=auto: the teacher's temperature on validation is {fit.status} "
            f"({why}); give a number"
        )
    return fit.temperature
