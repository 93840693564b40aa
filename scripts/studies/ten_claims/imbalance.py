"""Claim 6: weighted cross-entropy and adaptive-margin hinge climb the same mountain."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor

from distill.losses import (
    class_balanced_cross_entropy,
    class_balanced_weights,
    crammer_singer,
    ldam,
)
from distill.metrics import cost_optimal_decision
from distill.metrics.classes import balanced_accuracy, per_class_recall
from shared import spread
from ten_claims.runs import Run, Runs, on_labels
from ten_claims.study import Colours, Finding, Result, Study, exact, larger, minus

COST = 100.0  # of missing the rare class, for one false alarm
BAYES = 1 / (1 + COST)
COUNTS = (COST, 1.0)  # training examples: weights of 1 : 100 at β → 1
IMBALANCE = 50
TAIL = (
    "condition=long_tail",
    f"condition.imbalance={IMBALANCE}",
    "condition.clean_validation=true",
)
RARE = 3  # classes, the last ones
TRAINED = {
    "cross-entropy": on_labels("supervised"),
    "effective-number weights": on_labels("class_balanced"),
    "logit adjustment": on_labels("logit_adjusted"),
    "LDAM": on_labels("ldam"),
    "LDAM as a hinge": on_labels("ldam", "objective.terms.ldam.hinge=true"),
    "LDAM, deferred weights": on_labels("ldam_drw"),
}
DECIDED = "cross-entropy, cost-sensitive decision"
REMEDIES = {
    "a weight, a prior or a decision": ("effective-number weights", "logit adjustment", DECIDED),
    "margins alone": ("LDAM", "LDAM as a hinge"),
    "margins, and weights at the end": ("LDAM, deferred weights",),
}
MATTERS = 2.0  # points
SCORES = torch.linspace(-8, 8, 3201, dtype=torch.float64)  # of the rare class; the other has minus
CHANCES = torch.cat([torch.linspace(0.001, 0.02, 191), torch.linspace(0.03, 0.97, 95)]).double()
BinaryLoss = Callable[[Tensor, Tensor], Tensor]


def weighted_hinge(s: Tensor, y: Tensor) -> Tensor:
    """Return the hinge at half scores, times the weight of the label's class."""
    weights = class_balanced_weights(torch.tensor(COUNTS, dtype=torch.float64), 1 - 1e-9)
    return weights[y] * crammer_singer(s, y)


LOSSES: dict[str, BinaryLoss] = {
    "weighted cross-entropy": lambda s, y: class_balanced_cross_entropy(s, y, COUNTS, 1 - 1e-9),
    "weighted hinge": weighted_hinge,
    "margin-only hinge (LDAM)": lambda s, y: ldam(s, y, COUNTS, hinge=True),
}


def threshold(loss: BinaryLoss) -> float:
    """Return from which chance of the rare class on the best score favours it.

    The population limit: for each chance η of the rare class the score `f` that minimises
    `η·loss(f, rare) + (1 − η)·loss(f, common)`, by search over a grid; its sign decides.
    """
    s = torch.stack([-SCORES, SCORES], dim=1)
    rare, common = (loss(s, torch.full((len(s),), y)).double() for y in (1, 0))
    best = [SCORES[(eta * rare + (1 - eta) * common).argmin()] for eta in CHANCES]
    return float(CHANCES[torch.stack(best) > 0].min())


def population() -> list[Finding]:
    """Return which losses reach the threshold that the costs ask for."""
    found = {name: threshold(loss) for name, loss in LOSSES.items()}
    costs = torch.tensor([[0.0, 1.0], [COST, 0.0]])
    probs = torch.stack([1 - CHANCES, CHANCES], dim=1)
    decided = float(CHANCES[cost_optimal_decision(probs, costs) == 1].min())
    found["cost-sensitive decision"] = decided
    step = 1.1e-4  # of the grid of chances around the threshold
    margins = found.pop("margin-only hinge (LDAM)")
    told = ", ".join(f"{name} {100 * value:.2f} %" for name, value in found.items())
    return [
        exact(f"costs are {COST:g} to 1 and weights or the decision know them",
              max(abs(value - BAYES) for value in found.values()), step,
              f"{told}; largest distance to 1/101 = {100 * BAYES:.2f} %"),
        exact("a hinge knows them by margins alone", abs(margins - BAYES), step,
              f"its threshold is {100 * margins:.0f} %; distance to 1/101"),
    ]  # fmt: skip


def student(name: str, seed: int) -> Run:
    """Return the run of a remedy under the long tail; a decision needs no run of its own."""
    return Run((*TRAINED["cross-entropy" if name == DECIDED else name], *TAIL), seed)


def decisions(name: str, seed: int, runs: Runs, prior: Tensor) -> tuple[Tensor, Tensor]:
    """Return the class that is named for each test image, and the labels."""
    logits, target = runs.answers(student(name, seed))
    if name != DECIDED:
        return logits.argmax(1), target
    # A mistake costs as many times more as its class is rarer: balanced error is what is paid.
    costs = (1 - torch.eye(len(prior), dtype=torch.float64)) / prior[:, None]
    return cost_optimal_decision(logits.double().softmax(1), costs), target


def examine(seeds: Sequence[int], runs: Runs) -> Result:
    """Compare remedies on a long tail, and thresholds in the population limit."""
    names = [*TRAINED, DECIDED]
    prior = tail_prior(runs.answers(student("cross-entropy", seeds[0]))[0].shape[1])
    recalls, balanced = {}, {}
    for name in names:
        found = [decisions(name, seed, runs, prior) for seed in seeds]
        recalls[name] = torch.stack([per_class_recall(a, y, len(prior)) for a, y in found])
        balanced[name] = [100 * float(balanced_accuracy(a, y, len(prior))) for a, y in found]
    rare = {name: (100 * r[:, -RARE:].mean(1)).tolist() for name, r in recalls.items()}
    table = [["training", "balanced accuracy %", f"recall of the {RARE} rarest classes %"]]
    table += [[name, spread(balanced[name], 2), spread(rare[name], 2)] for name in names]
    plain = balanced["cross-entropy"]
    gains = [
        larger(f"classes have a long tail and the remedy is {told}",
               {name: minus(balanced[name], plain) for name in group},
               "balanced accuracy above plain cross-entropy's, points", MATTERS)
        for told, group in REMEDIES.items()
    ]  # fmt: skip
    return Result(
        [*population(), *gains], table,
        lambda canvas, colours: draw(canvas, colours, recalls),
        "Recall of each class, from the most frequent to the rarest, mean over seeds.",
        "At costs of 100 to 1 the best threshold is 1/101 = 0.99 %, not 10 %. Weights move it "
        "there under either loss. A margin widens the gap between classes of the training set and, "
        "where data abound, leaves the decision at one half.",
    )  # fmt: skip


def tail_prior(classes: int, imbalance: float = IMBALANCE) -> Tensor:
    """Return the shares of classes in the long tail."""
    sizes = imbalance ** (-torch.arange(classes).double() / (classes - 1))
    return sizes / sizes.sum()


def draw(canvas: Canvas, colours: Colours, recalls: dict[str, Tensor]) -> None:
    """Draw recall over classes."""
    axes = canvas.subplots()
    looks = zip(
        ("ink", "student", "teacher", "temperature", "gap", "baseline", "faint"),
        "o^sDvP*",
        strict=True,
    )
    for (name, recall), (colour, marker) in zip(recalls.items(), looks, strict=True):
        axes.plot(100 * recall.mean(0), marker=marker, color=colours[colour], label=name)
    axes.set(xlabel="class, the last is the rarest", ylabel="recall (%)", ylim=(0, 105))
    axes.legend(loc="lower left")


STUDY = Study(
    "imbalance",
    "Under imbalance, weighted cross-entropy and adaptive-margin hinge climb the same mountain; at "
    "costs of 100 to 1 both decide at 10 %.",
    examine,
    lambda seed: [student(name, seed) for name in TRAINED],
)
