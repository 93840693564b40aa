"""Claim 2: cross-entropy gives calibrated confidence, hinge only a ranking."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure as Canvas
from scipy.stats import combine_pvalues
from torch import Tensor

from distill.metrics import expected_calibration_error
from distill.metrics.calibration import reliability
from shared import spread
from ten_claims.runs import Run, Runs
from ten_claims.study import FAILS, HOLDS, Colours, Finding, Result, Study, larger, minus

ENTROPIES = ("kd", "soft_ce")
HINGES = ("soft_hinge", "squared_soft_hinge", "weighted_sign_hinge", "product_hinge",
          "pairwise_soft_hinge")  # fmt: skip
HARDLY_LEARNS = ("epsilon_insensitive_hinge",)  # is shown, not judged
METRICS = (("top1", 100, 2), ("nll", 1, 4), ("brier", 1, 4), ("ece", 100, 2),
           ("temperature_star", 1, 3), ("nll_after_scaling", 1, 4), ("brier_after_scaling", 1, 4),
           ("ece_after_scaling", 100, 2))  # fmt: skip
MATTERS = 0.5  # points of ECE
DRAWS = 500


def student(objective: str, seed: int) -> Run:
    """Return the run of an objective as it is configured."""
    return Run((f"objective={objective}",), seed)


def chance_of_ece(logits: Tensor, target: Tensor) -> float:
    """Return how often labels drawn from the model's own probabilities have an ECE as large.

    A calibrated model has an ECE above zero on any finite set: this is the p-value of its being
    calibrated, which is never zero.
    """
    probs = logits.double().softmax(1)
    random = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(probs, DRAWS, replacement=True, generator=random)
    observed = expected_calibration_error(probs, target)
    chance = [expected_calibration_error(probs, drawn[:, k]) >= observed for k in range(DRAWS)]
    return (1 + int(torch.stack(chance).sum())) / (1 + DRAWS)


def examine(seeds: Sequence[int], runs: Runs) -> Result:
    """Compare every soft objective before and after one temperature is fitted."""
    names = (*ENTROPIES, *HINGES, *HARDLY_LEARNS)
    found = {name: [runs.numbers(student(name, seed)) for seed in seeds] for name in names}
    table = [["objective", "top-1 %", "NLL", "Brier", "ECE %", "T fitted", "NLL after T",
              "Brier after T", "ECE % after T"]]  # fmt: skip
    for name in names:
        table.append([name, *(column(found[name], *metric) for metric in METRICS)])
    return Result(
        [*calibrated(seeds, runs), *against(found)],
        table,
        lambda canvas, colours: draw(canvas, colours, runs, seeds[0]),
        "Reliability of the first seed's students, before (left) and after (right) the temperature "
        "that validation chose.",
        "Raw hinge scores are no probabilities. Whether they hold more than a ranking is decided "
        "by what one fitted number makes of them.",
    )  # fmt: skip


def column(rows: Sequence[dict], metric: str, scale: float, digits: int) -> str:
    """Return mean ± deviation of a metric where it is defined."""
    values = [scale * row[metric] for row in rows if row[metric] is not None]
    return spread(values, digits) if values else "–"


def calibrated(seeds: Sequence[int], runs: Runs) -> list[Finding]:
    """Return whether the students of cross-entropies can be told from calibrated ones, at 5 %."""
    findings = []
    for name in ENTROPIES:
        chances = [chance_of_ece(*runs.answers(student(name, seed))) for seed in seeds]
        together = combine_pvalues(chances).pvalue
        told = f"p of such ECEs if they were calibrated, over seeds (Fisher): {together:.2g}"
        condition = f"“calibrated” is said of {name} students as trained"
        findings.append(Finding(condition, HOLDS if together >= 0.05 else FAILS, told))
    return findings


def against(found: dict[str, list[dict]]) -> list[Finding]:
    """Return whether each hinge's ECE is above the KL student's, before and after scaling."""
    return [
        larger(condition, {name: minus([row[metric] for row in found[name]],
                                       [row[metric] for row in found["kd"]], 100)
                           for name in HINGES},
               "ECE above the KL student's, points", MATTERS)
        for condition, metric in (
            ("hinge scores are read as logits as they are", "ece"),
            ("“only a ranking” is said of hinge scores after one fitted temperature",
             "ece_after_scaling"),
        )
    ]  # fmt: skip


def draw(canvas: Canvas, colours: Colours, runs: Runs, seed: int) -> None:
    """Draw accuracy over confidence before and after scaling."""
    shown = {"kd": "student", "soft_hinge": "baseline", "pairwise_soft_hinge": "temperature"}
    for axes, scaled in zip(canvas.subplots(1, 2, sharey=True), (False, True), strict=True):
        axes.plot([0, 1], [0, 1], ":", color=colours["ink"])
        for name, colour in shown.items():
            run = student(name, seed)
            logits, target = runs.answers(run)
            fitted = runs.numbers(run)["temperature_star"] if scaled else None
            bins = reliability((logits.double() / (fitted or 1)).softmax(1), target, 10)
            full = bins.count > 0
            axes.plot(bins.confidence[full], bins.accuracy[full], "o-", label=name,
                      color=colours[colour])  # fmt: skip
        axes.set(xlabel="confidence", title="after T" if scaled else "as trained")
    axes.legend()
    canvas.axes[0].set_ylabel("accuracy")


STUDY = Study(
    "calibration",
    "Cross-entropy gives calibrated confidence, hinge gives only a ranking.",
    examine,
    lambda seed: [student(name, seed) for name in (*ENTROPIES, *HINGES, *HARDLY_LEARNS)],
)
