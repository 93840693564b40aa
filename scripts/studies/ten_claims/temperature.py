"""Claim 1: temperature is thermodynamic."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor

from distill.losses import tempered_cross_entropy
from distill.report.figures import plain_ticks
from shared import mean_and_deviation, spread
from ten_claims.runs import Run, Runs
from ten_claims.study import Colours, Finding, Result, Study, exact, larger, minus

CONSTANT = (1, 2, 4, 8)
ANNEALED = ("annealing=cosine", "annealing.start=8", "annealing.end=1", "annealing.unit=step")
KINDS = {
    "a student under its teacher": ("objective=kd",),
    "plain supervised training": ("objective=supervised", "teacher=none"),
}
GRID = torch.logspace(-2, 2, 81, dtype=torch.float64)
MATTERS = 0.25  # points of top-1


def free_energy(q: Tensor, s: Tensor, tau: float | Tensor) -> Tensor:
    """Return `F(q; s, τ) = −⟨q, s⟩ + τ Σ q log q`, `[N]`, of distributions and scores `[N, K]`."""
    return -(q * s).sum(-1) + tau * torch.special.xlogy(q, q).sum(-1)


def least_free_energy(s: Tensor, tau: float | Tensor) -> Tensor:
    """Return `F* = −τ·logsumexp(s/τ)`, `[N]`."""
    return -tau * torch.logsumexp(s / tau, -1)


def entropy(s: Tensor, tau: float | Tensor) -> Tensor:
    """Return `S` of `softmax(s/τ)` in nats, `[N]`."""
    p = torch.softmax(s / tau, -1)
    return -torch.special.xlogy(p, p).sum(-1)


def laws() -> list[Finding]:
    """Return what must hold for any scores, tried on random ones in float64."""
    random = torch.Generator().manual_seed(0)
    s = 3 * torch.randn(200, 10, dtype=torch.float64, generator=random)
    # From nearly one-hot to nearly uniform.
    sharpness = torch.logspace(-2, 2, 50, dtype=torch.float64)[:, None, None]
    q = torch.softmax(torch.randn(50, 200, 10, dtype=torch.float64, generator=random) / sharpness,
                      dim=-1)  # fmt: skip
    condition = "it is about softmax itself"
    at_softmax = largest(
        lambda t: free_energy(torch.softmax(s / t, -1), s, t) - least_free_energy(s, t)
    )
    beaten = max(0.0, *(float((least_free_energy(s, t) - free_energy(q, s, t)).max())
                        for t in GRID))  # fmt: skip
    slope = largest(lambda t: slope_of(s, t) + entropy(s, t))
    falls = torch.stack([entropy(s, t) for t in GRID]).diff(dim=0).clamp(max=0).abs().max()
    labels = torch.arange(200) % 10
    gap = largest(
        lambda t: tempered_cross_entropy(s, labels, float(t))
        - (free_energy(torch.nn.functional.one_hot(labels, 10).double(), s, t)
           - least_free_energy(s, t))
    )  # fmt: skip
    return [
        exact(condition, at_softmax, 1e-9, "|F(softmax) − F*| at most"),
        exact(condition, beaten, 1e-9, "any of 10,000 distributions below F* by"),
        exact(condition, slope, 1e-5, "|dF*/dτ + S| at most, by central differences"),
        exact(condition, float(falls), 1e-9, "S falling with τ by"),
        exact(condition, gap, 1e-9, "|τ·CE(s/τ, y) − (F(e_y) − F*)| at most"),
    ]


def largest(difference: Callable[[Tensor], Tensor]) -> float:
    """Return the largest size of a difference over all temperatures."""
    return max(float(difference(tau).abs().max()) for tau in GRID)


def slope_of(s: Tensor, tau: Tensor, step: float = 1e-4) -> Tensor:
    """Return `dF*/dτ` by a central difference over a share of τ."""
    above, below = tau * (1 + step), tau * (1 - step)
    return (least_free_energy(s, above) - least_free_energy(s, below)) / (above - below)


def schedules(kind: str, seed: int) -> dict[str, Run]:
    """Return the runs of a kind of training: each constant temperature, and the annealed one."""
    constant = {f"T = {t}": Run((*KINDS[kind], f"objective.temperature={t}"), seed)
                for t in CONSTANT}  # fmt: skip
    return constant | {"8 → 1": Run((*KINDS[kind], *ANNEALED), seed)}


def examine(seeds: Sequence[int], runs: Runs) -> Result:
    """Compare annealing with every constant temperature, at equal epochs."""
    findings, table, top1 = laws(), [["training", "temperature", "top-1 %", "NLL", "ECE %"]], {}
    for kind in KINDS:
        found = {
            name: [runs.numbers(schedules(kind, seed)[name]) for seed in seeds]
            for name in schedules(kind, 0)
        }
        top1[kind] = {n: [100 * x["top1"] for x in rows] for n, rows in found.items()}
        annealed = top1[kind]["8 → 1"]
        against = {n: minus(annealed, values) for n, values in top1[kind].items() if n != "8 → 1"}
        findings.append(larger(f"annealing is meant to help {kind}", against,
                               "top-1 of annealing less that of each constant, points",
                               MATTERS))  # fmt: skip
        for name, rows in found.items():
            table.append([kind, name, spread(top1[kind][name], 2),
                          spread([x["nll"] for x in rows], 4),
                          spread([100 * x["ece"] for x in rows], 2)])  # fmt: skip

    def draw(canvas: Canvas, colours: Colours) -> None:
        left, right = canvas.subplots(1, 2)
        s = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
        p = [torch.softmax(s / t, -1) for t in GRID]
        left.plot(GRID, [float(-(q * s).sum()) for q in p], color=colours["student"], label="E")
        left.plot(GRID, [float(entropy(s, t)) for t in GRID], color=colours["teacher"], label="S")
        left.plot(GRID, [float(least_free_energy(s, t)) for t in GRID],
                  color=colours["gap"], label="F = E − τS")  # fmt: skip
        left.set(xscale="log", xlabel="τ", ylim=(-6, 2), title="scores 2, 1, 0, −1")
        plain_ticks(left, [0.01, 0.1, 1, 10, 100])
        left.legend()
        for (kind, values), name in zip(top1.items(), ("student", "baseline"), strict=True):
            means = [mean_and_deviation(one) for one in values.values()]
            right.errorbar(range(len(means)), [m for m, _ in means], [d for _, d in means],
                           marker="o", capsize=3, color=colours[name], label=kind)  # fmt: skip
        right.set_xticks(range(len(means)), list(values))
        right.set(ylabel="top-1 on test (%)")
        right.legend()

    return Result(
        findings, table, draw,
        "Left: energy, entropy and free energy of four scores. Right: constant temperatures and "
        "one annealed from 8 to 1, mean and deviation over seeds.",
        "That softmax minimises free energy is an identity. That cooling helps training does not "
        "follow from it: it is a question to the data.",
    )  # fmt: skip


STUDY = Study(
    "temperature",
    "Temperature is thermodynamic: softmax at τ minimises E − τS, a hot one is a gas and a cold "
    "one a crystal, and cooling a student slowly makes it better.",
    examine,
    lambda seed: [run for kind in KINDS for run in schedules(kind, seed).values()],
)
