"""Claim 9: cross-entropy is as good as a loss made for top-k."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure as Canvas

from shared import spread
from ten_claims.runs import ALONE, Run, Runs, on_labels
from ten_claims.study import Colours, Result, Study, larger, minus

TAUGHT = "KL, which has a teacher,"
STUDENTS = {
    "cross-entropy": ALONE,
    TAUGHT: ("objective=kd",),
    "smooth top-3": on_labels("smooth_topk", "objective.terms.topk.k=3"),
    "smooth top-5": on_labels("smooth_topk", "objective.terms.topk.k=5"),
    "hard top-3": on_labels("hard_topk", "objective.terms.topk.k=3"),
    "hard top-5": on_labels("hard_topk", "objective.terms.topk.k=5"),
}
MADE_FOR = {3: ("smooth top-3", "hard top-3"), 5: ("smooth top-5", "hard top-5")}
SHOWN = (1, 3, 5)
MATTERS = 0.5  # points that cross-entropy may be worse and still be as good


def examine(seeds: Sequence[int], runs: Runs) -> Result:
    """Compare top-1, top-3 and top-5 of all students."""
    found = {
        name: [runs.numbers(Run(overrides, seed)) for seed in seeds]
        for name, overrides in STUDENTS.items()
    }
    share = {(name, k): [100 * row[f"top{k}"] for row in rows]
             for name, rows in found.items() for k in SHOWN}  # fmt: skip
    table = [["objective", *(f"top-{k} %" for k in SHOWN)]]
    table += [[name, *(spread(share[name, k], 2) for k in SHOWN)] for name in STUDENTS]
    findings = [
        larger(f"{ours} is judged by top-{k}",
               {f"against {name}": [d + MATTERS for d in minus(share[ours, k], share[name, k])]
                for name in MADE_FOR[k]},
               f"top-{k} less the other's plus {MATTERS} points that do not matter")
        for k in MADE_FOR for ours in ("cross-entropy", TAUGHT)
    ]  # fmt: skip

    def draw(canvas: Canvas, colours: Colours) -> None:
        axes = canvas.subplots()
        looks = zip(STUDENTS, ("ink", "student", "teacher", "temperature", "baseline", "gap"),
                    strict=True)  # fmt: skip
        for place, (name, colour) in enumerate(looks):
            for x, k in enumerate(SHOWN):
                values = share[name, k]
                axes.plot([x + (place - 2.5) / 8] * len(values), values, "o", ms=3,
                          color=colours[colour], label=name if k == 1 else None)  # fmt: skip
        axes.set_xticks(range(len(SHOWN)), [f"top-{k}" for k in SHOWN])
        axes.set(ylabel="right among the first k (%)")
        axes.legend()

    return Result(
        findings, table, draw, "Each point is a seed.",
        "“As good” means: at most half a point worse, by the whole interval. With ten classes "
        "top-3 and top-5 are nearly full for cross-entropy. Each loss has the learning "
        "rate that was best for it on validation.",
    )  # fmt: skip


STUDY = Study(
    "topk",
    "Cross-entropy is as good as a loss made for top-k.",
    examine,
    lambda seed: [Run(overrides, seed) for overrides in STUDENTS.values()],
)
