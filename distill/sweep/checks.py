"""What a sweep is refused for, before anything of it is written."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

# Nothing heavy: Hydra imports this file before it prints its help.
from distill.config.explain import refuse
from distill.config.resolvers import direction
from distill.utils.run_folder import RECORD


def check_sweep(config: DictConfig) -> None:
    """Refuse a sweep whose table could not be made, and a search that could not be one."""
    check_record(config)
    if "sweep" not in config:  # of an evaluation
        return
    if config.sweep.resume and not config.hydra.sweeper._target_.endswith(".BasicSweeper"):
        refuse(ValueError(
            f"sweep.resume={config.sweep.resume}: a search goes on with the same "
            "hydra.sweeper.study_name, in a folder of its own"
        ))  # fmt: skip
    if "direction" in config.hydra.sweeper:
        check_direction(config)


def check_record(config: DictConfig) -> None:
    """Refuse jobs without Hydra's record of their overrides, and jobs out of the folder."""
    subdir = str(OmegaConf.to_container(config.hydra.sweep, resolve=False)["subdir"])  # type: ignore[index, call-overload]
    if subdir.startswith(("/", ".")) or "/." in subdir:
        refuse(ValueError(
            f"hydra.sweep.subdir={subdir} is hidden, or out of the sweep's folder, where its table "
            "looks for jobs: give another name"
        ))  # fmt: skip
    record = config.hydra.output_subdir or "null"
    if record != str(RECORD.parent):
        refuse(ValueError(
            f"hydra.output_subdir={record}: a sweep's table and sweep.resume read what a job was "
            f"told from its {RECORD.parent}: leave it out"
        ))  # fmt: skip


def check_direction(config: DictConfig) -> None:
    """Refuse a direction that does not follow from what is reported to a search of each trial."""
    given, goals = config.hydra.sweeper.direction, config.sweep.metrics
    ways = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    names = [getattr(way, "name", way) for way in ways]  # Optuna's own preset has an enumeration
    right = [direction(goal) for goal in goals or [config.optimized_metric]]
    if names != right:
        setting = (
            f"sweep.metrics={goals}" if goals else f"optimized_metric={config.optimized_metric}"
        )
        refuse(ValueError(
            f"hydra.sweeper.direction={', '.join(map(str, names))} is not that of {setting}, which "
            f"is {', '.join(right)}: leave it out, or give that"
        ))  # fmt: skip
