"""Trained models judged: their answers to the held-out splits, and the numbers that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import nan
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from distill import metrics, report
from distill.config import build, read
from distill.data import DataModule
from distill.data.condition.image_corruptions import SEVERITIES, ImageCorruption
from distill.data.sources.splits import Split
from distill.data.views.views import CLEAN
from distill.metrics import (
    VectorScaling,
    class_numbers,
    cost_numbers,
    evaluate,
    fit_vector_scaling,
    uncertainty,
    vector_numbers,
)
from distill.metrics.cost import costs_of_models, parameters
from distill.teacher.precision import checked_device
from distill.teacher.teacher import Teacher
from distill.training.auxiliary import direct_teacher
from distill.training.module import Distiller
from distill.training.trainer import reported_topk, single_device
from distill.utils.files import save_arrays
from distill.utils.json_files import finite

SPLITS = ("val", "test")  # a temperature is fitted on the first and judged on the second
ROLES = ("teacher", "baseline", "student", "student_best")


@dataclass(frozen=True)
class Predictions:
    """What models say of the held-out splits: split → role, `target` and `index` → tensor.

    Logits are float32 `[N, K]`, labels and indices `[N]`. Roles are `student`, `teacher`,
    `baseline`, `student_best`, and `teacher_1`, `teacher_2`, … for the teachers of assistants.
    """

    splits: dict[str, dict[str, Tensor]]
    device: torch.device  # on which the models answered

    def add(self, role: str, answers: Predictions) -> None:
        """Take the student of other answers to the same splits as a further role."""
        for split, values in self.splits.items():
            assert torch.equal(values["index"], answers.splits[split]["index"])
            values[role] = answers.splits[split]["student"]

    def of(self, role: str, split: str) -> tuple[Tensor, Tensor]:
        """Return a model's logits and the labels."""
        return self.splits[split][role], self.splits[split]["target"]

    def save(self, path: Path) -> None:
        """Write every array, named `SPLIT_ROLE`, as an uncompressed `.npz`."""
        arrays = {
            f"{split}_{name}": tensor
            for split, values in self.splits.items()
            for name, tensor in values.items()
        }
        save_arrays(path, arrays)


def predict(cfg: DictConfig, module: Distiller, data: DataModule) -> Predictions:
    """Return student's and teacher's answers to both splits, on one device and in float32."""
    trainer = single_device(cfg)
    batches = trainer.predict(module, datamodule=data)
    assert batches is not None
    if not len(data.val):  # of a single loader Lightning gives no list
        return Predictions({"test": joined(batches)}, trainer.strategy.root_device)
    answers = {split: joined(part) for split, part in zip(SPLITS, batches, strict=True)}
    return Predictions(answers, trainer.strategy.root_device)


def joined(batches: Sequence[Any]) -> dict[str, Tensor]:
    """Return the answers of several batches as one, on the CPU."""
    return {key: torch.cat([batch[key].cpu() for batch in batches]) for key in batches[0]}


def summary(
    cfg: DictConfig,
    data: DataModule,
    answers: Predictions,
    models: Mapping[str, nn.Module],
    further: Sequence[Mapping[str, Mapping[str, Any]]] = (),
    kept: Mapping[str, Mapping[str, Any]] | None = None,
    costs: Tensor | None = None,
) -> dict[str, Any]:
    """Return every number of a run: each model's own, and the diagnostics that its page shows.

    Args:
        cfg: the run's configuration.
        data: the run's data.
        answers: of the models to the held-out splits.
        models: role → model; `student` is there, the others may be.
        further: more numbers, each role → its own.
        kept: role → what its bundle says of its calibration, which is applied; None fits it on
            validation.
        costs: what each decision costs for each true class, `[K, D]`, where a table was given.
    """
    measured = costs_of(cfg, data, models, answers.device)
    topk = reported_topk(cfg, data)
    intervals, comparisons = uncertain(answers, models, topk)
    results: dict[str, Any] = dict.fromkeys(ROLES)
    for role, model in models.items():
        own = None if kept is None else kept.get(role, {})
        numbers = numbers_on_test(cfg, data, answers, role, costs, own)
        results[role] = numbers | {"params": parameters(model)}
        for more in (*further, measured, {role: {"intervals": intervals[role]}}):
            results[role] |= more.get(role, {})
    if "teacher" in models:
        results["teacher"] = {"name": direct_teacher(cfg), **results["teacher"]}
    results["chain"] = [results.pop(role) for role in list(results) if role.startswith("teacher_")]
    vector = vector_of(answers, kept)
    if vector is not None:
        results["student"] |= vector_numbers(vector, *answers.of("student", "test"))
    validation = None
    if "val" in answers.splits:
        held_out = answers.of("student", "val")
        validation = evaluate(*held_out, topk=topk) | classes_on_validation(*held_out)
    return {
        **results,
        "comparisons": comparisons,
        "majority": majority(answers.splits["test"]["target"], data.classes),
        "validation": validation,
        "vector_scaling": vector and asdict(vector),
        "evidence": report.diagnostics(answers.splits["test"], results),
    }


def uncertain(
    answers: Predictions, models: Mapping[str, nn.Module], topk: Sequence[int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return intervals for the test split's numbers by role, and what the student is to others."""
    roles = ("student", *(role for role in models if role != "student"))
    test = answers.splits["test"]
    return uncertainty(
        {role: test[role] for role in roles},
        test["target"],
        [role for role in ("baseline", "teacher") if role in models],
        topk=topk,
    )


def majority(target: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Return the most frequent class of labels `[N]`: `label`, `class`, `share`, all `counts` [K].

    Also what a model that always names it comes to: its `share` is the top-1, beside it are
    `balanced_accuracy` and `macro_f1`.
    """
    counts = torch.bincount(target.long(), minlength=len(classes))
    label = int(counts.argmax())
    always = torch.full_like(target, label)
    return {
        "label": label,
        "class": classes[label],
        "share": int(counts[label]) / len(target),
        "balanced_accuracy": float(metrics.balanced_accuracy(always, target, len(classes))),
        "macro_f1": float(metrics.macro_f1(always, target, len(classes))),
        "counts": counts.tolist(),
    }


def classes_on_validation(logits: Tensor, target: Tensor) -> dict[str, float]:
    """Return the numbers of validation in which each class counts the same."""
    answers, classes = logits.argmax(dim=1), logits.shape[1]
    measures = {"balanced_accuracy": metrics.balanced_accuracy, "macro_f1": metrics.macro_f1}
    return {name: float(of(answers, target, classes)) for name, of in measures.items()}


def costs_of(
    cfg: DictConfig, data: DataModule, models: Mapping[str, nn.Module], device: torch.device
) -> dict[str, Any]:
    """Return what models cost to store and to run at the image size of each, by role."""
    alike: dict[tuple[tuple[int, ...], torch.device], dict[str, nn.Module]] = {}
    for role, model in models.items():
        if role != "student_best":  # the same model as the student
            shape = (data.in_chans, *size_for(cfg, data, role))
            alike.setdefault((shape, device_for(cfg, role, device)), {})[role] = model
    measured = [costs_of_models(own, *where) for where, own in alike.items()]
    return {role: costs for one in measured for role, costs in one.items()}


def device_for(cfg: DictConfig, role: str, device: torch.device) -> torch.device:
    """Return where a model answers: a teacher may have its own device."""
    own = cfg.teacher.get("device") if role == first_teacher(cfg) else None
    return device if own is None else checked_device(own)


def first_teacher(cfg: DictConfig) -> str:
    """Return the role of the teacher that `cfg.teacher` names."""
    return "teacher_1" if cfg.get("assistants") else "teacher"


def size_for(cfg: DictConfig, data: DataModule, role: str) -> tuple[int, int]:
    """Return the height and width of what a model is shown: a teacher may have its own."""
    own = role == first_teacher(cfg)
    return build.model_shape(cfg.teacher, data).image_size if own else data.image_size


def vector_of(
    answers: Predictions, kept: Mapping[str, Mapping[str, Any]] | None
) -> VectorScaling | None:
    """Return the student's vector scaling: fitted on validation, or its bundle's, if it has one."""
    if kept is None:
        return fit_vector_scaling(*answers.of("student", "val"))
    scaling = kept.get("student", {}).get("vector_scaling")
    return VectorScaling(scaling["scale"], scaling["bias"], "ok", nan, nan) if scaling else None


def numbers_on_test(
    cfg: DictConfig,
    data: DataModule,
    answers: Predictions,
    role: str,
    costs: Tensor | None,
    kept: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the test split's numbers of one model.

    What is fitted is fitted on validation, or `kept`: what the model's bundle says of it.
    """
    logits, target = answers.of(role, "test")
    numbers: dict[str, Any] = evaluate(
        logits,
        target,
        None if role.startswith("teacher") else answers.splits["test"].get("teacher"),
        topk=reported_topk(cfg, data),
        validation=answers.of(role, "val") if kept is None else None,
        confidence=cfg.decision.confidence,
        temperature=(kept or {}).get("temperature"),
    )
    counts = data.image_counts if len(data.train) else [nan] * data.num_classes  # nobody knows
    numbers |= class_numbers(logits, target, counts, read.plain(cfg.shot_groups))
    if costs is not None:
        fitted = numbers["temperature_star"]
        assert not isinstance(fitted, str)
        numbers |= cost_numbers(logits, target, costs, fitted)
    return {"top5": None, **numbers}


@torch.inference_mode()
def predicted_classes(
    modules: Mapping[str, Distiller],
    data: DataModule,
    split: Split,
    device: torch.device,
    corruption: ImageCorruption | None = None,
) -> dict[str, Tensor]:
    """Return by role the class `[N]` that each model names for each image of a split, in order."""
    for module in modules.values():
        module.to(device).eval()
    positions = torch.arange(len(split)).split(data.batch_size)
    predicted: dict[str, list[Tensor]] = {role: [] for role in modules}
    for batch in data.in_order(split, CLEAN, positions, device, corruption):
        for role, module in modules.items():
            predicted[role].append(module(batch.view).argmax(dim=1).cpu())
    return {role: torch.cat(answers) for role, answers in predicted.items()}


def learned_labels(
    data: DataModule, modules: Mapping[str, Distiller], device: torch.device
) -> dict[str, dict[str, float | None]]:
    """Return by role what models make of wrong training labels; nothing where none is wrong."""
    change = data.corrupted.get("train")
    if change is None or not bool(change.wrong.any()):
        return {}
    learned = {}
    for role, answers in predicted_classes(modules, data, change.split, device).items():
        shares = metrics.learned_labels(answers, change.split.labels, change.true)
        learned[role] = finite({name: float(share) for name, share in shares.items()})
    return learned


def robustness(
    data: DataModule, modules: Mapping[str, Distiller], device: torch.device, names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return by role what models get wrong on corrupted test images; nothing without corruptions.

    Args:
        data: whose test images are corrupted.
        modules: the models by role; those of a `baseline` are what others are compared with.
        device: where they answer.
        names: of the corruptions.

    Returns:
        `corruption_errors` (corruption → share of errors at each severity), their
        `mean_corruption_error`, and `relative_corruption_error` to the baseline, or None.
    """
    if not names:
        return {}
    table = {role: torch.zeros(len(names), len(SEVERITIES)).double() for role in modules}
    for row, name in enumerate(names):
        for column, severity in enumerate(SEVERITIES):
            corruption = ImageCorruption(name, severity)
            answers = predicted_classes(modules, data, data.test, device, corruption)
            for role, answer in answers.items():
                table[role][row, column] = (answer != data.test.labels).double().mean()
    mean, reference = metrics.mean_corruption_error, table.get("baseline")
    return finite(
        {
            role: {
                "corruption_errors": dict(zip(names, errors.tolist(), strict=True)),
                "mean_corruption_error": float(mean(errors)),
                "relative_corruption_error": None
                if reference is None
                else float(mean(errors, reference)),
            }
            for role, errors in table.items()
        }
    )


def as_module(teacher: Teacher, data: DataModule) -> Distiller:
    """Return a teacher as a model to be judged like a student, which stays where it answers."""
    if teacher.device is not None:
        return Distiller(AskedTeacher(teacher), num_classes=data.num_classes)
    return Distiller(teacher.model, num_classes=data.num_classes, normalize=teacher.normalize)


class AskedTeacher(nn.Module):
    """A teacher as a module of views, which is not moved with it."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, view: Tensor) -> Tensor:
        """Return the teacher's logits `[N, K]`."""
        return self.teacher(view)
