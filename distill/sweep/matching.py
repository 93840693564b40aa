"""Which folder each job of a resumed sweep has: by its overrides, not by its place in it.

Hydra numbers the jobs of a command. Here they are compared with those that are in the sweep's
folder: the same job has its own folder again, a new one gets a number that none has. What was found
is written into `hydra.sweep.subdir`, which every launcher asks for a job's folder.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from distill.config.keys import flat, is_bookkeeping
from distill.utils.reading import parsed_yaml, read_yaml
from distill.utils.run_folder import RECORD, SUMMARY, jobs_in, read_overrides

NUMBER = "${hydra.job.num}"  # `hydra.sweep.subdir` as it is, of which the names are known at once
CONFIG = RECORD.with_name("config.yaml")
Pairs = frozenset[tuple[str, str]]
Settings = dict[str, Any]


@dataclass(frozen=True)
class Match:
    """Where the jobs of a command lie.

    Args:
        folders: of each job, within the sweep's.
        finished: how many of them have their numbers already.
        unfinished: how many were begun, and go on from a checkpoint.
        others: how many more are in the sweep's folder.
    """

    folders: Sequence[str]
    finished: int = 0
    unfinished: int = 0
    others: int = 0

    def __str__(self) -> str:
        count = len(self.folders)
        new = count - self.finished - self.unfinished
        parts = [f"{self.finished} finished before" if self.finished else "",
                 f"{self.unfinished} {'goes' if self.unfinished == 1 else 'go'} on"
                 if self.unfinished else "",
                 f"{new} new" if new else ""]  # fmt: skip
        kept = f"; {self.others} more there, not asked for now, kept" if self.others else ""
        return f"{count} {plural('job', count)}: {', '.join(filter(None, parts))}{kept}"


def match(config: DictConfig, folder: Path) -> Match:
    """Find out which of a sweep's jobs are in its folder.

    Args:
        config: of the sweep, under its command line.
        folder: the sweep's.

    Raises:
        ValueError: if two jobs would have one folder.
    """
    overrides = job_overrides(config)
    there = {job.relative_to(folder).as_posix(): job for job in jobs_in(folder)}
    compose = cache(partial(composed, config, overrides))
    matched = same(overrides, there, compose)
    names = [matched.get(k) for k in range(len(overrides))]
    folders = with_new_names(names, there, names_of(config, compose))
    taken = [there[name] for name in matched.values()]
    finished = [job for job in taken if (job / SUMMARY).is_file()]
    begun = [job for job in taken if job not in finished and any(job.glob("checkpoints/*.ckpt"))]
    return Match(folders, len(finished), len(begun), len(there) - len(matched))


def job_overrides(config: DictConfig) -> list[list[str]]:
    """Return the overrides of each job, in the order of Hydra's own sweeper.

    Raises:
        HydraException: if the command line cannot be read.
    """
    params = [f"{name}={value}" for name, value in (config.hydra.sweeper.params or {}).items()]
    given = [*params, *OmegaConf.to_container(config.hydra.overrides.task, resolve=False)]  # type: ignore[misc]
    return combined(given)


def combined(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each job of a command line.

    Raises:
        HydraException: if it cannot be read.
    """
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    said = {one.get_key_element(): choices(one) for one in parser.parse_overrides(list(overrides))}
    return [list(job) for job in itertools.product(*said.values())]  # of a key said twice, the last


def choices(override: Override) -> list[str]:
    """Return what an override says in each of the jobs that it makes."""
    if override.is_sweep_override():
        values = list(override.sweep_string_iterator())
    else:
        values = [override.get_value_element_as_str()]
    return [f"{override.get_key_element()}={value}" for value in values]


def composed(config: DictConfig, overrides: Sequence[list[str]], number: int) -> DictConfig:
    """Return the whole configuration of a job, as its launcher will compose it."""
    loader: Any = GlobalHydra.instance().config_loader()
    job: DictConfig = loader.load_sweep_config(config, list(overrides[number]))
    with read_write(job.hydra), open_dict(job.hydra):
        job.hydra.job.num = job.hydra.job.id = number
    return job


def same(
    jobs: Sequence[Sequence[str]], there: dict[str, Path], compose: Callable[[int], DictConfig]
) -> dict[int, str]:
    """Return which job of the command is which in the folder: first by words, then by meaning.

    `objective.temperature=4 seed=0` and `objective.temperature=4` are two texts of one
    configuration. Composing it takes time, which only those take that no text has matched.
    """
    left: dict[Pairs, list[str]] = {}
    for name, job in there.items():
        left.setdefault(canonical_pairs(tuple(read_overrides(job))), []).append(name)
    matched: dict[int, str] = {}
    for number, overrides in enumerate(jobs):
        if names := left.get(canonical_pairs(tuple(overrides))):
            matched[number] = names.pop(0)
    configs = {name: settings_in(there[name]) for names in left.values() for name in names}
    for number in range(len(jobs)):
        if number not in matched and configs:
            own = settings_of(compose(number))
            equal = next((name for name, config in configs.items() if config == own), None)
            if equal is not None:
                matched[number] = equal
                del configs[equal]
    return matched


@cache
def canonical_pairs(overrides: tuple[str, ...]) -> Pairs:
    """Return what overrides say of a job's numbers, however they are written and in any order."""
    pairs = map(pair, overrides)
    return frozenset((name, value) for name, value in pairs if not is_bookkeeping(name))


@cache
def pair(override: str) -> tuple[str, str]:
    """Return the key and the value of an override, the same for `+lr=8e-3` and `lr=0.008`."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:  # of another version, perhaps: it stands for itself
        return override, ""
    name = parsed.get_key_element()
    return (name if parsed.is_delete() else name.lstrip("+")), canonical(parsed.value())


def canonical(value: Any) -> str:
    """Return a value as a text that is the same for 1 and 1.0, and another for `true`."""
    if isinstance(value, dict):
        return repr(sorted((str(key), canonical(inner)) for key, inner in value.items()))
    if isinstance(value, list):
        return repr([canonical(inner) for inner in value])
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(float(value))
    return f"{type(value).__name__ if isinstance(value, bool) else ''}{value}"


def settings_in(job: Path) -> Settings:
    """Return what decides the numbers of a job that is there, as Hydra recorded it."""
    return settings(read_yaml(job / CONFIG) or {})


def settings_of(config: DictConfig) -> Settings:
    """Return what decides a job's numbers, as Hydra will record it."""
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    return settings(parsed_yaml(OmegaConf.to_yaml(own)))


def settings(config: Any) -> Settings:
    """Return the values of an unresolved configuration that decide a job's numbers, by name."""
    return {
        name: value
        for name, value in flat(config).items()
        if value not in ({}, [], None) and not is_bookkeeping(name)
    }


def names_of(config: DictConfig, compose: Callable[[int], DictConfig]) -> Callable[[int, int], str]:
    """Return (job, number) → the folder that a job of that number has."""
    if OmegaConf.to_container(config.hydra.sweep, resolve=False)["subdir"] == NUMBER:  # type: ignore[index, call-overload]
        return lambda _, number: str(number)

    def name(job: int, number: int) -> str:
        own = compose(job)
        with read_write(own.hydra):
            own.hydra.job.num = number
        before = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(own)
        try:
            return Path(str(own.hydra.sweep.subdir)).as_posix()
        finally:
            HydraConfig.instance().cfg = before

    return name


def with_new_names(
    names: Sequence[str | None], there: Iterable[str], name: Callable[[int, int], str]
) -> list[str]:
    """Return a folder for each job: its own, or a new one of a number after the largest."""
    taken = {*there, *filter(None, names)}
    number = 1 + max((number_in(one) for one in taken), default=-1)
    folders: list[str] = []
    for job, existing in enumerate(names):
        own = existing
        if own is None:
            own = name(job, number)
            if own in taken:
                raise ValueError(
                    f"hydra.sweep.subdir names the folder {own} for two jobs: let it hold what "
                    "they differ in, or ${hydra.job.num}"
                )
            number += 1
        taken.add(own)
        folders.append(own)
    return folders


def number_in(name: str) -> int:
    """Return the number at the end of a folder's name; −1 where there is none."""
    digits = re.search(r"[0-9]+$", name)
    return int(digits[0]) if digits else -1


def subdir_of(folders: Sequence[str]) -> str:
    """Return what `hydra.sweep.subdir` has to say so that each job has its folder."""
    listed = " ".join(quote(folder, safe="/=.,_-") for folder in folders)
    return f'${{job_folder:"{listed}",{NUMBER}}}'


def plural(noun: str, count: int) -> str:
    """Return a noun for so many."""
    return noun if count == 1 else f"{noun}s"
