"""What a study leaves: its figure as PNG and SVG, `summary.json`, and a page over all of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas

from distill.report import figures, page
from distill.utils.files import write_whole
from ten_claims.study import FAILS, Finding, Result, Study, as_json, in_short, verdict

SIZE = (7.6, 3.2)  # inches


@dataclass(frozen=True)
class Checked:
    """A study with what it found."""

    study: Study
    result: Result

    @property
    def verdict(self) -> str:
        """Return the verdict in words."""
        return verdict(self.result.findings)

    @property
    def in_short(self) -> str:
        """Return what became of the claim in one sentence."""
        return in_short(self.result.findings)

    @property
    def wrong(self) -> list[Finding]:
        """Return the parts of the claim that do not hold."""
        return [one for one in self.result.findings if one.outcome == FAILS]


def write_study(folder: Path, checked: Checked, run_metadata: Mapping[str, Any]) -> None:
    """Write a study's figure and numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    paper = light_palette()
    with rc_context(on_paper(paper)):
        canvas = Canvas(figsize=SIZE, layout="constrained")
        checked.result.draw(canvas, paper)
        for kind in ("png", "svg"):
            canvas.savefig(folder / f"figure.{kind}", dpi=150, facecolor=paper["paper"])
    summary = {**as_json(checked.study, checked.result), **run_metadata}
    write_whole(folder / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")


def write_page(path: Path, found: Mapping[int, Checked], run_metadata: Mapping[str, Any]) -> None:
    """Write one self-contained page over studies, by number."""
    template = page.environment().from_string(
        (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    )
    drawn = {number: embedded(checked) for number, checked in found.items()}
    write_whole(path, page.rendered(template, found=found, drawn=drawn, **run_metadata))


def embedded(checked: Checked) -> figures.Figure:
    """Return a study's figure in the page's own colours."""
    with figures.drawing(checked.study.name, *SIZE) as (canvas, kept):
        checked.result.draw(canvas, figures.COLOURS)
    said = f"{checked.study.claim} {checked.result.caption} The table holds the numbers."
    return figures.Figure(Markup(kept["svg"]), checked.result.caption, said)


def light_palette() -> dict[str, str]:
    """Return the page's colours on light paper, by name."""
    style = page.asset("style.css")
    return dict(re.findall(r"--(\w+): (#\w{6});", style.partition("@media")[0]))


def on_paper(paper: Mapping[str, str]) -> Any:
    """Return the figures' style in real colours."""
    named = {stand_in: paper[name] for name, stand_in in figures.COLOURS.items()}
    return {key: named.get(value, value) if isinstance(value, str) else value
            for key, value in figures.STYLE.items()}  # fmt: skip


def as_markdown(found: Mapping[int, Checked]) -> str:
    """Return the headline table: a line for each claim."""
    lines = ["| | claim | in short | more exactly |", "|---|---|---|---|"]
    lines += [f"| {number} | {one.study.claim} | {one.in_short} | {one.verdict} |"
              for number, one in found.items()]  # fmt: skip
    return "\n".join(lines)
