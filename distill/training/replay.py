"""A function whose inputs and outputs lie in fixed places, captured as a CUDA graph or called."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM = 3  # calls before a capture, in which libraries choose their kernels

Outputs = Sequence[Tensor | None]
Replay = Callable[[], None]


def in_fixed_places(compute: Callable[[], Outputs], device: torch.device) -> tuple[Outputs, Replay]:
    """Return where a function leaves its outputs, and what computes them again there.

    It is called a few times, and what it changes is not set back. On a CPU it is called each time,
    and its outputs are copied to where the first call left them, as a graph leaves its own.

    Raises:
        RuntimeError: if a GPU cannot capture it.
    """
    if device.type == "cuda":
        return captured(compute)
    outputs = [None if out is None else out.detach().clone() for out in compute()]

    def replay() -> None:
        for place, out in zip(outputs, compute(), strict=True):
            if place is not None and out is not None:
                place.copy_(out)

    return outputs, replay


def captured(compute: Callable[[], Outputs]) -> tuple[Outputs, Replay]:
    """Return the outputs of a function that is captured, and what replays it."""
    current = torch.cuda.current_stream()
    with torch.cuda.stream(current):  # which a capture that fails may not set back
        side = torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM - 1):
                compute()
            without_waiting(compute)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # What other threads do, such as a loader's pinning of memory, is no part of it.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = compute()
    replay: Replay = graph.replay
    return outputs, replay


def without_waiting(compute: Callable[[], Outputs]) -> None:
    """Call a function, refusing what waits for the device, before a capture would fail of it."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        compute()
    finally:
        torch.cuda.set_sync_debug_mode("default")
