"""The helper networks of an objective: made for two models, trained beside the student."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from distill.losses import ModelInfo, ReusedClassifier
from distill.models.features import model_info, train_token
from distill.objective.term import Term


class Helpers(nn.ModuleDict):
    """Term → the module that learns with the student, for the losses that have one.

    It is empty until it is connected to the two models.

    Args:
        terms: all terms of the objective, by name.
        stages: whose feature maps they compare.
    """

    def __init__(self, terms: Mapping[str, Term], stages: Sequence[int]) -> None:
        super().__init__()
        self.terms, self.stages = terms, stages

    def reads(self, prefix: str) -> bool:
        """Whether any term reads a tensor whose name begins so."""
        inputs = (name for term in self.terms.values() for name in term.loss.inputs)
        return any(name.startswith(prefix) for name in inputs)

    @property
    def needs_models(self) -> bool:
        """Whether any term asks more of the models than their logits."""
        learns = any(term.loss.learns for term in self.terms.values())
        return learns or self.reads("student_") or self.reads("teacher_")

    @property
    def sets_classifier(self) -> bool:
        """Whether a term decides what the student's classifier is, which then is not trained."""
        return any(term.loss.function is ReusedClassifier for term in self.terms.values())

    @property
    def keeps_samples(self) -> bool:
        """Whether a term keeps what it saw of earlier batches, of which there is no average."""
        return any(term.loss.learns and term.options.get("queue") for term in self.terms.values())

    def connect(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Make the helpers for these two models.

        Raises:
            ValueError: if a model lacks what a term reads of it.
        """
        if not self.needs_models:
            return
        of_student, of_teacher = self.reads("student_"), self.reads("teacher_")
        if self.reads("student_token"):
            train_token(student)
        ours = model_info(student, self.stages, "student", of_student)
        theirs = ours
        if teacher is not None:
            theirs = model_info(teacher, self.stages, "teacher", of_teacher)
        self.make(ours, theirs)
        self.set_classifier(student)

    def check(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Refuse two models that cannot be connected, leaving them as they are.

        Raises:
            ValueError: as `connect`.
        """
        if self.needs_models:
            with torch.random.fork_rng(devices=[]):
                copy.deepcopy(self).connect(copy.deepcopy(student), teacher)

    def make(self, ours: ModelInfo, theirs: ModelInfo) -> None:
        """Make the helpers for a student of such a kind under such a teacher."""
        for name, term in self.terms.items():
            if term.loss.learns:
                try:
                    self[name] = term.module(ours, theirs)
                except ValueError as error:
                    raise ValueError(f"objective.terms.{name}: {error}") from error

    def set_classifier(self, student: Any) -> None:
        """Set the student's classifier, where a term decides what it is."""
        for module in self.values():
            if isinstance(module, ReusedClassifier):
                module.set_classifier(student.get_classifier())
