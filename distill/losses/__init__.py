"""Every loss of the framework, and the table by which a configuration finds it.

Pure functions of raw logits: no state, no reduction, one value per example in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from distill.losses.balanced import (
    class_balanced_cross_entropy,
    class_balanced_weights,
    ldam,
    logit_adjusted_cross_entropy,
)
from distill.losses.batchwise import multi_level_kd, streamlined_kd
from distill.losses.features import attention_transfer, hint
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
from distill.losses.robust import (
    generalized_cross_entropy,
    ramp_hinge,
    symmetric_cross_entropy,
)
from distill.losses.soft import (
    cross_entropy,
    decoupled,
    dist,
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


class Loss(NamedTuple):
    """A loss function and the tensors it is called with, in order.

    Attributes:
        function: returns one value per example, `[N]`; what follows its tensors are options.
        inputs: what it takes, positionally: `student` and `teacher` logits, `target`, or the
            feature maps `student_maps`, `projected_maps` (to the teacher's channels) and
            `teacher_maps`.
    """

    function: Callable[..., Tensor]
    inputs: tuple[str, ...]


def _table(inputs: tuple[str, ...], *functions: Callable[..., Tensor]) -> dict[str, Loss]:
    return {function.__name__: Loss(function, inputs) for function in functions}


LOSSES: dict[str, Loss] = {
    **_table(
        ("student", "teacher"),
        kl_divergence,
        soft_cross_entropy,
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
    **_table(("projected_maps", "teacher_maps"), hint),
    **_table(("student_maps", "teacher_maps"), attention_transfer),
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
    "LOSSES",
    "Loss",
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
    "hard_topk_hinge",
    "hint",
    "kl_divergence",
    "ldam",
    "logit_adjusted_cross_entropy",
    "logit_mse",
    "multi_level_kd",
    "normalized_kd",
    "one_vs_rest_hinge",
    "pairwise_soft_hinge",
    "product_hinge",
    "ramp_hinge",
    "reachable_confidence",
    "refined_kd",
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
