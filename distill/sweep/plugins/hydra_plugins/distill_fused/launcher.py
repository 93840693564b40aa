"""`hydra/launcher=fused`, where Hydra looks for launchers; what it does is in `distill.sweep`.

Hydra imports this before it prints its help: nothing heavy may be imported here.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class FusedLauncher(Launcher):
    """Train the jobs of a sweep that share data and teacher in one process, in turns.

    Args:
        devices: processes, one for each GPU or a share of the cores each: a number, a list of GPUs,
            or `auto`, which is one for each GPU where there are several.
        together: the most jobs that share a process at a time; None sets no limit.
    """

    def __init__(self, devices: int | str = "auto", together: int | None = None) -> None:
        self.devices, self.together = devices, together

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Take what Hydra gives."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run the jobs, and return what each came to, in their order."""
        fused = importlib.import_module("distill.sweep.fused")
        return fused.launch(self, job_overrides, initial_job_idx)


OPTIONS = {
    "_target_": "hydra_plugins.distill_fused.launcher.FusedLauncher",
    "devices": "auto",
    "together": None,
}
ConfigStore.instance().store("fused", OPTIONS, group="hydra/launcher", provider="distill")
