"""Errors on corrupted images, summed up over kinds of corruption and their severities."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_corruption_error(errors: Tensor, reference: Tensor | None = None) -> Tensor:
    r"""Mean error over corruptions and severities, plain or relative to another model's.

    With the error `E_cs` of corruption c at severity s, plain: `mean_c mean_s E_cs`. Relative to
    errors `B_cs`: `mean_c (Σ_s E_cs / Σ_s B_cs)`, so that an easy corruption weighs as much as a
    hard one; below 1 is better than the reference.

    Args:
        errors: in [0, 1], `[C, S]`.
        reference: of the other model, `[C, S]`.

    Returns:
        A float64 scalar; NaN where the reference makes no mistake under some corruption.

    Raises:
        ValueError: If there is nothing to average, or the shapes differ.

    Example:
        >>> mean_corruption_error(torch.tensor([[0.25, 0.5]]), torch.tensor([[0.5, 1.0]])).item()
        0.5

    Reference: Hendrycks and Dietterich, arXiv:1903.12261.
    """
    if errors.ndim != 2 or not errors.numel():
        raise ValueError(f"errors must have shape [C, S] and not be empty, not {errors.shape}.")
    if reference is None:
        return errors.double().mean()
    if reference.shape != errors.shape:
        raise ValueError(f"reference must have shape {errors.shape}, not {reference.shape}.")
    total, other = errors.double().sum(dim=1), reference.double().sum(dim=1)
    return torch.where(other > 0, total / other, torch.nan).mean()
