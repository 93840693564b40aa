"""What a student is trained on: weighted loss terms under one temperature."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from distill.models.features import Features
from distill.objective.annealed import AnnealedValues
from distill.objective.helpers import Helpers
from distill.objective.selection import build_selection
from distill.objective.temperature import LearnedTemperature
from distill.objective.term import build_term
from distill.utils.inputs import as_labels, check_targets
from distill.utils.numbers import is_number, is_real

Number = float | Tensor
SMALLEST = 1e-12  # divides zeros where no sample is kept
TOLD = ("loss", "kept")  # what an objective returns beside its terms


class Objective(nn.Module):
    r"""A weighted sum of loss terms under one temperature.

    `loss = Σ_i a_i·w_i·mean_n ℓ_i(n)`, where `a_i` is `α` for the terms that use the teacher and
    `1 − α` for those that use labels only; without `alpha` every `a_i` is 1. Losses that know a
    temperature are given the objective's, unless the term's options name their own. At `α = 1`
    the terms on labels are left out: the student learns from the teacher alone.

    Labels can be smoothed, and those not trusted left out, for the terms on labels; the terms that
    use the teacher see all samples, and labels as they are. The terms on labels then are means
    over the samples kept, `Σ_n m_n·ℓ_i(n)/Σ_n m_n` with m_n ∈ {0, 1}, or 0 where none is. In eval
    mode none is left out.

    Where only some samples have labels, the terms that use the teacher alone are means over all of
    them; the others, those that use the teacher and read labels included, see the samples with
    labels and are means over these.

    Args:
        terms: name → loss, given as a name in `distill.losses.LOSSES`, the dotted path of a
            function `(student, [teacher], [target], ...) -> [N]`, or a mapping with `loss`,
            `weight` (default 1) and the loss's own options.
        temperature: τ > 0, moved by annealing.
        alpha: the teacher's share in [0, 1], or None.
        class_counts: training samples per class, for the losses that correct an imbalance.
        curriculum: keywords of `LearnedTemperature`, which starts at `temperature` and takes its
            place.
        stages: which of the models' feature stages the terms on feature maps compare.
        label_smoothing: ε in [0, 1): terms on labels see `(1 − ε)·e_y + ε/K` in place of the label
            y, or `(1 − ε)·p + ε/K` of class probabilities p; for losses that take probabilities.
        sample_selection: keywords of `Selection`, which samples of a training batch the terms on
            labels see; `small_loss` ranks them by `Σ_i w_i·ℓ_i(n)` of those terms.

    Raises:
        ValueError: for an unknown loss, a wrong option or a value out of range.

    Example:
        >>> import torch
        >>> kd = Objective({"ce": "cross_entropy", "kl": "kl_divergence"}, temperature=4, alpha=0.9)
        >>> s, z, y = torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 2])
        >>> {name: round(value.item(), 4) for name, value in kd(s, z, y).items()}
        {'loss': 0.1099, 'ce': 1.0986, 'kl': 0.0}

    Reference:
        Hinton, Vinyals and Dean, 1503.02531. Label smoothing: Szegedy et al., 1512.00567.
    """

    def __init__(
        self,
        terms: Mapping[str, str | Mapping[str, Any]],
        temperature: float = 1.0,
        alpha: float | None = None,
        class_counts: Sequence[int] | Tensor | None = None,
        curriculum: Mapping[str, Any] | None = None,
        stages: Sequence[int] = (-1,),
        label_smoothing: float = 0.0,
        sample_selection: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_names(terms)
        if not stages:
            raise ValueError("objective.stages names no stage: [-1] is the last")
        self.terms = {name: build_term(name, spec) for name, spec in terms.items()}
        self.weights = {name: term.weight for name, term in self.terms.items()}
        self.curriculum: LearnedTemperature | None = None
        self.temperature, self.alpha = temperature, alpha
        self.class_counts = class_counts
        self.stages = tuple(stages)
        self.label_smoothing = checked_smoothing(label_smoothing)
        self.sample_selection = build_selection(sample_selection)
        if (self.sample_selection or label_smoothing) and all(
            t.uses_teacher for t in self.terms.values()
        ):
            raise ValueError(
                "objective.sample_selection and objective.label_smoothing are of terms on labels, "
                "and this objective has none"
            )
        self.checked = False  # whether targets were looked at; a look waits for the device
        self.helpers = Helpers(self.terms, self.stages)  # there are none until these are connected
        if curriculum is not None:
            classes = {"num_classes": len(class_counts)} if class_counts is not None else {}
            self.curriculum = LearnedTemperature(temperature, **{**classes, **curriculum})
        for name, term in self.terms.items():
            if term.needs_class_counts and class_counts is None:
                raise ValueError(f"objective.terms.{name} needs class_counts")
        on_logits = any("student" in term.loss.inputs for term in self.terms.values())
        if on_logits and self.helpers.sets_classifier:
            raise ValueError(
                "a term of this objective sets the student's classifier from others, so that terms "
                "on the student's logits would teach nothing: leave them out"
            )
        if not any(self._factor(name) for name in self.terms):
            raise ValueError(
                "every term of the objective has weight zero: nothing would be learned"
            )

    @property
    def temperature(self) -> float:
        """The temperature τ that the terms share; of a learned one, the last batch's mean."""
        return self._temperature if self.curriculum is None else self.curriculum.last

    @temperature.setter
    def temperature(self, value: float) -> None:
        if not (is_real(value) and value > 0):
            raise ValueError(f"objective.temperature must be a number above 0, got {value!r}")
        self._temperature = float(value)

    @property
    def alpha(self) -> float | None:
        """The teacher's share of the loss, or None where the weights stand alone."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float | None) -> None:
        if value is not None and not (is_real(value) and 0 <= value <= 1):
            raise ValueError(f"objective.alpha must lie in [0, 1], got {value!r}")
        self._alpha = None if value is None else float(value)

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares the student with a teacher, or the teacher judges labels."""
        compares = any(term.uses_teacher for term in self.terms.values())
        return compares or self.sample_selection.agreement is not None

    @property
    def reads_no_labels(self) -> bool:
        """Whether the terms on labels are left out, as the teacher alone has a share."""
        return self.alpha == 1 and any(term.uses_teacher for term in self.terms.values())

    @property
    def needs_student_features(self) -> bool:
        """Whether any term reads the student's feature maps or embeddings."""
        return self.helpers.reads("student_")

    @property
    def needs_teacher_features(self) -> bool:
        """Whether any term reads the teacher's feature maps or embeddings."""
        return self.helpers.reads("teacher_")

    def teaches_unlabeled(self, moved: Collection[str] = ()) -> bool:
        """Whether a sample without a label teaches anything, now or once annealing moves these."""
        if self.alpha == 0 and "alpha" not in moved:
            return False
        return any(
            term.teaches_unlabeled and (self.weights[name] or f"terms.{name}.weight" in moved)
            for name, term in self.terms.items()
        )

    @property
    def annealed(self) -> AnnealedValues:
        """The values that annealing can move, by name: to read and to set."""
        places: dict[str, tuple[Any, str]] = {
            f"terms.{name}.weight": (self.weights, name) for name in self.terms
        }
        if self.alpha is not None:
            places["alpha"] = self, "alpha"
        if self.sample_selection.small_loss is not None:
            places["sample_selection.small_loss"] = self.sample_selection, "small_loss"
        if self.curriculum is not None:
            places["curriculum.strength"] = self.curriculum, "strength"
        elif self.uses_temperature:
            places["temperature"] = self, "temperature"
        return AnnealedValues(places)

    @property
    def uses_temperature(self) -> bool:
        """Whether any term takes the objective's temperature."""
        return any(
            term.takes("temperature") and "temperature" not in term.options
            for term in self.terms.values()
        )

    def numbers(self) -> dict[str, Number]:
        """Return what the loss is computed with now: τ, each term's factor, the curriculum's λ."""
        own = {f"terms.{name}": self._factor(name) for name in self.terms}
        if self.curriculum is not None:
            own["curriculum.strength"] = self.curriculum.strength
        return {"temperature": self._temperature, **own}

    def state(self) -> dict[str, float]:
        """Return what annealing has moved, in plain values, for a checkpoint."""
        return {"temperature": self.temperature, **self.annealed}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Take back what `state` returned."""
        for name in self.annealed:
            if name not in state:
                raise ValueError(f"the checkpoint is of another objective: it has no {name}")
            self.annealed[name] = state[name]

    def forward(
        self,
        student: Tensor,
        teacher: Tensor | None,
        target: Tensor,
        features: tuple[Features | None, Features | None] = (None, None),
        labelled: int | None = None,
        numbers: Mapping[str, Number] | None = None,
    ) -> dict[str, Tensor]:
        """Return `loss`, each term's unweighted mean, and of a selection the share `kept`.

        Args:
            student: logits `[N, K]`.
            teacher: logits `[N, K]`, or None where no term uses a teacher.
            target: labels `[N]`, or class probabilities `[N, K]` for the losses that take them.
            features: the student's and the teacher's, of `stages`, for the terms that read them.
            labelled: how many samples, the first ones, have a label; None is all. The targets of
                the others are not read.
            numbers: in the place of `numbers()`: those of a captured step lie on its device.

        Raises:
            ValueError: if there is no teacher where one is asked, or for targets that are neither
                labels nor probabilities by their type and shape. Their values are looked at in the
                first batch, and again once `checked` is set back, as at each epoch's first.
        """
        target = as_labels(target)
        if not self.checked:
            self.checked = True
            check_targets(target[:labelled], student.shape[-1])
        if teacher is None and self.needs_teacher:
            raise ValueError("this objective asks a teacher, and there is none")
        given: dict[str, Any] = {"student": student, "teacher": teacher, "target": target}
        numbers = numbers or self.numbers()
        given |= {"temperature": numbers["temperature"], "class_counts": self.class_counts}
        if self.curriculum is not None and teacher is not None:
            strength = numbers["curriculum.strength"]
            given["temperature"] = self.curriculum(student, teacher, strength)
        for role, of in zip(("student", "teacher"), features, strict=True):
            if of is not None:
                given |= {f"{role}_maps": of.maps, f"{role}_embedding": of.embedding}
                given |= {f"{role}_token": of.token}
        known = given if labelled is None else first(given, labelled)
        values = {
            name: self.values(name, given if term.teaches_unlabeled else known)
            for name, term in self.terms.items()
        }
        kept = self._select(values, known) if self.sample_selection and self.training else {}
        means = {name: value.mean() for name, value in values.items()}
        return {"loss": self._weighted(means, numbers), **means, **kept}

    def values(self, name: str, given: Mapping[str, Any]) -> Tensor:
        """Return a term's loss of each sample, `[N]`.

        Args:
            name: the term's.
            given: the tensors by the names of `Loss.inputs`, and what else the objective knows.
        """
        term = self.terms[name]
        if not self.label_smoothing or term.uses_teacher:
            return term(given, self.helpers[name] if term.loss.learns else None)
        goal = smoothed(given["target"], given["student"], self.label_smoothing)
        return term({**given, "target": goal})

    def _select(self, values: dict[str, Tensor], given: Mapping[str, Any]) -> dict[str, Tensor]:
        """Leave out of the terms on labels what is not kept, and return the share that is."""
        labelled = [name for name, term in self.terms.items() if not term.uses_teacher]
        weighted = [self.weights[name] * values[name].detach() for name in labelled]
        kept, share = self.sample_selection(
            reduce(add, weighted), given["teacher"], given["target"]
        )
        for name in labelled:
            # What ranks average is then the mean over what all of them keep.
            values[name] = torch.where(kept, values[name], 0.0) / share.clamp(min=SMALLEST)
        return {"kept": share}

    def _weighted(self, means: Mapping[str, Tensor], numbers: Mapping[str, Number]) -> Tensor:
        # A label must not reach the student through what has no weight, not even as 0·∞.
        unread = self.reads_no_labels
        total = sum(
            as_type(numbers[f"terms.{name}"], mean) * mean
            for name, mean in means.items()
            if self.terms[name].uses_teacher or not unread
        )
        return total  # type: ignore[return-value]

    def _factor(self, name: str) -> float:
        if self.alpha is None:
            return self.weights[name]
        share = self.alpha if self.terms[name].uses_teacher else 1 - self.alpha
        return share * self.weights[name]


def as_type(number: Number, of: Tensor) -> Number:
    """Return a number as one of Python's would act on a tensor: without widening it."""
    return number.to(of.dtype) if isinstance(number, Tensor) else number


def first(given: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return what an objective knows of a batch's first samples."""

    def part(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [part(one) for one in value]
        return value[:count] if isinstance(value, Tensor) and value.ndim else value

    counts = {"class_counts": given["class_counts"]}  # of the data, not of the batch
    return {name: part(value) for name, value in given.items()} | counts


def check_names(terms: Mapping[str, Any]) -> None:
    """Refuse an objective without terms, or with the names of what else it returns."""
    if not terms:
        raise ValueError("an objective needs at least one term")
    for name in TOLD:
        if name in terms:
            raise ValueError(f"objective.terms.{name} has the name of a metric: call it another")


def checked_smoothing(value: float) -> float:
    """Return the share of a label that is spread over the classes, refusing what is none."""
    if not (is_number(value) and 0 <= value < 1):
        raise ValueError(f"objective.label_smoothing must lie in [0, 1), got {value!r}")
    return float(value)


def smoothed(target: Tensor, student: Tensor, share: float) -> Tensor:
    """Return `(1 − ε)·e_y + ε/K`, at least float32 `[N, K]`, of labels or class probabilities."""
    goal = target
    if not target.is_floating_point():
        blank = torch.zeros_like(student, dtype=torch.promote_types(student.dtype, torch.float32))
        goal = blank.scatter(1, target.long().unsqueeze(1), 1.0)
    return (1 - share) * goal + share / student.shape[1]
