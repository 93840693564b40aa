"""Which of a run's processes this one is, before there is a process group to ask."""

from __future__ import annotations

import os

VARIABLES = ("RANK", "SLURM_PROCID", "LOCAL_RANK")  # of torchrun, srun, and Lightning's own


def first_of_run() -> bool:
    """Return whether this process speaks for all of its run, on whatever machine."""
    return int(next((os.environ[name] for name in VARIABLES if name in os.environ), 0)) == 0
