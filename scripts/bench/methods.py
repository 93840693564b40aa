"""What a training step costs under each objective that compares with a teacher, beside `kd`.

cifar_resnet32x4 → cifar_resnet8x4 on made-up pictures, the teacher live: what it adds on features,
relations and helper networks. All take turns; the ratio is that of seconds.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from measure import Row, print_rows, ratio, rounds
from omegaconf import OmegaConf
from steps import Pair

from distill.config.overrides import CONF
from distill.losses import LOSSES

PAIR = "cifar_resnet32x4 → cifar_resnet8x4"
WITHOUT = ("deit",)  # is for students with a distillation token


def options(parser: argparse.ArgumentParser) -> None:
    """Add what this part takes."""
    parser.add_argument("--steps", type=int, default=4, help="of a turn that count")
    parser.add_argument("--batch", type=int, default=64)


def measure(asked: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """Measure, print and return the rows."""
    with tempfile.TemporaryDirectory() as folder:
        pair = Pair(PAIR, asked.steps, Path(folder), batch=asked.batch)
        turns = {name: partial(pair.ours, "live", [f"objective={name}"]) for name in taught()}
        speeds = rounds(turns, asked.repeats or 3)
    rows = [Row(f"{name} / kd", ratio(speeds, "kd", name)) for name in turns]
    print_rows(rows)
    return rows, {"images_per_second": speeds}


def taught() -> list[str]:
    """Return the objectives that have a term on the teacher."""
    names = []
    for file in sorted((CONF / "objective").glob("*.yaml")):
        terms = OmegaConf.load(file).terms.values()
        inputs = [name for term in terms for name in LOSSES[term.loss].inputs]
        if any(name.startswith("teacher") for name in inputs) and file.stem not in WITHOUT:
            names.append(file.stem)
    return names
