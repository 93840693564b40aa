"""Claim 10: distillation beats the same student trained alone, also when that one is calibrated."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure as Canvas

from shared import spread
from ten_claims.runs import ALONE, Run, Runs
from ten_claims.study import Colours, Result, Study, larger, minus

STUDENTS = {"alone": ALONE, "distilled": ("objective=kd",)}
METRICS = (("top1", 100, 2, "top-1 %"), ("nll", 1, 4, "NLL"), ("ece", 100, 2, "ECE %"),
           ("nll_after_scaling", 1, 4, "NLL after T"),
           ("ece_after_scaling", 100, 2, "ECE % after T"))  # fmt: skip


def examine(seeds: Sequence[int], runs: Runs) -> Result:
    """Compare pairs of the same seed and epochs, with and without the teacher."""
    found = {
        name: [runs.numbers(Run(overrides, seed)) for seed in seeds]
        for name, overrides in STUDENTS.items()
    }
    value = {(name, metric): [scale * row[metric] for row in rows]
             for name, rows in found.items() for metric, scale, *_ in METRICS}  # fmt: skip
    table = [["student", *(heading for *_, heading in METRICS)]]
    table += [[name, *(spread(value[name, metric], digits) for metric, _, digits, _ in METRICS)]
              for name in STUDENTS]  # fmt: skip

    def gain(metric: str, other: str = "") -> dict[str, list[float]]:
        theirs = value["alone", other or metric]
        return {"": minus(theirs, value["distilled", metric])}

    accuracy = minus(value["distilled", "top1"], value["alone", "top1"])
    findings = [
        larger("top-1 judges", {"": accuracy}, "top-1 above, points", 0.1),
        larger("NLL judges", gain("nll"), "NLL below, nats"),
        larger("ECE judges", gain("ece"), "ECE below, points"),
        larger("the student trained alone is calibrated first and NLL judges",
               gain("nll", "nll_after_scaling"), "NLL below, nats"),
        larger("both are calibrated and NLL judges", gain("nll_after_scaling"), "NLL below, nats"),
        larger("both are calibrated and ECE judges", gain("ece_after_scaling"),
               "ECE below, points"),
    ]  # fmt: skip

    def draw(canvas: Canvas, colours: Colours) -> None:
        for axes, (metric, _, _, heading) in zip(canvas.subplots(1, 3), METRICS[:3], strict=True):
            for pair in zip(value["alone", metric], value["distilled", metric], strict=True):
                axes.plot([0, 1], pair, "o-", color=colours["student"], alpha=0.7)
            axes.set_xticks([0, 1], list(STUDENTS))
            axes.set(title=heading, xlim=(-0.3, 1.3))

    return Result(
        findings, table, draw,
        "Each line is a seed: the same student, with the same initial weights and views.",
        "Protocol: last epoch, the test split, equal epochs, the learning rate that was best for "
        "the student alone; the temperature of distillation, 8, was chosen on this data set's "
        "validation images. Calibrating is one temperature, fitted on half of the test split for "
        "the other half.",
    )  # fmt: skip


STUDY = Study(
    "distillation",
    "Distillation beats the same student trained alone, and the calibrated student trained alone.",
    examine,
    lambda seed: [Run(overrides, seed) for overrides in STUDENTS.values()],
)
