"""Claim 3: an increasing transform of the scores leaves ROC-AUC alone and changes log-loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

from distill.metrics.ranking import auroc, log_odds
from distill.report.figures import plain_ticks
from ten_claims.runs import ALONE, Run, Runs
from ten_claims.study import FAILS, HOLDS, Colours, Finding, Result, Study, exact

TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "3s + 1": lambda s: 3 * s + 1,
    "s³": lambda s: s**3,
    "exp(s/8)": lambda s: torch.exp(s / 8),
    "asinh(s)": torch.asinh,
    "sigmoid(s)": torch.sigmoid,
    "tanh(s)": torch.tanh,
    "s²": torch.square,
    "tan(s)": torch.tan,
}
TEXTBOOK = ("s²", "tan(s)")
SATURATES = ("sigmoid(s)", "tanh(s)")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Tried:
    """What a transform of scores `[N, K]`, one class against the rest, did.

    Attributes:
        increasing: whether larger scores stayed larger, on the floats that were used.
        area: the change of the area under the ROC curve.
        loss: the change of the log-loss of `sigmoid(score)`, mean over classes.
    """

    increasing: bool
    area: float
    loss: float


def try_transform(transform: Callable[[Tensor], Tensor], scores: Tensor, target: Tensor) -> Tried:
    """Return what a transform does, in the scores' own precision."""
    after = transform(scores)
    return Tried(
        strictly_increasing(scores, after),
        float(auroc(after, target) - auroc(scores, target)),
        log_loss(after, target) - log_loss(scores, target),
    )


def strictly_increasing(before: Tensor, after: Tensor) -> bool:
    """Return whether of any two scores of a column the larger one stayed larger."""
    order = before.argsort(dim=0)
    steps = before.gather(0, order).diff(dim=0)
    return bool((after.gather(0, order).diff(dim=0)[steps > 0] > 0).all())


def log_loss(scores: Tensor, target: Tensor) -> float:
    """Return the log-loss of `sigmoid(score)` in nats, mean over examples and classes."""
    truth = one_hot(target, scores.shape[1]).double()
    return float(binary_cross_entropy_with_logits(scores.double(), truth))


def student(seed: int) -> Run:
    """Return the run whose scores are transformed."""
    return Run(ALONE, seed)


def examine(seeds: Sequence[int], runs: Runs) -> Result:
    """Transform the log-odds of trained students, in both precisions."""
    tried = {
        (name, precision): [
            try_transform(transform, log_odds(logits).to(dtype), target)
            for logits, target in (runs.answers(student(seed)) for seed in seeds)
        ]
        for name, transform in TRANSFORMS.items()
        for precision, dtype in DTYPES.items()
    }
    table = [["transform", "precision", "strictly increasing", "change of AUC, largest",
              "change of log-loss, smallest"]]  # fmt: skip
    for (name, precision), found in tried.items():
        kept = sum(one.increasing for one in found)
        table.append([name, precision, f"{kept} of {len(found)}",
                      f"{max((one.area for one in found), key=abs):+.1e}",
                      f"{min((one.loss for one in found), key=abs):+.3f}"])  # fmt: skip
    return Result(
        findings_of(tried), table, lambda canvas, colours: draw(canvas, colours, tried),
        "Change of AUC, on a logarithmic axis from 10⁻¹⁶; crosses mark what is not strictly "
        "increasing on these floats. Exact equality lies on the left edge.",
        "Monotone on paper is not monotone on floats: what saturates makes ties, and ties can "
        "change the area. Squaring and tangent are not monotone at all on scores of both signs.",
    )  # fmt: skip


def findings_of(tried: dict[tuple[str, str], list[Tried]]) -> list[Finding]:
    """Return whether the area stays and the loss moves, by whether order was kept."""
    every = [one for found in tried.values() for one in found]
    kept = [one for one in every if one.increasing]
    condition = "the transform is strictly increasing on the floats that are used"
    moved = min(abs(one.loss) for one in kept)
    return [
        exact(condition, max(abs(one.area) for one in kept), 1e-12, "largest change of AUC"),
        Finding(condition, HOLDS if moved > 0 else FAILS,
                f"smallest change of log-loss: {moved:.2g} nats"),
        of_kind(tried, TEXTBOOK, "it is the textbook's square or tangent"),
        *(of_kind(tried, [name], f"it is {name}, which saturates") for name in SATURATES),
    ]  # fmt: skip


def of_kind(
    tried: dict[tuple[str, str], list[Tried]], names: Sequence[str], condition: str
) -> Finding:
    """Return whether transforms of some names left every area alone."""
    found = [one for (name, _), several in tried.items() if name in names for one in several]
    return exact(condition, max(abs(one.area) for one in found), 1e-12, "largest change of AUC")


def draw(canvas: Canvas, colours: Colours, tried: dict[tuple[str, str], list[Tried]]) -> None:
    """Draw each transform's change of AUC in both precisions."""
    axes = canvas.subplots()
    for precision, name in zip(DTYPES, ("student", "baseline"), strict=True):
        for row, transform in enumerate(TRANSFORMS):
            for one in tried[transform, precision]:
                axes.plot(max(abs(one.area), 1e-16), row + (0.15 if name == "student" else -0.15),
                          "o" if one.increasing else "x", color=colours[name])  # fmt: skip
        axes.plot([], [], "o", color=colours[name], label=precision)
    axes.set_yticks(range(len(TRANSFORMS)), list(TRANSFORMS))
    axes.invert_yaxis()
    axes.set(xscale="log", xlim=(5e-17, 1), xlabel="|change of AUC|")
    plain_ticks(axes, [1e-16, 1e-12, 1e-8, 1e-4, 1])
    axes.legend(loc="lower left")


STUDY = Study(
    "transforms",
    "A monotone transform of the scores, such as squaring or the tangent, leaves ROC-AUC alone "
    "and changes log-loss.",
    examine,
    lambda seed: [student(seed)],
)
