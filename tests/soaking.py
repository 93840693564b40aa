"""Short runs of configurations drawn at random, one after another in one process.

`scripts/soak` does it at length, `test_soak.py` in short.
"""

import csv
import gc
import io
import json
import math
import os
import random
import shlex
import shutil
import statistics
import threading
import time
import traceback
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from distill import run
from distill.cli import ADVICE
from distill.config import build
from distill.config.overrides import CONF
from distill.losses import ModelInfo
from distill.models.features import Features
from distill.training.trainer import schedules

TINY = (
    "trainer.accelerator=cpu", "trainer.limit_train_batches=3", "trainer.limit_val_batches=2",
)  # fmt: skip
TAUGHT, ALONE = ("teacher.fit.max_epochs=1",), ("teacher=none",)
ASSISTED = ("assistants=[{name:slim_resnet10_8}]",)
TEACHERLESS = ("supervised", "one_vs_rest_hinge", "crammer_singer", "weston_watkins",
               "class_balanced", "ldam", "ldam_drw", "logit_adjusted", "gce", "sce", "ramp_hinge",
               "smooth_topk", "hard_topk")  # fmt: skip
NEEDS_A_TOKEN = ("deit",)  # a kind of student that these are not
OBJECTIVES = tuple(
    sorted({path.stem for path in (CONF / "objective").glob("*.yaml")} - {*NEEDS_A_TOKEN})
)
SCHEDULES = ("linear", "cosine", "exponential", "step")
# Each row is one choice that a configuration makes, independent of the others.
CHOICES = (
    ((), (), ("condition=symmetric_noise",), ("condition=pair_noise",), ("condition=long_tail",),
     ("condition=few_shot", "data.batch_size=16"), ("condition.drop=[3]",)),
    ((), ("data.view.flip=true",), ("data.view.rotate=10", "data.view.zoom=[0.8,1.2]"),
     ("data.view.crop_scale=[0.5,1]",), ("data.view.erase=0.5",)),
    ((), ("+student.args.stem_width=8",), ("+student.args.drop_rate=0.2",),
     ("student=timm", "student.name=cifar_resnet8")),
    (("store=auto",), ("store=off",), ("store=disk",), ("store=disk", "store.dtype=float32"),
     ("store=disk", "store.topk=3"), ("store=auto", "store.views=1")),
    (("callbacks=none",), ("callbacks=[checkpoints,progress]",), ("callbacks=[checkpoints,ema]",),
     ("callbacks=[checkpoints,early_stopping]",), ("callbacks=[checkpoints,sparsity]",),
     ("callbacks=[checkpoints,sparsity]", "callbacks.sparsity.groups=true"),
     ("callbacks=[checkpoints,fake_quantize]",)),
    ((), ("optimizer.opt=sgd",), ("optimizer.opt=lamb",)),
    (("trainer.max_epochs=1",), ("trainer.max_epochs=2", "scheduler=null"),
     ("trainer.max_epochs=1", "scheduler.sched=poly"),
     ("trainer.max_epochs=2", "scheduler.warmup_epochs=1")),
    ((), ("trainer.accumulate_grad_batches=2",), ("trainer.gradient_clip_val=1",),
     ("trainer.precision=bf16-mixed",)),
    (("logger=none",), ("logger=none",), ("logger=tensorboard",)),
    (("report=false",), ("report=false",), ("report=true",)),
    (("baseline=false",), ("baseline=false",), ("baseline=true",)),
    ((), ("optimized_metric=val/nll",), ("optimized_metric=val/ece",)),
    ((), ("topk=[1,3]",)),
    (("seed=0",), ("seed=1",)),
)  # fmt: skip
MIXED = ((), (), (), ("data.view.mixup=0.2",), ("data.view.cutmix=1",))
# What is said on purpose: a temperature that caps the confidence, a class without images.
DELIBERATE = ("standardised logits", "classes have no training examples")
NUMBERS = ("top1", "nll", "brier", "ece")  # of a model, in any run


@dataclass
class Usage:
    """What a process holds."""

    megabytes: float
    files: int
    threads: int

    @classmethod
    def now(cls):
        """Return what this process holds when nothing waits to be collected (Linux only)."""
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
            len(os.listdir("/proc/self/fd")),
            threading.active_count(),
        )


CACHES_FILL = 30  # runs
LIMITS = {"megabytes": 2.0, "files": 0.1, "threads": 0.1}  # growth per run


@dataclass
class Outcome:
    """What came of one configuration."""

    overrides: list[str]
    wrong: list[str] = field(default_factory=list)
    refused: str | None = None
    seconds: float = 0.0
    trace: str = ""

    @property
    def command(self):
        """The line that runs it again."""
        return shlex.join(["distill", *self.overrides])


def draw(seed, number):
    """Return the overrides of a configuration, a function of the seed and its number alone."""
    chosen = random.Random(f"{seed} {number}")
    objective = chosen.choice(OBJECTIVES)
    overrides = [*TINY, f"objective={objective}"]
    for options in CHOICES:
        overrides += chosen.choice(options)
    taught = objective not in TEACHERLESS or chosen.random() < 0.5
    overrides += (TAUGHT, TAUGHT, TAUGHT + ASSISTED)[chosen.randrange(3)] if taught else ALONE
    cfg = composed(overrides)
    built = build.build_objective(cfg, build.build_data(cfg))
    overrides += chosen.choice(MIXED) if takes_soft_targets(built) else ()
    if built.needs_teacher_features or not taught:  # there are no logits to keep
        overrides = ["store=auto" if one == "store=disk" else one for one in overrides]
    own = {moved.value for moved in schedules(cfg, built)}
    return overrides + annealed(chosen, [name for name in built.annealed if name not in own])


def takes_soft_targets(objective):
    """Whether an objective can learn from labels that are mixed of several."""
    try:
        info = ModelInfo((8,) * len(objective.stages), 8, 10, torch.nn.Linear(8, 10))
        logits, maps = torch.eye(10)[:2], [torch.ones(2, 8, 4, 4)] * len(objective.stages)
        features = Features(maps, torch.ones(2, 8), logits)
        objective.eval().helpers.make(info, info)
        objective(logits, logits, logits, (features, features))
    except ValueError:
        return False
    return True


def annealed(chosen, names):
    """Return, for half of the configurations, a schedule of one of the objective's values."""
    if chosen.random() < 0.5 or not names:
        return []
    value = chosen.choice(names)
    ends = (4.0, 1.0) if value == "temperature" else (0.9, 0.5)
    return [f"annealing={chosen.choice(SCHEDULES)}", f"annealing.value={value}",
            f"annealing.start={ends[0]}", f"annealing.end={ends[1]}",
            f"annealing.unit={chosen.choice(('epoch', 'step'))}"]  # fmt: skip


def composed(overrides, folder="unused", cache="unused"):
    """Return the configuration of `distill` with these overrides."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(
            "train", overrides=[*overrides, f"paths.output_dir={folder}", f"paths.cache={cache}"]
        )


def attempt(overrides, folder, train=run.train):
    """Run one configuration in a folder, which is emptied but for its cache.

    Args:
        overrides: of the configuration.
        folder: for its output and what runs keep for each other.
        train: what runs a configuration.
    """
    outcome = Outcome(list(overrides))
    output = folder / "run"
    began = time.monotonic()
    with warnings.catch_warnings(record=True) as heard, redirect_stdout(io.StringIO()):
        warnings.simplefilter("always")
        for message in (*ADVICE, *(f".*{text}" for text in DELIBERATE)):
            warnings.filterwarnings("ignore", message=message)
        try:
            train(composed(overrides, output, folder / "cache"))
            outcome.wrong += not_finite(output)
        except ValueError as error:
            outcome.refused = str(error)
        except Exception as error:
            outcome.wrong.append(f"{type(error).__name__}: {error}")
            outcome.trace = traceback.format_exc()
    outcome.wrong += sorted({f"{one.category.__name__}: {one.message}" for one in heard})
    outcome.seconds = time.monotonic() - began
    shutil.rmtree(output, ignore_errors=True)
    return outcome


def not_finite(folder):
    """Return which numbers and weights that a run has left are missing, NaN or infinite."""
    summary = json.loads((folder / "summary.json").read_text())
    summary.pop("config")
    numbers = [(name, value) for name, value in leaves(summary) if isinstance(value, float)]
    for role in ("teacher", "baseline", "student"):
        row = summary[role] or dict.fromkeys(NUMBERS, 0.0)
        numbers += [(f"{role}.{name}", math.nan) for name in NUMBERS if row[name] is None]
    with (folder / "metrics.csv").open() as file:
        logged = [item for row in csv.DictReader(file) for item in row.items()]
    numbers += [(f"metrics.csv: {name}", text) for name, text in logged if text]
    weights = load_file(folder / "student" / "model.safetensors")
    numbers += [(f"student: {name}", weight.abs().max()) for name, weight in weights.items()]
    return sorted({name for name, value in numbers if not math.isfinite(float(value))})


def leaves(value, name=""):
    """Yield the dotted names and the values of nested containers."""
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in parts:
            yield from leaves(part, f"{name}.{key}".lstrip("."))
    else:
        yield name, value


def growth(values):
    """Return by how much a series grows per step: the median slope of its pairs (Theil and Sen).

    The first quarter, and no fewer than the runs in which caches fill, do not count.
    """
    settled = values[max(len(values) // 4, CACHES_FILL) :]
    slopes = [(b - a) / (j - i) for (i, a), (j, b) in combinations(enumerate(settled), 2)]
    return statistics.median(slopes) if slopes else 0.0


def leaks(usages):
    """Return what a process holds more of after each run than `LIMITS` allow, and how much."""
    grown = {name: growth([getattr(one, name) for one in usages]) for name in LIMITS}
    return {name: value for name, value in grown.items() if value > LIMITS[name]}
