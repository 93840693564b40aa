"""Claim 5: neither cross-entropy nor hinge resists far-out poisoned labels; a bounded loss does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from statistics import mean

import numpy as np
import torch
from matplotlib.figure import Figure as Canvas
from sklearn.svm import LinearSVC
from torch import Tensor

from distill.data.condition.corrupt import poisoned
from distill.losses import (
    crammer_singer,
    cross_entropy,
    generalized_cross_entropy,
    ramp_hinge,
    symmetric_cross_entropy,
)
from shared import spread
from ten_claims.runs import ALONE, Run, Runs, on_labels, pool
from ten_claims.study import Colours, Finding, Interval, Result, Study, larger, minus

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": cross_entropy,
    "hinge": crammer_singer,
    "GCE": generalized_cross_entropy,
    "SCE": symmetric_cross_entropy,
    "ramp": ramp_hinge,
}
UNBOUNDED, BOUNDED = ("cross-entropy", "hinge"), ("GCE", "ramp")
RADII = (0.0, 4.0, 16.0, 32.0, 64.0)
SHARE = 0.1  # poisoned points for one clean
STARTS, STEPS = 4, 300
RIDGE = 1e-3
RATES = (0.0, 0.2, 0.4)
NO_TEACHER = {"cross-entropy": "supervised", "hinge": "crammer_singer", "GCE": "gce",
              "SCE": "sce", "ramp": "ramp_hinge"}  # fmt: skip
TAUGHT = "KL, clean teacher"
FAR, WRONG = RADII[-1], RATES[-1]
HARM = 5.0  # points of accuracy from which on a loss has not resisted
Values = dict[tuple[str, float], list[float]]  # loss and radius or rate → accuracy of each seed


def clouds(seed: int, count: int = 200) -> tuple[Tensor, Tensor]:
    """Return two overlapping Gaussian clouds in the plane, features `[2·count, 2]` and labels."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(2).repeat_interleave(count)
    noise = torch.randn(2 * count, 2, dtype=torch.float64, generator=random)
    return noise + 1.5 * (2 * labels - 1)[:, None], labels


def fitted(loss: str, features: Tensor, labels: Tensor) -> Tensor:
    """Return the linear classifier `[2, D + 1]` with the lowest loss that any start led to.

    Cross-entropy is convex and needs one start. A bounded loss has several valleys, and those of
    most starts are not the lowest. The hinge, at whose kinks L-BFGS gets stuck, is left to a solver
    of its own.
    """
    if loss == "hinge":
        return supported(features, labels)
    random = torch.Generator().manual_seed(0)
    padded = torch.cat([features, torch.ones(len(features), 1, dtype=features.dtype)], dim=1)
    starts = 1 if loss == "cross-entropy" else STARTS
    ends = [
        descended(loss, padded, labels, torch.randn(2, padded.shape[1], dtype=features.dtype,
                                                    generator=random))
        for _ in range(starts)
    ]  # fmt: skip
    return min(ends, key=lambda weights: float(risk(loss, weights, padded, labels)))


def supported(features: Tensor, labels: Tensor) -> Tensor:
    """Return the minimiser of the hinge's risk, a linear support vector machine."""
    machine = LinearSVC(loss="hinge", C=1 / (RIDGE * len(features)), tol=1e-7, max_iter=10**7)
    machine.fit(features.numpy(), labels.numpy())
    half = torch.from_numpy(np.append(machine.coef_[0], machine.intercept_)) / 2
    return torch.stack([-half, half])


def risk(loss: str, weights: Tensor, padded: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss with a small ridge, without which it may have no minimum."""
    return LOSSES[loss](padded @ weights.T, labels).mean() + RIDGE * weights.square().sum()


def descended(loss: str, padded: Tensor, labels: Tensor, start: Tensor) -> Tensor:
    """Return where L-BFGS ends from a start."""
    # Of far-out points the gradient is as large as they are far: steps are taken in a whitened
    # space, in which no direction is steeper than another.
    scale = padded.square().mean(dim=0).sqrt()
    moved = (start * scale).requires_grad_()
    optimizer = torch.optim.LBFGS([moved], max_iter=STEPS, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-9, tolerance_change=1e-12)  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = risk(loss, moved / scale, padded, labels)
        value.backward()
        return value

    optimizer.step(closure)
    return (moved / scale).detach()


def accuracy(weights: Tensor, seed: int) -> float:
    """Return the per cent of fresh clean points that a linear classifier gets right."""
    features, labels = clouds(seed + 1000, 2000)
    scores = features @ weights[:, :-1].T + weights[:, -1]
    return 100 * float((scores.argmax(1) == labels).double().mean())


def under_poison(loss: str, radius: float, seed: int) -> float:
    """Return clean accuracy in per cent after training among points poisoned at a radius."""
    points = clouds(seed)
    if radius:
        points = poisoned(*points, radius, SHARE)
    return accuracy(fitted(loss, *points), seed)


def student(name: str, rate: float, seed: int) -> Run:
    """Return the run of a loss under a rate of wrong labels."""
    noise = ("condition=symmetric_noise", f"condition.rate={rate}") if rate else ()
    if name == TAUGHT:
        return Run(("objective=kd", "teacher=timm", *noise), seed,
                   teacher=Run(ALONE, seed + 100))  # fmt: skip
    return Run((*on_labels(NO_TEACHER[name]), *noise), seed)


def examine(seeds: Sequence[int], runs: Runs) -> Result:
    """Sweep the radius of poisoned points, and the rate of wrong labels."""
    places = list(product(LOSSES, RADII, seeds))
    with pool() as workers:
        found = dict(zip(places, workers.map(under_poison, *zip(*places, strict=True)),
                         strict=True))  # fmt: skip
    poison = {(name, r): [found[name, r, seed] for seed in seeds]
              for name in LOSSES for r in RADII}  # fmt: skip
    noise = {(name, rate): [100 * runs.numbers(student(name, rate, seed))["top1"]
                            for seed in seeds]
             for name in (*NO_TEACHER, TAUGHT) for rate in RATES}  # fmt: skip
    table = [["loss", *(f"radius {r:g}" if r else "no poison" for r in RADII),
              *(f"{100 * rate:.0f} % wrong" for rate in RATES)]]  # fmt: skip
    for name in (*LOSSES, TAUGHT):
        far = [spread(poison[name, r], 1) if name in LOSSES else "–" for r in RADII]
        table.append([name, *far, *(spread(noise[name, rate], 1) for rate in RATES)])
    return Result(
        findings_of(poison, noise), table,
        lambda canvas, colours: draw(canvas, colours, poison, noise),
        "Left: linear classifiers in the plane, a tenth of the points poisoned at a radius. Right: "
        "students trained under wrong labels. Accuracy on clean test data.",
        "A bounded loss has several valleys: the best of four starts by training loss is shown. "
        "SCE is not bounded, its cross-entropy part grows on, and yet it may stand. Each loss "
        "has the learning rate that was best for it on clean labels.",
    )  # fmt: skip


def findings_of(poison: Values, noise: Values) -> list[Finding]:
    """Return where cross-entropy and hinge fall while another stands."""
    out = {name: lost(poison, name, FAR) for name in LOSSES}
    wrong = {name: lost(noise, name, WRONG) for name in (*NO_TEACHER, TAUGHT)}
    student = f"a student is trained under {100 * WRONG:.0f} % wrong labels and"
    return [
        apart(f"linear classifiers meet points at radius {FAR:g} in the plane", out, BOUNDED),
        larger("“a bounded loss does” means that no unbounded one does",
               {"SCE": [d - HARM for d in out["SCE"]]},
               f"points that SCE loses at radius {FAR:g} beyond {HARM:g}"),
        *(apart(f"{student} the bounded loss is {name}", wrong, [name]) for name in BOUNDED),
        apart(f"{student} a teacher of clean labels takes the bounded loss's place", wrong,
              [TAUGHT]),
    ]  # fmt: skip


def lost(values: Values, name: str, worst: float) -> list[float]:
    """Return the points of accuracy that the worst takes from each seed."""
    return minus(values[name, 0.0], values[name, worst])


def apart(condition: str, lost: dict[str, list[float]], standing: Sequence[str]) -> Finding:
    """Return whether the unbounded losses lose more than HARM points, and others less."""
    signed = {name: [d - HARM for d in lost[name]] for name in UNBOUNDED}
    signed |= {name: [HARM - d for d in lost[name]] for name in standing}
    told = ", ".join(f"{name} {Interval.of(lost[name])}" for name in signed)
    outcome = larger(condition, signed, "").outcome
    return Finding(condition, outcome, f"points of accuracy lost, {HARM:g} being much: {told}")


def draw(canvas: Canvas, colours: Colours, poison: dict, noise: dict) -> None:
    """Draw accuracy over radius and over the rate of wrong labels."""
    left, right = canvas.subplots(1, 2, sharey=True)
    names = (*LOSSES, TAUGHT)
    looks = zip(names, ("ink", "student", "teacher", "temperature", "gap", "baseline"),
                "o^sDvP", strict=True)  # fmt: skip
    for name, colour, marker in looks:
        look = {"marker": marker, "color": colours[colour], "label": name}
        if name in LOSSES:
            left.plot(range(len(RADII)), [mean(poison[name, r]) for r in RADII], **look)
        right.plot([100 * rate for rate in RATES], [mean(noise[name, rate]) for rate in RATES],
                   **look)  # fmt: skip
    left.set_xticks(range(len(RADII)), ["none", *(f"{r:g}" for r in RADII[1:])])
    left.set(xlabel="radius of the poisoned points", ylabel="clean accuracy (%)")
    right.set(xlabel="wrong labels (%)")
    right.legend()


STUDY = Study(
    "poison",
    "Neither cross-entropy nor hinge resists far-out poisoned labels; a bounded loss does.",
    examine,
    lambda seed: [student(name, rate, seed) for name in (*NO_TEACHER, TAUGHT) for rate in RATES],
)
