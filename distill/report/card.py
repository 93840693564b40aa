"""The student's own description: `distill.json` and the model card."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from distill.data import DataModule

SHOWN = {
    "top-1": "top1",
    "top-5": "top5",
    "NLL": "nll",
    "NLL after temperature scaling": "nll_after_scaling",
    "Brier": "brier",
    "Brier after temperature scaling": "brier_after_scaling",
    "ECE": "ece",
    "ECE after temperature scaling": "ece_after_scaling",
    "agreement with the teacher": "agreement",
}


def bundle_facts(cfg: DictConfig, data: DataModule, summary: dict[str, Any]) -> dict[str, Any]:
    """Return what a bundle says of itself; `temperature` is null unless the fit succeeded."""
    config = summary["config"]
    return {
        "temperature": summary["student"]["temperature_star"],
        "temperature_status": summary["student"]["temperature_status"],
        "vector_scaling": fitted_vector(summary["vector_scaling"]),
        "data": data.source.name,
        "architecture": cfg.student.name,
        "teacher": (summary["teacher"] or {}).get("name"),
        "objective": config["objective"],
        "annealing": config["annealing"],
        "epochs": summary["epochs"],
        "images": summary["images"],
        "metrics": {"student": summary["student"], "baseline": summary["baseline"]},
        "command": summary["command"],
        "versions": summary["versions"],
        "seed": summary["seed"],
    }


def fitted_vector(fit: dict[str, Any]) -> dict[str, Any] | None:
    """Return a factor and a bias for each class, where the fit found them."""
    return {k: fit[k] for k in ("scale", "bias")} if fit["status"] == "ok" else None


def model_card(facts: dict[str, Any], classes: Sequence[str]) -> str:
    """Return a model card in Markdown, made of facts alone; the licence is left to its owner.

    Args:
        facts: see `bundle_facts`.
        classes: their names in label order.
    """
    student, baseline = facts["metrics"]["student"], facts["metrics"]["baseline"] or {}
    images = facts["images"]
    paragraphs = [
        "---\nlibrary_name: timm\npipeline_tag: image-classification\n"
        "tags: [knowledge-distillation]\n# license: only its owner can say\n---\n"
        f"# {facts['architecture']} distilled on {escape(facts['data'])}",
        f"A student of {escape(facts['teacher'] or 'the labels alone')}, "
        f"{student['params']:,} parameters. `{facts['command']}`",
        f"**Classes** ({len(classes)}): {listed(classes)}.",
        f"**Objective**: {described(facts['objective'])}.",
        f"**Protocol**: {facts['epochs']['last']} epochs on {images['train']:,} images, seed "
        f"{facts['seed']}; the numbers are the last epoch's on {images['test']:,} test images that "
        f"no decision saw; what is fitted was fitted on {images['val']:,} validation images.",
        "| | student | same student without a teacher |\n|---|---|---|\n"
        + "\n".join(
            f"| {label} | {cell(student.get(key))} | {cell(baseline.get(key))} |"
            for label, key in SHOWN.items()
        ),
        scaling_sentence(facts),
        "```python\n"
        "model = timm.create_model('local-dir:PATH_TO_THIS_FOLDER', pretrained=True).eval()\n"
        "config = timm.data.resolve_model_data_config(model)  # what it expects of images\n```",
        "**Licence**: not named here. That of the data, of the teacher and of initial weights may "
        "bear on it.",
        "Versions: " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items()) + ".",
    ]
    return "\n\n".join(paragraphs) + "\n"


def listed(names: Sequence[str], most: int = 50) -> str:
    """Return names for a text, and how many are left out."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(escape, names[:most])) + more


def escape(name: str) -> str:
    """Return a name that is nothing but text in Markdown, which may come from a stranger's data."""
    return html.escape(re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", " ".join(name.split())))


def described(objective: dict[str, Any]) -> str:
    """Return an objective in words: its terms, their weights, temperature and α."""
    terms = (f"{term['loss']} × {term.get('weight', 1)}" for term in objective["terms"].values())
    shared = {"temperature": objective.get("temperature"), "α": objective.get("alpha")}
    shared["label smoothing"] = objective.get("label_smoothing") or None
    keep = objective.get("keep") or {}
    shared |= {f"labels kept by {k.replace('_', ' ')}": v for k, v in keep.items() if v}
    told = [f"{name} {value}" for name, value in shared.items() if value is not None]
    return escape("; ".join([" + ".join(terms), *told]))


def scaling_sentence(facts: dict[str, Any]) -> str:
    """Return what a user should know of the fitted temperature."""
    if facts["temperature"] is None:
        status = facts["temperature_status"]
        return f"No temperature is applied: the fit on validation ended as {status}."
    return (
        f"Divide the logits by {facts['temperature']:.4f} for calibrated probabilities "
        "(fitted on validation), or use `distill.load_student(path, calibrated=True)`."
    )


def cell(value: float | None) -> str:
    """Return a table cell."""
    return "–" if value is None else f"{value:.4f}"
