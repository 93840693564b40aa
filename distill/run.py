"""One run from start to finish: teacher, baseline, student, and their numbers on the test split."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from distill import evaluation, report
from distill.config import build, checks, read
from distill.config.schema import check_folder
from distill.data import DataModule
from distill.data.condition.image_corruptions import chosen
from distill.data.views.preview import contact_sheet
from distill.metrics import fit_vector_scaling
from distill.models.build import build_model, normalization
from distill.teacher.teacher import Teacher
from distill.training import resume
from distill.training.cache import check_store
from distill.training.filling import fill, own_share
from distill.training.first_look import warned
from distill.training.fit import (
    best_epoch,
    fit,
    load_baseline,
    lost_note,
    prepare_baseline,
    save_bundle,
    training_speed,
)
from distill.training.module import Distiller
from distill.training.pruning import pruned
from distill.training.teachers import (
    load_teacher,
    prepare_teachers,
    resolve_auto_temperature,
)
from distill.training.trainer import (
    note_data,
    single_device,
    with_length,
)
from distill.training.untrained import Untrained, check_assistants, check_teacher, prepare
from distill.utils import signals
from distill.utils.files import only_run_in, remove_stale
from distill.utils.json_files import write_json
from distill.utils.ranks import first_of_run
from distill.utils.run_folder import METRICS, by_epoch, read_history
from distill.utils.sharing import Sharing

log = logging.getLogger(__name__)

FILES = ("summary.json", "report.html", "predictions.npz", "examples.npz", "condition.npz")


def train(cfg: DictConfig, sharing: Sharing | None = None) -> float | list[float] | None:
    """Train a student under its teacher, judge both and the baseline, and write the run directory.

    Args:
        cfg: the configuration.
        sharing: the run's part in what runs that take turns share; None is that of a run alone.

    Returns:
        The metric named by `optimized_metric` (or each of `sweep.metrics`), for a sweeper; None
        where it is not finite, and on ranks above 0.

    Raises:
        ValueError: for what a person can put right.
    """
    signals.stop_if_told()
    try:
        cfg = checked(cfg)
    except (ValueError, OmegaConfBaseException):
        if read.swept() and not cfg.sweep.resume:
            refused_in(Path(cfg.paths.output_dir))
        raise
    with lock_run_directory(Path(cfg.paths.output_dir)):
        result = result_of_finished(cfg)
        if result is None:
            cfg = resume.with_checkpoint(cfg)
            if first_of_run():
                set_aside(Path(cfg.paths.output_dir), cfg.ckpt_path)
            result = trained(cfg, sharing or Sharing())
    return None if result is None else read.finite_or_none(result)


def checked(cfg: DictConfig) -> DictConfig:
    """Return a configuration whose values have been checked as far as they can be by themselves.

    Raises:
        ValueError: for what a person can put right.
    """
    checks.check_multirun(cfg)
    checks.check_pair()
    cfg = checks.with_checked_values(cfg)
    build.run_imports(cfg)
    resume.check(cfg)
    return cfg


def opened(cfg: DictConfig, sharing: Sharing) -> DataModule:
    """Return a run's data, saying what was done with them."""
    checks.check_models(cfg)
    data = build.build_data(cfg, sharing=sharing)
    note_data(cfg, data)
    return data


def prepared(cfg: DictConfig, data: DataModule) -> tuple[DictConfig, Tensor | None, Untrained]:
    """Return the configuration as data and models decide it, decisions' costs, and the parts."""
    cfg = with_length(cfg, data)
    cfg = build.with_architecture(cfg)
    costs = checks.check_decision(cfg, data)
    return cfg, costs, prepare(cfg, data)


def trained(cfg: DictConfig, sharing: Sharing) -> float | list[float] | None:
    """Run what is not finished, in a run directory that is held and has no other run's files."""
    started = sharing.clock()
    data = opened(cfg, sharing)
    if cfg.preview.enabled:
        preview(cfg, data)
        return None
    cfg, costs, untrained = prepared(cfg, data)

    (*chain, teacher), looks = prepare_teachers(cfg, data, untrained.objective)
    cfg = resolve_auto_temperature(cfg, data, teacher)
    baseline = prepare_baseline(cfg, data) if cfg.baseline else None
    warnings = warned(cfg, data, looks)
    student, trainer = fit(cfg, data, teacher, untrained)
    lost = lost_note(data, trainer)
    if not trainer.is_global_zero:
        return None

    seconds = sharing.clock() - started
    best = best_epoch(trainer, student)
    student, sparsity = pruned(cfg, data, student, trainer)
    students = {"student": student, "baseline": baseline, "student_best": best and best[1]}
    predictions, models = predictions_of(cfg, data, students, teacher, chain)
    learned = evaluation.learned_labels(
        data, judged_modules(students, teacher, data), predictions.device
    )
    numbers = evaluation.summary(cfg, data, predictions, models, [learned], costs=costs)
    logged = last_logged(Path(cfg.paths.output_dir), trainer.callback_metrics)
    summary = {
        **numbers,
        "validation": read.numbers_for_sweeper(cfg, numbers["validation"], logged),
        "epochs": {"last": trainer.current_epoch, "best": best and best[0]},
        "sparsity": sparsity,
        "unlabeled": report.unlabeled_of(cfg, data, trainer),
        "warnings": [*warnings, *filter(None, [lost])],
        "seconds": round(seconds, 2),
        "images_per_second": training_speed(trainer),
        **report.run_metadata(cfg, data),
    }
    write_run(cfg, data, predictions, summary, student, best and best[1])
    return read.for_sweeper(cfg, logged)


def evaluate(cfg: DictConfig, sharing: Sharing | None = None) -> None:
    """Judge a trained student on the test split, print the numbers and write `summary.json`."""
    cfg = checks.with_checked_values(cfg)
    build.run_imports(cfg)
    if not cfg.student.checkpoint and not cfg.student.pretrained:
        raise ValueError("give student.checkpoint=PATH: a student bundle or a checkpoint")
    checks.check_models(cfg)
    data = build.build_data(cfg, build.to_judge(cfg), sharing)
    build.note_training_pictures(cfg, data)
    note_data(cfg, data)
    costs = checks.check_decision(cfg, data)
    checks.check_classes(cfg, data)
    kept = build.calibrations(cfg, data)
    if differing := checks.differing_views(cfg, data):  # at another resolution, say, on purpose
        log.info("%s to judge it as it was trained", differing)
    corruptions = chosen(read.plain(cfg.corruptions))
    shape = build.data_shape(data)
    model = build_model(read.model_spec(cfg.student), shape, "student", note=log.info)
    teacher = load_teacher(cfg, data)
    student = Distiller(model, teacher, normalize=normalization(model, data.in_chans))
    students = {"student": student, "baseline": load_baseline(cfg, data)}
    predictions, models = predictions_of(cfg, data, students, teacher)
    modules = judged_modules(students, teacher, data)
    further = [
        evaluation.learned_labels(data, modules, predictions.device),
        evaluation.robustness(data, modules, predictions.device, corruptions),
    ]
    summary = {
        **evaluation.summary(cfg, data, predictions, models, further, kept, costs),
        "warnings": [],
        **report.run_metadata(cfg, data),
    }
    write_run(cfg, data, predictions, summary)


def fill_store(cfg: DictConfig, sharing: Sharing | None = None) -> None:
    """Keep the teacher's answers ahead of the runs that will ask for them."""
    cfg = checks.with_checked_values(cfg)
    build.run_imports(cfg)
    own_share(cfg)
    if not read.teacher_name(cfg):
        raise ValueError("there is no teacher whose answers could be kept")
    checks.check_models(cfg)
    data = build.build_data(cfg, sharing=sharing)
    note_data(cfg, data)
    cfg = with_length(cfg, data)
    objective = build.build_objective(cfg, data)
    cfg = build.with_architecture(cfg)
    check_teacher(cfg, data)
    check_store(cfg, data, objective)
    check_folder("store.path", cfg.store.path)
    check_assistants(cfg, data, objective)
    (*_, teacher), _ = prepare_teachers(cfg, data, objective)
    assert teacher is not None
    check_store(cfg, data, objective, teacher.model)
    fill(cfg, data, teacher, single_device(cfg, precision=cfg.trainer.precision))


def preview(cfg: DictConfig, data: DataModule) -> None:
    """Write `views.png`: what the epochs will show of one training image."""
    path = Path(cfg.paths.output_dir) / "views.png"
    contact_sheet(data, cfg.preview.row, cfg.preview.epochs, path)
    log.info("image %d, clean and in %d epochs: %s", cfg.preview.row, cfg.preview.epochs,
             os.path.relpath(path))  # fmt: skip


def predictions_of(
    cfg: DictConfig,
    data: DataModule,
    students: Mapping[str, Distiller | None],
    teacher: Teacher | None,
    chain: Sequence[Teacher | None] = (),
) -> tuple[evaluation.Predictions, dict[str, nn.Module]]:
    """Return the predictions of a run's models to the held-out splits, and the models, by role."""
    before: dict[str, Distiller | None] = {
        f"teacher_{k}": evaluation.as_module(one, data)
        for k, one in enumerate(chain, start=1)
        if one is not None
    }
    modules = {role: one for role, one in {**before, **students}.items() if one is not None}
    models = {role: module.student for role, module in modules.items()}
    if teacher is not None:
        models["teacher"] = teacher.model
    predictions = evaluation.predict(cfg, modules.pop("student"), data)
    for role, module in modules.items():
        predictions.add(role, evaluation.predict(cfg, module, data))
    return predictions, models


def judged_modules(
    students: Mapping[str, Distiller | None], teacher: Teacher | None, data: DataModule
) -> dict[str, Distiller]:
    """Return a run's students and their teacher, by role, as models of views."""
    modules = {role: module for role, module in students.items() if module is not None}
    return (
        modules if teacher is None else {**modules, "teacher": evaluation.as_module(teacher, data)}
    )


def result_of_finished(cfg: DictConfig) -> float | list[float] | None:
    """Return what a run that goes on came to, if it has ended, and write its page if need be.

    Raises:
        ValueError: if another job has ended in its folder.
    """
    folder = Path(cfg.paths.output_dir)
    result = resume.finished(cfg)
    if isinstance(result, str):
        raise ValueError(result)
    page = folder / "report.html"
    if result is not None and cfg.report and not page.is_file():  # killed while it was written
        report.write_run_page(folder)
    return result


def refused_in(folder: Path) -> None:
    """Let no table of a sweep take an earlier job's numbers for those of the one refused here."""
    set_aside(folder, str(folder / resume.LAST))


def set_aside(folder: Path, going_on_from: str | None = None) -> None:
    """Rename what an earlier run left in the same folder, which would pass for this one's."""
    for name in FILES:
        path = folder / name
        if path.is_file():
            path.replace(path.with_name(f"{path.stem}.previous{path.suffix}"))
    old, previous = folder / resume.CHECKPOINTS, folder / f"{resume.CHECKPOINTS}.previous"
    needed = going_on_from and old.resolve() in Path(going_on_from).resolve().parents
    if old.is_dir() and not needed:
        shutil.rmtree(previous, ignore_errors=True)
        old.rename(previous)


@contextmanager
def lock_run_directory(folder: Path) -> Iterator[None]:
    """Keep other runs out of a run's folder, and remove what one that was killed left half done."""
    if not first_of_run():  # of several that are one run
        yield
        return
    with only_run_in(folder):
        for place in (folder, folder / resume.CHECKPOINTS):
            remove_stale(place)
        yield


def last_logged(folder: Path, logged: Mapping[str, Tensor]) -> Callable[[str], float]:
    """Return what looks up a metric's last value; of training that was over before, in its file."""

    def value(name: str) -> float:
        if name in logged:
            return logged[name].item()
        values = by_epoch(read_history(folder / METRICS), name)[1]
        if not values:
            raise ValueError(
                f"training ended before {name} was known, at trainer.max_time or by a callback: "
                "give it the time of an epoch"
            )
        return values[-1]

    return value


def write_run(
    cfg: DictConfig,
    data: DataModule,
    predictions: evaluation.Predictions,
    summary: dict[str, Any],
    student: Distiller | None = None,
    best: Distiller | None = None,
) -> None:
    """Write what a run leaves behind, and print its table.

    Args:
        cfg: its configuration.
        data: its data.
        predictions: of its models to the held-out splits.
        summary: its numbers.
        student: the student that was trained, as the last epoch left it; it is saved.
        best: the same as the best epoch left it; it is saved beside it.
    """
    folder = Path(cfg.paths.output_dir)
    if student is not None:
        shutil.rmtree(folder / "student_best", ignore_errors=True)  # of an earlier run
        trained = {"student": student, "student_best": best}
        for role, one in trained.items():
            if one is not None:
                save_role(cfg, data, predictions, summary, role, one)
    predictions.save(folder / "predictions.npz")
    if data.corrupted:
        report.save_condition(folder / "condition.npz", data)
    report.save_thumbnails(folder / "examples.npz", data, summary)
    write_json(folder / "summary.json", summary)
    report.print_table(summary)
    if cfg.report:
        report.write_run_page(folder)
    page = ", report.html" if cfg.report else ""
    bundles = ("student, " if student else "") + ("student_best, " if best else "")
    log.info("%ssummary%s in %s", bundles, page, os.path.relpath(folder))


def save_role(
    cfg: DictConfig,
    data: DataModule,
    predictions: evaluation.Predictions,
    summary: dict[str, Any],
    role: str,
    student: Distiller,
) -> None:
    """Write a student's bundle, with what was fitted for it and its own numbers."""
    vector = asdict(fit_vector_scaling(*predictions.of(role, "val")))
    facts = report.bundle_facts(cfg, data, summary, role, vector)
    card = report.model_card(facts, data.classes)
    save_bundle(student, data, Path(cfg.paths.output_dir) / role, facts, card)
