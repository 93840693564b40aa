"""Which options of Lightning and timm a run takes: each works as they say, or is refused.

The tables decide what is refused and what `docs/library_options.md` says; tests run every option
that works. One that a later version brings and no table knows is warned of.
"""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from timm.optim import get_optimizer_info, list_optimizers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """What becomes of an option.

    Args:
        note: what it does here, or why it is refused, and what to use instead.
        works: whether it is taken.
        breaks: whether it is refused under a Trainer of one's own, too.
    """

    note: str
    works: bool = True
    breaks: bool = False


def works(note: str = "as Lightning says") -> Verdict:
    """Return the verdict on an option that is taken."""
    return Verdict(note)


def refused(note: str, breaks: bool = False) -> Verdict:
    """Return the verdict on an option that is not."""
    return Verdict(note, works=False, breaks=breaks)


CALLBACKS: dict[str, Verdict] = {
    "BackboneFinetuning": refused(
        "a student has no `backbone` that could thaw; +optimizer.layer_decay=0.7 lets early "
        "layers learn slowly"),
    "BaseFinetuning": refused(
        "the schedule would not reach the weights it thaws; +optimizer.layer_decay=0.7 lets early "
        "layers learn slowly"),
    "BasePredictionWriter": refused(
        "training predicts nothing; a run writes predictions.npz, distill-predict those of "
        "further images"),
    "BatchSizeFinder": refused(
        "what a run learns depends on its batch size, which has to be the same each time; "
        "set data.batch_size"),
    "Callback": works("it does nothing; a class of one's own that extends it does what it says"),
    "Checkpoint": refused("it keeps nothing by itself; use ModelCheckpoint"),
    "DeviceStatsMonitor": works("as Lightning says; on a CPU it needs pip install psutil"),
    "EMAWeightAveraging": works(
        "as Lightning says; until the average begins, the student itself is validated and saved; "
        "not with 16 bits (…16-true), where an average stands still"),
    "EarlyStopping": works(),
    "GradientAccumulationScheduler": refused(
        "schedules are laid out over updates, whose number it changes; "
        "use trainer.accumulate_grad_batches", breaks=True),
    "LambdaCallback": works(),
    "LearningRateFinder": refused(
        "it trains on the way and leaves another rate each time; "
        "sweep it: distill -m student.lr=1e-3,3e-3,1e-2"),
    "LearningRateMonitor": works(),
    "ModelCheckpoint": works("as Lightning says, several too; one that monitors val/… names the "
                             "best epoch"),
    "ModelPruning": refused(
        "it renames the weights, which timm then cannot load; "
        "use callbacks=[checkpoints,progress,sparsity]", breaks=True),
    "ModelSummary": works(),
    "OnExceptionCheckpoint": refused(
        "it saves in the midst of a step, from where no run goes on as if nothing had been; "
        "use callbacks.last.every_n_train_steps=100 and resume=auto"),
    "ProgressBar": refused("it shows nothing by itself; use TQDMProgressBar or RichProgressBar"),
    "RichModelSummary": works(),
    "RichProgressBar": works(),
    "SpikeDetection": refused(
        "it ends a run with a traceback; use on_nan=skip, trainer.gradient_clip_val, or "
        "callbacks=[checkpoints,progress,early_stopping] with "
        "+callbacks.early_stopping.divergence_threshold"),
    "StochasticWeightAveraging": refused(
        "it replaces the schedule by one that goes by epochs, and trains one more; "
        "use callbacks=[checkpoints,progress,ema], and +callbacks.ema.update_starting_at_step=N "
        "for an average of the end", breaks=True),
    "TQDMProgressBar": works(),
    "ThroughputMonitor": works(),
    "Timer": works(),
    "WeightAveraging": works(
        "as Lightning says, all updates alike; not with 16 bits (…16-true), where an average "
        "stands still"),
}  # fmt: skip

OWN = "the run's own to set"
TRAINER: dict[str, Verdict] = {
    "accelerator": works(),
    "strategy": works("auto and ddp; refused: fsdp, which leaves each device a piece of the "
                      "student, and fork, spawn and notebook, which leave results elsewhere"),
    "devices": works(),
    "num_nodes": works(),
    "precision": works("as Lightning says; weights are the same to the bit after a resume"),
    "logger": refused(f"{OWN}: logger=[tensorboard], or +logger.NAME._target_=…"),
    "callbacks": refused(f"{OWN}: callbacks=[…], or +callbacks.NAME._target_=…"),
    "fast_dev_run": refused(f"{OWN}: debug=default tries a run out"),
    "max_epochs": works(),
    "min_epochs": works(),
    "max_steps": works("so many updates in the place of max_epochs, the last of them validated"),
    "min_steps": works(),
    "max_time": works(),
    "limit_train_batches": works(),
    "limit_val_batches": works(),
    "limit_test_batches": refused(f"{OWN}: a run is always judged on the whole test split"),
    "limit_predict_batches": refused(f"{OWN}: a run is always judged on the whole test split"),
    "overfit_batches": refused(f"{OWN}: trainer.limit_train_batches learns few batches"),
    "val_check_interval": works("as Lightning says, in batches; best and latest checkpoint and an "
                                "early stop follow each validation"),
    "check_val_every_n_epoch": works("as Lightning says; null with val_check_interval, which then "
                                     "counts on over epochs"),
    "num_sanity_val_steps": works(),
    "log_every_n_steps": works(),
    "enable_checkpointing": refused(f"{OWN}: callbacks=[progress] keeps no checkpoints"),
    "enable_progress_bar": refused(f"{OWN}: callbacks=[checkpoints] shows no progress"),
    "enable_model_summary": refused(
        f"{OWN}: +callbacks.layers._target_=pytorch_lightning.callbacks.ModelSummary prints one"),
    "accumulate_grad_batches": works("as Lightning says; schedules go by updates"),
    "gradient_clip_val": works(),
    "gradient_clip_algorithm": works(),
    "deterministic": works(),
    "benchmark": works(),
    "inference_mode": works(),
    "use_distributed_sampler": refused(f"{OWN}: the data give each device its share"),
    "profiler": works(),
    "detect_anomaly": works(),
    "barebones": refused(f"{OWN}: nothing would be logged that could be judged"),
    "plugins": refused(f"{OWN}: its checkpoints are written whole; trainer.precision and "
                       "trainer.strategy choose the others"),
    "sync_batchnorm": works(),
    "reload_dataloaders_every_n_epochs": refused(
        f"{OWN}: each epoch has views of its own from the same loader"),
    "default_root_dir": refused(f"{OWN}: hydra.run.dir=DIR"),
    "enable_autolog_hparams": works(),
    "model_registry": refused(f"{OWN}: distill-push uploads a student"),
}  # fmt: skip
OURS = ("compile", "graph")  # keys of the group `trainer` that are not Lightning's

LOGGERS: dict[str, Verdict] = {
    "CSVLogger": works("beside metrics.csv, which every run has; in a folder of its own"),
    "CometLogger": works("where `comet_ml` is installed; refused in one line where it is not"),
    "LitLogger": works("where `litlogger` is installed; refused in one line where it is not"),
    "Logger": refused("it logs nothing by itself; use logger=tensorboard"),
    "MLFlowLogger": works("where `mlflow` is installed; refused in one line where it is not"),
    "TensorBoardLogger": works(),
    "WandbLogger": works("where `wandb` is installed; refused in one line where it is not"),
}

ALWAYS = frozenset({"sched", "num_epochs", "warmup_epochs", "warmup_lr", "warmup_prefix", "noise",
                    "noise_pct", "noise_std", "noise_seed"})  # fmt: skip
CYCLES = frozenset({"cycle_mul", "cycle_decay", "cycle_limit"})
TO_THE_END = ALWAYS | {"min_lr", "cooldown_epochs"}


@dataclass(frozen=True)
class Schedule:
    """One of timm's schedules: its formula, and which options it reads."""

    formula: str
    reads: frozenset[str]


SCHEDULES: dict[str, Schedule] = {
    "cosine": Schedule("`min_lr + (lr − min_lr)·(1 + cos(π·t^k/T^k))/2`",
                       TO_THE_END | CYCLES | {"k_decay"}),
    "tanh": Schedule("`min_lr + (lr − min_lr)·(1 − tanh(−7·(1 − t/T) + 3·t/T))/2`",
                     TO_THE_END | CYCLES),
    "poly": Schedule("`min_lr + (lr − min_lr)·(1 − t^k/T^k)^decay_rate`",
                     TO_THE_END | CYCLES | {"k_decay", "decay_rate"}),
    "step": Schedule("`lr·decay_rate^⌊t/decay_epochs⌋`", ALWAYS | {"decay_epochs", "decay_rate"}),
    "multistep": Schedule("`lr·decay_rate^#{m ≤ t}` over the milestones m; timm's own is one "
                          "update earlier", ALWAYS | {"decay_milestones", "decay_rate"}),
    "wsd": Schedule("`lr`, then `min_lr + (lr − min_lr)·(1 − √x)` over the last `decay_epochs`",
                    TO_THE_END | {"decay_epochs", "decay_fn"}),
    "rsqrt": Schedule("`lr·√(s/(s + t))`, then down to `min_lr` over the last `decay_epochs`",
                      TO_THE_END | {"decay_epochs", "decay_fn", "stable_timescale"}),
    "constant": Schedule("`lr`, after the warm-up", ALWAYS),
    "none": Schedule("`lr`, as scheduler=null", frozenset({"sched"})),
}  # fmt: skip
NO_SCHEDULES = {
    "plateau": "plateau follows a metric; schedules here follow the step, so that a resumed run "
    "has the same: use multistep, step or cosine",
}

OPTIMIZERS = frozenset({
    "adabelief", "adadelta", "adafactor", "adafactorbv", "adafactorbvc", "adagrad", "adahessian",
    "adam", "adamax", "adamc", "adamp", "adamuon", "adamw", "adamwlegacy", "adan", "adanw",
    "adopt", "adoptc", "adoptw", "bnbadam", "bnbadam8bit", "bnbadamw", "bnbadamw8bit",
    "bnbademamix", "bnbademamix8bit", "bnblion", "bnblion8bit", "bnbsgd", "bnbsgd8bit",
    "cadafactor", "cadafactorbv", "cadafactorbvc", "cadamc", "cadamp", "cadamw", "cadan",
    "cadanw", "cadopt", "cadoptc", "cadoptw", "clamb", "clambw", "claprop", "clion", "clionc",
    "cmars", "cnadamc", "cnadamw", "crmsproptf", "csgdc", "csgdp", "csgdw", "fusedadam",
    "fusedadamw", "fusedlamb", "fusednovograd", "fusedsgd", "kron", "kronc", "kronw", "lamb",
    "lambc", "lambcd", "lambcw", "lambw", "laprop", "lapropc", "larc", "lars", "lion", "lionc",
    "madgrad", "madgradw", "mars", "momentum", "muon", "nadam", "nadamc", "nadamlegacy",
    "nadamuon", "nadamw", "nesterov", "nesterovw", "nlarc", "nlars", "nmuon", "novograd",
    "novogradc", "novogradw", "radabelief", "radam", "radamlegacy", "radamw", "rmsprop",
    "rmsproptf", "rmsproptfc", "rmsproptfw", "sgd", "sgdc", "sgdp", "sgdw",
})  # fmt: skip
SECOND_ORDER = "it needs second derivatives, which no step here computes; use kron or adamw"
TWO_STEPS = "it steps twice for a batch, and a run once; use adamw"
CLOSURE = "it asks for the loss of a batch several times, which is there once; use adamw"
MODES = (
    "it has weights for training and others for evaluation, which nothing here switches; "
    "use adamw with callbacks=[checkpoints,progress,ema]"
)
NO_OPTIMIZERS = {"lbfgs": CLOSURE, "sam": TWO_STEPS, "asam": TWO_STEPS, "gsam": TWO_STEPS,
                 "schedulefree": MODES, "adamwschedulefree": MODES, "sgdschedulefree": MODES,
                 "adahessian": SECOND_ORDER}  # fmt: skip
# Options that timm takes for any optimiser and hands to none but these.
HANDED_ON: dict[str, Callable[[Any], bool]] = {
    "eps": lambda info: info.has_eps,
    "betas": lambda info: info.has_betas,
    "momentum": lambda info: info.has_momentum,
    "fallback_list": lambda info: "muon" in info.name,
    "fallback_no_weight_decay": lambda info: "muon" in info.name,
}


# Callbacks, loggers and the Trainer


def lightnings(part: object) -> str | None:
    """Return the name of the Lightning class that a callback or logger is, or extends."""
    for kind in type(part).__mro__:
        if kind.__module__.startswith(("pytorch_lightning.", "lightning.pytorch.")):
            return kind.__name__
    return None


def is_own_class(part: object) -> bool:
    """Whether a callback or logger is of a class that is not Lightning's."""
    return type(part).__name__ != lightnings(part)


def check_parts(parts: Mapping[str, object], table: Mapping[str, Verdict]) -> None:
    """Refuse callbacks or loggers that a table refuses, and warn of those that it does not know.

    Args:
        parts: what a person calls it → the callback or logger.
        table: the name of Lightning's class → its verdict.

    Raises:
        ValueError: naming what is refused, why, and what to use instead.
    """
    for label, part in parts.items():
        name = lightnings(part)
        verdict = table.get(name or "")
        if verdict is None and name is not None:
            log.warning("%s: nobody has tried Lightning's %s here", label, name)
        bare = name in ("Checkpoint", "ProgressBar", "Logger") and is_own_class(part)
        if verdict is not None and not verdict.works and not bare:
            raise ValueError(f"{label}: {name} is refused: {verdict.note}")


def check_callbacks(callbacks: Iterable[pl.Callback]) -> None:
    """Refuse what would break training under a Trainer of one's own, too."""
    broken = {name: verdict for name, verdict in CALLBACKS.items() if verdict.breaks}
    for callback in callbacks:
        name = lightnings(callback)
        if name in broken:
            raise ValueError(f"callbacks: {name} is refused: {broken[name].note}")


def check_averages(parts: Mapping[str, object], precision: str, epochs: int, updates: int) -> None:
    """Refuse averages of weights that would not be an average of what is trained.

    Args:
        parts: what a person calls it → the callback.
        precision: Lightning's.
        epochs: of training.
        updates: of the optimiser, in all of training.

    Raises:
        ValueError: if one never begins, begins when it was not set to, or cannot move.
    """
    for label, part in parts.items():
        if not isinstance(part, WeightAveraging):
            continue
        if "16-true" in precision:
            mixed = precision.replace("true", "mixed")
            raise ValueError(
                f"{label}: under trainer.precision={precision} an average stands still, as 16 bits "
                f"do not hold its small steps; use trainer.precision={mixed}"
            )
        begins = getattr(part, "update_starting_at_epoch", None)
        every_step = getattr(part, "update_every_n_steps", 0) > 0
        if begins and every_step and getattr(part, "update_starting_at_step", None) is None:
            raise ValueError(
                f"{label}.update_starting_at_epoch={begins}: Lightning averages from the first "
                f"step all the same; give update_starting_at_step={begins * updates // epochs}, or "
                "update_every_n_steps=0 to average epochs"
            )
        last = next((k for k in reversed(range(updates)) if part.should_update(step_idx=k)), -1)
        by_epoch = any(part.should_update(epoch_idx=k) for k in range(epochs))
        if not by_epoch and last <= 0 < updates - 1:
            when = "never begins" if last < 0 else "holds the first update alone"
            raise ValueError(
                f"{label}: the average {when} in the {updates} updates of this training: lower "
                "update_starting_at_step or update_every_n_steps"
            )


def check_trainer(names: Iterable[str]) -> None:
    """Refuse flags of a Trainer under which a run could not end with its numbers.

    Raises:
        ValueError: naming the flag, why it is refused, and what to use instead.
    """
    for name in names:
        verdict = TRAINER.get(name)
        if verdict is None and name not in OURS and name in trainer_flags():
            log.warning("trainer.%s: nobody has tried this flag of Lightning's here", name)
        if verdict is not None and not verdict.works:
            raise ValueError(f"trainer.{name} is {verdict.note}")


def trainer_flags() -> list[str]:
    """Return the flags of Lightning's Trainer."""
    return list(inspect.signature(pl.Trainer).parameters)


# Optimisers


def check_optimizer(options: Mapping[str, Any]) -> None:
    """Refuse an optimiser that would not be the requested one.

    Raises:
        ValueError: saying what timm would drop, or what the optimiser needs, and what to use.
    """
    opt = str(options.get("opt", ""))
    prefix, _, name = opt.lower().rpartition("_")
    for spelling in (name, opt.lower().replace("_", "")):
        if spelling in NO_OPTIMIZERS:
            raise ValueError(f"optimizer.opt={opt} is refused: {NO_OPTIMIZERS[spelling]}")
    if name not in list_optimizers():
        near = difflib.get_close_matches(opt.lower(), sorted(OPTIMIZERS), n=3)
        hint = (
            f"; did you mean {' or '.join(near)}?" if near else "; see timm.optim.list_optimizers()"
        )
        raise ValueError(f"optimizer {dict(options)} was refused: Optimizer {opt} not found{hint}")
    if prefix not in ("", "lookahead"):
        raise ValueError(
            f"optimizer.opt={opt}: timm would drop {prefix!r} and train with {name}; give "
            f"{name}, or lookahead_{name}"
        )
    info = get_optimizer_info(name)
    if info.second_order:
        raise ValueError(f"optimizer.opt={opt} is refused: {SECOND_ORDER}")
    if name not in OPTIMIZERS:
        log.warning("optimizer.opt=%s: nobody has tried this optimiser of timm's here", opt)
    for option, reads in HANDED_ON.items():
        if options.get(option) is not None and not reads(info):
            raise ValueError(
                f"optimizer.{option}: {name} has none, and timm would drop it: leave it out"
            )
    for option in ("layer_decay_min_scale", "layer_decay_no_opt_scale"):
        if options.get(option) is not None and options.get("layer_decay") is None:
            raise ValueError(f"optimizer.{option} needs optimizer.layer_decay, such as 0.7")
    if not callable(options.get("param_group_fn") or len):
        raise ValueError(
            "optimizer.param_group_fn is a function: it can be given from Python alone"
        )


def completed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimiser's options, with those that a run needs to go on as it was.

    PSGD draws when to renew its preconditioner, by a generator that no checkpoint keeps unless it
    is set to be deterministic.
    """
    draws = "kron" in str(options.get("opt", "")).lower()
    return {"deterministic": True, **options} if draws else dict(options)


def check_steps(name: str, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimiser, of whatever origin, that a single step for a batch is not enough for.

    Raises:
        ValueError: naming it, and what to use instead.
    """
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    needs = {
        SECOND_ORDER: getattr(optimizer, "is_second_order", False),
        TWO_STEPS: hasattr(optimizer, "first_step") or hasattr(optimizer, "second_step"),
        CLOSURE: closure is not None and closure.default is inspect.Parameter.empty,
        MODES: callable(getattr(optimizer, "train", None)),
    }
    for why, needed in needs.items():
        if needed:
            raise ValueError(f"optimizer.opt={name} is refused: {why}")


def check_layers(optimizer: Mapping[str, Any], scheduled: bool) -> None:
    """Refuse rates by layer that nothing would apply: in timm the schedule does.

    Raises:
        ValueError: if there is no schedule.
    """
    if optimizer.get("layer_decay") is not None and not scheduled:
        raise ValueError(
            "optimizer.layer_decay is applied by the schedule, and there is none: "
            "scheduler.sched=constant keeps the rate"
        )


# Schedules


def check_schedule(options: Mapping[str, Any]) -> None:
    """Refuse a schedule that does not follow the step, or could not be followed.

    Raises:
        ValueError: saying why, and what to use instead.
    """
    name = str(options.get("sched", "cosine"))
    if name in NO_SCHEDULES:
        raise ValueError(f"scheduler.sched={NO_SCHEDULES[name]}")
    for key in ("step_on_epochs", "updates_per_epoch"):
        if key in options:
            raise ValueError(
                f"scheduler.{key} is {OWN}: schedules go by updates, options by epochs"
            )
    percent = options.get("noise_pct")
    if percent is not None and not 0 < percent <= 1:
        raise ValueError(f"scheduler.noise_pct must be above 0 and at most 1, got {percent}")
    milestones = options.get("decay_milestones")
    listed = isinstance(milestones, list | tuple)
    if milestones is not None and not (listed and list(milestones) == sorted(milestones)):
        raise ValueError(
            "scheduler.decay_milestones must be rising epochs, such as [60,120,160], got "
            f"{milestones}"
        )


def epochs_of_first_cycle(options: Mapping[str, Any], epochs: float) -> float:
    """Return `num_epochs` for which a schedule with all that surrounds it takes `epochs`.

    With n cycles, each m times as long as the last, it is
    `(epochs − cooldown − warm-up before it)/(1 + m + … + m^(n−1))`; timm leaves it to the caller to
    train for longer.

    Raises:
        ValueError: if nothing is left.
    """
    schedule = SCHEDULES.get(str(options.get("sched", "cosine")))
    given = {key: value for key, value in options.items() if schedule and key in schedule.reads}
    around = given.get("cooldown_epochs") or 0
    if given.get("warmup_prefix"):
        around += given.get("warmup_epochs") or 0
    growth, count = given.get("cycle_mul") or 1.0, int(given.get("cycle_limit") or 1)
    first = (epochs - around) / sum(growth**k for k in range(count))
    if first <= 0:
        raise ValueError(f"scheduler: cooldown and warm-up leave none of {epochs:g} epochs")
    return int(first) if first == int(first) else first


def unread(options: Mapping[str, Any], epochs: float) -> list[str]:
    """Return what to say of a schedule's options that change nothing."""
    name = str(options.get("sched", "cosine"))
    schedule = SCHEDULES.get(name)
    if schedule is None:
        return []
    quiet = {"warmup_epochs", "warmup_lr", "min_lr"}  # every configuration has them
    ignored = [key for key, value in options.items() if value and key not in schedule.reads]
    notes = [
        f"scheduler.{key} changes nothing: sched={name} does not read it"
        for key in ignored
        if not (key in quiet and name == "none")
    ]
    milestones = options.get("decay_milestones") or (90,)
    first = {"step": options.get("decay_epochs") or 90, "multistep": min(milestones)}
    if first.get(name, 0) >= epochs:
        key = "decay_epochs" if name == "step" else "decay_milestones"
        notes.append(f"scheduler.sched={name} never lowers the rate: its first step is at epoch "
                    f"{first[name]:g} of {epochs}; give +scheduler.{key}")  # fmt: skip
    return notes
