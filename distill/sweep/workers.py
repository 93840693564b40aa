"""Processes of a sweep: one for each GPU, or a share of the cores each, fed from one queue."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from hydra import version
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from distill.cli import HYDRA
from distill.utils import signals
from distill.utils.process import cores

GPU = "CUDA_VISIBLE_DEVICES"
PATIENCE = 60  # seconds in which students write their last checkpoints


@dataclass(frozen=True)
class Job:
    """One job of a sweep: its number and its whole configuration."""

    number: int
    config: DictConfig

    @property
    def name(self) -> str:
        """What people call it: its folder in the sweep's."""
        try:
            return str(self.config.hydra.sweep.subdir)
        except OmegaConfBaseException:  # only known where it runs
            return str(self.number)


Place = dict[str, str]  # environment variables that keep a process to its device
Part = tuple[list[Job], int]  # jobs, and how often they were given back
Report = Callable[[int, JobReturn], None]
Run = Callable[[Sequence[Job], Report], None]


def accelerator(config: DictConfig) -> Any:
    """Return where a job asks to be trained, or None if it cannot be said."""
    try:
        return (config.get("trainer") or {}).get("accelerator")
    except OmegaConfBaseException:  # its own run will say what is wrong
        return None


def places(devices: Any, on_gpus: bool = True) -> list[Place]:
    """Return where processes are to run, or nothing where the one that asks will do.

    Args:
        devices: `auto` for every GPU of the machine, a number of processes, or a list of GPUs: by
            name, or as torch counts those that this process may use.
        on_gpus: whether the jobs may use GPUs.

    Raises:
        ValueError: if there are not so many GPUs, or it is none of these.
    """
    names = gpus() if on_gpus else []
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return [{GPU: gpu_name(device, names) if on_gpus else str(device)} for device in devices]
    count = len(names) if devices == "auto" else devices
    if not isinstance(count, int) or isinstance(count, bool) or count < (devices != "auto"):
        raise ValueError(f"hydra.launcher.devices={devices}: give auto, a number or a list of GPUs")
    if names and count > len(names):
        raise ValueError(f"hydra.launcher.devices={devices}, and there are {len(names)} GPUs")
    if count < 2:
        return []
    if names:
        return [{GPU: device} for device in names[:count]]
    share = str(max(1, cores() // count))
    return [{"OMP_NUM_THREADS": share, "MKL_NUM_THREADS": share}] * count


def gpu_name(device: Any, names: Sequence[str]) -> str:
    """Return the name of one of the GPUs that were found, given its name or its index."""
    if isinstance(device, int) and 0 <= device < len(names):
        return names[device]
    if str(device) in names:
        return str(device)
    raise ValueError(f"hydra.launcher.devices names GPU {device}, and there are {len(names)} GPUs")


def gpus() -> list[str]:
    """Return the GPUs that this process may use, without initialising any."""
    import torch

    count = torch.cuda.device_count()
    visible = [name.strip() for name in os.environ.get(GPU, "").split(",") if name.strip()]
    return visible[:count] if visible else [str(k) for k in range(count)]


def nothing() -> JobReturn:
    """Return what is reported of a job that came to nothing: it goes on with the others."""
    done = JobReturn(status=JobStatus.COMPLETED)
    done.return_value = None  # not NaN, at which Optuna's sweeper ends the search
    return done


class Worker:
    """A process at one place, and the part of a sweep that it is busy with."""

    def __init__(self, place: Place, imports: str) -> None:
        self.place, self.imports = place, imports
        self.left: dict[int, Job] = {}  # those that it has not reported
        self.tries = 0
        context = multiprocessing.get_context("spawn")
        self.connection, there = context.Pipe()
        self.process = context.Process(target=serve, args=(there, imports))
        with environment(place):  # before it imports anything
            self.process.start()
        there.close()

    def give(self, run: Run, part: Part) -> None:
        """Hand over a part of the sweep, and what runs it."""
        jobs, self.tries = part
        self.left = {job.number: job for job in jobs}
        with suppress(OSError):  # it has died, as `answer` will say
            self.connection.send((run, jobs))

    def answer(self) -> tuple[int, Any] | None:
        """Return the number and the result of a job, or None at the end of its part.

        Raises:
            EOFError: if the process has died.
        """
        try:
            message: tuple[int, Any] | None = self.connection.recv()
        except ConnectionResetError as error:
            raise EOFError from error
        if message is not None:
            self.left.pop(message[0])
        return message

    def stop(self, patience: float = 5) -> None:
        """End the process; it is killed once patience, in seconds, is at its end."""
        self.connection.close()
        self.process.join(timeout=patience)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def serve(connection: Connection, imports: str) -> None:
    """Run the parts that come through a connection, and send back what came of each job.

    Whoever gives them speaks for all, also of an interruption.
    """
    version.setbase(HYDRA)
    setup_globals()
    with suppress(EOFError, OSError, KeyboardInterrupt, signals.Preempted), signals.heeded():
        importlib.import_module(imports)  # before there is anything to do: it takes seconds
        while True:
            run, jobs = connection.recv()
            run(jobs, lambda number, result: connection.send((number, result)))
            connection.send(None)


@contextmanager
def started(where: Sequence[Place], imports: str) -> Iterator[list[Worker]]:
    """Start a process at each place, and stop those that are idle at the end.

    Args:
        where: the places.
        imports: the module that they import meanwhile.
    """
    workers: list[Worker] = []
    try:
        for place in where:
            workers.append(Worker(place, imports))
        yield workers
    finally:
        for worker in workers:
            worker.stop()


def spread(
    run: Run, chunks: Sequence[Sequence[Job]], idle: list[Worker], results: dict[int, JobReturn]
) -> None:
    """Run parts of a sweep in several processes, the largest first.

    A process that dies gives its jobs back once, and another takes its place; a job with which two
    have died came to nothing.

    Args:
        run: (part, report) → runs its jobs, and reports the number and the result of each.
        chunks: the parts.
        idle: the processes, which are idle again at the end.
        results: takes the results, by the jobs' numbers.
    """
    queue: deque[Part] = deque((list(c), 0) for c in sorted(chunks, key=len, reverse=True))
    busy: list[Worker] = []
    try:
        while queue or busy:
            while queue and idle:
                worker = idle.pop(0)
                worker.give(run, queue.popleft())
                busy.append(worker)
            ready = wait([worker.connection for worker in busy])
            for worker in [worker for worker in busy if worker.connection in ready]:
                try:
                    message = worker.answer()
                except EOFError:
                    bury(worker, queue, results)
                    busy.remove(worker)
                    if queue:
                        idle.append(Worker(worker.place, worker.imports))
                    continue
                if message is not None:
                    results.update([message])
                else:
                    busy.remove(worker)
                    idle.append(worker)
    finally:  # of an interruption, if any is still busy
        for worker in busy:
            worker.process.terminate()
        for worker in busy:
            worker.stop(PATIENCE)


def bury(worker: Worker, queue: deque[Part], results: dict[int, JobReturn]) -> None:
    """Give the jobs of a process that died back, or give them up if they were given back before."""
    jobs = list(worker.left.values())
    again = worker.tries == 0
    names = ", ".join(job.name for job in jobs)
    outcome = "run again" if again else "came to nothing"
    print(f"distill: a worker died; its jobs ({names}) {outcome}", file=sys.stderr)
    worker.stop()
    if again and jobs:
        queue.appendleft((jobs, 1))
    elif not again:
        results.update({job.number: nothing() for job in jobs})


@contextmanager
def environment(values: Place) -> Any:
    """Set environment variables for the processes that are started inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
