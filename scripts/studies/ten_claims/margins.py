"""Claim 4: hinge ignores ambiguous points near the boundary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC

from shared import spread
from ten_claims.runs import Runs
from ten_claims.study import Colours, Finding, Result, Study, exact, larger, minus

SOLVED = 1e-4  # relative accuracy of the solvers
Points = tuple[np.ndarray, np.ndarray]  # features [N, D], labels −1 or 1 [N]
FITS: dict[str, Any] = {
    "hinge": partial(SVC, kernel="linear", tol=1e-9),
    "cross-entropy": partial(LogisticRegression, tol=1e-10, max_iter=10_000),
}
KINDS = ("beyond the margin", "inside the margin", "at random")


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


@dataclass(frozen=True)
class Moved:
    """What deleting points does to a boundary.

    Attributes:
        share: of the points that were deleted.
        change: of weights and bias, relative to the length of the weights.
        degrees: by which the boundary turned.
    """

    share: float
    change: float
    degrees: float


def moved(loss: str, points: Points, kind: str) -> Moved:
    """Return what becomes of a boundary when points of a kind are deleted.

    Margins are the hinge's own: beyond is `m > 1`, where its gradient is zero; inside is `|m| < 1`,
    the ambiguous points. At random are as many as lie inside.
    """
    m = margins(boundary("hinge", points), points)
    inside = np.abs(m) < 1 - SOLVED
    deleted = {
        "beyond the margin": m > 1 + SOLVED,
        "inside the margin": inside,
        "at random": np.random.default_rng(0).permutation(inside),
    }[kind]
    before = boundary(loss, points)
    after = boundary(loss, (points[0][~deleted], points[1][~deleted]))
    change = np.linalg.norm(after - before) / np.linalg.norm(before[:-1])
    return Moved(float(deleted.mean()), float(change), degrees_between(before[:-1], after[:-1]))


def degrees_between(a: np.ndarray, b: np.ndarray) -> float:
    """Return the angle between two vectors."""
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


def examine(seeds: Sequence[int], runs: Runs) -> Result:
    """Delete each kind of point, refit, and see whether the boundary moved."""
    found = {
        (name, loss, kind): [moved(loss, make(seed), kind) for seed in seeds]
        for name, make in SETS.items() for loss in FITS for kind in KINDS
    }  # fmt: skip
    table = [["points", "loss", "deleted", "share deleted %", "weights changed by %",
              "boundary turned by, degrees"]]  # fmt: skip
    for (name, loss, kind), rows in found.items():
        table.append([name, loss, kind, spread([100 * one.share for one in rows], 1),
                      spread([100 * one.change for one in rows], 2),
                      spread([one.degrees for one in rows], 2)])  # fmt: skip
    return Result(
        findings_of(found), table, draw,
        "The hinge's boundary and margins in the plane; filled points are those that decide it.",
        "The other way round: hinge ignores the points beyond its margin and is held by those "
        "near the boundary, its support vectors.",
    )  # fmt: skip


def findings_of(found: dict[tuple[str, str, str], list[Moved]]) -> list[Finding]:
    """Return which points the hinge ignores, and that cross-entropy does not."""
    far, near, any_of_them = ({name: found[name, "hinge", kind] for name in SETS} for kind in KINDS)
    entropy = {name: [one.change - SOLVED for one in found[name, "cross-entropy", KINDS[0]]]
               for name in SETS}  # fmt: skip
    beyond = "“ambiguous points near the boundary” is read as “points beyond the margin”"
    more = {
        name: minus([one.degrees for one in any_of_them[name]], [one.degrees for one in near[name]])
        for name in SETS
    }
    return [
        exact(beyond, max(one.change for rows in far.values() for one in rows), SOLVED,
              "the hinge's weights change, relative, if all points with margin above 1 go"),
        larger(beyond, entropy, "and those of cross-entropy do change"),
        larger("it is taken as written", more,
               "the hinge's boundary turns more, in degrees, if random points go than if as many "
               "inside the margin do"),
    ]  # fmt: skip


def draw(canvas: Canvas, colours: Colours) -> None:
    """Draw one pair of clouds with the hinge's boundary."""
    axes, points = canvas.subplots(), two_clouds(0)
    weights = boundary("hinge", points)
    deciding = margins(weights, points) <= 1 + SOLVED
    for label, name in ((-1, "baseline"), (1, "student")):
        for held, face in ((True, colours[name]), (False, "none")):
            chosen = (points[1] == label) & (deciding == held)
            horizontal, vertical = points[0][chosen].T
            axes.scatter(horizontal, vertical, s=14, facecolors=face, edgecolors=colours[name])
    x = np.linspace(-4, 4, 2)
    for level, dash in ((0, "-"), (-1, ":"), (1, ":")):
        y = (level - weights[-1] - weights[0] * x) / weights[1]
        axes.plot(x, y, dash, color=colours["ink"])
    axes.set(xlim=(-4, 4), ylim=(-4, 4), aspect="equal")


STUDY = Study("margins", "Hinge ignores ambiguous points near the boundary.", examine)
