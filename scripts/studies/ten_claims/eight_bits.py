"""Claim 8: hinge-trained models survive eight bits better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.figure import Figure as Canvas
from torch import Tensor

from distill.losses import crammer_singer, cross_entropy
from shared import mean_and_deviation, spread
from ten_claims.runs import ALONE, Run, Runs, cross_fitted
from ten_claims.study import Colours, Finding, Result, Study, larger, minus

STUDENTS = {
    "cross-entropy": ALONE,
    "hinge": ("objective=crammer_singer", "teacher=none"),
    "KL": ("objective=kd",),
    "soft hinge": ("objective=soft_hinge",),
}
PAIRS = {"hinge": "cross-entropy", "soft hinge": "KL"}  # hinge → its cross-entropy
SIGNS = {"top1": -1, "nll": 1, "ece": 1}  # of what gets worse
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

    `flips` counts answers that change although their two best scores are more than Δ apart; `nll`
    is by how many nats the mean cross-entropy rises.
    """
    s = s.double()
    step = step_of(s)
    q = rounded(s, step)
    best = s.topk(2, dim=1).values
    apart = best[:, 0] - best[:, 1] > step
    entropy, hinge = (loss(q, y) - loss(s, y) for loss in (cross_entropy, crammer_singer))
    changes = {
        "cross-entropy": entropy.abs().max() / step,
        "hinge": hinge.abs().max() / step,
        "flips": (apart & (q.argmax(1) != s.argmax(1))).sum(),
        "nll": entropy.mean(),
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
    bounds, lost, scaled, drops = {}, {}, {}, {}
    for name in STUDENTS:
        answers = [runs.answers(student(name, seed)) for seed in seeds]
        bounds[name] = [logit_bounds(*one) for one in answers]
        lost[name] = [100 * broken(*one) for one in answers]
        scaled[name] = [100 * broken(cross_fitted(*one)[0], one[1]) for one in answers]
        kinds = [runs.int8(student(name, seed)) for seed in seeds]
        drops[name] = {
            metric: [
                SIGNS[metric] * scale * (kind["int8"][metric] - kind["float"][metric])
                for kind in kinds
            ]
            for metric, scale, _ in METRICS
        }
    table = [["student", "logits: change of CE, Δ", "of hinge, Δ",
              "probabilities: infinite NLL, % of images",
              "after T", "int8 weights: top-1 worse by, points", "NLL", "ECE, points"]]  # fmt: skip
    for name in STUDENTS:
        most = [
            f"{max(one[loss] for one in bounds[name]):.3f}" for loss in ("cross-entropy", "hinge")
        ]
        changes = [spread(drops[name][metric], digits) for metric, _, digits in METRICS]
        table.append([name, *most, spread(lost[name], 2), spread(scaled[name], 2), *changes])
    return Result(
        findings_of(bounds, lost, scaled, drops), table,
        lambda canvas, colours: draw(canvas, colours, lost, drops),
        "Left: images whose label's probability rounds to zero in eight bits. Right: how much int8 "
        "weights and activations change NLL. Mean and deviation over seeds.",
        "Of logits a rounding moves either loss by at most one step. Stored as bytes, confident "
        "probabilities break: a label's probability below 1/510 becomes zero and its NLL infinite.",
    )  # fmt: skip


def findings_of(bounds: dict, lost: dict, scaled: dict, drops: dict) -> list[Finding]:
    """Return where eight bits harm the students of cross-entropies more than those of hinges."""

    def harm(values: dict) -> dict[str, list[float]]:
        return {f"{ours} against {theirs}": minus(values[ours], values[theirs])
                for theirs, ours in PAIRS.items()}  # fmt: skip

    rows = [one for several in bounds.values() for one in several]
    most = max(max(one["cross-entropy"], one["hinge"]) for one in rows)
    flips = sum(one["flips"] for one in rows)
    logits = {name: [one["nll"] for one in several] for name, several in bounds.items()}
    infinite = "images with infinite NLL, per cent more"
    return [
        larger("logits are rounded", harm(logits),
               f"NLL worse by, nats more (either loss moved by at most {most:.3f} Δ, and "
               f"{flips:.0f} answers flipped beyond Δ)", 0.005),
        larger("probabilities are rounded", harm(lost), infinite),
        larger("probabilities are rounded after one fitted temperature", harm(scaled), infinite),
        *(larger(f"weights and activations are int8 and {heading} judges",
                 harm({name: values[metric] for name, values in drops.items()}),
                 f"{heading} worse by, more", margin)
          for metric, heading, margin in (("top1", "top-1", 0.25), ("nll", "NLL", 0.005),
                                          ("ece", "ECE", 0.25))),
    ]  # fmt: skip


def draw(canvas: Canvas, colours: Colours, lost: dict, drops: dict) -> None:
    """Draw broken probabilities and changes of NLL."""
    left, right = canvas.subplots(1, 2)
    for axes, values, label in (
        (left, lost, "label's probability is 0 in 8 bits (%)"),
        (right, {name: one["nll"] for name, one in drops.items()}, "NLL worse by, in int8"),
    ):
        for place, (name, found) in enumerate(values.items()):
            average, deviation = mean_and_deviation(found)
            axes.bar(place, average, yerr=deviation, capsize=3,
                     color=colours["student" if "hinge" in name else "baseline"])  # fmt: skip
        axes.set_xticks(range(len(values)), [name.replace(" ", "\n") for name in values])
        axes.set(ylabel=label)


STUDY = Study(
    "eight_bits",
    "Hinge-trained models survive eight bits better.",
    examine,
    lambda seed: [student(name, seed) for name in STUDENTS],
)
