"""What is exported: a student with its preprocessing and its temperature, as one traced program."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from distill.models.checkpoint import FACTS
from distill.utils.errors import first_line
from distill.utils.files import writing

Runtime = Callable[[Tensor], Tensor]  # images [N, C, H, W] → logits [N, K], both on the CPU


class Deployed(nn.Module):
    """A student as a file holds it: `student(normalize(images)) / temperature`.

    Args:
        student: normalised images `[N, C, H, W]` → logits `[N, K]`.
        normalize: applied to the images first, or None where they come normalised.
        temperature: T > 0, or None for raw logits.
    """

    def __init__(
        self, student: nn.Module, normalize: nn.Module | None, temperature: float | None
    ) -> None:
        super().__init__()
        self.student, self.temperature = student, temperature
        self.normalize = normalize or nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `[N, K]`."""
        logits = self.student(self.normalize(images))
        return logits if self.temperature is None else logits / self.temperature


def trace(model: nn.Module, shape: tuple[int, ...]) -> ExportedProgram:
    """Return a model as a program for any batch size.

    Args:
        model: in eval mode.
        shape: `(C, H, W)` of its images.

    Raises:
        ValueError: if the model does what no such program can hold.
    """
    logging.getLogger("torch.fx.experimental").setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):  # where torch prints the program that it fails at
            # Two images: one would be taken for a constant.
            program = torch.export.export(
                model.eval(), (torch.zeros(2, *shape),), dynamic_shapes=({0: Dim("batch")},)
            )
    except Exception as error:  # tracing fails in as many ways as there are models
        raise ValueError(f"this student cannot be exported: {reason(error)}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def reason(error: BaseException) -> str:
    """Return the first line of what an exporter's error comes from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def write_program(program: ExportedProgram, path: Path, facts: Mapping[str, Any]) -> None:
    """Write a program with its facts, whole or not at all."""
    extra = {FACTS: json.dumps(facts, ensure_ascii=False)}
    with writing(path) as file, warnings.catch_warnings():
        # Weights in channels-last layout are taken for parts of larger ones, and saved whole.
        warnings.filterwarnings("ignore", message="No complete tensor found")
        torch.export.save(program, file, extra_files=extra)


def open_program(path: Path) -> Runtime:
    """Return what runs the program of a file."""
    module = torch.export.load(path).module()

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return module(images)

    return run
