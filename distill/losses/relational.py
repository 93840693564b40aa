"""Losses on embeddings: the relations among a batch's examples, not the embeddings themselves.

Student and teacher may embed in different dimensions. With several processes, each compares the
examples of its own batch; a batch of one has no relations and gives 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.losses._common import matrix_product, require, unit, upcast
from distill.losses._divergence import NEVER, divergence_terms

_LEAST_AFFINITY = 1e-7  # of opposite embeddings, whose affinity 0 has no logarithm


def relational_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Ask for the teacher's distances between examples, each relative to the mean distance.

    `1/N·Σ_j h(‖s_i − s_j‖/μ_s − ‖z_i − z_j‖/μ_z)`, h Huber's loss (`x²/2` up to |x| = 1, then
    `|x| − 1/2`) and μ the mean distance of the pairs i ≠ j, both scales being ignored. The paper
    sums over pairs; the mean over examples is the authors' code's mean over all N² of them, for
    which their weight is (25 on CIFAR-100). μ is the paper's; the code leaves pairs of equal
    embeddings out of it.

    Args:
        student: embeddings `[N, D]`, or `[N, …]`, flattened.
        teacher: embeddings `[N, D']`, or `[N, …]`; no gradient flows into them.

    Returns:
        One value per example, `[N]`.

    Raises:
        ValueError: shapes or types do not fit.

    Example:
        >>> corners = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
        >>> relational_distance(7 * corners + 1, corners).round(decimals=4)
        tensor([0., 0., 0.])

    Reference: arXiv:1904.05068.
    """
    s, z = _embedding_pair(student, teacher)
    return F.smooth_l1_loss(_distances(s), _distances(z), reduction="none").mean(dim=1)


def relational_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Ask for the teacher's angles in the triangles of examples.

    `1/N²·Σ_jk h(cos∠(s_j, s_i, s_k) − cos∠(z_j, z_i, z_k))` with the vertex at example i, h
    Huber's loss. Triples that are no triangle add 0. The paper sums over triples; the mean over
    examples is the authors' code's mean over all N³ of them, for which their weight is (50 on
    CIFAR-100). Takes memory for N³ cosines and N² differences of embeddings.

    Args:
        student: embeddings `[N, D]`, or `[N, …]`, flattened.
        teacher: embeddings `[N, D']`, or `[N, …]`; no gradient flows into them.

    Returns:
        One value per example, `[N]`.

    Raises:
        ValueError: shapes or types do not fit.

    Example:
        >>> corners = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
        >>> relational_angle(7 * corners + 1, corners).round(decimals=4)
        tensor([0., 0., 0.])

    Reference: arXiv:1904.05068.
    """
    s, z = _embedding_pair(student, teacher)
    return F.smooth_l1_loss(_cosines(s), _cosines(z), reduction="none").mean(dim=(1, 2))


def probabilistic_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Ask for the teacher's neighbours, as a distribution over the other examples.

    `KL(p_z(·|i) ‖ p_s(·|i))` with `p(j|i) = a_ij/Σ_{k≠i} a_ik` over j ≠ i and the affinity
    `a_ij = (1 + cos(x_i, x_j))/2`, at least 1e-7. The paper's loss is the sum over the batch. Its
    distribution is taken: the authors' code lets j = i in, whose affinity is always 1. The code's
    loss is the mean over N² terms, so that its weight is N times what the mean over examples needs
    (30,000 on CIFAR-100 at N = 64 is 470).

    Args:
        student: embeddings `[N, D]`, or `[N, …]`, flattened.
        teacher: embeddings `[N, D']`, or `[N, …]`; no gradient flows into them.

    Returns:
        Nats per example, `[N]`.

    Raises:
        ValueError: shapes or types do not fit.

    Example:
        >>> corners = torch.tensor([[1.0, 0.0], [3.0, 1.0], [0.0, 4.0]])
        >>> probabilistic_transfer(7 * corners, corners).round(decimals=4)
        tensor([0., 0., 0.])

    Reference: arXiv:1803.10837.
    """
    s, z = _embedding_pair(student, teacher)
    return divergence_terms(_log_neighbours(s), _log_neighbours(z)).sum(dim=1)


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """Ask for the teacher's similarities between examples.

    `1/N·Σ_j (G_s − G_z)_ij²`, G the products `X·Xᵀ` of flattened activations with each row at
    length 1. The mean over examples is the paper's `‖G_s − G_z‖²/N²` (weight 3,000 on CIFAR-100).

    Args:
        student: embeddings `[N, D]`, or maps `[N, C, H, W]`, flattened.
        teacher: embeddings `[N, D']`, or maps `[N, C', H', W']`; no gradient flows into them.

    Returns:
        One value per example, `[N]`.

    Raises:
        ValueError: shapes or types do not fit.

    Example:
        >>> maps = torch.rand(2, 3, 4, 4)
        >>> similarity_preserving(7 * maps, maps).round(decimals=4)
        tensor([0., 0.])

    Reference: arXiv:1907.09682.
    """
    s, z = _embedding_pair(student, teacher)
    return (_similarities(s) - _similarities(z)).square().mean(dim=1)


def _embedding_pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    for name, x in (("student", student), ("teacher", teacher)):
        require(
            x.dim() >= 2 and x.is_floating_point(),
            f"{name} embeddings must be a floating-point tensor of shape [N, D], "
            f"got {x.dtype} of shape {list(x.shape)}",
        )
    require(
        len(student) == len(teacher),
        f"embeddings of {len(student)} and {len(teacher)} examples do not compare",
    )
    return upcast(student).flatten(1), upcast(teacher.detach()).flatten(1)


def _distances(x: Tensor) -> Tensor:
    """Distances over their mean, with a finite slope at 0."""
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / max(len(x) * (len(x) - 1), 1)
    return distances / torch.where(mean > 0, mean, 1.0)


def _cosines(x: Tensor) -> Tensor:
    """The cosine at the vertex i between the directions to j and to k, `[N, N, N]`."""
    directions = unit(x - x.unsqueeze(1))
    return matrix_product(directions, directions.mT)


def _log_neighbours(x: Tensor) -> Tensor:
    directions = unit(x)
    affinities = (1 + matrix_product(directions, directions.mT)) / 2
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    logarithms = affinities.clamp(min=_LEAST_AFFINITY).log()
    return torch.log_softmax(logarithms.masked_fill(itself, NEVER), dim=1)


def _similarities(x: Tensor) -> Tensor:
    return unit(matrix_product(x, x.mT))
