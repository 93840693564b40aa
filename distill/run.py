"""One run from start to finish: teacher, baseline, student, and their numbers on the test split."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from distill import config, judge, report
from distill.cache import check_store, fill, keep_history, open_recall, trained_once
from distill.callbacks.speed import Speed
from distill.data import DataModule
from distill.data.image_corruptions import chosen
from distill.data.preview import contact_sheet
from distill.models.build import ModelSpec, Normalize, build_model, normalization
from distill.models.bundle import save_student
from distill.models.checkpoint import read_lightning, student_weights
from distill.models.ensemble import Ensemble
from distill.models.features import feature_channels
from distill.models.teacher import Teacher
from distill.module import Distiller
from distill.objectives import Objective
from distill.pruning import pruned
from distill.sharing import clock, once
from distill.sweep import resume

log = logging.getLogger(__name__)

FILES = ("summary.json", "report.html", "predictions.npz", "examples.npz", "condition.npz")


def train(cfg: DictConfig) -> float | list[float] | None:
    """Train a student under its teacher, judge both and the baseline, and write the run directory.

    Returns:
        The metric named by `optimized_metric` (or each of `sweep.metrics`), for a sweeper; None on
        ranks above 0.

    Raises:
        ValueError: for what a person can put right.
    """
    started = clock()
    config.check_multirun(cfg)
    before = take_up(cfg)
    if before is not None:
        return before
    data = config.build_data(cfg)
    for note in data.notes:
        log.info("%s: %s", data.source.name, note)
    if cfg.views:
        preview(cfg, data)
        return None
    objective = config.build_objective(cfg, data)
    config.resolve_student(cfg, data)
    check_early(cfg, data, objective)

    *chain, teacher = prepare_teachers(cfg, data, objective)
    settle_temperature(cfg, data, teacher)
    baseline = prepare_baseline(cfg, data) if cfg.baseline else None
    log.info("student: %s under %s", cfg.student.name, ", ".join(objective.terms))
    student, trainer = fit(cfg, data, teacher)
    if not trainer.is_global_zero:
        return None

    seconds = clock() - started
    best = best_epoch(trainer, student)
    student, sparsity = pruned(cfg, data, student, trainer)
    students = {"student": student, "baseline": baseline, "student_best": best and best[1]}
    answers, models = answered(cfg, data, students, teacher, chain)
    learned = judge.learned_labels(data, judged_modules(students, teacher, data), answers.device)
    summary = {
        **judge.summary(cfg, data, answers, models, [learned]),
        "epochs": {"last": trainer.current_epoch, "best": best and best[0]},
        "sparsity": sparsity,
        "seconds": round(seconds, 2),
        "images_per_second": training_speed(trainer),
        **report.circumstances(cfg, data),
    }
    write_run(cfg, data, answers, summary, student)
    return config.for_sweeper(cfg, lambda name: trainer.callback_metrics[name].item())


def evaluate(cfg: DictConfig) -> None:
    """Judge a trained student on the test split, print the numbers and write `summary.json`."""
    data = config.build_data(cfg)
    if not cfg.student.checkpoint and not cfg.student.pretrained:
        raise ValueError("give student.checkpoint=PATH: a student bundle or a checkpoint")
    config.check_decision(cfg, data)
    corruptions = chosen(config.plain(cfg.corruptions))
    shape = config.data_shape(data)
    model = build_model(config.model_spec(cfg.student), shape, "student")
    teacher = load_teacher(cfg, data)
    student = Distiller(model, teacher, normalize=normalization(model, data.in_chans))
    students = {"student": student, "baseline": load_baseline(cfg, data)}
    answers, models = answered(cfg, data, students, teacher)
    modules = judged_modules(students, teacher, data)
    further = [
        judge.learned_labels(data, modules, answers.device),
        judge.robustness(data, modules, answers.device, corruptions),
    ]
    summary = {
        **judge.summary(cfg, data, answers, models, further),
        **report.circumstances(cfg, data),
    }
    write_run(cfg, data, answers, summary)


def fill_store(cfg: DictConfig) -> None:
    """Keep the teacher's answers ahead of the runs that will ask for them."""
    cfg.store.mode = "disk"
    data = config.build_data(cfg)
    objective = config.build_objective(cfg, data)
    check_store(cfg, data, objective)
    *_, teacher = prepare_teachers(cfg, data, objective)
    if teacher is None:
        raise ValueError("there is no teacher whose answers could be kept")
    recall = open_recall(cfg, data, teacher, objective)
    assert recall is not None
    try:
        fill(cfg, data, teacher, recall, judge.single_device(cfg, precision=cfg.trainer.precision))
    finally:
        recall.close()


def preview(cfg: DictConfig, data: DataModule) -> None:
    """Write `views.png`: what the epochs will show of one training image."""
    if cfg.views != "preview":
        raise ValueError(f"views={cfg.views} is unknown: views=preview writes a contact sheet")
    path = Path(cfg.paths.output_dir) / "views.png"
    contact_sheet(data, cfg.preview.row, cfg.preview.epochs, path)
    log.info("image %d, clean and in %d epochs: %s", cfg.preview.row, cfg.preview.epochs,
             os.path.relpath(path))  # fmt: skip


def answered(
    cfg: DictConfig,
    data: DataModule,
    students: Mapping[str, Distiller | None],
    teacher: Teacher | None,
    chain: Sequence[Teacher | None] = (),
) -> tuple[judge.Answers, dict[str, nn.Module]]:
    """Return the answers of a run's models to the held-out splits, and the models, by role."""
    before: dict[str, Distiller | None] = {
        f"teacher_{k}": as_module(one, data)
        for k, one in enumerate(chain, start=1)
        if one is not None
    }
    known = {role: module for role, module in {**before, **students}.items() if module is not None}
    models = {role: module.student for role, module in known.items()}
    if teacher is not None:
        models["teacher"] = teacher.model
    answers = judge.answer(cfg, known.pop("student"), data)
    for role, module in known.items():
        answers.add(role, judge.answer(cfg, module, data))
    return answers, models


def judged_modules(
    students: Mapping[str, Distiller | None], teacher: Teacher | None, data: DataModule
) -> dict[str, Distiller]:
    """Return a run's students and their teacher, by role, as models of views."""
    modules = {role: module for role, module in students.items() if module is not None}
    return modules if teacher is None else {**modules, "teacher": as_module(teacher, data)}


def as_module(teacher: Teacher, data: DataModule) -> Distiller:
    """Return a teacher as a model to be judged like a student."""
    return Distiller(teacher.model, num_classes=data.num_classes, normalize=teacher.normalize)


def take_up(cfg: DictConfig) -> float | list[float] | None:
    """Return what the job of a resumed sweep came to, if it has ended; else make ready to run it.

    Raises:
        ValueError: if another job has ended in its folder.
    """
    found = resume.finished(cfg)
    if found is not None and not isinstance(found, str):
        return found
    set_aside(Path(cfg.paths.output_dir))
    if found is not None:
        raise ValueError(found)
    resume.go_on(cfg)
    return None


def set_aside(folder: Path) -> None:
    """Rename what an earlier run left in the same folder, which would pass for this one's."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        for name in (
            "summary.json",
            "report.html",
            "predictions.npz",
            "examples.npz",
            "condition.npz",
        ):
            path = folder / name
            if path.is_file():
                path.replace(path.with_name(f"{path.stem}.previous{path.suffix}"))


def check_early(cfg: DictConfig, data: DataModule, objective: Objective) -> None:
    """Refuse what would only fail after the teacher has been trained."""
    config.check_trainer(cfg)
    config.check_decision(cfg, data)
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
    check_assistants(cfg, data, objective)
    if cfg.ckpt_path and not Path(cfg.ckpt_path).is_file():
        raise FileNotFoundError(f"ckpt_path={cfg.ckpt_path} does not exist")
    config.check_resume(cfg, student, objective)
    if cfg.store.mode == "disk" and config.teacher_name(cfg):
        check_store(cfg, data, objective)


def check_assistants(cfg: DictConfig, data: DataModule, objective: Objective) -> None:
    """Refuse assistants that have no teacher, or cannot be built."""
    if cfg.assistants and not config.teacher_name(cfg):
        raise ValueError("assistants learn from a teacher, and there is none")
    for number in range(1, len(cfg.assistants) + 1):
        own = config.assistant(cfg, number)
        build_model(config.model_spec(own.student), config.data_shape(data), f"assistant {number}")


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
    student.recall = open_recall(cfg, data, teacher, objective, trainer.global_rank)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    try:
        trainer.fit(student, datamodule=data, ckpt_path=cfg.ckpt_path, weights_only=True)
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except SystemExit:
        if trainer.interrupted:  # Lightning turns Ctrl-C into an exit code of its own
            raise KeyboardInterrupt from None
        raise
    finally:
        if student.recall is not None:
            student.recall.close()
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):  # else the next job of a sweep would log to its run
                logger.experiment.finish()
    if "16-true" in str(cfg.trainer.precision):
        student.float()  # what is judged and saved is what a user will load
    return student, trainer


def prepare_teacher(cfg: DictConfig, data: DataModule) -> Teacher | None:
    """Return the teacher, trained once and kept where no weights exist."""
    source, key = cfg.teacher, config.shared_key(cfg, "teacher")
    if not source.name or source.checkpoint or source.pretrained or not source.fit:
        return once(key, lambda: load_teacher(cfg, data))
    model = trained_once(config.alone(cfg, "teacher"), data, "teacher", train_and_keep)
    return once(key, lambda: as_teacher(model, data))


def prepare_teachers(
    cfg: DictConfig, data: DataModule, objective: Objective
) -> list[Teacher | None]:
    """Return the teacher and its assistants, each trained under the one before it."""
    chain = [prepare_teacher(cfg, data)]
    for number in range(1, len(cfg.assistants) + 1):
        own = config.assistant(cfg, number)
        settle_temperature(own, data, chain[-1])
        role = f"assistant-{number}"
        model = trained_once(own, data, role, train_and_keep, chain[-1])
        own.paths = None  # where it was trained makes no other teacher
        chain.append(once(str([role, own]), partial(as_teacher, model, data)))
    for teacher in chain:
        if teacher is not None and objective.needs_features:
            feature_channels(teacher.model, objective.stages, "teacher")
    return chain


def settle_temperature(cfg: DictConfig, data: DataModule, teacher: Teacher | None) -> None:
    """Put a number in the place of `objective.temperature=auto`."""
    if cfg.objective.temperature == "auto":
        cfg.objective.temperature = judge.teacher_temperature(cfg, data, teacher)
        log.info("objective.temperature: %.4f, fitted to the teacher", cfg.objective.temperature)


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
    return Teacher(Ensemble(members, cfg.teacher.combine, weights), batch_size=data.batch_size)


def load_baseline(cfg: DictConfig, data: DataModule) -> Distiller | None:
    """Return the student without a teacher that an evaluation compares with, where one is named."""
    if not cfg.baseline:
        return None
    model = build_model(ModelSpec(checkpoint=cfg.baseline), config.data_shape(data), "baseline")
    return Distiller(model, normalize=normalization(model, data.in_chans))


def as_teacher(model: nn.Module, data: DataModule) -> Teacher:
    """Freeze a model, with its own normalisation."""
    return Teacher(model, normalization(model, data.in_chans), data.batch_size)


def prepare_baseline(cfg: DictConfig, data: DataModule) -> Distiller:
    """Return the same student, trained from the same seed for as long, on labels only."""
    model = trained_once(config.alone(cfg, "baseline"), data, "baseline", train_and_keep)
    return Distiller(model, normalize=normalization(model, data.in_chans))


def train_and_keep(
    cfg: DictConfig, data: DataModule, role: str, kept: Path, teacher: Teacher | None
) -> None:
    """Train a model, on labels or under a teacher, and put it into the cache."""
    log.info("%s: training %s for %d epochs", role, cfg.student.name, cfg.trainer.max_epochs)
    student, trainer = fit(cfg, data, teacher)
    if trainer.is_global_zero:
        student, _ = pruned(cfg, data, student, trainer)
        facts = {"role": role, "config": config.plain(cfg), "data": data.fingerprint}
        save_bundle(student, data, kept, facts)
        keep_history(cfg, kept)
        log.info("%s: kept in %s", role, kept)
    trainer.strategy.barrier()


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
) -> Path:
    """Write the student for timm, with the preprocessing it was trained under."""
    normalize = student.normalize
    assert isinstance(normalize, Normalize)
    return save_student(
        student.student,
        path,
        classes=data.classes,
        **data.preprocessing,
        mean=normalize.mean.flatten().tolist(),
        std=normalize.std.flatten().tolist(),
        facts=facts,
        card=card,
    )


def write_run(
    cfg: DictConfig,
    data: DataModule,
    answers: judge.Answers,
    summary: dict[str, Any],
    student: Distiller | None = None,
) -> None:
    """Write what a run leaves behind, and print its table; a student that was trained is saved."""
    folder = Path(cfg.paths.output_dir)
    if student is not None:
        facts = report.bundle_facts(cfg, data, summary)
        save_bundle(
            student, data, folder / "student", facts, report.model_card(facts, data.classes)
        )
    answers.save(folder / "predictions.npz")
    if data.altered:
        report.save_condition(folder / "condition.npz", data)
    report.save_thumbnails(folder / "examples.npz", data, summary)
    report.write_json(folder / "summary.json", summary)
    report.print_table(summary)
    if cfg.report:
        report.write_run_page(folder)
    page = ", report.html" if cfg.report else ""
    log.info("%ssummary%s in %s", "student, " if student else "", page, os.path.relpath(folder))
