"""Losses on feature maps: what the layers below the logits have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.losses._common import require, upcast

Maps = Sequence[Tensor]


def hint(student: Maps, teacher: Maps) -> Tensor:
    r"""Ask the student's feature maps to be the teacher's.

    `mean over maps, channels and places of (s − z)²`, the larger map averaged down to the smaller.

    Args:
        student: maps `[N, C, H, W]`, projected to the teacher's channels.
        teacher: as many maps `[N, C, H', W']`.

    Returns:
        One value per example, `[N]`.

    Raises:
        ValueError: if the numbers of maps or channels differ.

    Example:
        >>> hint([torch.zeros(2, 3, 4, 4)], [torch.ones(2, 3, 2, 2)])
        tensor([1., 1.])

    Reference:
        Romero et al., FitNets, 1412.6550.
    """
    pairs = _matched(student, teacher)
    for s, z in pairs:
        require(
            s.shape == z.shape, f"maps of {s.shape[1]} and {z.shape[1]} channels do not compare"
        )
    return torch.stack([(s - z).square().flatten(1).mean(1) for s, z in pairs]).mean(0)


def attention_transfer(student: Maps, teacher: Maps) -> Tensor:
    r"""Ask the student to look where the teacher looks.

    `mean over maps of ‖Q_s/‖Q_s‖ − Q_z/‖Q_z‖‖²` with `Q = Σ_c A_c²` flattened over places; between
    0 and 2. The larger map is averaged down to the smaller; channels need not match.

    Args:
        student: maps `[N, C, H, W]`.
        teacher: as many maps `[N, C', H', W']`.

    Returns:
        One value per example, `[N]`.

    Raises:
        ValueError: if the numbers of maps differ.

    Example:
        >>> maps = [torch.rand(2, 3, 4, 4)]
        >>> attention_transfer(maps, [2 * m for m in maps]).abs().max() < 1e-6
        tensor(True)

    Reference:
        Zagoruyko and Komodakis, 1612.03928.
    """
    pairs = _matched(student, teacher)
    return torch.stack([(_attention(s) - _attention(z)).square().sum(1) for s, z in pairs]).mean(0)


def hierarchical_context(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compare two maps at several resolutions.

    `Σ_l w_l·mean (pool_l(s) − pool_l(z))² / Σ_l w_l` over the whole map, of weight 1, and its
    averages to 4 × 4, 2 × 2 and 1 × 1 places, as far as they are smaller, each of half the weight
    of the one before.

    Args:
        student: maps `[N, C, H, W]`.
        teacher: maps of that shape.

    Returns:
        One value per example, `[N]`.

    Example:
        >>> hierarchical_context(torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8))
        tensor([1., 1.])

    Reference:
        Chen et al., Distilling Knowledge via Knowledge Review, 2104.09044, there "HCL".
    """
    require(
        student.shape == teacher.shape,
        f"maps of {list(student.shape)} and {list(teacher.shape)} do not compare",
    )
    s, z = upcast(student), upcast(teacher.detach())
    sides = [None, *(side for side in (4, 2, 1) if side < s.shape[2])]
    total, weights = s.new_zeros(len(s)), 0.0
    for power, side in enumerate(sides):
        ours, theirs = (x if side is None else F.adaptive_avg_pool2d(x, side) for x in (s, z))
        total = total + 0.5**power * (ours - theirs).square().flatten(1).mean(1)
        weights += 0.5**power
    return total / weights


def _attention(maps: Tensor) -> Tensor:
    return F.normalize(maps.square().sum(1).flatten(1), dim=1)


def _matched(student: Maps, teacher: Maps) -> list[tuple[Tensor, Tensor]]:
    require(len(student) == len(teacher) > 0, f"{len(student)} maps against {len(teacher)}")
    pairs = []
    for s, z in zip(student, teacher, strict=True):
        size = (min(s.shape[2], z.shape[2]), min(s.shape[3], z.shape[3]))
        ours, theirs = (F.adaptive_avg_pool2d(upcast(x), size) for x in (s, z.detach()))
        pairs.append((ours, theirs))
    return pairs
