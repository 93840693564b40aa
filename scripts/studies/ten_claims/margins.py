"""Claim 4: hinge ignores ambiguous points near the boundary."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC

from shared import spread
from ten_claims.runs import Runs
from ten_claims.study import Colours, Finding, Result, Study, exact, larger

SOLVED = 1e-4  # relative accuracy of the solvers
Points = tuple[np.ndarray, np.ndarray]  # features [N, D], labels −1 or 1 [N]
FITS: dict[str, Any] = {
    "hinge": partial(SVC, kernel="linear", tol=1e-9),
    "cross-entropy": partial(LogisticRegression, tol=1e-10, max_iter=10_000),
}
KINDS = ("beyond the margin", "inside the margin")


def two_clouds(seed: int) -> Points:
    """Return two overlapping Gaussian clouds in the plane."""
    random = np.random.default_rng(seed)
    labels = np.repeat([-1, 1], 150)
    return random.normal(size=(300, 2)) + 1.3 * labels[:, None], labels


def two_digits(seed: int) -> Points:
    """Return real digits, 3 against 8, 200 of them."""
    images, digits = load_digits(return_X_y=True)
    chosen = np.random.default_rng(seed).permutation(np.flatnonzero(np.isin(digits, (3, 8))))[:200]
    return images[chosen] / 16, np.where(digits[chosen] == 8, 1, -1)


SETS = {"clouds": two_clouds, "digits 3 and 8": two_digits}


def boundary(loss: str, points: Points) -> np.ndarray:
    """Return weights and bias `[D + 1]` of the regularised linear fit."""
    fit = FITS[loss](C=1.0).fit(*points)
    return np.append(fit.coef_, fit.intercept_)


def margins(weights: np.ndarray, points: Points) -> np.ndarray:
    """Return `y·(w·x + b)`, `[N]`."""
    return points[1] * (points[0] @ weights[:-1] + weights[-1])


def moved(loss: str, points: Points, kind: str) -> tuple[float, float]:
    """Return how far the boundary moves when points of a kind are deleted, and their share.

    The distance is relative to the length of the weights. Margins are the hinge's own: beyond is
    `m > 1`, where its gradient is zero; inside is `|m| < 1`, the ambiguous points.
    """
    m = margins(boundary("hinge", points), points)
    deleted = m > 1 + SOLVED if kind == KINDS[0] else np.abs(m) < 1 - SOLVED
    before, rest = boundary(loss, points), (points[0][~deleted], points[1][~deleted])
    distance = np.linalg.norm(boundary(loss, rest) - before) / np.linalg.norm(before)
    return float(distance), float(deleted.mean())


def examine(seeds: Sequence[int], runs: Runs) -> Result:
    """Delete each kind of point, refit, and see whether the boundary moved."""
    found = {
        (name, loss, kind): [moved(loss, make(seed), kind) for seed in seeds]
        for name, make in SETS.items() for loss in FITS for kind in KINDS
    }  # fmt: skip
    table = [["points", "loss", "deleted", "share deleted %", "boundary moved by %"]]
    for (name, loss, kind), rows in found.items():
        table.append([name, loss, kind, spread([100 * share for _, share in rows], 1),
                      spread([100 * distance for distance, _ in rows], 4)])  # fmt: skip
    return Result(
        judge(found), table, draw,
        "The hinge's boundary and margins in the plane; filled points are those that decide it.",
        "The other way round: hinge ignores the points beyond its margin and is held by those "
        "near the boundary, its support vectors. Cross-entropy is moved by both kinds.",
    )  # fmt: skip


def judge(found: dict[tuple[str, str, str], list[tuple[float, float]]]) -> list[Finding]:
    """Return which points the hinge ignores, and that cross-entropy does not."""
    far = {name: max(d for d, _ in found[name, "hinge", KINDS[0]]) for name in SETS}
    near = {name: [d for d, _ in found[name, "hinge", KINDS[1]]] for name in SETS}
    entropy = {name: [d - SOLVED for d, _ in found[name, "cross-entropy", KINDS[0]]]
               for name in SETS}  # fmt: skip
    beyond = "“ambiguous points near the boundary” is read as “points beyond the margin”"
    return [
        exact(beyond, max(far.values()), SOLVED,
              "hinge boundary moved, relative, all points with margin above 1 deleted"),
        larger(beyond, entropy,
               "cross-entropy's boundary moves by them, relative"),
        exact("it is taken as written", min(min(values) for values in near.values()), SOLVED,
              "hinge boundary moved, relative, the points inside the margin deleted"),
    ]  # fmt: skip


def draw(canvas: Canvas, colours: Colours) -> None:
    """Draw one pair of clouds with the hinge's boundary."""
    axes, points = canvas.subplots(), two_clouds(0)
    weights = boundary("hinge", points)
    deciding = margins(weights, points) <= 1 + SOLVED
    for label, name in ((-1, "baseline"), (1, "student")):
        for held, face in ((True, colours[name]), (False, "none")):
            chosen = (points[1] == label) & (deciding == held)
            axes.scatter(*points[0][chosen].T, s=14, facecolors=face, edgecolors=colours[name])
    x = np.linspace(-4, 4, 2)
    for level, dash in ((0, "-"), (-1, ":"), (1, ":")):
        y = (level - weights[-1] - weights[0] * x) / weights[1]
        axes.plot(x, y, dash, color=colours["ink"])
    axes.set(xlim=(-4, 4), ylim=(-4, 4), aspect="equal")


STUDY = Study("margins", "Hinge ignores ambiguous points near the boundary.", examine)
