"""Every loss of the framework, and the table by which a configuration finds it.

Pure functions of logits and features, no state, and in `learned` modules that are trained beside
the student: no reduction, one value per example in float32 or wider.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from distill.losses.balanced import (
    class_balanced_cross_entropy,
    class_balanced_weights,
    ldam,
    logit_adjusted_cross_entropy,
)
from distill.losses.batchwise import multi_level_kd, streamlined_kd
from distill.losses.features import attention_transfer, hierarchical_context, hint
from distill.losses.hinge import (
    crammer_singer,
    epsilon_insensitive_hinge,
    one_vs_rest_hinge,
    pairwise_soft_hinge,
    product_hinge,
    soft_hinge,
    squared_soft_hinge,
    weighted_sign_hinge,
    weston_watkins,
)
from distill.losses.label_aware import normalized_kd, refined_kd
from distill.losses.learned import (
    Contrast,
    Hint,
    MaskedMaps,
    ModelInfo,
    Projector,
    ReusedClassifier,
    Review,
    StageHeads,
    Transport,
    linear_classifier,
)
from distill.losses.relational import (
    probabilistic_transfer,
    relational_angle,
    relational_distance,
    similarity_preserving,
)
from distill.losses.robust import (
    generalized_cross_entropy,
    ramp_hinge,
    symmetric_cross_entropy,
)
from distill.losses.soft import (
    cross_entropy,
    decoupled,
    dist,
    hard_cross_entropy,
    kl_divergence,
    logit_mse,
    reachable_confidence,
    soft_cross_entropy,
    standardized_kl,
    tempered_cross_entropy,
)
from distill.losses.topk import hard_topk_hinge, smooth_topk
from distill.losses.transformed import (
    entropy_weighted_kl,
    transformed_teacher,
    weighted_transformed_teacher,
)
from distill.losses.transport import class_costs, wasserstein_kd

INPUTS = (
    *("student", "teacher", "target", "student_maps", "teacher_maps"),
    *("student_embedding", "teacher_embedding", "student_token"),
)


class Loss(NamedTuple):
    """A loss and the tensors it is called with, in order.

    Attributes:
        function: a function whose options follow its tensors, or a class of modules that learn,
            which are made for the student and teacher (`ModelInfo`) and options. It, or
            the module, returns one value per example, `[N]`.
        inputs: what it takes, positionally, of `INPUTS`: `student` and `teacher` logits, `target`,
            the feature maps of stages, and the embeddings that the classifiers read, `[N, D]`, and
            the logits of the student's distillation token.
    """

    function: Callable[..., Any]
    inputs: tuple[str, ...]

    @property
    def learns(self) -> bool:
        """Whether it has weights of its own."""
        return isinstance(self.function, type)

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """What follows its tensors, or the models that it is made for."""
        parameters = inspect.signature(self.function).parameters
        return dict(list(parameters.items())[2 if self.learns else len(self.inputs) :])


def _table(inputs: tuple[str, ...], *functions: Callable[..., Tensor]) -> dict[str, Loss]:
    return {function.__name__: Loss(function, inputs) for function in functions}


LOSSES: dict[str, Loss] = {
    **_table(
        ("student", "teacher"),
        kl_divergence,
        soft_cross_entropy,
        hard_cross_entropy,
        logit_mse,
        standardized_kl,
        dist,
        transformed_teacher,
        weighted_transformed_teacher,
        entropy_weighted_kl,
        multi_level_kd,
        streamlined_kd,
        soft_hinge,
        squared_soft_hinge,
        weighted_sign_hinge,
        product_hinge,
        epsilon_insensitive_hinge,
        pairwise_soft_hinge,
    ),
    **_table(("student", "teacher", "target"), decoupled, normalized_kd, refined_kd),
    **_table(
        ("student_embedding", "teacher_embedding"),
        relational_distance,
        relational_angle,
        probabilistic_transfer,
        similarity_preserving,
    ),
    **_table(("student_maps", "teacher_maps"), attention_transfer),
    "token_cross_entropy": Loss(hard_cross_entropy, ("student_token", "teacher")),
    "masked_maps": Loss(MaskedMaps, ("student_maps", "teacher_maps")),
    "hint": Loss(Hint, ("student_maps", "teacher_maps")),
    "review": Loss(
        Review, ("student_maps", "teacher_maps", "student_embedding", "teacher_embedding")
    ),
    "contrast": Loss(Contrast, ("student_embedding", "teacher_embedding", "target")),
    "projector": Loss(Projector, ("student_embedding", "teacher_embedding")),
    "reused_classifier": Loss(ReusedClassifier, ("student_embedding", "teacher_embedding")),
    "stage_heads": Loss(StageHeads, ("student_maps", "teacher", "target")),
    "transport": Loss(Transport, ("student", "teacher", "target")),
    **_table(
        ("student", "target"),
        cross_entropy,
        tempered_cross_entropy,
        one_vs_rest_hinge,
        crammer_singer,
        weston_watkins,
        class_balanced_cross_entropy,
        ldam,
        logit_adjusted_cross_entropy,
        generalized_cross_entropy,
        symmetric_cross_entropy,
        ramp_hinge,
        smooth_topk,
        hard_topk_hinge,
    ),
}

__all__ = [
    "INPUTS",
    "LOSSES",
    "Contrast",
    "Hint",
    "Loss",
    "MaskedMaps",
    "ModelInfo",
    "Projector",
    "ReusedClassifier",
    "Review",
    "StageHeads",
    "Transport",
    "attention_transfer",
    "class_balanced_cross_entropy",
    "class_balanced_weights",
    "class_costs",
    "crammer_singer",
    "cross_entropy",
    "decoupled",
    "dist",
    "entropy_weighted_kl",
    "epsilon_insensitive_hinge",
    "generalized_cross_entropy",
    "hard_cross_entropy",
    "hard_topk_hinge",
    "hierarchical_context",
    "hint",
    "kl_divergence",
    "ldam",
    "linear_classifier",
    "logit_adjusted_cross_entropy",
    "logit_mse",
    "multi_level_kd",
    "normalized_kd",
    "one_vs_rest_hinge",
    "pairwise_soft_hinge",
    "probabilistic_transfer",
    "product_hinge",
    "ramp_hinge",
    "reachable_confidence",
    "refined_kd",
    "relational_angle",
    "relational_distance",
    "similarity_preserving",
    "smooth_topk",
    "soft_cross_entropy",
    "soft_hinge",
    "squared_soft_hinge",
    "standardized_kl",
    "streamlined_kd",
    "symmetric_cross_entropy",
    "tempered_cross_entropy",
    "transformed_teacher",
    "wasserstein_kd",
    "weighted_sign_hinge",
    "weighted_transformed_teacher",
    "weston_watkins",
]
