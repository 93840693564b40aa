"""Runs that are killed at random moments, and compared with one that never was.

`scripts/kills` does it at length, `test_kills.py` in short.
"""

import multiprocessing
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e import forked

QUICK = (
    "trainer.accelerator=cpu", "teacher.fit.max_epochs=1", "logger=none", "baseline=false",
    "report=false", "store.dtype=float32",
)  # fmt: skip
RUN = (*QUICK, "trainer.max_epochs=4", "callbacks.last.every_n_train_steps=5", "hydra.run.dir=run")
PLAIN, EMA = "callbacks=[checkpoints,progress]", "callbacks=[checkpoints,progress,ema]"
STEPWISE = ("annealing=cosine", "annealing.unit=step", "annealing.start=8")
SETTINGS = {
    "live": (PLAIN, "store=off"),
    "store": (PLAIN, "store=disk", "store.path=answers"),
    "annealing": (PLAIN, "store=off", *STEPWISE),
    "ema": (EMA, "store=off"),
    "accumulation": (PLAIN, "store=off", "trainer.accumulate_grad_batches=3"),
}
ALL = (EMA, *STEPWISE, "trainer.accumulate_grad_batches=2")
SWEEP = ("-m", "seed=0,1", "data.seed=0", "sweep.resume=run")
WAYS = {
    "plain": ("resume=auto",),
    "fused": SWEEP,
    "ray": (
        *SWEEP,
        "hydra/launcher=ray",
        "hydra.launcher.ray.remote.num_gpus=0",
        "hydra.launcher.ray.init.num_cpus=2",
    ),
}
LIMIT = 600  # seconds


def forkserver():
    """Return what starts commands that have imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distill.run", "tests.e2e.forked"])
    return context


def start(context, folder, arguments):
    """Start `distill` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    child = context.Process(target=forked.command, args=("train", folder, arguments))
    child.start()
    return child


@dataclass
class Outcome:
    """What became of a run, or a sweep, that was killed."""

    kills: int = 0
    differing: list[str] = field(default_factory=list)

    @property
    def survived(self):
        return not self.differing


def survive(begin, folder, whole, arguments, kills, moment):
    """Kill a run `kills` times, let it end, and compare what it leaves with that of `whole`.

    Args:
        begin: folder, arguments → a process.
        folder: where the run is.
        whole: where one was never interrupted.
        arguments: of the command, the same each time.
        kills: how often it is killed; a run that ends earlier is over.
        moment: → seconds after its start at which the next is killed.
    """
    outcome = Outcome()
    code = None
    while code != 0 and outcome.kills < kills:
        child = begin(folder, arguments)
        child.join(moment())
        if child.exitcode is None:
            child.kill()
            outcome.kills += 1
        child.join()
        code = child.exitcode
        if code not in (0, -signal.SIGKILL):
            break
    if code == -signal.SIGKILL:
        child = begin(folder, arguments)
        child.join(LIMIT)
        code = child.exitcode
    outcome.differing = ([] if code == 0 else [f"exit code {code}"]) + differences(folder, whole)
    return outcome


def differences(folder, whole):
    """Return what a killed run left otherwise than one that was not."""
    students = sorted(
        path.relative_to(whole) for path in whole.glob("run/**/student/*.safetensors")
    )
    assert students
    runs = [path.parents[1] for path in students]
    files = [*students, *(run / "metrics.csv" for run in runs)]
    found = [str(name) for name in files if not same(folder / name, whole / name)]
    for run in runs:
        ours, theirs = (best_of(one / run / "checkpoints") for one in (folder, whole))
        found += [] if ours == theirs else [f"{run}: best epoch {ours}, not {theirs}"]
    found += [str(path.relative_to(folder)) for path in folder.rglob("*.part")]
    said = (folder / "output.txt").read_text()
    return found + [word for word in ("Traceback", "Warning", "Error", "not empty") if word in said]


def same(ours, theirs):
    """Whether two files are there and hold the same bytes."""
    return ours.is_file() and theirs.is_file() and ours.read_bytes() == theirs.read_bytes()


def best_of(folder):
    """Return the epoch of a run's best checkpoint."""
    import torch

    path = Path(folder) / "best.ckpt"
    return torch.load(path, weights_only=True)["epoch"] if path.is_file() else None


def timed(begin, folder, arguments):
    """Run a command to its end, and return the seconds it took."""
    began = time.monotonic()
    child = begin(folder, arguments)
    child.join(LIMIT)
    assert child.exitcode == 0, (folder / "output.txt").read_text()
    return time.monotonic() - began


def moments(seed, longest):
    """Return what draws moments from a uniform distribution."""
    chosen = random.Random(seed)
    return lambda: chosen.uniform(0, longest)
