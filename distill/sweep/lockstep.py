"""Run several functions in turns, each in a world of its own."""

from __future__ import annotations

import logging
import os
import random
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from greenlet import GreenletExit, getcurrent, greenlet
from hydra.core.hydra_config import HydraConfig

from distill.utils.sharing import Sharing

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

    @classmethod
    def now(cls) -> World:
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
        )

    def enter(self) -> None:
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
    outside = World.now()
    waiting = deque((greenlet(partial(task, Sharing(switch, made))), outside) for task in tasks)
    try:
        while waiting:
            run, world = waiting[0]
            world.enter()
            run.switch()
            world = World.now()
            waiting.popleft()
            if not run.dead:
                waiting.append((run, world))
    finally:
        for run, world in waiting:  # one was interrupted: so are the others, to clean up
            world.enter()
            if not run.dead:
                run.throw(GreenletExit)
        outside.enter()
