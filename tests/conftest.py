"""Shared fixtures."""

import os
import random
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import distill  # noqa: F401  (which makes torchvision importable)

settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
settings.load_profile("unhurried")

# Of a suite that is started in the background a shell has Ctrl-C ignored, by all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


# What only `scripts/test --all` runs: files, or single tests, and why they may wait.
THOROUGH = {
    "sweep/test_ray.py": "starts clusters",
    "sweep/test_slurm.py": "starts a cluster",
    "sweep/test_engines.py": "searches by other launchers",
    "sweep/test_workers.py::test_jobs_on_two_gpus": "starts processes",
    "e2e/test_machines.py": "two agents of torchrun and of Slurm",
    "e2e/test_kills.py": "kills at length",
    "e2e/test_packaging.py": "builds and installs the wheel",
    "e2e/test_own_models.py": "every command with a module of one's own",
    "e2e/test_readme.py::test_a_command_of_the_docs_runs": "every command of docs/",
    "e2e/test_run.py::test_a_compiled_student": "compiles",
    "e2e/test_fused.py::test_a_sweep_that_was_told_to_end": "a whole sweep, three times",
    "e2e/test_fused.py::test_a_fused_sweep_leaves_what_separate_runs_leave[swept1": "a second one",
    "e2e/test_sweep.py::test_previews": "three launchers",
    "e2e/test_sparsity.py": "whole runs of what tests/training/callbacks tests in small",
    "sweep/test_search.py": "needs Optuna",
    "e2e/test_unlabeled.py::test_a_store_that_is_filled": "four runs",
    "deploy/test_hub.py::test_what_the_hub_or_the_bundle_forbids": "waits for what is not there",
    "config/test_library.py::test_an_optimiser_trains_and_goes_on_as_if_never_interrupted[kron]":
        "compiles",
    "studies": "trains the ten claims and a table",
    "test_soak.py": "random configurations",
    # What a smaller test beside it, or another of its cases, tests too.
    "training/test_shards_resumed.py::test_it_sees": "runs that are killed, of one and two ranks",
    "training/test_ddp.py::test_each_rank_asks": "two ranks",
    "training/test_ddp.py::test_two_processes_give_the_numbers_and_the_student_of_one[2]":
        "two ranks, a second time",
    "training/test_assistants.py": "whole chains of teachers",
    "training/test_first_look.py::test_doubts_are_in_the_numbers": "two whole runs",
    "training/test_helpers.py::test_stock_timm_loads_a_student_that_answers": "whole runs",
    "training/test_graph.py::test_runs_that_take_turns": "pairs of runs",
    "config/test_library.py::test_an_optimiser_trains_and_goes_on_as_if_never_interrupted[kronc":
        "compiles",
    "data/sources/test_shard_writing.py::test_timm_and_tarfile_read_them": "a process of timm's",
    "data/sources/test_shard_writing.py::test_the_command_names_a_size_that_is_none[0":
        "another size",
    "data/sources/test_shard_writing.py::test_the_command_names_a_size_that_is_none[few":
        "another size",
    "data/sources/test_packed.py::test_a_worker_that_reads_all": "measures memory",
    "data/test_module.py::test_spawned_workers": "starts Python anew for each worker",
    "deploy/export/test_export.py::test_every_file_is_judged": "exports to each format",
    "e2e/test_export.py": "a whole run, exported",
    "e2e/test_cli.py::test_a_sweep_over_keys_that_are_new": "sweeps three times",
    "e2e/test_fused.py::test_two_processes_share": "a sweep over two processes",
    "e2e/test_fused.py::test_what_fails_is_named": "two sweeps",
    "e2e/test_fused.py::test_the_one_gpu_that_is_listed": "a sweep over processes",
    "e2e/test_readme.py::test_a_command_of_the_readme_runs[distill -m": "a whole sweep",
    "e2e/test_readme.py::test_a_command_of_the_readme_runs[scripts/distill]":
        "what `distill` does, from a checkout",
    "e2e/test_readme.py::test_the_programs_of_the_readme_run": "whole runs",
    "e2e/test_run.py::test_one_run_over_two_processes": "two ranks",
    "e2e/test_run.py::test_options_work_together[extra1": "one of five mixtures will do",
    "e2e/test_run.py::test_options_work_together[extra2": "one of five mixtures will do",
    "e2e/test_run.py::test_options_work_together[extra3": "one of five mixtures will do",
    "e2e/test_run.py::test_options_work_together[extra4": "one of five mixtures will do",
    "e2e/test_sweep.py::test_a_job_that_fails_in_a_used_folder": "sweeps twice",
    "e2e/test_sweep.py::test_a_sweep_of_stores": "a sweep of another command",
    "e2e/test_sweep.py::test_subprocess_ddp": "starts processes",
    "e2e/test_unlabeled.py::test_jobs_that_share_a_process": "a sweep, and its runs alone",
    "e2e/test_unlabeled.py::test_they_are_refused": "a command for each mistake",
    "metrics/test_calibration.py::test_two_processes": "two ranks",
    "metrics/test_invariance.py::test_two_processes": "two ranks",
    "metrics/test_scaling.py::test_fifty_thousand_rows": "at length",
    "plan/test_command.py::test_a_sweep_is_the_sum": "plans a sweep and each of its jobs",
    "report/test_page.py::test_damaged_runs": "damages each file in many ways",
    "utils/test_memory.py::test_blocks": "measures memory",
}  # fmt: skip
# What takes more than a few seconds beside them, and so is not in `scripts/test --fast`.
SLOW = (
    "e2e", "deploy/test_predict.py::test_the_command_predicts",
    "config/test_configurations.py::test_what_decides_a_cached_model", "teacher/test_cached.py",
    "training/test_filling.py",
    "report/test_leaderboard.py::test_damaged_sweeps",
    "test_soak_shards.py::test_a_short_stream", "data/sources/test_shards.py::test_a_stalled",
    "training/test_graph.py",
    "test_judging.py",
    "deploy/export/test_export.py",
    "config/test_mistakes.py::test_the_installed_command",
    "config/test_configurations.py::test_every_objective_trains", "data/sources/test_cifar.py",
    "models/test_cifar_literature.py", "models/test_channels.py::test_stock_timm_builds",
    "models/test_teacher_and_bundle.py::test_stock_timm_gives",
    "data/condition/test_image_corruptions.py::test_a_higher_severity_changes_more",
    "plan/test_command.py::test_assistants",
    "training/test_long_runs.py::test_a_run_that_is_killed_anywhere",
    "sweep/test_workers.py", "deploy/test_hub.py::test_the_four_files",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    for item in items:
        name = item.nodeid.removeprefix("tests/")
        thorough = name.startswith(tuple(THOROUGH))
        if thorough:
            item.add_marker(pytest.mark.thorough)
        if thorough or name.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU here"))


class Tiny(nn.Module):
    """A model of a few weights, with batch norm and dropout to catch a wrong mode."""

    def __init__(self, num_classes=4, width=8):
        super().__init__()
        self.num_classes = num_classes
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.2)
        )
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


@pytest.fixture
def tiny():
    return Tiny


def pairs(count=64, classes=4, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, 8, 8, generator=generator)
    labels = torch.arange(count) % classes
    return DataLoader(TensorDataset(images, labels), **{"batch_size": 16, **options})


@pytest.fixture
def loader():
    return pairs


@pytest.fixture(scope="session")
def cache(tmp_path_factory, worker_id):
    """A cache of trained teachers that all tests of a session share."""
    base = tmp_path_factory.getbasetemp()
    return (base if worker_id == "master" else base.parent) / "cache"


@pytest.fixture
def surroundings(cache):
    """The environment of an installed command that is started now."""

    def now(**environment):
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        own = {"PATH": path, "DISTILL_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
        return {**os.environ, **own, **environment}

    return now


@pytest.fixture
def command(surroundings, tmp_path):
    """Run an installed command in a folder of its own."""

    def run(*arguments, folder=tmp_path, check=True, **environment):
        done = subprocess.run(
            [str(argument) for argument in arguments],
            cwd=folder,
            env=surroundings(**environment),
            capture_output=True,
            text=True,
            timeout=600,
        )
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


class Started(subprocess.Popen):
    """A command that goes on by itself, in a session of its own; it writes to `output`."""

    def __init__(self, arguments, output, **options):
        self.output = output
        with output.open("w") as file:
            super().__init__(
                [str(argument) for argument in arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **options,
            )

    def said(self):
        return self.output.read_text()

    def kill(self):
        """Kill it and all that it has started, whatever group that is in."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(ProcessLookupError):
                if os.getsid(int(process.name)) == self.pid:
                    os.kill(int(process.name), signal.SIGKILL)
        self.wait()


@pytest.fixture
def spawn(surroundings, tmp_path):
    """Start an installed command; what is left of it is killed at the end of the test."""
    started = []

    def start(*arguments, **environment):
        output = tmp_path / f"output-{len(started)}.txt"
        process = Started(arguments, output, cwd=tmp_path, env=surroundings(**environment))
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


def free_port():
    """A port that neither the system nor Ray (10002 to 19999) gives out meanwhile."""
    for port in random.sample(range(20000, 25000), 100):
        with socket.socket() as one, suppress(OSError):
            one.bind(("", port))
            return port
    raise AssertionError("no port is free")
