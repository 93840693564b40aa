"""One command in a folder: what a run or a sweep writes is its own from before the first file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

# Nothing heavy: Hydra imports this file before it prints its help.
from distill.config.explain import refuse
from distill.sweep.checks import check_sweep
from distill.utils.files import COMMAND, held_elsewhere, only_run_in
from distill.utils.ranks import first_of_run
from distill.utils.run_folder import SWEEP, jobs_in

MOST = 100  # folders that are named by one second


class Alone(Callback):
    """Hold the folder of a run or a sweep before Hydra writes its record there, until the end.

    The second command in it ends with exit code 2 and changes nothing. One whose folder is named by
    the second it was begun in takes another name.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hold a run's folder, unless a sweep has it."""
        if not first_of_run():  # of several processes that are one run
            return
        folder = hold(config, "run")
        if in_a_sweep(folder) and held_elsewhere(folder.parent):
            refuse(ValueError(
                f"{folder} belongs to a sweep that is being run: wait for it, or give another "
                "directory"
            ))  # fmt: skip

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hold a sweep's folder, unless one of its jobs is still at work."""
        check_sweep(config)
        folder = hold(config, "sweep")
        for job in jobs_in(folder):
            if held_elsewhere(job):
                refuse(ValueError(
                    f"{job}: another run is writing there: wait for it, or give another directory"
                ))  # fmt: skip


def hold(config: DictConfig, kind: str) -> Path:
    """Hold the folder of `hydra.run` or `hydra.sweep`, and return it."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)  # as Hydra does before it asks for the folder
    try:
        folder = Path(str(config.hydra[kind].dir))
        raw = OmegaConf.to_container(config.hydra[kind], resolve=False)
    finally:
        HydraConfig.instance().cfg = before
    resumed = OmegaConf.select(config, "sweep.resume")
    chosen = not isinstance(raw, dict) or "${now:" not in str(raw["dir"]) or bool(resumed)
    try:
        if chosen:
            COMMAND.enter_context(only_run_in(folder))
            return folder
        free = first_free(folder)
    except (ValueError, OSError) as error:
        refuse(error)
    if free != folder:
        name_it(config, f"hydra.{kind}.dir", free)
    return free


def first_free(folder: Path) -> Path:
    """Hold a folder, or the first of `NAME-2`, `NAME-3`, … that no other command holds."""
    names = [folder, *(folder.with_name(f"{folder.name}-{k}") for k in range(2, MOST))]
    for name in names[:-1]:
        if not held_elsewhere(name):
            try:
                COMMAND.enter_context(only_run_in(name))
                return name
            except ValueError:  # taken in the meantime
                continue
    COMMAND.enter_context(only_run_in(names[-1]))
    return names[-1]


def name_it(config: DictConfig, key: str, value: Path | str) -> None:
    """Set one of Hydra's own values, also for the jobs that are composed from its overrides."""
    text = str(value)
    with read_write(config.hydra), open_dict(config.hydra):
        OmegaConf.update(config, key, text)
        quoted = text.replace("\\", "\\\\").replace("'", "\\'")
        config.hydra.overrides.hydra.append(f"{key}='{quoted}'")


def in_a_sweep(folder: Path) -> bool:
    """Whether a folder lies in that of a sweep, as its jobs do."""
    return (folder.parent / SWEEP).is_file()
