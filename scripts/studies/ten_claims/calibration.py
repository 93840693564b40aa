"""Claim 2: cross-entropy gives calibrated confidence, hinge only a ranking."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor

from distill.metrics import expected_calibration_error
from distill.metrics.calibration import reliability
from shared import spread
from ten_claims.runs import ALONE, Run, Runs, cross_fitted
from ten_claims.study import Colours, Finding, Result, Study, larger, minus

ENTROPIES = ("supervised", "kd", "soft_ce")
HINGES = ("soft_hinge", "squared_soft_hinge", "weighted_sign_hinge", "product_hinge",
          "pairwise_soft_hinge")  # fmt: skip
HARDLY_LEARNS = ("epsilon_insensitive_hinge",)  # is shown, not judged
METRICS = (("top1", 100, 2), ("nll", 1, 4), ("brier", 1, 4), ("ece", 100, 2),
           ("temperature_star", 1, 3), ("nll_after_scaling", 1, 4), ("brier_after_scaling", 1, 4),
           ("ece_after_scaling", 100, 2))  # fmt: skip
MATTERS = 0.5  # points of ECE
DRAWS = 200


def student(objective: str, seed: int) -> Run:
    """Return the run of an objective as it is configured."""
    return Run(ALONE if objective == "supervised" else (f"objective={objective}",), seed)


def excess_of_ece(logits: Tensor, target: Tensor) -> float:
    """Return by how many points the ECE is above that of labels drawn from the model's own word.

    A calibrated model has an ECE above zero on any finite set; this difference is zero on average.
    """
    probs = logits.double().softmax(1)
    random = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(probs, DRAWS, replacement=True, generator=random)
    expected = [expected_calibration_error(probs, drawn[:, k]) for k in range(DRAWS)]
    observed = expected_calibration_error(probs, target)
    return 100 * float(observed - torch.stack(expected).mean())


def examine(seeds: Sequence[int], runs: Runs) -> Result:
    """Compare every soft objective before and after one temperature is fitted."""
    names = (*ENTROPIES, *HINGES, *HARDLY_LEARNS)
    found = {name: [runs.numbers(student(name, seed)) for seed in seeds] for name in names}
    table = [["objective", "top-1 %", "NLL", "Brier", "ECE %", "T fitted", "NLL after T",
              "Brier after T", "ECE % after T"]]  # fmt: skip
    for name in names:
        table.append([name, *(column(found[name], *metric) for metric in METRICS)])
    return Result(
        [calibrated(seeds, runs), *against(found)],
        table,
        lambda canvas, colours: draw(canvas, colours, runs, seeds[0]),
        "Reliability of the first seed's students, before (left) and after (right) one "
        "temperature, fitted on one half of the test split for the other. "
        "`epsilon_insensitive_hinge` hardly learns and is not judged.",
        "Raw hinge scores are no probabilities. Whether they hold more than a ranking is decided "
        "by what one fitted number makes of them.",
    )  # fmt: skip


def column(rows: Sequence[dict], metric: str, scale: float, digits: int) -> str:
    """Return mean ± deviation of a metric where it is defined."""
    values = [scale * row[metric] for row in rows if row[metric] is not None]
    return spread(values, digits) if values else "–"


def calibrated(seeds: Sequence[int], runs: Runs) -> Finding:
    """Return whether the students of cross-entropies are calibrated, to half a point."""
    short = {
        name: [MATTERS - excess_of_ece(*runs.answers(student(name, seed))) for seed in seeds]
        for name in ENTROPIES
    }
    told = f"{MATTERS} points less the ECE's excess over that of a calibrated model"
    return larger("“calibrated” is said of cross-entropies as trained", short, told)


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
            logits, target = runs.answers(student(name, seed))
            shown_logits = cross_fitted(logits, target)[0] if scaled else logits.double()
            bins = reliability(shown_logits.softmax(1), target, 10)
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
