"""The student's own description: `distill.json` and the model card."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from distill.data import DataModule

SHOWN = ("top1", "top5", "nll", "brier", "ece", "ece_after_scaling", "agreement")


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
        "metrics": {"student": summary["student"], "baseline": summary["baseline"]},
        "command": summary["command"],
        "versions": summary["versions"],
        "seed": summary["seed"],
    }


def fitted_vector(fit: dict[str, Any]) -> dict[str, Any] | None:
    """Return a factor and a bias for each class, where the fit found them."""
    return {k: fit[k] for k in ("scale", "bias")} if fit["status"] == "ok" else None


def model_card(facts: dict[str, Any]) -> str:
    """Return a model card in Markdown, made of facts alone; the licence is left to its owner."""
    student, baseline = facts["metrics"]["student"], facts["metrics"]["baseline"]
    lines = [
        "---",
        "library_name: timm",
        "pipeline_tag: image-classification",
        "tags: [knowledge-distillation]",
        "---",
        f"# {facts['architecture']} distilled on {facts['data']}",
        "",
        f"A student of {facts['teacher'] or 'the labels alone'}, trained for "
        f"{facts['epochs']['last']} epochs with `{facts['command']}`.",
        "",
        "| test split, last epoch | student | same student without a teacher |",
        "|---|---|---|",
        *(
            f"| {name} | {cell(student.get(name))} | {cell((baseline or {}).get(name))} |"
            for name in SHOWN
        ),
        "",
        "```python",
        "model = timm.create_model('local-dir:PATH_TO_THIS_FOLDER', pretrained=True).eval()",
        "```",
        "",
        scaling_sentence(facts),
        "",
        "Versions: " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items()) + ".",
    ]
    return "\n".join(lines) + "\n"


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
