"""The student's own description: `distill.json` and the model card."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from distill.data import DataModule
from distill.objective.term import build_term
from distill.report.words import comparison_sentences

SHOWN = {
    "top-1": "top1",
    "top-5": "top5",
    "balanced accuracy": "balanced_accuracy",
    "NLL": "nll",
    "NLL after temperature scaling": "nll_after_scaling",
    "Brier": "brier",
    "Brier after temperature scaling": "brier_after_scaling",
    "ECE": "ece",
    "ECE after temperature scaling": "ece_after_scaling",
    "agreement with the teacher": "agreement",
}


def bundle_facts(
    cfg: DictConfig,
    data: DataModule,
    summary: dict[str, Any],
    role: str = "student",
    vector: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what a bundle says of itself; `temperature` is null unless the fit succeeded.

    Args:
        cfg: the run's configuration.
        data: the run's data.
        summary: the run's numbers.
        role: `student`, of the last epoch, or `student_best`.
        vector: the fit of a factor and a bias for each class; None is the summary's, the student's.
    """
    config = summary["config"]
    return {
        "temperature": summary[role]["temperature_star"],
        "temperature_status": summary[role]["temperature_status"],
        "vector_scaling": fitted_vector(vector or summary["vector_scaling"]),
        "epoch": epoch_of(role, summary["epochs"], cfg.optimized_metric),
        "data": data.source.name,
        "pictures": data.pictures,
        "architecture": cfg.student.name,
        "teacher": (summary["teacher"] or {}).get("name"),
        "initial_weights": initial_weights(cfg.student),
        "objective": config["objective"],
        "annealing": config["annealing"],
        "epochs": summary["epochs"],
        "images": summary["images"],
        "unlabeled": summary.get("unlabeled"),
        "metrics": {"student": summary[role], "baseline": summary["baseline"]},
        "comparisons": summary["comparisons"] if role == "student" else {},
        "command": summary["command"],
        "versions": summary["versions"],
        "seed": summary["seed"],
    }


def epoch_of(role: str, epochs: dict[str, Any], metric: str) -> dict[str, Any]:
    """Return which epoch a bundle is of, counted from 1, and how that was chosen."""
    chosen = "best" if role == "student_best" else "last"
    number = epochs[chosen]
    by = {"by": metric} if chosen == "best" else {}
    return {"number": number, "chosen": chosen, **by, "is_last": number == epochs["last"]}


def initial_weights(student: DictConfig) -> str:
    """Return where a student began, without the folders of whoever trained it."""
    if student.checkpoint:
        return f"checkpoint {os.path.basename(os.path.abspath(student.checkpoint))}"
    return "published with timm" if student.pretrained else "random"


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
    moved = movements(facts["objective"], facts["annealing"])
    teacher = facts["teacher"] if asks_teacher(facts["objective"], moved) else None
    tags = "tags: [knowledge-distillation]\n" if teacher else ""
    shown = {label: key for label, key in SHOWN.items() if teacher or key != "agreement"}
    paragraphs = [
        "---\nlibrary_name: timm\npipeline_tag: image-classification\n"
        f"{tags}# license: only its owner can say\n---\n"
        f"# {facts['architecture']} {'distilled' if teacher else 'trained'} on "
        f"{escape(facts['data'])}",
        f"A student of {escape(teacher or 'the labels alone')}, "
        f"{student['params']:,} parameters. `{facts['command']}`",
        f"**Classes** ({len(classes)}): {listed(classes)}.",
        f"**Initial weights**: {escape(facts['initial_weights'])}.",
        f"**Objective**: {described(facts['objective'], moved)}.",
        f"**Protocol**: {facts['epochs']['last']} epochs on {images['train']:,} images, seed "
        f"{facts['seed']}; the numbers are {epoch_text(facts)} on {images['test']:,} test images "
        f"that no decision saw; what is fitted was fitted on {images['val']:,} validation images.",
        *([f"**Unlabelled pictures**: {text}"] if (text := unlabeled_text(facts)) else []),
        "| | student | same student without a teacher |\n|---|---|---|\n"
        + "\n".join(
            f"| {label} | {cell(student, key)} | {cell(baseline, key)} |"
            for label, key in shown.items()
        ),
        *comparison(facts),
        scaling_sentence(facts),
        "```python\n"
        "model = timm.create_model('local-dir:PATH_TO_THIS_FOLDER', pretrained=True).eval()\n"
        "config = timm.data.resolve_model_data_config(model)  # what it expects of images\n```",
        "**Licence**: not named here. That of the data, of the teacher and of initial weights may "
        "bear on it.",
        "Versions: " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items()) + ".",
    ]
    return "\n\n".join(paragraphs) + "\n"


def epoch_text(facts: dict[str, Any]) -> str:
    """Return whose numbers a card gives, for a sentence."""
    epoch = facts.get("epoch") or {}
    if epoch.get("chosen") != "best":
        return "the last epoch's"
    last = ", which is the last," if epoch["is_last"] else ""
    return f"those of epoch {epoch['number']}{last} the best on validation by {epoch['by']},"


def listed(names: Sequence[str], most: int = 50) -> str:
    """Return names for a text, and how many are left out."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(escape, names[:most])) + more


def escape(name: str) -> str:
    """Return a name that is nothing but text in Markdown, which may come from a stranger's data."""
    return html.escape(re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", " ".join(name.split())))


def asks_teacher(objective: dict[str, Any], moved: Mapping[str, str]) -> bool:
    """Whether a term that has a weight compares with a teacher, or the teacher judges labels."""
    if (objective.get("sample_selection") or {}).get("agreement"):
        return True
    if objective.get("alpha") == 0 and "alpha" not in moved:
        return False
    terms = {name: build_term(name, spec) for name, spec in objective["terms"].items()}
    return any(
        term.uses_teacher and (term.weight or f"terms.{name}.weight" in moved)
        for name, term in terms.items()
    )


def movements(objective: dict[str, Any], annealing: dict[str, Any] | None) -> dict[str, str]:
    """Return from where to where, and how, each value went that training moved."""
    schedules = (objective.get("schedules") or {}).values()
    moved = [node for node in (annealing, *schedules) if node and node.get("end", 1.0) is not None]
    return {node.get("value", "temperature"): movement(objective, node) for node in moved}


def movement(objective: dict[str, Any], node: dict[str, Any]) -> str:
    """Return how one value went; see `distill.training.callbacks.annealing.Annealing`."""
    start, warmup = node.get("start"), node.get("warmup") or 0
    if start is None:
        start = own_value(objective, node.get("value", "temperature"))
    held = f"{warmup:.0%} of training" if warmup < 1 else f"{warmup} {node.get('unit', 'epoch')}s"
    after = f" after {held}" if warmup else ""
    return f"{start} → {node.get('end', 1.0)} ({node.get('schedule', 'cosine')}{after})"


def own_value(objective: dict[str, Any], name: str) -> Any:
    """Return what an objective says of one of its values; what it leaves out is 1."""
    value: Any = objective
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return 1.0 if value is None else value


def described(objective: dict[str, Any], moved: Mapping[str, str] | None = None) -> str:
    """Return an objective in words: its terms, their weights, temperature and α.

    Args:
        objective: its configuration.
        moved: see `movements`.
    """
    left = dict(moved or {})
    terms = []
    for name, spec in objective["terms"].items():
        term = {"loss": spec} if isinstance(spec, str) else spec
        weight = left.pop(f"terms.{name}.weight", term.get("weight", 1))
        terms.append(f"{term['loss']} × {weight}")
    shared = {"temperature": left.pop("temperature", objective.get("temperature"))}
    if learned := objective.get("curriculum"):
        start, scope = shared["temperature"], learned.get("scope", "run")
        shared["temperature"] = f"learned per {scope}, from {start}"
    shared["α"] = left.pop("alpha", objective.get("alpha"))
    shared["label smoothing"] = objective.get("label_smoothing") or None
    for name, value in (objective.get("sample_selection") or {}).items():
        kept = left.pop(f"sample_selection.{name}", value)
        shared[f"labels kept by {name.replace('_', ' ')}"] = kept or None
    settings = [f"{name} {value}" for name, value in (shared | left).items() if value is not None]
    return escape("; ".join([" + ".join(terms), *settings]))


def unlabeled_text(summary: Mapping[str, Any]) -> str | None:
    """Return what a run, by its summary or a bundle's facts, made of pictures without labels."""
    counts = summary.get("unlabeled")
    if not counts:
        return None
    left_out = f", {counts['left_out']:,} left out as held-out images" if counts["left_out"] else ""
    return (
        f"{counts['images']:,} pictures without labels{left_out}; {counts['per_batch']:,} of the "
        f"{counts['per_batch'] + counts['labelled_per_batch']:,} in each batch of the student "
        f"were of them, {counts['views_shown']:,} views in all. The student without a teacher "
        "learned from the same labelled batches."
    )


def scaling_sentence(facts: dict[str, Any]) -> str:
    """Return what a user should know of the fitted temperature."""
    if facts["temperature"] is None:
        status = facts["temperature_status"]
        return f"No temperature is applied: the fit on validation ended as {status}."
    return (
        f"Divide the logits by {facts['temperature']:.4f} for calibrated probabilities "
        "(fitted on validation), or use `distill.load_student(path, calibrated=True)`."
    )


def comparison(facts: Mapping[str, Any]) -> list[str]:
    """Return what the differences are worth, as a paragraph; none where nothing was compared."""
    sentences = comparison_sentences(facts)
    if not sentences:
        return []
    return [
        " ".join([*sentences, "Intervals are over which images happened to be in the test split."])
    ]


def cell(numbers: Mapping[str, Any], key: str) -> str:
    """Return a table cell: a number and, where there is one, its interval."""
    value, ends = numbers.get(key), (numbers.get("intervals") or {}).get(key)
    if value is None:
        return "–"
    return f"{value:.4f} ({ends[0]:.3f}–{ends[1]:.3f})" if ends else f"{value:.4f}"
