"""`hydra/launcher=fused`: the jobs of a sweep in few processes.

What a process needs to train is imported while others that will train import it too; here is only
what hands the jobs out.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, configure_log, setup_globals
from omegaconf import DictConfig, open_dict

from distill.cli import sweep_goes_on
from distill.sweep.workers import GPU, Job, accelerator, places, spread, started
from distill.utils import signals

GROUP = "distill.sweep.group"


def launch(
    launcher: Any, job_overrides: Sequence[Sequence[str]], first: int
) -> Sequence[JobReturn]:
    """Run the jobs of a multirun; see `hydra_plugins.distill_fused.launcher.FusedLauncher`."""
    setup_globals()
    config: DictConfig = launcher.config
    if config.hydra.job.chdir:
        raise ValueError(
            "hydra.job.chdir=true: jobs that take turns are in one directory; "
            "leave it, or take hydra/launcher=basic"
        )
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    Path(config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
    jobs = [composed(launcher, list(own), k) for k, own in enumerate(job_overrides, first)]
    on_gpus = any(accelerator(job.config) != "cpu" for job in jobs)
    where = places(launcher.devices, on_gpus)
    sharers = 1 if any(GPU in place for place in where) else max(1, len(where))  # of the memory
    results: dict[int, JobReturn] = {}
    try:
        with started(where[: len(jobs)], GROUP) as workers:
            group = importlib.import_module(GROUP)
            chunks = group.chunked(jobs, max(1, len(where)), launcher.together)
            run = partial(group.run_chunk, launcher.hydra_context, launcher.task_function, sharers)
            if workers:
                spread(run, chunks, workers, results)
            else:
                for chunk in chunks:
                    run(chunk, results.__setitem__)
    except signals.Preempted as stop:
        stop.advice = sweep_goes_on(config.hydra.sweep.dir)
        raise
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    return [results[number] for number in range(first, first + len(job_overrides))]


def composed(launcher: Any, overrides: list[str], number: int) -> Job:
    """Return the job of these overrides."""
    config = launcher.hydra_context.config_loader.load_sweep_config(launcher.config, overrides)
    with open_dict(config):
        config.hydra.job.id = config.hydra.job.num = number
    return Job(number, config)
