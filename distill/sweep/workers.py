"""Processes of a sweep: one for each GPU, or a share of the cores each, fed from one queue."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

from hydra import version
from hydra.core.utils import setup_globals

from distill.cli import HYDRA

Place = dict[str, str]  # environment variables that keep a process to its device
GPU = "CUDA_VISIBLE_DEVICES"


def places(devices: Any) -> list[Place]:
    """Return where processes are to run; one place or none needs no process of its own.

    Args:
        devices: `auto` for every GPU of the machine, a number of processes, or a list of GPUs.

    Raises:
        ValueError: if there are not so many GPUs, or it is none of these.
    """
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return [{GPU: str(device)} for device in devices]
    found = gpus()
    if devices == "auto":
        return [{GPU: device} for device in found]
    if not isinstance(devices, int) or isinstance(devices, bool) or devices < 1:
        raise ValueError(f"hydra.launcher.devices={devices}: give auto, a number or a list of GPUs")
    if found:
        if devices > len(found):
            raise ValueError(f"hydra.launcher.devices={devices}, and there are {len(found)} GPUs")
        return [{GPU: device} for device in found[:devices]]
    share = max(1, cores() // devices)
    return [{"OMP_NUM_THREADS": str(share), "MKL_NUM_THREADS": str(share)}] * devices


def gpus() -> list[str]:
    """Return the GPUs that this process may use, without initialising any."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get(GPU, "").split(",") if name.strip()]
    return named[:count] if named else [str(k) for k in range(count)]


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Worker:
    """A process at one place, and the part of a sweep that it is busy with."""

    def __init__(self, place: Place, run: Callable[..., None]) -> None:
        self.place, self.run = place, run
        self.left: dict[int, Any] = {}  # the jobs that it has not reported
        self.tries = 0
        context = multiprocessing.get_context("spawn")
        self.connection, there = context.Pipe()
        arguments = (there, run)
        self.process = context.Process(target=serve, args=arguments)
        with environment(place):  # before it imports anything
            self.process.start()
        there.close()

    def give(self, chunk: Sequence[Any], tries: int) -> None:
        """Hand over a part of the sweep."""
        self.left, self.tries = {job.number: job for job in chunk}, tries
        self.connection.send(list(chunk))

    def stop(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.join(timeout=5)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()


def serve(connection: Connection, run: Callable[..., None]) -> None:
    """Run the parts that come through a connection, and send back what came of each job."""
    version.setbase(HYDRA)
    setup_globals()
    while True:
        try:
            chunk = connection.recv()
        except (EOFError, OSError, KeyboardInterrupt):
            return
        run(chunk, lambda number, result: connection.send((number, result)))
        connection.send(None)


def spread(
    run: Callable[..., None],
    chunks: Sequence[Sequence[Any]],
    where: Sequence[Place],
    results: dict[int, Any],
) -> None:
    """Run parts of a sweep in a process at each place, the largest first.

    A process that dies gives its jobs back once; a job with which two have died came to nothing.

    Args:
        run: (part, report) → runs its jobs, and reports the number and the result of each.
        chunks: the parts.
        where: the places.
        results: takes the results, by the jobs' numbers.
    """
    from distill.sweep.fused import nothing

    queue = deque((chunk, 0) for chunk in sorted(chunks, key=len, reverse=True))
    workers: list[Worker] = []
    try:
        for place in where[: len(queue)]:
            workers.append(Worker(place, run))
            workers[-1].give(*queue.popleft())
        while any(worker.left for worker in workers) or queue:
            ready = wait([worker.connection for worker in workers])
            for at, worker in enumerate(workers):
                if worker.connection not in ready:
                    continue
                try:
                    message = worker.connection.recv()
                except (EOFError, ConnectionResetError):
                    given_back = list(worker.left.values())
                    worker.stop()
                    names = ", ".join(str(job.number) for job in given_back)
                    again = worker.tries == 0
                    outcome = "run again" if again else "came to nothing"
                    print(f"distill: a worker died; its jobs ({names}) {outcome}", file=sys.stderr)
                    if again:
                        queue.appendleft((given_back, 1))
                    else:
                        results.update({job.number: nothing() for job in given_back})
                    workers[at] = Worker(worker.place, run)
                    if queue:
                        workers[at].give(*queue.popleft())
                    continue
                if message is None:
                    if queue:
                        worker.give(*queue.popleft())
                else:
                    number, result = message
                    results[number] = result
                    worker.left.pop(number)
    finally:
        for worker in workers:
            worker.stop()


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
