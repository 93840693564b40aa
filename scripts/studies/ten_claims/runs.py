"""The students that studies train: each once, on file, in as many processes as there are cores."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import distill
from deployment import judged
from distill import evaluation, metrics
from distill.config import build
from distill.training import fit, teachers
from distill.training.module import Distiller
from distill.utils.files import write_whole
from shared import composed, quiet

ANSWERS, INT8 = "predictions.npz", "int8.json"
ALONE = ("objective=supervised", "teacher=none")
# Objective → the best learning rate of 3e-3, 1e-2 and 3e-2 on digits that were cut from train
# (data.val_fraction=0.3, one seed). The default, 3e-2, is that of cross-entropy and of the hinge.
RATES = {"ramp_hinge": 1e-2, "smooth_topk": 1e-2, "hard_topk": 1e-2}


@dataclass(frozen=True)
class Run:
    """A student to be trained.

    Attributes:
        overrides: of `distill`, as a user would give them.
        seed: of its weights and views.
        teacher: a run whose student is the teacher.
        int8: whether it is also exported and judged as int8.
    """

    overrides: tuple[str, ...]
    seed: int
    teacher: Run | None = None
    int8: bool = False


class Runs:
    """Trained students, in a folder for each.

    Args:
        folder: where they are kept.
        common: overrides of all of them: data and budget.
    """

    def __init__(self, folder: Path, common: tuple[str, ...]) -> None:
        self.folder, self.common = folder, common

    def overrides(self, run: Run) -> tuple[str, ...]:
        """Return what runs have in common; how a teacher is trained is left out where none is."""
        trains = run.teacher is None and "teacher=none" not in run.overrides
        return tuple(one for one in self.common if trains or not one.startswith("teacher.fit."))

    def place(self, run: Run) -> Path:
        """Return a run's folder, named by what it is."""
        teacher = self.place(run.teacher).name if run.teacher else None
        told = json.dumps([self.common, run.overrides, run.seed, teacher])
        return self.folder / hashlib.sha256(told.encode()).hexdigest()[:16]

    def done(self, run: Run) -> bool:
        """Whether everything that is asked of a run is on file."""
        names = (ANSWERS, INT8) if run.int8 else (ANSWERS,)
        return all((self.place(run) / name).exists() for name in names)

    def answers(self, run: Run, split: str = "test") -> tuple[Tensor, Tensor]:
        """Return a student's logits `[N, K]` and the labels `[N]`."""
        with np.load(self.place(run) / ANSWERS) as arrays:
            student, target = (torch.from_numpy(arrays[f"{split}_{name}"])
                               for name in ("student", "target"))  # fmt: skip
        return student, target

    def numbers(self, run: Run) -> dict[str, Any]:
        """Return `distill.metrics.evaluate`'s numbers; those after scaling are cross-fitted."""
        logits, target = self.answers(run)
        numbers = metrics.evaluate(logits, target, topk=(1, 3, 5))
        scaled, fitted = cross_fitted(logits, target)
        after = metrics.evaluate(scaled, target)
        numbers |= {f"{name}_after_scaling": after[name] for name in ("nll", "brier", "ece")}
        return numbers | {"temperature_star": fitted}

    def int8(self, run: Run) -> dict[str, dict[str, float]]:
        """Return the numbers of a student as `float` and as `int8`, each in its own runtime."""
        return json.loads((self.place(run) / INT8).read_text())

    def student(self, run: Run) -> torch.nn.Module:
        """Return a student with its weights."""
        return distill.load_student(self.place(run) / "student")

    def train(self, wanted: Iterable[Run]) -> None:
        """Train what is not on file yet; those that teach others come first."""
        asked: dict[Path, Run] = {}
        for run in wanted:
            known = asked.get(self.place(run), run)
            asked[self.place(run)] = replace(run, int8=run.int8 or known.int8)
        first = {self.place(run.teacher): run.teacher for run in asked.values() if run.teacher}
        for stage in (first, asked):
            missing = [run for run in stage.values() if not self.done(run)]
            with pool() as workers:
                jobs = {workers.submit(train_one, self, run): run for run in missing}
                for number, job in enumerate(as_completed(jobs), start=1):
                    told = " ".join((*jobs[job].overrides, f"seed={jobs[job].seed}"))
                    print(f"{number}/{len(jobs)} {told}: {job.result():.1f} s", flush=True)


def cross_fitted(logits: Tensor, target: Tensor) -> tuple[Tensor, float | None]:
    """Return logits, each half divided by the temperature that fits the other, and one of the two.

    The validation split has too few images for it: a student that is right on nearly all of them
    is given any temperature, and may be worse after it.
    """
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))
    scaled, fitted = logits.double().clone(), None
    for here, there in (order.chunk(2), order.chunk(2)[::-1]):
        fitted = metrics.fit_temperature(logits[there], target[there]).temperature
        scaled[here] /= fitted or 1.0
    return scaled, fitted


def on_labels(objective: str, *overrides: str) -> tuple[str, ...]:
    """Return the overrides of training without a teacher, at the objective's own learning rate."""
    rate = RATES.get(objective)
    own = (f"optimizer.lr={rate}",) if rate else ()
    return (f"objective={objective}", "teacher=none", *overrides, *own)


def pool() -> ProcessPoolExecutor:
    """Return a process for each core, with one thread each."""
    cores = len(os.sched_getaffinity(0))
    return ProcessPoolExecutor(cores, multiprocessing.get_context("spawn"), quiet)


def train_one(runs: Runs, run: Run) -> float:
    """Train one student, keep its answers and its bundle, and return the seconds it took."""
    started, folder = time.perf_counter(), runs.place(run)
    teacher = [f"teacher.checkpoint={runs.place(run.teacher) / 'student'}"] if run.teacher else []
    cfg = composed(
        f"paths.output_dir={folder}", f"seed={run.seed}", "trainer.accelerator=cpu",
        "trainer.limit_val_batches=0", "callbacks=none", "logger=none",
        *runs.overrides(run), *run.overrides, *teacher,
    )  # fmt: skip
    data = build.build_data(cfg)
    fitted, _ = fit.fit(cfg, data, teachers.prepare_teacher(cfg, data))
    student = Distiller(fitted.student, normalize=fitted.normalize)
    fit.save_bundle(student, data, folder / "student", {})
    if run.int8:
        rows = {row["kind"]: row for row in judged(cfg, student, data, folder)}
        write_whole(folder / INT8, json.dumps(rows))
    evaluation.predict(cfg, student, data).save(folder / ANSWERS)
    return time.perf_counter() - started
