"""The jobs of a sweep in few processes: each shares one pass of data and teacher among its jobs.

Jobs that differ on the student's side only form a group. A process trains a group in turns, batch
by batch: data, views, the teacher and its answers are made once; everything else is each job's own,
so that its files and numbers are those of a run alone.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from distill.config import shared_key
from distill.sweep.lockstep import in_turns
from distill.sweep.workers import places, spread

Report = Callable[[int, JobReturn], None]


@dataclass(frozen=True)
class Job:
    """One job of a sweep: its number and its whole configuration."""

    number: int
    config: DictConfig


def launch(
    launcher: Any, job_overrides: Sequence[Sequence[str]], first: int
) -> Sequence[JobReturn]:
    """Run the jobs of a multirun; see `hydra_plugins.distill_fused.launcher.FusedLauncher`."""
    setup_globals()
    config: DictConfig = launcher.config
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    Path(config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
    jobs = [composed(launcher, list(own), k) for k, own in enumerate(job_overrides, first)]
    results: dict[int, JobReturn] = {}
    where = places(launcher.devices)
    chunks = chunked(jobs, max(1, len(where)), launcher.together)
    if len(where) < 2:
        for chunk in chunks:
            run_chunk(launcher.hydra_context, launcher.task_function, chunk, results.__setitem__)
    else:
        spread(partial(run_chunk, None, launcher.task_function), chunks, where, results)
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    return [results[number] for number in range(first, first + len(job_overrides))]


def composed(launcher: Any, overrides: list[str], number: int) -> Job:
    """Return the job of these overrides."""
    config = launcher.hydra_context.config_loader.load_sweep_config(launcher.config, overrides)
    with open_dict(config):
        config.hydra.job.id = config.hydra.job.num = number
    return Job(number, config)


def nothing() -> JobReturn:
    """Return what a sweeper is told of a job that came to nothing: it goes on with the others."""
    done = JobReturn(status=JobStatus.COMPLETED)
    done.return_value = math.nan
    return done


def chunked(jobs: Iterable[Job], processes: int, most: int | None) -> list[list[Job]]:
    """Return jobs that share data and teacher together, in at least as many parts as processes."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        try:
            key = shared_key(job.config, "teacher")
        except OmegaConfBaseException:  # its own run will say what is wrong
            key = str(job.number)
        groups.setdefault(key, []).append(job)
    parts = []
    for group in groups.values():
        size = min(math.ceil(len(group) / processes), most or len(group))
        parts += [group[start : start + size] for start in range(0, len(group), size)]
    return parts


def run_chunk(
    context: HydraContext | None, task: TaskFunction, chunk: Sequence[Job], report: Report
) -> None:
    """Run jobs in turns; one for which memory did not suffice runs again when it is alone."""
    crowded: list[Job] = []

    def run(job: Job, among_others: bool) -> None:
        done = run_job(
            hydra_context=context or HydraContext(None, callbacks_of(job.config)),  # type: ignore[arg-type]
            task_function=partial(labelled, task, job.number),
            config=job.config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        if among_others and out_of_memory(done):
            crowded.append(job)
        else:
            report(job.number, done if done.status == JobStatus.COMPLETED else nothing())

    in_turns([partial(run, job, len(chunk) > 1) for job in chunk])
    for job in crowded:
        print(f"distill: job {job.number} does not fit beside the others: it runs again, alone",
              file=sys.stderr)  # fmt: skip
        in_turns([partial(run, job, False)])


def out_of_memory(done: JobReturn) -> bool:
    """Whether a job ended for want of memory."""
    return done.status == JobStatus.FAILED and isinstance(
        done._return_value, torch.OutOfMemoryError | MemoryError
    )


def labelled(task: TaskFunction, number: int, cfg: DictConfig) -> Any:
    """Run a job whose lines on the screen begin with its number."""
    for handler in logging.root.handlers:
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(logging.Formatter(f"[{number}] %(message)s"))
    return task(cfg)


def callbacks_of(config: DictConfig) -> Any:
    """Return Hydra's callbacks, in a process to which its own cannot be sent."""
    from hydra._internal.callbacks import Callbacks

    return Callbacks(config)
