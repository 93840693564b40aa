"""Claim 7: L1 picks one of two redundant features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure as Canvas
from sklearn.linear_model import Lasso
from torch import Tensor

from distill.training.callbacks.sparsity import shrink_weights
from distill.training.pruning import zeros
from shared import mean_and_deviation, spread
from ten_claims.runs import ALONE, Run, Runs
from ten_claims.study import Colours, Finding, Result, Study, exact

STRENGTH = 0.1
STEPS = 3000
SCALE = 1.25  # of the copy that is larger
STRENGTHS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0)  # λ of students
ROUNDING = 1e-10


def problem(seed: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return features `[N, 4]` and values `[N]`; the second feature is `scale` times the first.

    The third says something too, the fourth nothing.
    """
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 3, dtype=torch.float64, generator=random)
    noise = 0.1 * torch.randn(200, dtype=torch.float64, generator=random)
    features = torch.stack([x[:, 0], scale * x[:, 0], x[:, 1], x[:, 2]], dim=1)
    return features, x[:, 0] + 0.5 * x[:, 1] + noise


def objective(weights: Tensor, features: Tensor, values: Tensor) -> Tensor:
    """Return `‖Xw − y‖²/(2N) + λ‖w‖₁`."""
    error = features @ weights - values
    return error.square().mean() / 2 + STRENGTH * weights.abs().sum()


def by_proximal_steps(features: Tensor, values: Tensor, start: Tensor) -> Tensor:
    """Return the lasso's weights: a gradient step on the error, then the proximal step of λ‖w‖₁."""
    rate = len(features) / float(torch.linalg.matrix_norm(features, 2)) ** 2
    weights = start.clone()
    for _ in range(STEPS):
        weights -= rate * features.T @ (features @ weights - values) / len(features)
        shrink_weights([weights], [rate * STRENGTH])
    return weights


def by_coordinates(features: Tensor, values: Tensor) -> Tensor:
    """Return the lasso's weights by coordinate descent, as scikit-learn has it."""
    lasso = Lasso(alpha=STRENGTH, fit_intercept=False, tol=1e-12, max_iter=100_000)
    return torch.from_numpy(lasso.fit(features.numpy(), values.numpy()).coef_)


def by_adam(features: Tensor, values: Tensor, start: Tensor) -> Tensor:
    """Return weights that Adam found with λ‖w‖₁ as a part of the loss."""
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        objective(weights, features, values).backward()
        optimizer.step()
    return weights.detach()


def student(strength: float, seed: int) -> Run:
    """Return the run of a student under a strength of the proximal step."""
    sparse = ("callbacks=sparsity", f"callbacks.sparsity.strength={strength}") if strength else ()
    return Run((*ALONE, *sparse), seed)


def examine(seeds: Sequence[int], runs: Runs) -> Result:
    """Solve lassos with a duplicated feature, and train sparse students."""
    top1 = {s: [100 * runs.numbers(student(s, seed))["top1"] for seed in seeds] for s in STRENGTHS}
    share = {}
    for s in STRENGTHS:
        counted = [zeros(runs.student(student(s, seed))) for seed in seeds]
        share[s] = [100 * one["zeros"] / one["weights"] for one in counted]
    table = [["λ of the student", "weights that are zero %", "top-1 %"]]
    table += [[f"{s:g}", spread(share[s], 1), spread(top1[s], 2)] for s in STRENGTHS]

    def draw(canvas: Canvas, colours: Colours) -> None:
        left, right = canvas.subplots(1, 2)
        for offset, (name, scale) in zip((-0.2, 0.2), (("equal", 1.0), ("larger", SCALE)),
                                         strict=True):  # fmt: skip
            weights = by_proximal_steps(*problem(0, scale), torch.zeros(4, dtype=torch.float64))
            colour = colours["student" if name == "equal" else "baseline"]
            left.bar(torch.arange(4) + offset, weights, 0.4, color=colour,
                     label=f"the copy is {name}")  # fmt: skip
        left.set_xticks(range(4), ["feature", "its copy", "another", "nothing"])
        left.set(ylabel="weight")
        left.legend()
        zero = [mean_and_deviation(share[s])[0] for s in STRENGTHS]
        right_share, deviation = zip(*(mean_and_deviation(top1[s]) for s in STRENGTHS), strict=True)
        right.errorbar(zero, right_share, deviation, marker="o", capsize=3,
                       color=colours["student"])  # fmt: skip
        right.set(xlabel="weights that are zero (%)", ylabel="top-1 of a student (%)")

    return Result(
        [*lassos(seeds)], table, draw,
        "Left: weights of a lasso with an exact copy of a feature, as large as it or larger. "
        "Right: what zeros cost a student, mean and deviation over seeds.",
        "Between exact copies L1 has no preference: every split of the weight has the same value, "
        "and the algorithm chooses, not the penalty. Scale decides. Zeros that are exactly zero "
        "are the proximal step's work, not the penalty's.",
    )  # fmt: skip


def lassos(seeds: Sequence[int]) -> list[Finding]:
    """Return what L1 does with copies, and who makes zeros."""
    even, picked, flat, small, adam = [], [], [], [], []
    zero = torch.zeros(4, dtype=torch.float64)
    for seed in seeds:
        copies = problem(seed, 1.0)
        found = by_proximal_steps(*copies, zero)
        even.append(float(found[:2].abs().min()))
        one_only = torch.stack([found[0] + found[1], zero[0], *found[2:]])
        flat.append(abs(float(objective(found, *copies) - objective(one_only, *copies))))
        apart = by_proximal_steps(*problem(seed, SCALE), zero)
        small.append(float(apart[0].abs()))
        picked.append(float(by_coordinates(*copies)[:2].abs().min()))
        adam.append(float(by_adam(*problem(seed, SCALE), zero + 0.1)[0].abs()))
    return [
        exact("the copies are exact and proximal steps start at zero", max(even), ROUNDING,
              "smaller of the two weights, at most"),
        exact("the copies are exact and the solver is coordinate descent", max(picked), ROUNDING,
              "smaller of the two weights, at most"),
        exact("the copies are exact and “picks” means no more than that one alone is as good",
              max(flat), ROUNDING, "change of the objective if one takes all"),
        exact(f"one copy is larger ({SCALE:g} times) and zeros come from a proximal step",
              max(small), 0.0, "weight of the smaller copy, at most"),
        exact(f"one copy is larger ({SCALE:g} times) and the penalty is a part of Adam's loss",
              max(adam), 0.0, "weight of the smaller copy, at most"),
    ]  # fmt: skip


STUDY = Study(
    "redundancy",
    "L1 picks one of two redundant features.",
    examine,
    lambda seed: [student(s, seed) for s in STRENGTHS],
)
