"""The jobs of a sweep that one process trains: they share one pass of data and teacher.

Jobs that differ on the student's side only form a group. A process trains a group in turns, batch
by batch: data, views, the teacher and its answers are made once; everything else is each job's own,
so that its files and numbers are those of a run alone.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

import timm
import torch
from hydra.core.utils import run_job
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from distill.cli import job_name
from distill.config.build import shared_key
from distill.config.explain import one_line, out_of_memory
from distill.config.read import plain
from distill.sweep.lockstep import in_turns
from distill.sweep.workers import Job, Report, accelerator, nothing
from distill.utils import signals
from distill.utils.compat import returned
from distill.utils.memory import available_bytes
from distill.utils.sharing import Sharing

STATES = 5  # of each parameter: its value, gradient, the optimiser's two, and an average


def chunked(jobs: Iterable[Job], processes: int, most: int | None) -> list[list[Job]]:
    """Return jobs that share data and teacher together, in at least as many parts as processes."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        try:
            key = shared_key(job.config, "teacher")
        except OmegaConfBaseException:  # its own run will say what is wrong
            key = str(job.number)
        if (job.config.get("logger") or {}).get("wandb"):  # a process has one run of W&B at a time
            key = str(job.number)
        groups.setdefault(key, []).append(job)
    parts = []
    for group in groups.values():
        size = min(math.ceil(len(group) / processes), most or len(group))
        parts += [group[start : start + size] for start in range(0, len(group), size)]
    return parts


def run_chunk(
    context: HydraContext, task: TaskFunction, sharers: int, chunk: Sequence[Job], report: Report
) -> None:
    """Run jobs in turns, as many at a time as there is memory for among `sharers` processes."""
    most = fitting(chunk, sharers)
    if most < len(chunk):
        print(f"distill: {len(chunk)} students do not fit in memory beside each other: they are "
              f"trained {most} at a time", file=sys.stderr)  # fmt: skip
    for start in range(0, len(chunk), most):
        run_together(context, task, chunk[start : start + most], report)


def fitting(chunk: Sequence[Job], sharers: int = 1) -> int:
    """Return how many of these jobs' students fit in half of a process's share of free memory."""
    largest = max(student_bytes(job.config) for job in chunk)
    free = free_bytes(chunk[0].config) / sharers
    return max(1, min(len(chunk), int(free / 2 // largest))) if largest and free else len(chunk)


def student_bytes(config: DictConfig) -> int:
    """Return the bytes that a student takes as long as it is trained; 0 if that is not known."""
    student = config.get("student")
    if not student or not student.name:
        return 0
    return STATES * parameter_bytes(student.name, json.dumps(plain(student.get("args") or {})))


@cache  # the jobs of a sweep have few architectures
def parameter_bytes(name: str, args: str) -> int:
    """Return the bytes of an architecture's parameters; 0 if timm does not build it.

    Args:
        name: timm's name.
        args: further arguments of `timm.create_model`, as JSON.
    """
    try:
        with torch.device("meta"):  # without their numbers
            model = timm.create_model(name, **json.loads(args))
    except Exception:  # of which its own run will speak
        return 0
    return sum(parameter.nbytes for parameter in model.parameters())


def free_bytes(config: DictConfig) -> int:
    """Return the free memory where a job's student will be; 0 if that is not known."""
    if accelerator(config) != "cpu" and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return available_bytes()


def run_together(
    context: HydraContext, task: TaskFunction, chunk: Sequence[Job], report: Report
) -> None:
    """Run jobs in turns; one for which memory did not suffice runs again when it is alone."""
    crowded: list[Job] = []

    def run(job: Job, among_others: bool, sharing: Sharing) -> None:
        done = run_job(
            hydra_context=context,
            task_function=partial(labelled, task, sharing),
            config=job.config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        if signals.pending():  # whoever requested it has stopped listening
            return
        outcome = returned(done)
        if not out_of_memory(outcome):
            report(job.number, done)
        elif among_others:
            crowded.append(job)
            release(outcome)
        else:
            print(f"distill: job {job.name}: {one_line(outcome)}", file=sys.stderr)
            report(job.number, nothing())

    in_turns([partial(run, job, len(chunk) > 1) for job in chunk])
    signals.stop_if_told()
    for job in crowded:
        print(f"distill: job {job.name} does not fit beside the others: it runs again, alone",
              file=sys.stderr)  # fmt: skip
        in_turns([partial(run, job, False)])


def release(error: BaseException | None) -> None:
    """Free what the frames of an error hold, a whole step's tensors, for those who come after."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def labelled(task: Callable[..., Any], sharing: Sharing, cfg: DictConfig) -> Any:
    """Run a job whose lines on the screen begin with its name."""
    name = job_name().replace("%", "%%")
    for handler in logging.root.handlers:
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(logging.Formatter(f"[{name}] %(message)s"))
    try:
        return task(cfg, sharing=sharing)
    except signals.Preempted:  # the others also write their checkpoints before the process ends
        return None
