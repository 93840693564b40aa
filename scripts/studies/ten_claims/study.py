"""What a study is: a claim, the runs it needs, what they say, and the verdict that follows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure as Canvas
from scipy.stats import t as student_t

from ten_claims.runs import Run, Runs

HOLDS, FAILS, OPEN = "holds", "fails", "open"
Colours = Mapping[str, str]


@dataclass(frozen=True)
class Finding:
    """One part of a claim, tested.

    Attributes:
        condition: under which it was tested, so that "holds only if CONDITION" is a sentence.
        outcome: HOLDS, FAILS, or OPEN where these runs cannot tell.
        measured: the numbers, with their uncertainty.
    """

    condition: str
    outcome: str
    measured: str


@dataclass(frozen=True)
class Result:
    """What a study found.

    Attributes:
        findings: the parts of the claim.
        table: rows of cells; the first is the heading.
        draw: draws the figure on a canvas in these colours.
        caption: what to see in the figure.
        lesson: what a reader should take home; it names no outcome, which are the findings'.
    """

    findings: Sequence[Finding]
    table: Sequence[Sequence[str]]
    draw: Callable[[Canvas, Colours], None]
    caption: str
    lesson: str = ""


@dataclass(frozen=True)
class Study:
    """A claim that can be checked.

    Attributes:
        name: of the command.
        claim: as the textbook has it.
        examine: the seeds and trained students → what was found.
        runs: seed → the students to be trained; none where nothing is trained.
    """

    name: str
    claim: str
    examine: Callable[[Sequence[int], Runs], Result]
    runs: Callable[[int], Sequence[Run]] = field(default=lambda seed: ())


def by_outcome(findings: Sequence[Finding]) -> tuple[list[str], list[str], list[str]]:
    """Return the conditions under which a claim holds, fails, and is open.

    Of several findings under one condition the worst decides.
    """
    worst: dict[str, str] = {}
    for one in findings:
        before = worst.get(one.condition, HOLDS)
        worst[one.condition] = max(before, one.outcome, key=(HOLDS, OPEN, FAILS).index)
    held, failed, unknown = ([condition for condition, outcome in worst.items() if outcome == which]
                             for which in (HOLDS, FAILS, OPEN))  # fmt: skip
    return held, failed, unknown


def in_short(findings: Sequence[Finding]) -> str:
    """Return what became of a claim in one plain sentence, before any condition."""
    held, failed, unknown = map(len, by_outcome(findings))
    tested = held + failed + unknown
    if held == tested:
        return "It holds."
    if failed == tested:
        return "It is wrong."
    if unknown == tested:
        return "These runs cannot tell."
    counts = ((held, "right"), (failed, "wrong"), (unknown, "undecided"))
    parts = [f"{word} in {count}" for count, word in counts if count]
    return f"Of {tested} ways to read it, it is {', '.join(parts[:-1])} and {parts[-1]}."


def verdict(findings: Sequence[Finding]) -> str:
    """Return *holds*, *fails*, *holds only if …* or *undecided if …*, from the outcomes alone."""
    held, failed, unknown = by_outcome(findings)
    if not held:
        told = "fails" if failed else "undecided"
        return f"{told}; undecided if {'; or if '.join(unknown)}" if failed and unknown else told
    if not failed and not unknown:
        return "holds"
    told = f"holds {'only ' if failed else ''}if {'; or if '.join(held)}"
    return f"{told}; undecided if {'; or if '.join(unknown)}" if unknown else told


def exact(condition: str, error: float, bound: float, what: str) -> Finding:
    """Return whether an error stays within a bound that arithmetic allows."""
    outcome = HOLDS if error <= bound else FAILS
    return Finding(condition, outcome, f"{what}: {error:.2g}, bound {bound:.2g}")


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % confidence interval (Student's t)."""

    mean: float
    half: float
    deviation: float = math.nan

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Return the interval of some values; unbounded for a single one."""
        mean, count = statistics.mean(values), len(values)
        if count < 2:
            return cls(mean, math.inf)
        deviation = statistics.stdev(values)
        return cls(mean, half_width(deviation, count), deviation)

    def seeds_to_decide(self, margin: float) -> int | None:
        """Return how many seeds would decide, if mean and deviation stayed what they are.

        None where a million would not.
        """
        fewest, most = 2, 1_000_000
        if math.isnan(self.deviation) or self._with(most).outcome(margin) == OPEN:
            return None
        while fewest < most:
            middle = (fewest + most) // 2
            if self._with(middle).outcome(margin) == OPEN:
                fewest = middle + 1
            else:
                most = middle
        return fewest

    def _with(self, seeds: int) -> Interval:
        return Interval(self.mean, half_width(self.deviation, seeds), self.deviation)

    def outcome(self, margin: float) -> str:
        """Return whether the mean is above zero; below `margin` a difference does not matter."""
        if self.mean - self.half > 0:
            return HOLDS
        return FAILS if self.mean + self.half < margin else OPEN

    def __str__(self) -> str:
        return f"{self.mean:+.3g} ± {self.half:.2g}"


def half_width(deviation: float, count: int) -> float:
    """Return half the width of the 95 % interval of a mean of so many values."""
    return float(student_t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)


def larger(
    condition: str,
    differences: Mapping[str, Sequence[float]],
    what: str,
    margin: float = 0.0,
) -> Finding:
    """Return whether all of several paired differences are above zero.

    Args:
        condition: of the finding.
        differences: name → a difference for each seed.
        what: is compared, and its unit.
        margin: the least difference that would matter, in the same unit: an interval that lies
            below it fails. One above zero holds, however small it is.
    """
    found = {name: Interval.of(values) for name, values in differences.items()}
    outcomes = [one.outcome(margin) for one in found.values()]
    outcome = FAILS if FAILS in outcomes else OPEN if OPEN in outcomes else HOLDS
    told = ", ".join(f"{name} {interval}" if name else str(interval)
                     for name, interval in found.items())  # fmt: skip
    return Finding(condition, outcome, f"{what}: {told}{what_would_decide(found, margin)}")


def what_would_decide(found: Mapping[str, Interval], margin: float) -> str:
    """Return how many seeds would decide what is open, for people; nothing where nothing is."""
    needed = [one.seeds_to_decide(margin) for one in found.values() if one.outcome(margin) == OPEN]
    if not needed:
        return ""
    if None in needed:
        return "; no number of seeds would decide it at these means"
    most = max(number for number in needed if number)
    return f"; about {most:,} seeds would decide it, if means and deviations stay as they are"


def minus(a: Sequence[float], b: Sequence[float], scale: float = 1.0) -> list[float]:
    """Return differences seed by seed, in another unit."""
    return [scale * (x - y) for x, y in zip(a, b, strict=True)]


def as_json(study: Study, result: Result) -> dict[str, Any]:
    """Return what `summary.json` says of a study."""
    return {
        "name": study.name,
        "claim": study.claim,
        "in_short": in_short(result.findings),
        "verdict": verdict(result.findings),
        "findings": [vars(one) for one in result.findings],
        "table": [list(row) for row in result.table],
        "lesson": result.lesson,
    }
