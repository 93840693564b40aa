"""One run from start to finish: teacher, baseline, student, and their numbers on the test split."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from filelock import FileLock
from omegaconf import DictConfig
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from distill import config, report
from distill.callbacks.speed import Speed
from distill.data import DataModule
from distill.metrics import evaluate as evaluate_logits
from distill.models.build import ModelSpec, Normalize, build_model, channels_last, normalization
from distill.models.bundle import (
    load_student,
    read_checkpoint,
    read_lightning,
    save_student,
    student_weights,
)
from distill.models.ensemble import Ensemble
from distill.models.features import feature_channels
from distill.models.teacher import Teacher
from distill.module import Distiller
from distill.objectives import Objective

log = logging.getLogger(__name__)

Predictions = dict[str, dict[str, Tensor]]  # split → student, teacher, target, index
COSMETIC = ("accelerator", "log_every_n_steps", "compile", "_target_")
FOR_CALLBACKS = ("limit_val_batches", "check_val_every_n_epoch")


def train(cfg: DictConfig) -> float | None:
    """Train a student under its teacher, judge both and the baseline, and write the run directory.

    Returns:
        The metric named by `optimized_metric`, for a sweeper; None on ranks above 0.

    Raises:
        ValueError: for what a person can put right.
    """
    started = time.perf_counter()
    config.check_multirun(cfg)
    set_aside(Path(cfg.paths.output_dir) / "summary.json")
    data = config.build_data(cfg)
    for note in data.notes:
        log.info("%s: %s", data.source.name, note)
    objective = config.build_objective(cfg, data)
    config.resolve_student(cfg)
    check_early(cfg, data, objective)

    teacher = prepare_teacher(cfg, data)
    if teacher is not None and objective.needs_features:
        feature_channels(teacher.model, objective.stages, "teacher")
    baseline = prepare_baseline(cfg, data) if cfg.baseline else None
    log.info("student: %s under %s", cfg.student.name, ", ".join(objective.terms))
    student, trainer = fit(cfg, data, teacher)
    if not trainer.is_global_zero:
        return None

    seconds = time.perf_counter() - started
    topk = config.topk(cfg, data)
    predictions = predict(cfg, student, data)
    best = best_epoch(trainer, student)
    summary: dict[str, Any] = {
        "teacher": judge_teacher(cfg, predictions, teacher, topk),
        "baseline": baseline and judge(predict(cfg, baseline, data), baseline.student, topk),
        "student": judge(predictions, student.student, topk),
        "student_best": best and judge(predict(cfg, best[1], data), best[1].student, topk),
        "validation": evaluate_logits(
            predictions["val"]["student"], predictions["val"]["target"], topk=topk
        ),
        "epochs": {"last": trainer.current_epoch, "best": best and best[0]},
        "seconds": round(seconds, 2),
        "images_per_second": training_speed(trainer),
        **report.circumstances(cfg),
        "notes": data.notes,
    }
    models = {"student": student.student}
    models |= {"teacher": teacher.model} if teacher else {}
    models |= {"baseline": baseline.student} if baseline else {}
    for role, model in models.items():
        shape = (data.in_chans, *data.image_size)
        speed = report.throughput(model, shape, trainer.strategy.root_device)
        summary[role]["images_per_second"] = speed
    write_run(cfg, data, student, summary)
    return trainer.callback_metrics[cfg.optimized_metric].item()


def evaluate(cfg: DictConfig) -> None:
    """Judge a trained student on the test split, print the numbers and write `summary.json`."""
    data = config.build_data(cfg)
    if not cfg.student.checkpoint and not cfg.student.pretrained:
        raise ValueError("give student.checkpoint=PATH: a student bundle or a checkpoint")
    shape = config.data_shape(data)
    model = build_model(config.model_spec(cfg.student), shape, "student")
    teacher = load_teacher(cfg, data)
    student = Distiller(model, teacher, normalize=normalization(model, data.in_chans))
    topk = config.topk(cfg, data)
    predictions = predict(cfg, student, data)
    summary: dict[str, Any] = {
        "teacher": judge_teacher(cfg, predictions, teacher, topk),
        "student": judge(predictions, model, topk),
        **report.circumstances(cfg),
        "notes": data.notes,
    }
    report.write_json(Path(cfg.paths.output_dir) / "summary.json", summary)
    report.print_table(summary)
    log.info("written to %s", cfg.paths.output_dir)


def set_aside(summary: Path) -> None:
    """Rename the summary of an earlier run in the same folder, which would pass for this one's."""
    if summary.is_file() and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        summary.replace(summary.with_name("summary.previous.json"))


def check_early(cfg: DictConfig, data: DataModule, objective: Objective) -> None:
    """Refuse what would only fail after the teacher has been trained."""
    config.check_trainer(cfg)
    config.check_objective(cfg, data, objective)
    config.check_monitor(cfg, data, objective)
    student = build_model(config.model_spec(cfg.student), config.data_shape(data), "student")
    config.check_optimizer(cfg, student)
    if objective.needs_features:
        feature_channels(student, objective.stages, "student")
    config.build_trainer(cfg, objective)
    if objective.needs_teacher and not config.teacher_name(cfg):
        raise ValueError(
            "this objective compares with a teacher: give one, or objective=supervised"
        )
    if cfg.ckpt_path and not Path(cfg.ckpt_path).is_file():
        raise FileNotFoundError(f"ckpt_path={cfg.ckpt_path} does not exist")
    config.check_resume(cfg, student, objective)


def fit(cfg: DictConfig, data: DataModule, teacher: Teacher | None) -> tuple[Distiller, pl.Trainer]:
    """Build the student from its seed and train it."""
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    spec = config.model_spec(cfg.student)
    model = build_model(spec, config.data_shape(data), "student")
    objective = config.build_objective(cfg, data)
    student = Distiller(
        model,
        teacher,
        objective,
        optimizer=config.plain(cfg.optimizer),
        scheduler=config.plain(cfg.scheduler),
        topk=config.plain(cfg.topk),
        normalize=normalization(model, data.in_chans),
    )
    student.about = {
        "student_model": asdict(replace(spec, checkpoint=None, pretrained=False)),
        "preprocessing": {
            name: values.flatten().tolist() for name, values in student.normalize.named_buffers()
        },
    }
    trainer = config.build_trainer(cfg, objective)
    for logger in trainer.loggers:
        logger.log_hyperparams(config.plain(cfg))
    if cfg.trainer.get("compile"):
        mode = cfg.trainer.compile
        model.compile(mode=None if mode is True else mode)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    try:
        trainer.fit(student, datamodule=data, ckpt_path=cfg.ckpt_path, weights_only=True)
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except SystemExit:
        if trainer.interrupted:  # Lightning turns Ctrl-C into an exit code of its own
            raise KeyboardInterrupt from None
        raise
    if "16-true" in str(cfg.trainer.precision):
        student.float()  # what is judged and saved is what a user will load
    return student, trainer


def prepare_teacher(cfg: DictConfig, data: DataModule) -> Teacher | None:
    """Return the teacher, trained once and kept where no weights exist."""
    source = cfg.teacher
    if not source.name or source.checkpoint or source.pretrained or not source.fit:
        return load_teacher(cfg, data)
    return as_teacher(trained_once(config.alone(cfg, "teacher"), data, "teacher"), data)


def load_teacher(cfg: DictConfig, data: DataModule) -> Teacher | None:
    """Return the teacher from its published weights or a file, or None where none is named."""
    source = cfg.teacher
    if not config.teacher_name(cfg):
        return None
    if source.get("checkpoints") is not None:
        return load_ensemble(cfg, data)
    if not source.pretrained and not source.checkpoint:
        raise ValueError(
            f"teacher {source.name} would have random weights: give teacher.pretrained=true, "
            "teacher.checkpoint=PATH, or teacher=trained"
        )
    model = build_model(config.model_spec(source), config.data_shape(data), "teacher")
    return as_teacher(model, data)


def load_ensemble(cfg: DictConfig, data: DataModule) -> Teacher:
    """Return several teachers as one, each with its own normalisation."""
    members = []
    for path in cfg.teacher.checkpoints:
        model = build_model(ModelSpec(checkpoint=path), config.data_shape(data), "teacher")
        members.append(nn.Sequential(normalization(model, data.in_chans), model))
    weights = config.plain(cfg.teacher.weights)
    return Teacher(Ensemble(members, cfg.teacher.combine, weights))


def as_teacher(model: nn.Module, data: DataModule) -> Teacher:
    """Freeze a model, with its own normalisation."""
    return Teacher(model, normalization(model, data.in_chans))


def prepare_baseline(cfg: DictConfig, data: DataModule) -> Distiller:
    """Return the same student, trained from the same seed for as long, on labels only."""
    model = trained_once(config.alone(cfg, "baseline"), data, "baseline")
    return Distiller(model, normalize=normalization(model, data.in_chans))


def trained_once(cfg: DictConfig, data: DataModule, role: str) -> nn.Module:
    """Return a model trained on labels, from the cache if the same was trained before."""
    data = data.with_options(seed=cfg.data.seed, batch_size=cfg.data.batch_size)
    kept = Path(cfg.paths.cache) / f"{role}-{fit_key(cfg, data)}"
    kept.parent.mkdir(parents=True, exist_ok=True)
    if kept.is_dir():
        log.info("%s: %s, trained before, from %s", role, cfg.student.name, kept)
        return load_kept(kept)
    if config.processes(cfg) > 1:  # every rank takes part in training: a lock would wait for itself
        train_and_keep(cfg, data, role, kept)
        return load_kept(kept)
    with FileLock(f"{kept}.lock"):  # a parallel trial waits for this one's work
        if not kept.is_dir():
            train_and_keep(cfg, data, role, kept)
    return load_kept(kept)


def load_kept(path: Path) -> nn.Module:
    """Load a kept model; its memory layout is not part of the file."""
    return channels_last(load_student(path))


def train_and_keep(cfg: DictConfig, data: DataModule, role: str, kept: Path) -> None:
    """Train a model on labels and put it into the cache."""
    log.info("%s: training %s for %d epochs", role, cfg.student.name, cfg.trainer.max_epochs)
    student, trainer = fit(cfg, data, None)
    if trainer.is_global_zero:
        facts = {"role": role, "config": config.plain(cfg), "data": data.fingerprint}
        save_bundle(student, data, kept, facts)
        log.info("%s: kept in %s", role, kept)
    trainer.strategy.barrier()


def fit_key(cfg: DictConfig, data: DataModule) -> str:
    """Return a hash of everything that decides a fit's outcome."""
    values = config.plain(cfg)
    callbacks = {k: node for k, node in (values["callbacks"] or {}).items() if k != "progress"}
    ignored = COSMETIC if callbacks else COSMETIC + FOR_CALLBACKS
    trainer = {k: v for k, v in values["trainer"].items() if k not in ignored}
    decided = {key: values[key] for key in ("student", "optimizer", "scheduler", "seed")}
    decided |= {"trainer": trainer, "view": values["data"]["view"], "size": data.image_size}
    decided |= {"batch_size": data.batch_size, "data": data.fingerprint, "order": data.seed}
    decided |= {"channels": data.in_chans, "classes": data.num_classes}
    decided["gpu"] = cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()
    if cfg.student.checkpoint:  # a path may come to hold other weights
        decided["student"]["checkpoint"] = weights_digest(cfg.student.checkpoint)
    decided["callbacks"] = callbacks
    decided["versions"] = report.versions()
    text = json.dumps(decided, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_digest(path: str) -> str:
    """Return a hash of the weights in a checkpoint."""
    digest = hashlib.sha256()
    for name, tensor in sorted(read_checkpoint(path).weights.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def predict(cfg: DictConfig, module: Distiller, data: DataModule) -> Predictions:
    """Return the answers to the validation and test splits, on one device and in float32."""
    devices = config.plain(cfg.trainer.devices)
    trainer = pl.Trainer(
        accelerator=cfg.trainer.accelerator,
        devices=devices[:1] if isinstance(devices, list) else 1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    batches = trainer.predict(module, datamodule=data)
    assert batches is not None
    return {
        split: {key: torch.cat([b[key].cpu() for b in answers]) for key in answers[0]}
        for split, answers in zip(("val", "test"), batches, strict=True)
    }


def judge(predictions: Predictions, model: nn.Module, topk: tuple[int, ...]) -> dict[str, Any]:
    """Return the test split's numbers; the temperature is fitted on validation."""
    val, test = predictions["val"], predictions["test"]
    numbers = evaluate_logits(
        test["student"],
        test["target"],
        test.get("teacher"),
        topk=topk,
        validation=(val["student"], val["target"]),
    )
    return {"top5": None, **numbers, "params": report.parameters(model)}


def judge_teacher(
    cfg: DictConfig, predictions: Predictions, teacher: Teacher | None, topk: tuple[int, ...]
) -> dict[str, Any] | None:
    """Return the teacher's own numbers on the test split."""
    if teacher is None:
        return None
    answers = {
        split: {"student": values["teacher"], "target": values["target"]}
        for split, values in predictions.items()
    }
    return {"name": config.teacher_name(cfg), **judge(answers, teacher.model, topk)}


def best_epoch(trainer: pl.Trainer, student: Distiller) -> tuple[int, Distiller] | None:
    """Return the epoch that was best on validation, counted from 1, and the student it left."""
    for callback in trainer.checkpoint_callbacks:
        path = getattr(callback, "best_model_path", "")
        if getattr(callback, "monitor", None) and path:
            content = read_lightning(Path(path))
            model = copy.deepcopy(student.student)
            model.load_state_dict(student_weights(content))
            best = Distiller(model, student.teacher, normalize=student.normalize)
            return content["epoch"] + 1, best
    return None


def training_speed(trainer: pl.Trainer) -> float | None:
    """Return the images per second of training."""
    found = (c.images_per_second for c in trainer.callbacks if isinstance(c, Speed))  # type: ignore[attr-defined]
    return next(found, None)


def save_bundle(
    student: Distiller, data: DataModule, path: Path, facts: dict[str, Any], card: str = ""
) -> None:
    """Write the student for timm, with the preprocessing it was trained under."""
    normalize = student.normalize
    assert isinstance(normalize, Normalize)
    save_student(
        student.student,
        path,
        classes=data.classes,
        input_size=(data.in_chans, *data.image_size),
        mean=normalize.mean.flatten().tolist(),
        std=normalize.std.flatten().tolist(),
        facts=facts,
        card=card,
    )


def write_run(
    cfg: DictConfig, data: DataModule, student: Distiller, summary: dict[str, Any]
) -> None:
    """Write the bundle and the summary, and print the table."""
    folder = Path(cfg.paths.output_dir)
    facts = report.bundle_facts(cfg, data, summary)
    save_bundle(student, data, folder / "student", facts, report.model_card(facts))
    report.write_json(folder / "summary.json", summary)
    report.print_table(summary)
    log.info("student and summary in %s", os.path.relpath(folder))
