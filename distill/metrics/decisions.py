"""Decisions where mistakes differ in price.

`costs` `[K, D]` holds at row k and column d the cost of decision d where the true class is k. The
first K decisions are to answer with a class; further ones are other actions, such as to abstain. A
gain is a negative cost. Everything works in float64 and returns tensors without gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.metrics._shared import (
    BLOCK_ELEMENTS,
    check_probabilities,
    check_scores,
    check_target,
    mean_over_rows,
)


def cost_optimal_decision(probs: Tensor, costs: Tensor) -> Tensor:
    """Choose the decision that the probabilities expect to cost least.

    `argmin_d Σ_k p_k C_kd`, the first of equals. Nothing changes if a constant is added to a row of
    the costs, so each row's largest cost is taken off first: with costs of 0 and 1 what remains are
    the probabilities themselves, and the decision is exactly their argmax.

    Args:
        probs: Probabilities `[N, K]`; only calibrated ones make the choice a good one.
        costs: Costs `[K, D]`, `D ≥ K`.

    Returns:
        Decisions `[N]`, integers in `0 … D − 1`.

    Raises:
        ValueError: If shapes or values are wrong, or there is no example.

    Example:
        >>> costs = torch.tensor([[0.0, 1.0, 0.25], [8.0, 0.0, 0.25]])  # miss, false alarm, ask
        >>> probs = torch.tensor([[0.99, 0.01], [0.8, 0.2], [0.1, 0.9]])
        >>> cost_optimal_decision(probs, costs).tolist()
        [0, 2, 1]

    Reference: Elkan, The Foundations of Cost-Sensitive Learning, 2001.
    """
    _check_probabilities(probs)
    _check_costs(costs, probs.shape[1])
    # Halved, so that the difference of two finite costs is finite.
    half = costs.detach().to(probs.device, torch.float64) / 2
    relative = half - half.amax(dim=1, keepdim=True)
    rows = max(1, BLOCK_ELEMENTS // costs.shape[1])
    blocks = probs.detach().split(rows)
    return torch.cat([(block.double() @ relative).argmin(dim=1) for block in blocks])


def expected_cost(decision: Tensor, target: Tensor, costs: Tensor) -> Tensor:
    """Mean cost of decisions once the labels are given.

    `1/N · Σ_i C[y_i, d_i]`, the estimate from these examples of the cost to expect.

    Args:
        decision: Decisions `[N]`, integers in `0 … D − 1`.
        target: Labels `[N]`.
        costs: Costs `[K, D]`, `D ≥ K`.

    Returns:
        A float64 scalar, in the unit of the costs.

    Raises:
        ValueError: If shapes or values are wrong, or there is no example.

    Example:
        >>> costs = torch.tensor([[0.0, 1.0], [8.0, 0.0]])
        >>> float(expected_cost(torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1]), costs))
        2.25

    Reference: Elkan, The Foundations of Cost-Sensitive Learning, 2001.
    """
    _check_costs(costs)
    _check_decision(decision, costs.shape[1])
    check_target(target, len(decision), len(costs))
    return costs.detach().to(target.device)[target.long(), decision.long()].double().mean()


def anticipated_cost(probs: Tensor, decision: Tensor, costs: Tensor) -> Tensor:
    """Mean cost of decisions as the probabilities themselves expect it, without labels.

    `1/N · Σ_i Σ_k p_ik C[k, d_i]`. Of calibrated probabilities this and `expected_cost` have the
    same expectation, so their gap checks the calibration: real costs above it are overconfidence.

    Args:
        probs: Probabilities `[N, K]`.
        decision: Decisions `[N]`, integers in `0 … D − 1`.
        costs: Costs `[K, D]`, `D ≥ K`.

    Returns:
        A float64 scalar, in the unit of the costs.

    Raises:
        ValueError: If shapes or values are wrong, or there is no example.

    Example:
        >>> costs = torch.tensor([[0.0, 1.0], [8.0, 0.0]])
        >>> float(anticipated_cost(torch.tensor([[0.75, 0.25]]), torch.tensor([1]), costs))
        0.75

    Reference: Zhao et al., Calibrating Predictions to Decisions, arXiv:2107.05719.
    """
    _check_probabilities(probs)
    _check_costs(costs, probs.shape[1])
    _check_decision(decision, costs.shape[1], rows=len(probs))
    of_decision = costs.detach().to(probs.device, torch.float64).t()
    return mean_over_rows(lambda p, d: (p * of_decision[d.long()]).sum(dim=1), probs, decision)


def _check_probabilities(probs: Tensor) -> None:
    check_scores(probs, "probs")
    # The check wants labels too; any will do.
    check_probabilities(probs, torch.zeros(len(probs), dtype=torch.long, device=probs.device))


def _check_costs(costs: Tensor, classes: int | None = None) -> None:
    shape = list(costs.shape)
    if costs.ndim != 2 or not 2 <= costs.shape[0] <= costs.shape[1]:
        raise ValueError(f"costs must have shape [K, D] with D ≥ K ≥ 2, not {shape}.")
    if classes is not None and costs.shape[0] != classes:
        raise ValueError(f"costs of shape {shape} need {classes} rows, one for each class.")
    if costs.is_complex() or not bool(torch.isfinite(costs).all()):
        raise ValueError("costs must be finite real numbers.")


def _check_decision(decision: Tensor, decisions: int, rows: int | None = None) -> None:
    if decision.ndim != 1 or (rows is not None and len(decision) != rows):
        expected = "N" if rows is None else rows
        raise ValueError(f"decision must have shape [{expected}], not {list(decision.shape)}.")
    if decision.is_floating_point() or decision.is_complex() or decision.dtype == torch.bool:
        raise ValueError(f"decision must hold integers, not {decision.dtype}.")
    if len(decision) == 0:
        raise ValueError("decision is empty: there is no example to measure.")
    if not bool(((decision >= 0) & (decision < decisions)).all()):
        low, high = int(decision.min()), int(decision.max())
        raise ValueError(
            f"decision must lie in 0 … {decisions - 1} for {decisions} columns of costs, not in "
            f"{low} … {high}."
        )
