"""Claim 8: hinge-trained models survive eight bits better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor

from distill.losses import crammer_singer, cross_entropy
from shared import spread
from ten_claims.runs import ALONE, Run, Runs
from ten_claims.study import FAILS, HOLDS, Colours, Finding, Result, Study, larger, minus

STUDENTS = {
    "cross-entropy": ALONE,
    "hinge": ("objective=crammer_singer", "teacher=none"),
    "KL": ("objective=kd",),
    "soft hinge": ("objective=soft_hinge",),
}
PAIRS = {"hinge": "cross-entropy", "soft hinge": "KL"}  # hinge → its cross-entropy
LEVELS = 127  # of a signed byte
METRICS = (("top1", 100, 2), ("nll", 1, 4), ("ece", 100, 2))


def step_of(s: Tensor) -> float:
    """Return `Δ = max|s|/127`."""
    return float(s.abs().max()) / LEVELS


def rounded(s: Tensor, step: float) -> Tensor:
    """Return scores on a grid of steps; each moves by at most half of one."""
    return (s / step).round() * step


def logit_bounds(s: Tensor, y: Tensor) -> dict[str, float]:
    """Return what 8-bit logits change, in steps Δ: of either loss at most 1; and needless flips.

    `flips` counts answers that change although their two best scores are more than Δ apart.
    """
    s = s.double()
    step = step_of(s)
    q = rounded(s, step)
    best = s.topk(2, dim=1).values
    apart = best[:, 0] - best[:, 1] > step
    changes = {
        "cross-entropy": (cross_entropy(q, y) - cross_entropy(s, y)).abs().max() / step,
        "hinge": (crammer_singer(q, y) - crammer_singer(s, y)).abs().max() / step,
        "flips": (apart & (q.argmax(1) != s.argmax(1))).sum(),
    }
    return {name: float(value) for name, value in changes.items()}


def broken(s: Tensor, y: Tensor) -> float:
    """Return the share of examples whose 8-bit probability of the label is zero: infinite NLL."""
    p = (s.double().softmax(1) * 255).round()
    return float((p.gather(1, y[:, None]) == 0).double().mean())


def student(name: str, seed: int) -> Run:
    """Return the run of an objective, exported as int8 too."""
    return replace(Run(STUDENTS[name], seed), int8=True)


def examine(seeds: Sequence[int], runs: Runs) -> Result:
    """Quantise logits, probabilities and weights, apart from each other."""
    bounds, lost, drops = {}, {}, {}
    for name in STUDENTS:
        answers = [runs.answers(student(name, seed)) for seed in seeds]
        bounds[name] = [logit_bounds(*one) for one in answers]
        lost[name] = [100 * broken(*one) for one in answers]
        kinds = [runs.int8(student(name, seed)) for seed in seeds]
        drops[name] = {
            metric: [scale * abs(kind["int8"][metric] - kind["float"][metric]) for kind in kinds]
            for metric, scale, _ in METRICS
        }
    table = [["student", "logits: change of CE, Δ", "of hinge, Δ",
              "probabilities: infinite NLL, % of images",
              "int8 weights: change of top-1, points", "of NLL", "of ECE, points"]]  # fmt: skip
    for name in STUDENTS:
        most = [
            f"{max(one[loss] for one in bounds[name]):.3f}" for loss in ("cross-entropy", "hinge")
        ]
        changes = [spread(drops[name][metric], digits) for metric, _, digits in METRICS]
        table.append([name, *most, spread(lost[name], 2), *changes])
    return Result(
        judge(bounds, lost, drops), table,
        lambda canvas, colours: draw(canvas, colours, lost, drops),
        "Left: images whose label's probability rounds to zero in eight bits. Right: how much int8 "
        "weights and activations change NLL. Mean and deviation over seeds.",
        "Of logits a rounding moves either loss by at most one step. Stored as bytes, confident "
        "probabilities break: a label's probability below 1/510 becomes zero and its NLL infinite.",
    )  # fmt: skip


def judge(bounds: dict, lost: dict, drops: dict) -> list[Finding]:
    """Return where eight bits tell the losses apart."""
    rows = [one for several in bounds.values() for one in several]
    worst = {loss: max(one[loss] for one in rows) for loss in ("cross-entropy", "hinge")}
    flips = sum(one["flips"] for one in rows)
    # "Better" would mean that cross-entropy's bound were the wider one.
    logits = Finding(
        "logits are quantised", FAILS if max(worst.values()) <= 1 and not flips else HOLDS,
        f"either loss moves by at most Δ: cross-entropy {worst['cross-entropy']:.3f} Δ, hinge "
        f"{worst['hinge']:.3f} Δ; answers flipped beyond Δ: {flips:.0f}",
    )  # fmt: skip
    probabilities = larger(
        "probabilities are quantised",
        {f"{ours} against {theirs}": minus(lost[ours], lost[theirs])
         for theirs, ours in PAIRS.items()},
        "images with infinite NLL, points more",
    )  # fmt: skip
    weights = [
        larger(f"weights and activations are quantised and {heading} judges",
               {f"{ours} against {theirs}": minus(drops[ours][metric], drops[theirs][metric])
                for theirs, ours in PAIRS.items()},
               "change by int8, more", margin)
        for metric, heading, margin in (("top1", "top-1", 0.25), ("nll", "NLL", 0.005),
                                        ("ece", "ECE", 0.25))
    ]  # fmt: skip
    return [logits, probabilities, *weights]


def draw(canvas: Canvas, colours: Colours, lost: dict, drops: dict) -> None:
    """Draw broken probabilities and changes of NLL."""
    left, right = canvas.subplots(1, 2)
    for axes, values, label in (
        (left, lost, "label's probability is 0 in 8 bits (%)"),
        (right, {name: one["nll"] for name, one in drops.items()}, "change of NLL by int8"),
    ):
        for place, (name, found) in enumerate(values.items()):
            tensor = torch.tensor(found)
            deviation = float(tensor.std()) if len(found) > 1 else math.nan
            axes.bar(place, float(tensor.mean()), yerr=deviation, capsize=3,
                     color=colours["student" if "hinge" in name else "baseline"])  # fmt: skip
        axes.set_xticks(range(len(values)), [name.replace(" ", "\n") for name in values])
        axes.set(ylabel=label)


STUDY = Study(
    "eight_bits",
    "Hinge-trained models survive eight bits better.",
    examine,
    lambda seed: [student(name, seed) for name in STUDENTS],
)
