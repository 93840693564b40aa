"""The figures of a page: numbers in, a vector drawing with a sentence that says the same out.

Matplotlib draws with stand-in colours, which are then replaced by the page's CSS variables, so that
one drawing is readable on light and on dark paper.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import EngFormatter

Numbers = Sequence[float | None]  # None: undefined
Points = tuple[Sequence[float], Sequence[float]]
# Stand-ins that no drawing holds by chance → the variables of templates/style.css.
COLOURS = {
    "ink": "#010203",
    "faint": "#010204",
    "teacher": "#010205",
    "baseline": "#010206",
    "student": "#010207",
    "temperature": "#010208",
    "gap": "#010209",
}
ROLES = {"teacher": "teacher", "baseline": "without teacher", "student": "student"}
SERIES = ("student", "teacher", "temperature", "gap")
DASHES, SHAPES = ("-", "--", ":"), ("o", "s", "^", "D", "v")  # tell series of one colour apart
MARKERS = {"teacher": "s", "baseline": "^", "student": "o"}
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, found and scaled
    "text.parse_math": False,  # a class called $x$ is a name, not a formula
    "font.size": 9,
    "text.color": COLOURS["ink"],
    "axes.edgecolor": COLOURS["faint"],
    "axes.labelcolor": COLOURS["ink"],
    "xtick.color": COLOURS["ink"],
    "ytick.color": COLOURS["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": COLOURS["faint"],
    "grid.alpha": 0.35,
    "legend.frameon": False,
    "lines.markersize": 3.5,
}


@dataclass(frozen=True)
class Figure:
    """A drawing for a page.

    Attributes:
        svg: the drawing, safe to put into a page.
        caption: what a reader should know of it.
        alternative: the same in words, for those who do not see it.
    """

    svg: Markup
    caption: str
    alternative: str


@contextmanager
def drawing(name: str, width: float, height: float) -> Iterator[tuple[Canvas, dict[str, str]]]:
    """Give a canvas, and take its drawing as SVG when it is finished."""
    kept: dict[str, str] = {}
    # Ids must differ between the drawings of one page.
    with rc_context(STYLE | {"svg.hashsalt": name}):
        canvas = Canvas(figsize=(width, height), layout="constrained")
        yield canvas, kept
        file = io.StringIO()
        canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    kept["svg"] = themed(file.getvalue())


def themed(svg: str) -> str:
    """Return a drawing without its XML head, in the page's colours and at the page's width."""
    svg = svg[svg.index("<svg") :]
    head, _, rest = svg.partition(">")
    box = head.partition('viewBox="')[2].partition('"')[0]
    svg = f'<svg viewBox="{box}" xmlns:xlink="http://www.w3.org/1999/xlink" aria-hidden="true">'
    start, end = rest.find("<metadata>"), rest.find("</metadata>")
    svg += rest[:start] + rest[end + len("</metadata>") :] if start >= 0 else rest
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same names in every drawing of a page
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def reliability(role: str, title: str, bins: Mapping[str, Any], ece: float, name: str) -> Figure:
    """Draw accuracy over confidence, and under it how many examples each bin holds.

    Args:
        role: whose colour to use.
        title: what is shown.
        bins: `edges [B + 1]`, `count`, `accuracy` and `confidence` `[B]`, None where empty.
        ece: the expected calibration error, in [0, 1].
        name: of the drawing, unique on its page.
    """
    edges, count = bins["edges"], bins["count"]
    width = edges[1] - edges[0]
    full = [b for b, n in enumerate(count) if n]
    with drawing(name, 3.4, 3.6) as (canvas, kept):
        above, below = canvas.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        above.plot([0, 1], [0, 1], color=COLOURS["ink"], linewidth=1, linestyle=":")
        for b in full:
            accuracy, confidence = bins["accuracy"][b], bins["confidence"][b]
            above.bar(edges[b], accuracy, width, align="edge", color=COLOURS[role], alpha=0.75)
            above.plot([confidence] * 2, [accuracy, confidence], color=COLOURS["gap"], linewidth=2)
        above.set(ylim=(0, 1), xlim=(0, 1), ylabel="accuracy")
        above.set_title(f"{title}: ECE {100 * ece:.2f} %", fontsize=9)
        below.bar(edges[:-1], [max(n, 0) for n in count], width, align="edge", color=COLOURS[role])
        below.set_yscale("symlog", linthresh=1)
        below.set(xlabel="confidence", ylabel="examples", ylim=(0, 2 * max(count)))
        decades = [10**power for power in range(len(str(max(count))))]
        below.set_yticks(decades, [f"{decade:,}" for decade in decades])
        below.minorticks_off()
    said = "; ".join(
        f"{count[b]} examples at confidence {bins['confidence'][b]:.2f} are right in "
        f"{100 * bins['accuracy'][b]:.0f} %"
        for b in full
    )
    return Figure(
        Markup(kept["svg"]),
        "",
        f"Reliability diagram, {title}, ECE {100 * ece:.2f} percent: {said}.",
    )


def curve_over_temperature(
    curves: Mapping[str, Mapping[str, Numbers]], metric: str, chosen: Mapping[str, float | None]
) -> Figure:
    """Draw NLL or ECE of each role over the temperature that divides its logits.

    Args:
        curves: role → `temperature`, `nll` and `ece` `[P]`.
        metric: `"nll"` or `"ece"`.
        chosen: role → the temperature fitted on validation, or None.
    """
    said = []
    with drawing(f"scaling-{metric}", 3.8, 2.9) as (canvas, kept):
        axes = canvas.subplots()
        for role, curve in curves.items():
            values = scaled(curve[metric], metric)
            temperature = [float(t or math.nan) for t in curve["temperature"]]
            axes.plot(temperature, values, color=COLOURS[role], label=ROLES[role])
            if (fitted := chosen.get(role)) is not None:
                axes.axvline(fitted, color=COLOURS[role], linestyle=":", linewidth=1)
                said.append(f"{ROLES[role]}: T fitted on validation {fitted:.3g}")
            lowest = min((v, t) for v, t in zip(values, temperature, strict=True))
            best = f"lowest {label(metric)} on test {lowest[0]:.4g} at T = {lowest[1]:.3g}"
            said.append(f"{ROLES[role]}: {best}")
        axes.axvline(1, color=COLOURS["ink"], linewidth=0.6)
        axes.set_xscale("log")
        plain_ticks(axes, [0.125, 0.25, 0.5, 1, 2, 4, 8, 16])
        axes.set(xlabel="temperature that divides the logits", ylabel=label(metric))
        axes.legend()
    return Figure(
        Markup(kept["svg"]),
        f"{label(metric)} on test if all logits were divided by T. Dotted: fitted on validation.",
        f"{label(metric)} over the scaling temperature. {'; '.join(said)}.",
    )


def learning(name: str, curves: Mapping[str, Points], temperature: Points) -> Figure:
    """Draw values over epochs, with the objective's temperature on an axis of its own.

    Args:
        name: what the values are.
        curves: label → epochs and values.
        temperature: epochs and temperatures; empty where the objective has none.
    """
    with drawing(f"learning-{name}", 3.8, 2.9) as (canvas, kept):
        axes = canvas.subplots()
        for (title, (x, y)), colour in zip(curves.items(), SERIES, strict=False):
            style = "--" if title.startswith("train") else "-"
            own = "baseline" if title == ROLES["baseline"] else colour  # as in all other figures
            axes.plot(x, y, style, marker="o", color=COLOURS[own], label=title)
        axes.set(xlabel="epoch", ylabel=name)
        if temperature[0]:
            other = axes.twinx()
            other.plot(*temperature, color=COLOURS["temperature"], linewidth=1, label="temperature")
            other.set_ylabel("temperature", color=COLOURS["temperature"])
            other.set_ylim(bottom=0)
            other.grid(visible=False)
            other.spines["right"].set_visible(True)
        canvas.legend(loc="outside upper center", ncols=3)
    ends = ", ".join(f"{title} {y[0]:.4g} to {y[-1]:.4g}" for title, (_, y) in curves.items() if y)
    moved = temperature[1]
    said = f" Temperature {moved[0]:.3g} to {moved[-1]:.3g}." if moved else ""
    return Figure(
        Markup(kept["svg"]), f"{name} by epoch.", f"{name} from first to last epoch: {ends}.{said}"
    )


def risk_coverage(curves: Mapping[str, Mapping[str, Numbers]]) -> Figure:
    """Draw the error share among the surest answers over the share that is answered.

    Args:
        curves: role → `coverage` and `risk` `[P]`, in [0, 1].
    """
    said = []
    with drawing("risk-coverage", 3.8, 2.9) as (canvas, kept):
        axes = canvas.subplots()
        for role, curve in curves.items():
            coverage, risk = scaled(curve["coverage"], "top1"), scaled(curve["risk"], "top1")
            axes.plot(coverage, risk, color=COLOURS[role], label=ROLES[role])
            half = min(zip(coverage, risk, strict=True), key=lambda point: abs(point[0] - 50))
            said.append(
                f"{ROLES[role]}: {half[1]:.2f} percent errors among the surest {half[0]:.0f} "
                f"percent, {risk[-1]:.2f} among all"
            )
        axes.set(xlabel="answered, surest first (%)", ylabel="errors among them (%)")
        axes.set_ylim(bottom=0)
        axes.legend()
    return Figure(
        Markup(kept["svg"]),
        "Errors among the answers that are kept when the least sure ones are left to a person.",
        f"Risk over coverage. {'; '.join(said)}.",
    )


def over_axis(
    metric: str,
    axis: str,
    series: Mapping[str, Sequence[tuple[float, float, float, int]]],
    reference: float | None,
) -> Figure:
    """Draw a metric over what a sweep varies: mean and standard deviation over seeds.

    Args:
        metric: such as `top1`, with its values as in `summary.json`.
        axis: the name of what varies.
        series: label → `(x, mean, deviation, number of runs)` in ascending x.
        reference: the mean of the students without a teacher, or None.
    """
    said = []
    with drawing(f"sweep-{metric}", 3.8, 2.9) as (canvas, kept):
        axes = canvas.subplots()
        looks = zip(cycle(SERIES), cycle(SHAPES), strict=False)
        for number, ((title, points), (colour, shape)) in enumerate(
            zip(series.items(), looks, strict=False)
        ):
            x, count = [p[0] for p in points], [p[3] for p in points]
            mean, spread = (scaled([p[i] for p in points], metric) for i in (1, 2))
            dash = DASHES[number // len(SERIES) % len(DASHES)]
            look: Any = {"marker": shape, "linestyle": dash, "color": COLOURS[colour]}
            axes.errorbar(x, mean, spread, capsize=3, label=title, **look)
            said += [
                f"{title} at {a:g}: {m:.4g}" + (f" ± {s:.2g} over {n} seeds" if n > 1 else "")
                for a, m, s, n in zip(x, mean, spread, count, strict=True)
            ]
        if reference is not None:
            (value,) = scaled([reference], metric)
            axes.axhline(value, color=COLOURS["baseline"], linestyle=":")
            place: Any = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
            axes.annotate("without teacher", (0.99, value), color=COLOURS["baseline"], **place)
            said.append(f"without teacher {value:.4g}")
        if all(point[0] > 0 for points in series.values() for point in points):
            axes.set_xscale("log")
            plain_ticks(axes, sorted({p[0] for points in series.values() for p in points}))
        axes.set(xlabel=axis, ylabel=label(metric))
        if len(series) > 1:
            canvas.legend(loc="outside upper center", ncols=1, fontsize=7)
    return Figure(
        Markup(kept["svg"]),
        "",
        f"{label(metric)} over {axis}. {'; '.join(said)}.",
    )


COSTS = {"params": "parameters", "flops": "FLOPs of one image", "latency_ms": "latency (ms)"}


def over_cost(cost: str, kinds: Sequence[tuple[str, float, float, float, int]]) -> Figure:
    """Draw accuracy over what students cost: mean and standard deviation over the runs of each.

    Args:
        cost: `params`, `flops` or `latency_ms`.
        kinds: `(name, cost, mean top-1, deviation, number of runs)` in ascending cost.
    """
    said = []
    with drawing(f"cost-{cost}", 3.8, 2.9) as (canvas, kept):
        axes = canvas.subplots()
        names = sorted({kind[0] for kind in kinds})  # so that each looks alike in all figures
        looks = dict(zip(names, zip(cycle(SERIES), cycle(SHAPES), strict=False), strict=False))
        for name, value, *top1, count in kinds:
            (mean, spread), (colour, shape) = scaled(top1, "top1"), looks[name]
            look: Any = {"marker": shape, "linestyle": "", "color": COLOURS[colour]}
            axes.errorbar([value], [mean], [spread], capsize=3, label=name, **look)
            over = f" ± {spread:.2g} over {count} runs" if count > 1 else ""
            said.append(f"{name} at {value:,.4g}: {mean:.4g}{over}")
        axes.set_xscale("log")
        plain_amounts(axes)
        axes.set(xlabel=COSTS[cost], ylabel=label("top1"))
        if len(kinds) <= 12:
            canvas.legend(loc="outside upper center", ncols=1, fontsize=7)
    return Figure(
        Markup(kept["svg"]), "", f"{label('top1')} over {COSTS[cost]}. {'; '.join(said)}."
    )


def plain_amounts(axes: Axes) -> None:
    """Mark a logarithmic axis at 1, 2 and 5 of each power of ten, as a person writes them."""
    low, high = axes.get_xlim()
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [d * 10.0**p for p in powers for d in (1, 2, 5) if low <= d * 10.0**p <= high]
    if len(marks) > 5:
        marks = [mark for mark in marks if f"{mark:e}"[0] == "1"]
    if not marks:  # of costs that hardly differ
        marks = [float(f"{math.sqrt(low * high):.3g}")]
    written = [EngFormatter(sep="")(mark) if mark >= 1000 else f"{mark:g}" for mark in marks]
    axes.set_xticks(marks, written)
    axes.minorticks_off()


def cycle(names: Sequence[str]) -> Iterator[str]:
    """Return the names again and again."""
    while True:
        yield from names


def plain_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Mark these values of a logarithmic axis, as they are written."""
    low, high = axes.get_xlim()
    marks = [value for value in values if low <= value <= high]
    axes.set_xticks(marks, [f"{value:g}" for value in marks])
    axes.minorticks_off()


def label(metric: str) -> str:
    """Return what a person calls a metric."""
    names = {"nll": "NLL", "ece": "ECE (%)", "top1": "top-1 (%)", "top5": "top-5 (%)"}
    return names.get(metric, metric)


def scaled(values: Sequence[Any], metric: str) -> list[float]:
    """Return values as they are shown: shares in percent, what is missing as NaN."""
    factor = 1.0 if metric == "nll" else 100.0
    return [math.nan if value is None else factor * value for value in values]
