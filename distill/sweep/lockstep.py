"""Run several functions in turns, each with a global state of its own."""

from __future__ import annotations

import logging
import os
import random
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from greenlet import GreenletExit, getcurrent, greenlet
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from distill.utils.sharing import Sharing

SEEDS = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")


def cuda_states() -> list[torch.Tensor] | None:
    """Return the random states of the GPUs that this process has begun to use."""
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.cuda.get_rng_state_all() if in_use else None


def set_cuda_states(states: list[torch.Tensor] | None) -> None:
    """Set what `cuda_states` returned."""
    if states is not None:
        torch.cuda.set_rng_state_all(states)


def hydra_config() -> DictConfig | None:
    """Return the job that Hydra says is running."""
    return cast("DictConfig | None", HydraConfig.instance().cfg)


def set_hydra_config(config: DictConfig | None) -> None:
    """Set which job Hydra says is running."""
    HydraConfig.instance().cfg = config  # type: ignore[assignment]


def log_settings() -> tuple[list[logging.Handler], int]:
    """Return where the log is written, and from which level on."""
    return logging.root.handlers[:], logging.root.level


def set_log_settings(settings: tuple[list[logging.Handler], int]) -> None:
    """Set what `log_settings` returned."""
    logging.root.handlers[:], level = settings
    logging.root.setLevel(level)


def seeds() -> dict[str, str]:
    """Return the environment variables that Lightning keeps seeds in."""
    return {name: os.environ[name] for name in SEEDS if name in os.environ}


def set_seeds(values: dict[str, str]) -> None:
    """Set what `seeds` returned."""
    for name in SEEDS:
        os.environ.pop(name, None)
    os.environ.update(values)


# What is global to a process, and yet each run's own: how it is read, and how it is set.
GLOBALS: tuple[tuple[Callable[[], Any], Callable[[Any], None]], ...] = (
    (random.getstate, random.setstate),
    (np.random.get_state, np.random.set_state),
    (torch.get_rng_state, torch.set_rng_state),
    (cuda_states, set_cuda_states),
    (hydra_config, set_hydra_config),
    (log_settings, set_log_settings),
    (seeds, set_seeds),
)


def global_state() -> list[Any]:
    """Return what all of `GLOBALS` hold now."""
    return [read() for read, _ in GLOBALS]


def set_global_state(state: list[Any]) -> None:
    """Set what `global_state` returned."""
    for (_, write), value in zip(GLOBALS, state, strict=True):
        write(value)


def in_turns(tasks: Sequence[Callable[[Sharing], None]]) -> None:
    """Run functions in turns; each is given its `Sharing`, and ends a turn by `next_turn`.

    Each has its own random states, Hydra configuration and log handlers. All are in one thread: a
    thread for each would have a pool of workers each, which share the cores badly.
    """
    caller = getcurrent()

    def switch() -> None:
        # What is local to the thread is set as a run's outermost code has it, and back again after.
        with torch.inference_mode(False), torch.enable_grad():
            caller.switch()

    made: dict[Hashable, Any] = {}
    outside = global_state()
    waiting = deque((greenlet(partial(task, Sharing(switch, made))), outside) for task in tasks)
    try:
        while waiting:
            run, state = waiting[0]
            set_global_state(state)
            run.switch()
            state = global_state()
            waiting.popleft()
            if not run.dead:
                waiting.append((run, state))
    finally:
        for run, state in waiting:  # one was interrupted: so are the others, to clean up
            set_global_state(state)
            if not run.dead:
                run.throw(GreenletExit)
        set_global_state(outside)
