"""From configuration to objects: the only caller of Hydra's `instantiate`, and the early checks."""

from __future__ import annotations

import copy
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    ModelCheckpoint,
    ProgressBar,
    WeightAveraging,
)
from pytorch_lightning.loggers import CSVLogger, Logger
from torch import Tensor, nn

from distill import library
from distill.callbacks.annealing import Annealing
from distill.callbacks.checkpoints import LatestCheckpoint, StopWhenTold, WholeCheckpoints
from distill.callbacks.continuity import Continuity
from distill.callbacks.fake_quantize import FakeQuantize
from distill.callbacks.finite import FiniteLoss
from distill.callbacks.rate import LearningRate
from distill.callbacks.sparsity import check_averaging
from distill.callbacks.speed import Speed
from distill.checks import check_values, is_number, resolve_paths
from distill.data import DataModule
from distill.data.costs import read_costs
from distill.data.judged import Judged, named
from distill.data.module import CLEAN_VIEW, border
from distill.data.sizes import ModelSize
from distill.data.views import StreamedView, is_range
from distill.errors import first_line
from distill.files import resolved_path
from distill.losses import dist
from distill.models.build import ModelSpec, check_name, normalization, resolved
from distill.models.bundle import read_facts
from distill.models.checkpoint import (
    FACTS,
    as_object,
    epochs_done,
    existing,
    read_checkpoint,
    read_lightning,
    student_weights,
)
from distill.models.own import import_modules
from distill.models.sizes import declared_size
from distill.models.weights import DataShape
from distill.module import (
    DEFAULT_TOPK,
    create_optimizer,
    create_schedule,
    evaluation_metrics,
    has_schedule,
    resolve_topk,
)
from distill.objectives import Objective
from distill.overrides import closest
from distill.resolvers import recommended_lr
from distill.sharing import once

log = logging.getLogger(__name__)

CONFIGURED = "distill.data.module.configured"
EXTRAS = ("wandb", "mlflow")
MANY = 1000  # updates in an epoch, where a schedule is only tried
STOPPED_EARLY = "early_stopping"
RECIPE = ("opt", "lr", "weight_decay", "momentum", "betas", "eps", "layer_decay")
SEEDS_APART = 1000  # of the weights of a student and of its assistants
SUPERVISED = {
    "_target_": "distill.objectives.Objective",
    "terms": {"ce": {"loss": "cross_entropy"}},
}


def make(node: Any, label: str, **extra: Any) -> Any:
    """Instantiate one configuration node, explaining what it refuses.

    Args:
        node: a node with a `_target_`.
        label: the node's name, for messages.
        **extra: further arguments, passed as they are.

    Raises:
        ValueError: if the arguments are wrong or a package is missing.
    """
    try:
        return instantiate(node, _convert_="all", **extra)
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError):
            raise cause from error
        why = str(cause).strip()
        if isinstance(cause, ValueError) and label in why:  # it already says where
            raise ValueError(why) from error
        name = label.rpartition(".")[2]
        package = f"distill-kd[{name}]" if name in EXTRAS else getattr(cause, "name", None)
        if isinstance(cause, ModuleNotFoundError) and package:
            raise ValueError(f"{label} needs pip install '{package}' ({cause})") from error
        raise ValueError(f"{label}: {first_line(cause)}") from error


def for_sweeper(cfg: DictConfig, value: Callable[[str], float]) -> float | list[float]:
    """Return what a sweeper is told of a run: `optimized_metric`, or each of `sweep.metrics`.

    Args:
        cfg: the run's configuration.
        value: the name of a metric → what it came to.
    """
    several = plain(cfg.sweep.metrics)
    return [value(name) for name in several] if several else value(cfg.optimized_metric)


def tellable(value: float | list[float]) -> float | list[float] | None:
    """Return what a sweeper is told, or None, a failed trial, where it is not finite.

    At NaN, Optuna's sweeper ends the search.
    """
    numbers = value if isinstance(value, list) else [value]
    return value if all(map(math.isfinite, numbers)) else None


def told(cfg: DictConfig, numbers: dict[str, Any], value: Callable[[str], float]) -> dict[str, Any]:
    """Return validation's numbers, with what decides that is not among them.

    Of `sweep.metrics` they are what the sweeper is told, so that its front is the table's.
    """
    decides = {cfg.optimized_metric.removeprefix("val/"): value(cfg.optimized_metric)}
    several = plain(cfg.sweep.metrics) or []
    return {**decides, **numbers, **{name.removeprefix("val/"): value(name) for name in several}}


def swept() -> bool:
    """Return whether this is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def settle_values(cfg: DictConfig) -> None:
    """Refuse values that are of another kind than their keys ask for, and resolve what is a path.

    Where `hydra.job.chdir` leads a run into its own folder, relative paths still count from where
    the command was typed.

    Raises:
        ValueError: naming the key.
    """
    check_values(cfg)
    elsewhere = HydraConfig.initialized() and HydraConfig.get().job.chdir
    resolve_paths(cfg, HydraConfig.get().runtime.cwd if elsewhere else None)
    check_trainer_keys(cfg)


def check_trainer_keys(cfg: DictConfig) -> None:
    """Refuse what is no option of Lightning's trainer, before anything is read."""
    known = [*signature(pl.Trainer.__init__).parameters, "compile"]
    for name in cfg.get("trainer") or {}:
        if name not in (*known, "_target_"):
            raise ValueError(f"trainer has no option {name}{closest(name, known, 'trainer.')}")


def check_multirun(cfg: DictConfig) -> None:
    """Refuse a sweep whose every job would start subprocesses that repeat the whole sweep."""
    if swept() and processes(cfg) > 1:
        raise ValueError(
            f"a sweep (-m) with trainer.strategy={cfg.trainer.strategy} and trainer.devices="
            f"{cfg.trainer.devices} would repeat the sweep in every process: use trainer.devices=1 "
            "(one trial per device), or one torchrun per job without -m"
        )


def processes(cfg: DictConfig) -> int:
    """Return how many processes, one per device, a run has."""
    devices = plain(cfg.trainer.devices)
    if isinstance(devices, str) and "," in devices:  # "0,1", as Lightning reads it
        devices = [device for device in devices.split(",") if device.strip()]
    if isinstance(devices, list):
        count = len(devices)
    elif str(devices) in ("auto", "-1"):
        count = 1 if cfg.trainer.accelerator == "cpu" else max(torch.cuda.device_count(), 1)
    else:
        count = int(devices)
    return count * int(cfg.trainer.num_nodes)


def check_trainer(cfg: DictConfig) -> None:
    """Refuse trainers under which a run could not end with its numbers."""
    trainer = cfg.trainer
    if "fsdp" in str(trainer.strategy).lower():
        raise ValueError(
            f"trainer.strategy={trainer.strategy} would leave each device a piece of the student: "
            "use ddp; where the teacher needs the memory, ask it ahead with distill-store"
        )
    if any(word in str(trainer.strategy) for word in ("fork", "spawn", "notebook")):
        raise ValueError(
            f"trainer.strategy={trainer.strategy} leaves the results in another process: use ddp"
        )
    if not 1 <= trainer.check_val_every_n_epoch <= (trainer.max_epochs or 0):
        raise ValueError(
            f"trainer.max_epochs={trainer.max_epochs} with trainer.check_val_every_n_epoch="
            f"{trainer.check_val_every_n_epoch} never validates"
        )
    if trainer.limit_val_batches == 0:
        raise ValueError("trainer.limit_val_batches=0 leaves nothing to choose the best epoch by")
    library.check_trainer(map(str, trainer))


def build_data(cfg: DictConfig, judged: Judged | None = None) -> DataModule:
    """Return the data module; of runs that share, each has its own with the same splits.

    Args:
        cfg: the configuration.
        judged: what a trained model brings that is only judged on the data.
    """
    given = {"model_size": model_size(cfg), "judged": judged}
    if CONFIGURED not in str(cfg.data.get("_target_")):
        given = {}
    data = once(shared_key(cfg, "data") + repr(judged), lambda: make(cfg.data, "data", **given))
    if not isinstance(data, DataModule):
        raise ValueError("data must be a distill.data.DataModule")
    return data.with_options(seed=data.seed, batch_size=data.batch_size, views=data.views)


def to_judge(cfg: DictConfig, whole: bool = True) -> Judged:
    """Return what the student brings to the data that it is judged on.

    Args:
        cfg: the configuration.
        whole: whether data without a train split are judged as a whole.
    """
    label = f"student.checkpoint={cfg.student.checkpoint}"
    facts = kept_facts(cfg.student.checkpoint)
    known = read_checkpoint(cfg.student.checkpoint) if cfg.student.checkpoint else None
    refit = cfg.get("calibration") == "refit"
    shown = known.preprocessing if known else {}
    return Judged(label, facts.get("classes") or (), shown, whole, refit)


def kept_facts(path: str | None) -> dict[str, Any]:
    """Return what a bundle says of itself; nothing of what is no bundle."""
    folder = resolved_path(path or "")
    return read_facts(folder) if path and (folder / FACTS).is_file() else {}


def note_known_pictures(cfg: DictConfig, data: DataModule) -> None:
    """Note that the pictures which are all judged are those that the student was trained on."""
    known = kept_facts(cfg.student.checkpoint).get("pictures")
    if known and not len(data.train) and known == data.pictures:
        data.notes.append(
            "these are the pictures that the student was trained on: most numbers below are of "
            "training pictures, and say little of new ones"
        )


def calibrations(cfg: DictConfig, data: DataModule) -> dict[str, dict[str, Any]] | None:
    """Return role → what its bundle says of its calibration, or None to fit it on validation.

    Raises:
        ValueError: if the one that is asked for is not there.
    """
    there, asked = bool(len(data.val)), cfg.calibration
    if asked == "refit" or (asked is None and there):
        return None
    paths = {"student": cfg.student.checkpoint, "teacher": cfg.teacher.checkpoint}
    kept = {role: kept_facts(path) for role, path in {**paths, "baseline": cfg.baseline}.items()}
    if asked == "bundle" and not kept["student"]:
        raise ValueError(
            f"calibration=bundle: student.checkpoint={cfg.student.checkpoint} is no student bundle "
            "that knows one"
        )
    temperature = kept["student"].get("temperature")
    told = "none is known" if temperature is None else f"the bundle's {temperature:.4g} is applied"
    log.info("temperature: %s, nothing is fitted on %s", told, data.source.name)
    return kept


def model_size(cfg: DictConfig) -> ModelSize | None:
    """Return the size that the student, or else the teacher, says of its images, if it is asked."""
    if cfg.data.get("image_size", 0) is not None:
        return None
    teacher = model_spec(cfg.teacher) if "teacher" in cfg else ModelSpec()
    return declared_size(model_spec(cfg.student)) or declared_size(teacher)


def shared_key(cfg: DictConfig, what: str) -> str:
    """Return a text that is the same for runs that can share their data, or also their teacher.

    What else a run says is on its student's side: objective, annealing, optimiser, schedule,
    architecture, and the seed of the weights.
    """
    decided = {"data": plain(cfg.data), "size": model_size(cfg)}
    if what != "data":
        decided |= {key: plain(cfg[key]) for key in ("teacher", "trainer")}
        decided["trainer"].pop("max_epochs")
    return json.dumps([what, decided], sort_keys=True, default=str)


def build_objective(cfg: DictConfig, data: DataModule) -> Objective:
    """Return the objective, which learns from the data how many samples each class has."""
    node = OmegaConf.masked_copy(cfg.objective, [k for k in cfg.objective if k != "schedules"])
    if node.get("temperature") == "auto":  # any will do until the teacher is there to be asked
        node.temperature = 1.0
    return make(node, "objective", class_counts=data.class_counts)


def check_objective(cfg: DictConfig, data: DataModule, objective: Objective) -> None:
    """Refuse, by trying it on made-up logits, an objective that these classes leave undefined."""
    given = cfg.objective.get("temperature", 1)
    if given != 1 and not objective.uses_temperature:
        raise ValueError("objective.temperature: no term of this objective takes one")
    correlated = [name for name, term in objective.terms.items() if term.loss.function is dist]
    if correlated and data.batch_size * processes(cfg) == 1:
        raise ValueError(
            f"objective.terms.{correlated[0]}: dist has no columns at data.batch_size=1"
        )
    unlabelled = objective.alpha == 1 and [n for n, t in objective.terms.items() if t.uses_teacher]
    for name in unlabelled or []:
        if objective.terms[name].uses_labels:
            raise ValueError(
                f"objective.alpha=1 is to learn without labels, and objective.terms.{name} reads "
                "them: give the others no weight instead, such as objective.terms.ce.weight=0"
            )
    if given == "auto" and teacher_name(cfg) is None:
        raise ValueError("objective.temperature=auto asks the teacher, and there is none")
    logits, teacher = torch.randn(
        2, 2, data.num_classes, generator=torch.Generator().manual_seed(0)
    )
    maps = [torch.ones(2, 1, 1, 1)]
    target = torch.tensor([0, 1])
    if data.soft_targets:
        target = torch.nn.functional.one_hot(target, data.num_classes).float()
    inputs = {"student": logits, "teacher": teacher, "target": target}
    inputs |= {"temperature": objective.temperature, "class_counts": data.class_counts}
    inputs |= {"student_maps": maps, "projected_maps": maps, "teacher_maps": maps}
    for name, term in objective.terms.items():
        try:
            term(inputs)
        except (ValueError, TypeError) as error:
            raise ValueError(f"objective.terms.{name}: {first_line(error)}") from error
        try:
            objective.values(name, inputs)
        except ValueError as error:
            raise ValueError(
                f"objective.label_smoothing: terms.{name} cannot be smoothed ({error})"
            ) from error
    objective.keep(torch.zeros(2), teacher, target)


def check_unlabeled(cfg: DictConfig, data: DataModule, objective: Objective) -> None:
    """Refuse unlabelled pictures of which no term of the objective makes anything."""
    if data.unlabeled is None:
        return
    moved = {annealing.value for annealing in schedules(cfg, objective)}
    if not objective.teaches_unlabeled(moved):
        raise ValueError(
            "data.unlabeled: no term of this objective that has a weight learns from the teacher "
            "without reading labels: give one that does, such as objective=kd, or no such pictures"
        )


def schedules(cfg: DictConfig, objective: Objective) -> list[Annealing]:
    """Return what moves the objective's values: `annealing`, and the objective's own schedules.

    One whose end is null has nowhere to go: what it would move is not in use.

    Raises:
        ValueError: if two move the same value, of which the later one would win unseen.
    """
    nodes = [("annealing", cfg.annealing)] if cfg.annealing else []
    own = present(cfg.objective.get("schedules"))
    nodes += [(f"objective.schedules.{k}", v) for k, v in own if v.get("end", 1.0) is not None]
    moved = [make(node, label) for label, node in nodes]
    movers: dict[str, str] = {}
    for (label, _), annealing in zip(nodes, moved, strict=True):
        annealing.check(objective)
        other = movers.setdefault(annealing.value, label)
        if other != label:
            raise ValueError(
                f"{other} and {label} both move {annealing.value}: set {label}=null, or change it"
            )
    return moved


def build_trainer(cfg: DictConfig, objective: Objective) -> pl.Trainer:
    """Return a trainer with the configured callbacks, annealing and loggers."""
    named = made_callbacks(cfg)
    # The latest state comes last, and holds what the others have kept.
    callbacks = sorted(named.values(), key=lambda callback: isinstance(callback, LatestCheckpoint))
    check_averaging(callbacks)
    averages = [callback for callback in callbacks if isinstance(callback, WeightAveraging)]
    if averages:
        callbacks.insert(0, library.UntilAveraged(averages))
    if cfg.trainer.get("compile") and any(isinstance(c, FakeQuantize) for c in callbacks):
        raise ValueError("callbacks.fake_quantize needs trainer.compile=false")
    callbacks += [Speed(), LearningRate(), FiniteLoss(cfg.on_nan)]
    if not any(isinstance(c, LatestCheckpoint) for c in callbacks):
        callbacks.append(StopWhenTold())
    callbacks += schedules(cfg, objective)
    folder = Path(cfg.paths.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    history = CSVLogger(str(folder), name="", version="")
    callbacks.append(Continuity(history))
    loggers: list[Logger] = [history]
    others = {f"logger.{name}": make(node, f"logger.{name}") for name, node in present(cfg.logger)}
    library.check_parts(others, library.LOGGERS)
    for label, logger in others.items():
        if isinstance(logger, CSVLogger) and Path(logger.log_dir).resolve() == folder.resolve():
            raise ValueError(f"{label} would write over the run's metrics.csv: give it a name")
    loggers += others.values()
    return make(
        OmegaConf.masked_copy(cfg.trainer, [key for key in cfg.trainer if key != "compile"]),
        "trainer",
        callbacks=callbacks,
        logger=loggers,
        plugins=[WholeCheckpoints()],
        default_root_dir=str(folder),
        use_distributed_sampler=False,  # the data module gives each rank its share
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
        enable_progress_bar=any(isinstance(c, ProgressBar) for c in callbacks),
    )


def made_callbacks(cfg: DictConfig) -> dict[str, pl.Callback]:
    """Return the configured callbacks, by what a person calls them."""
    made = {f"callbacks.{k}": make(node, f"callbacks.{k}") for k, node in present(cfg.callbacks)}
    library.check_parts(made, library.CALLBACKS)
    return made


def check_callbacks(cfg: DictConfig, data: DataModule, objective: Objective) -> None:
    """Refuse callbacks that could not do what they say in a run of this length and these metrics.

    Raises:
        ValueError: naming the callback, and what to change.
    """
    made, trainer = made_callbacks(cfg), cfg.trainer
    batches = len(data.train) // (data.batch_size * processes(cfg))
    limit = trainer.limit_train_batches
    limited = min(limit, batches) if isinstance(limit, int) else int(limit * batches)
    updates = max(math.ceil(limited / trainer.accumulate_grad_batches), 1) * trainer.max_epochs
    library.check_averages(made, str(trainer.precision), trainer.max_epochs, updates)
    terms = [f"train/{name}" for name in objective.terms]
    logged = ["train/loss", *terms, "train/temperature", "train/zeros", "train/skipped"]
    may_log = any(library.is_own_class(callback) for callback in made.values())
    for label, callback in made.items():
        if isinstance(callback, DeviceStatsMonitor) and not find_spec("psutil"):
            asked, on_cpu = (
                callback._cpu_stats,
                trainer.accelerator == "cpu" or not torch.cuda.is_available(),
            )
            if asked or (asked is None and on_cpu):
                raise ValueError(f"{label} needs pip install psutil, to tell of a CPU")
        if not isinstance(callback, ModelCheckpoint | EarlyStopping) or not callback.monitor:
            continue
        monitor = callback.monitor
        if monitor.startswith("train/") and monitor not in logged and not may_log:
            raise ValueError(
                f"{label}.monitor={monitor} is not logged; there are {', '.join(logged)}"
            )
        within = isinstance(callback, ModelCheckpoint) and (
            callback._every_n_train_steps or callback._train_time_interval
        )
        if monitor.startswith("val/") and within:
            raise ValueError(
                f"{label}.monitor={monitor} is known at the end of epochs alone: leave out "
                "every_n_train_steps and train_time_interval, or monitor train/loss"
            )


def present(group: DictConfig | None) -> Iterable[tuple[str, Any]]:
    """Return the named nodes of a group that have not been switched off with null."""
    return [(str(name), node) for name, node in (group or {}).items() if node is not None]


def model_spec(node: DictConfig) -> ModelSpec:
    """Return which model a teacher or student node names."""
    values = {key: node.get(key) for key in ("name", "pretrained", "checkpoint")}
    key_map = plain(node.get("key_map"))
    return ModelSpec(args=plain(node.get("args")) or {}, key_map=key_map, **values)


def check_models(cfg: DictConfig) -> None:
    """Refuse, before any data are read, names that timm does not know and files that are not there.

    Raises:
        ValueError: for a name.
        FileNotFoundError: for a file.
    """
    for role in ("teacher", "student"):
        node = cfg.get(role)
        if node is None:
            continue
        for path in [node.get("checkpoint"), *(node.get("checkpoints") or [])]:
            if path:
                existing(path)
        if node.get("name") and not node.get("checkpoint"):
            check_name(node.name, f"{role}.name")
    if cfg.get("ckpt_path") and not Path(cfg.ckpt_path).is_file():
        raise FileNotFoundError(f"ckpt_path={cfg.ckpt_path} does not exist")
    for number, own in enumerate(cfg.get("assistants") or [], start=1):
        if isinstance(own, DictConfig) and own.get("name"):
            check_name(own.name, f"assistant {number}.name")


def resolve_student(cfg: DictConfig) -> None:
    """Write into the configuration the architecture that `student.checkpoint` brings."""
    spec = resolved(model_spec(cfg.student))
    cfg.student.lr = cfg.student.lr  # as recommended for what was named
    cfg.student.name, cfg.student.args = spec.name, dict(spec.args)


def run_imports(cfg: DictConfig) -> None:
    """Import the user's own modules; see `distill.models.own`."""
    import_modules(plain(cfg.get("imports")) or [])


def check_classes(cfg: DictConfig, data: DataModule) -> None:
    """Refuse to judge a student on data of other classes than its own: `data=` was forgotten."""
    bundle = resolved_path(cfg.student.checkpoint or "")
    if not cfg.student.checkpoint or not (bundle.is_file() or (bundle / FACTS).is_file()):
        return
    known = read_facts(bundle).get("classes")
    if known and known != data.classes:  # of data that are not read by names of classes
        raise ValueError(
            f"student.checkpoint={bundle} knows the classes {named(known)} and {data.source.name} "
            f"has {named(data.classes)}: give the data it was trained on (data=…)"
        )


def differing_views(cfg: DictConfig, data: DataModule) -> str | None:
    """Return how the data's clean views differ from those that a bundle was trained for, or None.

    Of data in memory only the size counts: nothing resizes or crops them for evaluation.
    """
    if not cfg.student.checkpoint:
        return None
    known = read_checkpoint(cfg.student.checkpoint).preprocessing
    if "input_size" not in known:  # weights alone, or a Lightning checkpoint
        return None
    wanted = {"image_size": written_size(known["input_size"][1:])}
    shown: dict[str, Any] = {"image_size": written_size(data.image_size)}
    if isinstance(data.view, StreamedView):
        wanted |= {key: known[key] for key in CLEAN_VIEW if key in known}
        shown |= data.preprocessing
    differing = [key for key, value in wanted.items() if value != shown[key]]
    if not differing:
        return None
    trained, found = (", ".join(f"{k}={v[k]}" for k in differing) for v in (wanted, shown))
    missing = " ".join(f"{override_of(cfg, key)}={wanted[key]}" for key in differing)
    return (
        f"student.checkpoint={cfg.student.checkpoint} was trained for {trained} and "
        f"{data.source.name} is shown at {found}: add {missing}"
    )


def written_size(size: Sequence[int]) -> str:
    """Return a size as `data.image_size` says it."""
    height, width = size
    return str(height) if height == width else f"[{height},{width}]"


def check_border(cfg: DictConfig, data: DataModule, student: nn.Module) -> None:
    """Refuse clean views padded in another colour than timm's from the student's bundle."""
    if data.preprocessing["crop_mode"] != "border":
        return
    mean = normalization(student, data.in_chans).mean.flatten().tolist()
    own, shown = ([round(255 * v) for v in colour] for colour in (mean, border(data.in_chans)))
    if own != shown:
        raise ValueError(
            f"data.view.crop_mode=border would pad in the colour {shown}, and timm pads for "
            f"{cfg.student.name} in {own}: give center or squash"
        )


def override_of(cfg: DictConfig, key: str) -> str:
    """Return what a person writes to set the data's size, or an option of their views."""
    if key == "image_size":
        return "data.image_size"
    return f"{'' if key in cfg.data.view else '+'}data.view.{key}"


def data_shape(data: DataModule) -> DataShape:
    """Return what the data ask of a model."""
    return DataShape(data.num_classes, data.in_chans, data.image_size, tuple(data.classes))


def own_size(node: DictConfig) -> tuple[int, int] | None:
    """Return the height and width that a teacher sees, where they are not its student's."""
    size = plain(node.get("image_size"))
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def model_shape(node: DictConfig, data: DataModule) -> DataShape:
    """Return what is asked of a teacher or student: the data's shape, or its own image size."""
    shape = data_shape(data)
    return replace(shape, image_size=own_size(node) or shape.image_size)


def teacher_name(cfg: DictConfig) -> str | None:
    """Return what a person calls the teacher, or None where there is none."""
    source = cfg.teacher
    if source.get("checkpoints") is not None:
        return " + ".join(map(str, source.checkpoints)) or "an empty ensemble"
    own = source.checkpoint or source.name
    if own and (source.get("fit") or {}).get("from_weights"):  # the weights are not the teacher
        return f"{source.name or Path(own).name}, fine-tuned"
    return own


def direct_teacher(cfg: DictConfig) -> str | None:
    """Return what a person calls the model that the student learns from."""
    last = len(cfg.get("assistants") or [])
    return f"{assistant(cfg, last).student.name}, assistant {last}" if last else teacher_name(cfg)


def topk(cfg: DictConfig, data: DataModule) -> tuple[int, ...]:
    """Return the k to report."""
    return resolve_topk(plain(cfg.topk), data.num_classes)


def note_data(cfg: DictConfig, data: DataModule) -> None:
    """Say once for a command what was done with its data, and which numbers say nothing of them."""
    for note in data.notes:
        log.info("%s: %s", data.source.name, note)
    if "trainer" in cfg and (told := data.unlabeled_note(processes(cfg))):
        log.info("%s: %s", data.source.name, told)
    if cfg.topk is None and DEFAULT_TOPK[-1] not in topk(cfg, data):
        log.info("top-5 is left out: there are %d classes", data.num_classes)


def check_monitor(cfg: DictConfig, data: DataModule, objective: Objective) -> None:
    """Refuse an `optimized_metric`, or any of `sweep.metrics`, that no epoch will log."""
    several = plain(cfg.sweep.metrics) or []
    if not isinstance(several, list):
        raise ValueError(f"sweep.metrics is a list, such as [val/top1,val/ece], not {several!r}")
    metrics = evaluation_metrics(
        resolve_topk(plain(cfg.topk), data.num_classes),
        data.num_classes,
        objective,
        teacher_name(cfg) is not None,
    )
    known = [f"val/{name}" for name in metrics]
    asked = [("optimized_metric", cfg.optimized_metric), *(("sweep.metrics", n) for n in several)]
    for key, name in asked:
        if name not in known:
            raise ValueError(f"{key}={name} is not logged; there are {', '.join(known)}")
    for callback, node in present(cfg.callbacks):
        name = node.get("monitor")
        if name is not None and name not in known and not str(name).startswith("train/"):
            raise ValueError(
                f"callbacks.{callback}.monitor={name} is not logged; there are {', '.join(known)}"
            )


def costs(cfg: DictConfig, data: DataModule) -> Tensor | None:
    """Return what each decision costs for each true class, where a table is given."""
    if not cfg.decision.costs:
        return None
    return costs_once(cfg.decision.costs, tuple(data.classes))


@cache
def costs_once(path: str, classes: tuple[str, ...]) -> Tensor:
    """Return a table as it was when a run began: it may be gone or changed when training ends."""
    try:
        return read_costs(path, classes)[0]
    except OSError as error:
        raise ValueError(f"decision.costs={path}: {error.strerror}") from error


def check_decision(cfg: DictConfig, data: DataModule) -> None:
    """Refuse a confidence, groups or a table of costs that no numbers could be made with."""
    sure = cfg.decision and cfg.decision.confidence
    if not (is_number(sure) and 0 <= sure <= 1):
        raise ValueError(f"decision.confidence must lie in [0, 1], got {sure}")
    if not is_range(plain(cfg.shot_groups), 0, math.inf):
        raise ValueError(
            "shot_groups must be two numbers of training images, few ≤ many, got "
            f"{plain(cfg.shot_groups)}"
        )
    costs_once.cache_clear()
    costs(cfg, data)


def check_optimizer(cfg: DictConfig, model: Any, where: str = "") -> None:
    """Refuse an optimiser or a schedule that cannot be built, before anything is trained."""
    try:
        optimizer = create_optimizer(model, plain(cfg.optimizer))
        library.check_layers(cfg.optimizer, has_schedule(cfg.scheduler))
        if has_schedule(cfg.scheduler):
            options, epochs = plain(cfg.scheduler), cfg.trainer.max_epochs
            create_schedule(optimizer, options, epochs, MANY)
            for told in library.unread(options, epochs):
                log.warning("%s%s", where, told)
    except ValueError as error:
        name = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        known = [key for key in RECIPE if name and key != name[1]]
        meant = closest(name[1], known, f"{where}optimizer.") if name else ""
        raise ValueError(f"{where}{error}{meant}") from error
    if "lr" not in cfg.optimizer:
        raise ValueError(f"{where}optimizer has no learning rate: give {where}optimizer.lr=…")
    warmup = (cfg.scheduler or {}).get("warmup_epochs") or 0
    if warmup >= cfg.trainer.max_epochs:
        raise ValueError(
            f"{where}scheduler.warmup_epochs={warmup} leaves none of {cfg.trainer.max_epochs} "
            "epochs at the full learning rate"
        )


def check_single_images(model: nn.Module, data: DataModule, batch_size: int, key: str) -> None:
    """Refuse batches of one image that a model's batch normalisation cannot be trained on."""
    if batch_size > 1:
        return
    blank = torch.zeros(1, data.in_chans, *data.image_size)
    with explained_batch_of_one(key), torch.no_grad():
        copy.deepcopy(model).train()(blank)


@contextmanager
def explained_batch_of_one(key: str = "data.batch_size") -> Iterator[None]:
    """Say what to do where batch normalisation meets a single value for each channel."""
    try:
        yield
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"{key}=1: batch normalisation needs more than one value for each channel, and the "
            f"model's last maps have one for each image: give {key}=2 or more, or larger images"
        ) from error


def check_resume(cfg: DictConfig, model: Any, objective: Objective, classes: Sequence[str]) -> None:
    """Refuse a checkpoint of another run: other weights, classes, values, or nothing left to do."""
    if not cfg.ckpt_path:
        return
    content = read_lightning(Path(cfg.ckpt_path))
    own, saved = model.state_dict(), student_weights(content)
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in saved.items()}:
        raise ValueError(f"ckpt_path={cfg.ckpt_path} is a checkpoint of another student")
    known = as_object(content.get("distill")).get("classes") or list(classes)
    if known != list(classes):
        raise ValueError(
            f"ckpt_path={cfg.ckpt_path} knows the classes {named(known)} and the data have "
            f"{named(classes)}: start from it with student.checkpoint, which matches them by name"
        )
    progress = epochs_done(content, cfg.ckpt_path)
    may_only_be_judged = cfg.resume or cfg.sweep.resume
    if progress >= cfg.trainer.max_epochs and not may_only_be_judged:
        raise ValueError(
            f"ckpt_path={cfg.ckpt_path} has trained {progress} epochs of trainer.max_epochs="
            f"{cfg.trainer.max_epochs}: there is nothing left to do"
        )
    moved = {annealing.value for annealing in schedules(cfg, objective)}
    before = as_object(as_object(content.get("distill")).get("objective"))
    if cfg.objective.get("temperature") == "auto":  # the same teacher gives the same again
        moved.add("temperature")
    for name in objective.annealed:
        if name not in moved and before.get(name) != objective.get(name):
            raise ValueError(
                f"ckpt_path={cfg.ckpt_path} was trained at objective.{name}={before.get(name)}, "
                f"and this run says {objective.get(name)}"
            )


def plain(node: Any) -> Any:
    """Return a node as plain containers, resolved."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def aside(cfg: DictConfig, role: str) -> DictConfig:
    """Return the configuration of a run on the way to the student: nothing but a model is kept."""
    derived = cfg.copy()
    OmegaConf.set_struct(derived, False)
    derived.logger, derived.ckpt_path, derived.resume = {}, None, None
    derived.sweep.resume = None
    derived.callbacks = {
        name: node for name, node in present(cfg.callbacks) if "dirpath" not in node
    }
    derived.paths.output_dir = str(Path(cfg.paths.output_dir) / role)
    return derived


def assistant(cfg: DictConfig, number: int) -> DictConfig:
    """Return the configuration of the run that trains an assistant, counted from 1.

    It is the student's, but for what `assistants` says, and for the seed of its weights: one like
    the student would otherwise begin as the student does.
    """
    derived = aside(cfg, f"assistant-{number}")
    own = plain(cfg.assistants[number - 1])
    if not isinstance(own, dict) or own.keys() - cfg.student.keys():
        raise ValueError(
            f"assistants: {own} is not a change of `student`, which has {', '.join(cfg.student)}"
        )
    start: dict[str, Any] = {"checkpoint": None, "pretrained": False, "key_map": None}
    if name := own.get("name"):  # a named model is that model, and learns as it should
        start |= {"args": {}, "lr": recommended_lr(name)}
    derived.student = {**plain(cfg.student), **start, **own}
    derived.data.seed = cfg.data.seed
    derived.seed = cfg.seed + SEEDS_APART * number
    spec = resolved(model_spec(derived.student))  # a checkpoint brings its own
    derived.student.name, derived.student.args = spec.name, dict(spec.args)
    return OmegaConf.create(plain(derived))


def alone(cfg: DictConfig, role: str) -> DictConfig:
    """Return the configuration of a run that trains the teacher or the baseline, on labels only."""
    derived = aside(cfg, role)
    derived.objective, derived.annealing = SUPERVISED, {}
    derived.data.unlabeled = None  # nobody teaches there
    kept = evaluation_metrics((), 2, Objective({"ce": "cross_entropy"}), with_teacher=False)
    if cfg.optimized_metric.removeprefix("val/") not in kept:
        derived.optimized_metric = "val/top1"  # the run's own may compare with a teacher
    if role == "teacher":
        recipe = cfg.teacher.fit
        start = ("name", "args", "pretrained", "checkpoint", "key_map", "image_size")
        derived.student = {key: cfg.teacher.get(key) for key in start}
        spec = resolved(model_spec(derived.student))  # a checkpoint brings its own
        derived.student.name, derived.student.args = spec.name, dict(spec.args)
        derived.optimizer, derived.scheduler = plain(recipe.optimizer), plain(recipe.scheduler)
        derived.trainer.max_epochs = recipe.max_epochs
        derived.seed = derived.data.seed = recipe.seed
        derived.data.batch_size = recipe.batch_size
        derived.data.views = None  # its answers are kept for the student, not for itself
        progress = {name: node for name, node in present(cfg.callbacks) if name == "progress"}
        derived.callbacks = {**teacher_callbacks(recipe), **progress}
    return OmegaConf.create(plain(derived))


def teacher_callbacks(recipe: DictConfig) -> dict[str, Any]:
    """Return the callbacks that a recipe for training a teacher asks for.

    The best epoch is that of the lowest NLL: probabilities are what a student learns from, and of
    few validation images top-1 says little.
    """
    found: dict[str, Any] = {}
    if epochs := recipe.get("head_epochs"):
        found["head_first"] = {
            "_target_": "distill.callbacks.head_first.HeadFirst",
            "epochs": epochs,
        }
    if decay := recipe.get("ema"):
        found["ema"] = {
            "_target_": "pytorch_lightning.callbacks.EMAWeightAveraging",
            "decay": decay,
        }
    if patience := recipe.get("patience"):
        found[STOPPED_EARLY] = {
            "_target_": "pytorch_lightning.callbacks.EarlyStopping",
            "patience": patience,
            "monitor": "val/nll",
            "mode": "min",
        }
    return found
