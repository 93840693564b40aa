"""The command `distill plan`: its jobs, what each would take, and all of them together."""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from distill.cli import HYDRA
from distill.config import read
from distill.config.overrides import CONF
from distill.config.schema import check_values
from distill.plan.job import Planner
from distill.plan.table import as_json, assumptions, print_plan, print_sweep
from distill.plan.total import Plan, total_of
from distill.sweep.group import chunked
from distill.sweep.matching import combined
from distill.sweep.workers import Job, accelerator, places
from distill.utils.json_files import write_json
from distill.utils.memory import keep_freed_memory

CONFIG = "plan"
FUSED = "FusedLauncher"


def run(flags: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Print what the jobs of a command would take.

    It leaves nothing behind but `plan.json`, and in the cache what it has read of files of data.

    Args:
        flags: Hydra's, by their names.
        overrides: as typed.

    Raises:
        ValueError: for what the run would refuse before it trains anything.
    """
    keep_freed_memory()
    with tempfile.TemporaryDirectory(prefix="distill-plan-") as work, composing(flags):
        jobs = composed(overrides, bool(flags["multirun"]), Path(work))
        settings = jobs[0].plan
        check_values(OmegaConf.create({"plan": settings}))
        numbers = read.plain(settings.devices)
        devices = numbers if isinstance(numbers, list) else [numbers]
        with spoken():
            planner = Planner(Path(work), settings.seconds)
            plans = list(map(partial(planned, planner), jobs, names(jobs)))
        groups, fused = grouped(jobs, plans) if flags["multirun"] else ([plans], False)
        one = total_of(groups)
        if flags["multirun"]:
            print_sweep(plans, one, fused, devices)
        else:
            print_plan(plans[0], devices)
        print("supposed:")
        for line in assumptions(plans):
            print(f"  {line}")
        if settings.json:
            write_json(Path(settings.json), as_json(plans, one, devices))


@contextmanager
def composing(flags: Mapping[str, Any]) -> Iterator[None]:
    """Find configurations where the command would, until the end; then Hydra knows of no job."""
    before = HydraConfig.instance().cfg
    try:
        with initialize_config_dir(str(CONF), version_base=HYDRA, job_name="distill"):
            yield
    finally:
        HydraConfig.instance().cfg = before


def composed(overrides: Sequence[str], multirun: bool, work: Path) -> list[DictConfig]:
    """Return the configurations of a command's jobs, with Hydra's own."""
    ours = [f"hydra.mode={'MULTIRUN' if multirun else 'RUN'}", f"hydra.runtime.output_dir={work}"]
    if not multirun:
        return [compose(CONFIG, [*overrides, *ours], return_hydra_config=True)]
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    fixed = [one.input_line or "" for one in parsed if not one.is_sweep_override()]
    common = compose(CONFIG, [*fixed, *ours], return_hydra_config=True)
    if not common.hydra.sweeper._target_.endswith(".BasicSweeper"):
        raise ValueError(
            "what a search will try is not known ahead: leave out -m, and multiply by "
            "hydra.sweeper.n_trials"
        )
    swept = [f"{key}={value}" for key, value in (common.hydra.sweeper.params or {}).items()]
    return [
        compose(CONFIG, [*job, *ours, f"hydra.job.num={number}", f"hydra.job.id={number}"],
                return_hydra_config=True)
        for number, job in enumerate(combined([*swept, *overrides]))
    ]  # fmt: skip


def names(jobs: Sequence[DictConfig]) -> list[str]:
    """Return what tells jobs from each other: the overrides that not all of them have."""
    typed = [read.plain(job.hydra.overrides.task) for job in jobs]
    return [", ".join(one for one in own if not all(one in other for other in typed))
            for own in typed]  # fmt: skip


def planned(planner: Planner, job: DictConfig, name: str) -> Plan:
    """Return the plan of one job, while Hydra says that it is at work."""
    HydraConfig.instance().set_config(job)
    own = job.copy()
    with open_dict(own):
        del own["hydra"], own["plan"]
    return planner.plan(own, name)


def grouped(jobs: Sequence[DictConfig], plans: Sequence[Plan]) -> tuple[list[list[Plan]], bool]:
    """Return a sweep's plans in the groups that its launcher trains together, and whether it does.

    Args:
        jobs: their configurations, with Hydra's own.
        plans: of the jobs.
    """
    launcher = jobs[0].hydra.launcher
    if not launcher._target_.endswith(FUSED):
        return [[plan] for plan in plans], False
    where = places(launcher.devices, any(accelerator(job) != "cpu" for job in jobs))
    numbered = [Job(number, job) for number, job in enumerate(jobs)]
    chunks = chunked(numbered, max(1, len(where)), launcher.together)
    return [[plans[job.number] for job in chunk] for chunk in chunks], True


@contextmanager
def spoken() -> Iterator[None]:
    """Let notes of data and models go to the error stream, which is apart from the plan.

    Of data also what takes a while, such as reading all shards once.
    """
    own, handler = logging.getLogger("distill"), logging.StreamHandler(sys.stderr)
    data = logging.getLogger("distill.data")
    handler.setFormatter(logging.Formatter("%(message)s"))
    levels = own.level, data.level
    own.addHandler(handler)
    own.setLevel(logging.WARNING)
    data.setLevel(logging.INFO)
    try:
        yield
    finally:
        own.removeHandler(handler)
        own.setLevel(levels[0])
        data.setLevel(levels[1])
