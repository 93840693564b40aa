"""A plan for people, and for a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from distill.config import read
from distill.plan.job import device_name, devices_here
from distill.plan.measure import FEW, Decoding
from distill.plan.total import Plan, Total, total_of
from distill.report.table import show
from distill.training.auxiliary import STOPPED_EARLY
from distill.utils.memory import bytes_text
from distill.utils.numbers import rate_text

GPU_ASSUMED = "memory beside the weights is the peak of a step on this GPU"
CPU_ASSUMED = (
    "activations are what a forward pass keeps for the backward pass, counted on {few} images and "
    "multiplied; what an operation needs for a moment is not counted"
)


def print_plan(plan: Plan, devices: Sequence[int]) -> None:
    """Print what one run would take."""
    facts = plan.facts
    unlabeled = f", {facts['unlabeled']:,} unlabelled" if facts["unlabeled"] else ""
    height, width = facts["image_size"]
    print(
        f"{facts['data']}: {facts['train']:,} training, {facts['val']:,} validation and "
        f"{facts['test']:,} test images{unlabeled}, {facts['classes']:,} classes, "
        f"{height} × {width} px, on {device_name(plan.cfg)}"
    )
    show(
        ["", "model", "batch", "steps an epoch", "epochs", "steps", "images/s", "from a store",
         "time"],
        fit_rows(plan), title="to be trained", drop=("model", "batch", "steps an epoch"),
        rest="plan.json=FILE",
    )  # fmt: skip
    columns = ("teacher", "weights", "gradients", "optimiser", "activations", "all")
    show(["", *columns], memory_rows(plan), title="memory, each while it is trained")
    for line in (
        f"teacher: {teacher_text(plan)}",
        f"teacher's answers: {plan.store}",
        f"checkpoints: {checkpoint_text(plan)}",
        f"decoding: {decoding_text(plan)}",
    ):
        print(line)
    print_total(total(plan), devices, devices_here(plan.cfg))


def total(plan: Plan) -> Total:
    """Return what a run takes by itself."""
    return total_of([[plan]])


def fit_rows(plan: Plan) -> list[list[str]]:
    """Return the cells of what is trained."""
    rows = []
    for fit in plan.fits:
        trial = plan.trials[fit.role]
        rows.append([
            fit.role, fit.model, f"{fit.data.batch_size:,}", f"{fit.steps_per_epoch:,}",
            f"{fit.epochs:,}", f"{fit.steps:,}", rate_text(1 / trial.live),
            "–" if trial.fed is None else rate_text(1 / trial.fed),
            "kept" if fit.kept else time_text(plan.alone(fit)),
        ])  # fmt: skip
    return rows


def memory_rows(plan: Plan) -> list[list[str]]:
    """Return the cells of what memory each training takes."""
    found = []
    for fit in plan.fits:
        one = plan.trials[fit.role].memory
        parts = (one.teacher, one.weights, one.gradients, one.optimizer, one.activations)
        cells = [bytes_text(part) if part else "–" for part in (*parts, one.total)]
        found.append([fit.role, *cells])
    return found


def teacher_text(plan: Plan) -> str:
    """Return where the teacher comes from, and what has to be trained before the student."""
    source, before = plan.cfg.teacher, plan.fits[:-1]
    new = [fit.role for fit in before if not fit.kept]
    kept = [fit.role for fit in before if fit.kept]
    name = plan.facts["teacher"]
    if name is None:
        origin = "none"
    elif read.to_be_trained(source):
        start = " from its published weights" if source.pretrained or source.checkpoint else ""
        origin = f"{name}, to be trained here once{start}"
    else:
        origin = f"{name}, {'published weights' if source.pretrained else 'from a file'}"
    first = f"{len(new)} to be trained before the student ({', '.join(new)})" if new else (
        "nothing to be trained before the student"
    )  # fmt: skip
    there = f"; {', '.join(kept)} trained before, and kept" if kept else ""
    return f"{origin}; {first}{there}"


def checkpoint_text(plan: Plan) -> str:
    """Return how many checkpoints there will be, and what they take."""
    each, count = plan.trials[plan.student.role].checkpoint, plan.facts["checkpoints"]
    return f"{count} of {bytes_text(each)}, {bytes_text(plan.checkpoint_bytes)} on the disk"


def decoding_text(plan: Plan) -> str:
    """Return how fast pictures are decoded, and which of decoding and training limits the other."""
    trial, decoding = plan.trials[plan.student.role], plan.decoding
    if decoding is None:
        return "none, the images lie in memory"
    steps = {"its teacher live": trial.live, "fed from a store": trial.fed}
    if plan.student.taught_by is None:
        steps = {"in steps": trial.live}
    said = [limit_text(decoding, seconds, name) for name, seconds in steps.items() if seconds]
    workers = counted(decoding.workers, "worker")
    return f"{decoding.images_per_second:,.0f} images/s with {workers}; {'; '.join(said)}"


def limit_text(decoding: Decoding, step: float, name: str) -> str:
    """Return which of decoding and training limits, and with which workers neither would.

    Args:
        decoding: how fast it is.
        step: seconds of an image in training.
        name: of how it is trained.
    """
    limit = "decoding limits" if decoding.seconds > step else "training limits"
    balance = f"data.num_workers={decoding.balancing(1 / step)} would balance them"
    return f"{limit} where the student takes {rate_text(1 / step)} images/s ({name}), {balance}"


def print_total(one: Total, devices: Sequence[int], here: int) -> None:
    """Print how long all of it takes, and what memory and disks must hold.

    Args:
        one: all of it.
        devices: numbers of devices.
        here: how many of them a machine has.
    """
    jobs = f"{one.jobs} jobs, " if one.jobs > 1 else ""
    print(f"in all: {jobs}{counted(one.fits, 'model')}, {one.steps:,} steps, {one.images:,} images")
    print(f"  {machine_text(one, here)}")
    for count in devices:
        machines = machines_of(count, here)
        print(
            f"  {counted(count, 'device')} in {counted(machines, 'machine')}: "
            f"{time_text(one.seconds / count)}, {bytes_text(count * one.memory)} of memory, "
            f"{bytes_text(one.disk(machines))} on disks"
        )


def machine_text(one: Total, here: int) -> str:
    """Return what each machine must hold, and what is there once for all of them."""
    parts = {"answers": one.answers, "checkpoints": one.checkpoints}
    shared = [f"{bytes_text(size)} of {name}" for name, size in parts.items() if size]
    copies = f", {bytes_text(one.copies)} of copied shards" if one.copies else ""
    times = "" if here == 1 else f"{here} × {bytes_text(one.memory)} = "
    own = f"each machine: {times}{bytes_text(here * one.memory)} of memory{copies}"
    return f"{own}; all share {' and '.join(shared)}" if shared else own


def machines_of(devices: int, here: int) -> int:
    """Return on how many machines so many devices are, where each has a few."""
    return -(-devices // here)


def counted(count: int, name: str) -> str:
    """Return a number of things for people."""
    return f"{count:,} {name}{'' if count == 1 else 's'}"


def print_sweep(plans: Sequence[Plan], one: Total, fused: bool, devices: Sequence[int]) -> None:
    """Print what all jobs of a sweep take together."""
    rows = [
        [plan.name, plan.student.model, f"{plan.student.steps:,}",
         rate_text(1 / plan.trials[plan.student.role].live),
         time_text(total(plan).seconds)] for plan in plans
    ]  # fmt: skip
    title = "jobs, and their time if each were alone"
    show(["job", "student", "steps", "images/s", "time"], rows, title=title)
    print(
        "jobs that differ on the student's side only take turns: a batch is decoded, and its "
        "teacher asked, once" if fused else "each job by itself, one after the other"
    )  # fmt: skip
    print_total(one, devices, devices_here(plans[0].cfg))


def assumptions(plans: Sequence[Plan]) -> list[str]:
    """Return in one line each what the numbers suppose."""
    cfg, trials = plans[0].cfg, [trial for plan in plans for trial in plan.trials.values()]
    gpu = read.on_gpu(cfg)
    found = [
        "models with random weights are timed: trained ones take as long",
        "validation, the evaluation at the end, the page and the start are left out",
        "devices share the work evenly, each with cores and workers as there are here, and the "
        "batch size is each device's own",
        f"a machine has {counted(devices_here(cfg), 'device')}, and all machines share the folders "
        "of the run and of its answers; data and processes take memory beside that of models",
        GPU_ASSUMED if gpu else CPU_ASSUMED.format(few=FEW),
    ]
    smaller = [t.batch for p in plans for f in p.fits
               if (t := p.trials[f.role]).batch < f.data.batch_size]  # fmt: skip
    if smaller:
        found.append(f"steps were timed with batches of {min(smaller)} images or more: a full one "
                     "takes as long for each image")  # fmt: skip
    if any(plan.decoding and not plan.decoding.beside for plan in plans):
        found.append("decoding and training share this machine's cores")
    if any(plan.answers for plan in plans):
        found.append("the store is empty when the first job begins")
    early = any(STOPPED_EARLY in fit.cfg.callbacks for plan in plans for fit in plan.fits)
    if early:
        found.append("no training stops early")
    if any(fit.role.startswith("assistant") for plan in plans for fit in plan.fits):
        found.append("no assistant was trained before")
    if any(not math.isfinite(trial.live) for trial in trials):
        found.append("a step took no time that could be measured")
    return found


def as_json(plans: Sequence[Plan], one: Total, devices: Sequence[int]) -> dict[str, Any]:
    """Return all numbers."""
    return {
        "jobs": [
            {
                "name": plan.name,
                **plan.facts,
                "store": {"kept": plan.answers is not None, "said": plan.store,
                          "bytes": plan.store_bytes},
                "decoding": plan.decoding and asdict(plan.decoding),
                "fits": [fit_json(plan, fit) for fit in plan.fits],
            }
            for plan in plans
        ],
        "total": {
            **asdict(one),
            "hours": {str(n): one.hours(n) for n in devices},
            "bytes": {str(n): bytes_json(one, n, devices_here(plans[0].cfg)) for n in devices},
        },
        "assumed": assumptions(plans),
    }  # fmt: skip


def bytes_json(one: Total, devices: int, here: int) -> dict[str, int]:
    """Return what so many devices, and the machines that they are in, must hold."""
    machines = machines_of(devices, here)
    return {"machines": machines, "memory": devices * one.memory, "disk": one.disk(machines)}


def fit_json(plan: Plan, fit: Any) -> dict[str, Any]:
    """Return the numbers of one fit."""
    trial = plan.trials[fit.role]
    return {
        "role": fit.role, "model": fit.model, "kept": fit.kept, "epochs": fit.epochs,
        "batch_size": fit.data.batch_size, "steps_per_epoch": fit.steps_per_epoch,
        "steps": fit.steps, "images": fit.images, "seconds": plan.alone(fit),
        "tried_batch": trial.batch, "images_per_second": 1 / trial.live,
        "images_per_second_fed": trial.fed and 1 / trial.fed,
        "checkpoint_bytes": trial.checkpoint,
        "memory": {**asdict(trial.memory), "total": trial.memory.total},
    }  # fmt: skip


def time_text(seconds: float) -> str:
    """Return a time for people, in the two digits that an estimate is worth.

    >>> time_text(11.48), time_text(276), time_text(8.3e6)
    ('11 s', '4.6 min', '2,300 h')
    """
    unit, name = next((u for u in ((3600, "h"), (60, "min")) if seconds >= 2 * u[0]), (1, "s"))
    value = seconds / unit
    if not value:
        return "0 s"
    digits = 1 - math.floor(math.log10(value))
    return f"{round(value, digits):,.{max(0, digits)}f} {name}"
