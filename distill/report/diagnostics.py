"""What a page shows beyond single numbers, as plain values: `evidence` in `summary.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.data import DataModule
from distill.metrics import Reliability, reliability, risk_coverage
from distill.metrics.calibration import calibration_error_of_confidence
from distill.utils.files import save_arrays

BINS = 15
ROLES = ("student", "teacher", "baseline")
WHOLE_MATRIX = 20  # classes up to which a confusion matrix is shown whole
PAIRS, EXAMPLES, CURVE_POINTS, COVERAGE_POINTS = 20, 24, 25, 101
PART = 1024  # examples whose probabilities are computed at a time
LARGEST_SIDE = 96  # pixels of a thumbnail


def diagnostics(split: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a page shows of all models.

    Args:
        split: role → logits `[N, K]` on the test split, with `target` and `index` `[N]`.
        numbers: role → its numbers, with `temperature_star`.

    Returns:
        `models` (role → see `model_diagnostics`), `confusion` of the student, and `examples`.
    """
    present = [role for role in ROLES if role in split]
    target = split["target"]
    fitted = {role: numbers[role]["temperature_star"] for role in present}
    return {
        "models": {role: model_diagnostics(split[role], target, fitted[role]) for role in present},
        "confusion": confusion(split["student"], target),
        "examples": examples(split, disputed(split)),
    }


def model_diagnostics(logits: Tensor, target: Tensor, temperature: float | None) -> dict[str, Any]:
    """Return one model's reliability, its scores over the scaling temperature, and its risk.

    Args:
        logits: of the test split, `[N, K]`.
        target: labels `[N]`.
        temperature: fitted on validation, or None.
    """
    probs = softmax(logits, 1.0)
    confidence, prediction = probs.max(dim=1)
    curve = risk_coverage(confidence, prediction == target)
    kept = torch.linspace(0, len(curve.risk) - 1, COVERAGE_POINTS).round().long().unique()
    return {
        "reliability": bins_of(reliability(probs, target, BINS)),
        "reliability_after_scaling": temperature
        and bins_of(reliability(softmax(logits, temperature), target, BINS)),
        "scaling": scaling_curve(logits, target, temperature),
        "risk_coverage": {
            "coverage": rounded(curve.coverage[kept]),
            "risk": rounded(curve.risk[kept]),
        },
    }


def softmax(logits: Tensor, temperature: Tensor | float) -> Tensor:
    """Return probabilities in float64."""
    return (logits.double() / temperature).softmax(dim=1)


def bins_of(bins: Reliability) -> dict[str, Any]:
    """Return a reliability diagram's bins; what an empty one lacks is None."""
    return {
        "edges": rounded(bins.edges),
        "count": bins.count.long().tolist(),
        "accuracy": rounded(bins.accuracy),
        "confidence": rounded(bins.mean_confidence),
    }


def scaling_curve(logits: Tensor, target: Tensor, temperature: float | None) -> dict[str, Any]:
    """Return NLL and ECE over temperatures around 1 and around the fitted one.

    Both need of an example's probabilities only what its largest and its label's are, so that the
    logits are gone through once, part by part, and no temperature makes a copy of them.
    """
    low, high = min(1.0, temperature or 1.0) / 4, max(1.0, temperature or 1.0) * 4
    grid = torch.logspace(math.log10(low), math.log10(high), CURVE_POINTS, dtype=torch.float64)
    confidence = torch.empty(len(grid), len(logits), dtype=torch.float64)
    surprise, correct = torch.empty_like(confidence), logits.argmax(dim=1) == target
    for rows in torch.arange(len(logits)).split(PART):
        part = logits[rows].double()
        below = part - part.amax(dim=1, keepdim=True)
        of_label = below.gather(1, target[rows].long()[:, None])[:, 0]
        for k, t in enumerate(grid):
            log_sum = (below / t).exp().sum(dim=1).log()
            confidence[k, rows], surprise[k, rows] = (-log_sum).exp(), log_sum - of_label / t
    errors = [calibration_error_of_confidence(row, correct, BINS) for row in confidence]
    return {
        "temperature": rounded(grid),
        "nll": [short(value) for value in surprise.mean(dim=1)],
        "ece": [short(value) for value in errors],
    }


def confusion(logits: Tensor, target: Tensor) -> dict[str, Any]:
    """Return which classes are taken for which: the whole matrix where it is small, and the worst.

    Returns:
        `matrix` `[K, K]` of counts (row: true class, column: answer) or None, and `pairs`, each a
        true class, an answer and how often it was given, the most frequent first.
    """
    classes = logits.shape[1]
    counts = torch.bincount(target.long() * classes + logits.argmax(dim=1), minlength=classes**2)
    wrong = counts.clone().view(classes, classes).fill_diagonal_(0).flatten()
    most = wrong.argsort(descending=True, stable=True)[:PAIRS]
    pairs = [[i // classes, i % classes, int(wrong[i])] for i in most.tolist() if wrong[i]]
    whole = counts.view(classes, classes).tolist() if classes <= WHOLE_MATRIX else None
    return {"matrix": whole, "pairs": pairs}


def disputed(split: Mapping[str, Tensor]) -> Tensor:
    """Return the rows, the most telling first, of which a page shows the images.

    With a teacher they are those on which it and the student name other classes, ordered by the
    total variation of the two predictions; without, the student's surest mistakes.
    """
    student = softmax(split["student"], 1.0)
    if "teacher" in split:
        teacher = softmax(split["teacher"], 1.0)
        chosen = student.argmax(dim=1) != teacher.argmax(dim=1)
        weight = (student - teacher).abs().sum(dim=1)
    else:
        chosen = student.argmax(dim=1) != split["target"]
        weight = student.amax(dim=1)
    order = weight.masked_fill(~chosen, -1).argsort(descending=True, stable=True)
    return order[: min(EXAMPLES, int(chosen.sum()))]


def examples(split: Mapping[str, Tensor], rows: Tensor) -> list[dict[str, Any]]:
    """Return of each row its index, its true class, and each model's answer and confidence."""
    records = []
    for row in rows.tolist():
        example: dict[str, Any] = {"row": row, "index": int(split["index"][row])}
        example["target"] = int(split["target"][row])
        for role in ROLES:
            if role in split:
                confidence, answer = softmax(split[role][row : row + 1], 1.0).max(dim=1)
                example[role] = {"answer": int(answer), "confidence": short(confidence)}
        records.append(example)
    return records


def save_thumbnails(path: Path, data: DataModule, summary: Mapping[str, Any]) -> None:
    """Write the images of a summary's examples, in its order, as `images` of an `.npz`."""
    rows = torch.tensor([e["row"] for e in summary["evidence"]["examples"]], dtype=torch.long)
    save_arrays(path, {"images": thumbnails(data, rows)})


def thumbnails(data: DataModule, rows: Tensor) -> np.ndarray:
    """Return small uint8 images `[n, H, W, C]` of rows of the test split, as the models saw it."""
    if not len(rows):
        return np.zeros((0, 1, 1, 1), dtype=np.uint8)
    pixels = data.clean_test_images(rows).permute(0, 2, 3, 1).numpy()
    side = max(pixels.shape[1:3])
    if side <= LARGEST_SIDE:
        return pixels
    height, width = (max(round(n * LARGEST_SIDE / side), 1) for n in pixels.shape[1:3])
    small = [Image.fromarray(image.squeeze()).resize((width, height)) for image in pixels]
    return np.stack([np.asarray(image).reshape(height, width, -1) for image in small])


def rounded(values: Tensor | Sequence[float]) -> list[float | None]:
    """Return numbers to six digits; None for what is undefined."""
    return [short(value) for value in values]


def short(value: Tensor | float) -> float | None:
    """Return a number to six digits; None if it is not finite."""
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else None
