"""What a run's numbers come to, in sentences: is a difference real, does a model tell anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

OTHERS = {"baseline": "the same student without a teacher", "teacher": "its teacher"}
UNBALANCED = 1.5  # the most frequent class of the test split over the rarest
HARM = 1.01  # times the NLL without a temperature, from which a fitted one does harm
BLIND = 0.95  # of the images of other classes that are given one label


def sentences(summary: Mapping[str, Any]) -> list[str]:
    """Return what a reader of the headline should know: differences, and models of one answer."""
    return [
        *blind_sentences(summary),
        *comparison_sentences(summary),
        *scaling_sentences(summary.get("student") or {}),
    ]


def scaling_sentences(student: Mapping[str, Any]) -> list[str]:
    """Return that the temperature that goes with the student does harm on test, where it does."""
    before, after = student.get("nll"), student.get("nll_after_scaling")
    if before is None or after is None or after <= HARM * before:
        return []
    return [
        f"The temperature fitted on validation, T = {student['temperature_star']:.2f}, makes the "
        f"student's probabilities worse on the test images (NLL {before:.3f} → {after:.3f}): these "
        "are not like those of validation, or those were too few."
    ]


def comparison_sentences(summary: Mapping[str, Any]) -> list[str]:
    """Return how the student compares with the baseline and its teacher; nothing where unknown."""
    comparisons = summary.get("comparisons") or {}
    present = [(comparisons[role], name) for role, name in OTHERS.items() if role in comparisons]
    return [comparison_sentence(*one) + confidence_sentence(one[0]) for one in present]


def comparison_sentence(comparison: Mapping[str, Any], other: str) -> str:
    """Return in words whether the student is better than another model, and how surely.

    Args:
        comparison: see `distill.metrics.uncertainty`.
        other: what the other model is called.
    """
    difference = comparison["differences"]["top1"]
    value, ends = difference["value"], difference["interval"]
    if comparison["verdict"] == "worse":
        value, ends = -value, [-end for end in reversed(ends)]
    p = p_value(comparison["mcnemar_p"])
    surely = f"95 %: {points(ends[0])} to {points(ends[1])}; McNemar p {p}"
    if comparison["verdict"] == "undecided":
        return (
            f"The student and {other} cannot be told apart on {comparison['images']:,} images "
            f"(difference {points(value, sign=True)} points of top-1, {surely})."
        )
    return (
        f"The student is {comparison['verdict']} than {other} by {points(value)} points of top-1 "
        f"({surely})."
    )


def confidence_sentence(comparison: Mapping[str, Any]) -> str:
    """Return how the NLL differs, after a space, where it clearly does."""
    difference = comparison["differences"]["nll"]
    low, high = difference["interval"] or (0.0, 0.0)
    if low <= 0 <= high:
        return ""
    way, ends = "lower" if high < 0 else "higher", sorted((abs(low), abs(high)))
    return (
        f" The student's NLL is {way} by {abs(difference['value']):.3f} "
        f"(95 %: {ends[0]:.3f} to {ends[1]:.3f})."
    )


def gain_sentences(gains: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what each setting of a sweep gains over the student without a teacher, over seeds.

    Args:
        gains: see `distill.report.leaderboard.gains`.
    """
    return [gain_sentence(gain) + confidence_sentence({"differences": gain}) for gain in gains]


def gain_sentence(gain: Mapping[str, Any]) -> str:
    """Return whether a setting is better than the student without a teacher, over its seeds."""
    value, ends = gain["top1"]["value"], gain["top1"]["interval"]
    who = "the student" if gain["setting"] == "student" else f"the student of {gain['setting']}"
    over = f"Over {gain['seeds']} seeds {who}"
    if ends[0] <= 0 <= ends[1]:
        return (
            f"{over} and {OTHERS['baseline']} cannot be told apart (difference "
            f"{points(value, sign=True)} points of top-1, 95 %: {points(ends[0])} to "
            f"{points(ends[1])})."
        )
    way = "better" if value > 0 else "worse"
    low, high = sorted(abs(end) for end in ends)
    return (
        f"{over} is {way} than {OTHERS['baseline']} by {points(abs(value))} points of top-1 "
        f"(95 %: {points(low)} to {points(high)})."
    )


def points(value: float, sign: bool = False) -> str:
    """Return a share in points of percent, with a minus that is one."""
    shown = f"{100 * value:{'+' if sign else ''}.1f}".replace("-", "−")
    return shown if shown.strip("+−") != "0.0" else "0.0"


def p_value(p: float) -> str:
    """Return a p-value with its relation, to be read after “p”."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}" if p < 0.1 else f"= {p:.2f}"


def blind_sentences(summary: Mapping[str, Any]) -> list[str]:
    """Return of which models it must be said that they answer one class for nearly everything."""
    names = {"student": "The student", "teacher": "The teacher", "baseline": "The baseline"}
    present = {name: summary.get(role) for role, name in names.items()}
    return [
        blind_sentence(name, numbers["favourite"], summary["classes"])
        for name, numbers in present.items()
        if numbers and is_blind(numbers.get("favourite"))
    ]


def is_blind(favourite: Mapping[str, Any] | None) -> bool:
    """Whether a model gives one label to nearly all images of other classes too."""
    return favourite is not None and (favourite["share_of_others"] or 0.0) >= BLIND


def blind_sentence(name: str, favourite: Mapping[str, Any], classes: Sequence[str]) -> str:
    """Return that a model answers one class only, or almost."""
    share, others = (100 * favourite[key] for key in ("share", "share_of_others"))
    almost = "" if favourite["share"] == 1 else "almost "
    answer = plain(classes[favourite["label"]])
    return (
        f"{name} answers {almost}only one class: “{answer}” for {share:.1f} % of the test images, "
        f"and for {others:.1f} % of those of other classes."
    )


def is_unbalanced(summary: Mapping[str, Any]) -> bool:
    """Whether some class of the test split has clearly more images than another."""
    counts = [count for count in (summary.get("majority") or {}).get("counts", ()) if count]
    return bool(counts) and (len(counts) == 1 or max(counts) >= UNBALANCED * min(counts))


def majority_name(summary: Mapping[str, Any]) -> str:
    """Return what a model that always answers the most frequent class is called."""
    return f"always “{shortened(plain(summary['majority']['class']))}”"


def shortened(name: str, most: int = 20) -> str:
    """Return a name that leaves room for others."""
    return name if len(name) <= most else name[: most - 1] + "…"


def plain(name: str) -> str:
    """Return a name whose control characters reach no terminal."""
    return "".join(c if c.isprintable() else "�" for c in name)
