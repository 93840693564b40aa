"""Several teachers as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

COMBINATIONS = ("probability", "logit", "draw")


class Ensemble(nn.Module):
    """Combine several models' answers to the same view.

    - `probability`: `log Σ_i w_i·softmax(z_i)`, logits whose softmax is the mean probability.
    - `logit`: `Σ_i w_i·z_i`.
    - `draw`: in training one model answers each step, drawn with probability `w_i` by a generator
      keyed by the step alone, so that a resumed run draws the same; otherwise as `probability`.

    Args:
        models: each takes the view and returns logits `[N, K]` of the same classes.
        combine: one of the above.
        weights: one weight per model, scaled to sum to 1; None weighs them alike.

    Raises:
        ValueError: for no models, an unknown combination or wrong weights.

    Reference:
        You et al., Learning from Multiple Teacher Networks, KDD 2017.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        combine: str = "probability",
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if not models:
            raise ValueError("an ensemble needs teacher.checkpoints, a list of at least one")
        if combine not in COMBINATIONS:
            known = ", ".join(COMBINATIONS)
            raise ValueError(f"teacher.combine must be one of {known}, got {combine!r}")
        shares = list(weights) if weights is not None else [1.0] * len(models)
        if len(shares) != len(models) or min(shares) < 0 or sum(shares) <= 0:
            raise ValueError(
                f"teacher.weights must be {len(models)} numbers of at least 0, not all 0"
            )
        self.members = nn.ModuleList(models)
        self.combine = combine
        self.weights = [
            share / sum(shares) for share in shares
        ]  # on no device: nothing to wait for

    def extra_repr(self) -> str:
        """Return what decides the answers beside the members, for whoever tells models apart."""
        return f"combine={self.combine}, weights={self.weights}"

    def forward(self, view: Tensor, step: int | None = None) -> Tensor:
        """Return combined logits `[N, K]`; `step` is the optimiser step, in training."""
        if self.combine == "draw" and step is not None:
            return self.members[self.drawn(step)](view)
        answers = torch.stack([member(view).float() for member in self.members])
        weights = answers.new_tensor(self.weights)[:, None, None]
        if self.combine == "logit":
            return (weights * answers).sum(dim=0)
        return (answers.log_softmax(dim=2) + weights.log()).logsumexp(dim=0)

    def drawn(self, step: int) -> int:
        """Return which model answers a step."""
        generator = torch.Generator().manual_seed(step)
        weights = torch.tensor(self.weights, dtype=torch.float32)  # under any default type
        return int(torch.multinomial(weights, 1, generator=generator))
