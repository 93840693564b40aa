"""Run several functions in turns, each in a world of its own."""

from __future__ import annotations

import logging
import os
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from greenlet import GreenletExit, getcurrent, greenlet
from hydra.core.hydra_config import HydraConfig

from distill.utils.sharing import Sharing, among

SEEDS = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")  # environment variables that Lightning keeps seeds in


@dataclass
class World:
    """What is global to a process, and yet each run's own: random states, configuration, log."""

    python: Any
    numpy: Any
    torch: Any
    cuda: Any
    config: Any
    handlers: list[logging.Handler]
    level: int
    seeds: dict[str, str]
    away: float

    @classmethod
    def now(cls, sharing: Sharing) -> World:
        """Return the world as it is."""
        has_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        return cls(
            random.getstate(),
            np.random.get_state(),
            torch.get_rng_state(),
            torch.cuda.get_rng_state_all() if has_cuda else None,
            HydraConfig.instance().cfg,
            logging.root.handlers[:],
            logging.root.level,
            {name: os.environ[name] for name in SEEDS if name in os.environ},
            sharing.away,
        )

    def enter(self, sharing: Sharing) -> None:
        """Make the world what it was."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)
        HydraConfig.instance().cfg = self.config
        logging.root.handlers[:] = self.handlers
        logging.root.setLevel(self.level)
        for name in SEEDS:
            os.environ.pop(name, None)
        os.environ.update(self.seeds)
        sharing.away = self.away


def in_turns(tasks: Sequence[Callable[[], None]]) -> None:
    """Run functions in turns, which end where they call `sharing.next_turn`.

    Each has its own random states, Hydra configuration and log handlers. All are in one thread: a
    thread for each would have a pool of workers each, which share the cores badly.
    """
    caller = getcurrent()

    def switch() -> None:
        # What is local to the thread is set as a run's outermost code has it, and back again after.
        with torch.inference_mode(False), torch.enable_grad():
            caller.switch()

    sharing = Sharing(switch)
    outside = World.now(sharing)
    waiting = deque((greenlet(task), outside) for task in tasks)
    try:
        with among(sharing):
            while waiting:
                run, world = waiting[0]
                world.enter(sharing)
                run.switch()
                world = World.now(sharing)
                waiting.popleft()
                if not run.dead:
                    waiting.append((run, world))
    finally:
        with among(sharing):
            for run, world in waiting:  # one was interrupted: so are the others, to clean up
                world.enter(sharing)
                if not run.dead:
                    run.throw(GreenletExit)
        outside.enter(sharing)
