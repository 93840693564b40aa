"""What kind of value each key of a configuration holds, tried before anything is built.

Only what a value is by itself is said here: what has to fit the data or another value is refused
where that is known (`config.checks`). Keys that a configuration lacks are left alone.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from distill.config.keys import with_values
from distill.data.sources.decoders import CHOICES
from distill.utils.files import resolved_path
from distill.utils.numbers import is_real


@dataclass(frozen=True)
class Kind:
    """A kind of value: what a person calls it, and whether a value is of it."""

    name: str
    holds: Callable[[Any], bool]
    is_path: bool = False

    def or_(self, *others: Any) -> Kind:
        """Return the kind that also holds these very values."""
        names = " or ".join([self.name, *map(shown, others)])
        holds = self.holds
        return replace(self, name=names, holds=lambda v: same_as_any(v, others) or holds(v))


def same_as_any(value: Any, others: Sequence[Any]) -> bool:
    """Whether a value is one of these, of the same type."""
    return any(type(value) is type(other) and value == other for other in others)


def shown(value: Any) -> str:
    """Return a value as it is written in a configuration."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def real(low: float, high: float = math.inf, above: bool = False) -> Kind:
    """Return the numbers from `low`, or `above` it, to `high`."""
    start = "above" if above else "of at least"
    name = f"a number from {low:g} to {high:g}" if high < math.inf else f"a number {start} {low:g}"
    return Kind(name, lambda v: is_real(v) and low <= v <= high and not (above and v == low))


def whole(low: int, high: float = math.inf) -> Kind:
    """Return the whole numbers from `low` to `high`."""
    name = f"a whole number of at least {low}" + (f", at most {high}" if high < math.inf else "")
    return Kind(name, lambda v: is_real(v) and isinstance(v, int) and low <= v <= high)


def listed(kind: Kind) -> Kind:
    """Return the lists of a kind."""
    holds = kind.holds
    return replace(kind, name=f"a list, of which each is {kind.name}",
                   holds=lambda v: isinstance(v, list) and all(map(holds, v)))  # fmt: skip


def one_of(*names: str) -> Kind:
    """Return the kind of these names."""
    return Kind(" or ".join(names), lambda v: isinstance(v, str) and v in names)


WORD = Kind("a word", lambda v: isinstance(v, str) and bool(v))
PATH = Kind("a path (one that is a number begins with ./)", WORD.holds, is_path=True)
SWITCH = Kind("true or false", lambda v: isinstance(v, bool))
OBJECT = Kind("keys with values", lambda v: isinstance(v, dict))
LIST = Kind("a list", lambda v: isinstance(v, list))
POSITIVE, SHARE, FROM_ZERO = real(0, above=True), real(0, 1), real(0)
SEED = whole(0, 2**32 - 1)
# A share of the batches, or so many of them; Lightning tells 1 from 1.0.
BATCHES = Kind("a share of the batches above 0, or how many",
               lambda v: is_real(v) and v > 0 and (isinstance(v, int) or v <= 1))  # fmt: skip
# A picture's.
SIZE = Kind("a number of pixels, or a list of height and width",
            lambda v: all(type(n) is int and n > 0 for n in (v if isinstance(v, list) else [v]))
            and (not isinstance(v, list) or len(v) == 2))  # fmt: skip

MODEL = {
    "name": WORD.or_(None),
    "args": OBJECT.or_(None),
    "pretrained": SWITCH,
    "checkpoint": PATH.or_(None),
    "key_map": Kind(
        "order, or patterns with their replacements",
        lambda v: (
            v == "order"
            or (isinstance(v, dict) and all(isinstance(x, str) for x in (*v, *v.values())))
        ),
    ).or_(None),
    "lr": POSITIVE,
}
TRAINING = {
    "optimizer": OBJECT,
    "optimizer.opt": WORD,
    "optimizer.lr": POSITIVE,
    "optimizer.weight_decay": FROM_ZERO,
    "scheduler": OBJECT.or_(None),
    "scheduler.sched": WORD,
    "scheduler.min_lr": FROM_ZERO,
    "scheduler.warmup_lr": FROM_ZERO,
    "scheduler.warmup_epochs": FROM_ZERO,
}


def under(prefix: str, kinds: Mapping[str, Kind]) -> dict[str, Kind]:
    """Return the kinds of keys that lie under a prefix."""
    return {f"{prefix}.{key}": kind for key, kind in kinds.items()}


ADDRESSES = Kind("a folder, an address, or a list of addresses",
                 lambda v: PATH.holds(v) or (isinstance(v, list) and bool(v)
                                             and all(map(PATH.holds, v))),
                 is_path=True)  # fmt: skip


KINDS: dict[str, Kind] = {
    "seed": SEED,
    "report": SWITCH,
    "topk": listed(whole(1)).or_(None),
    "ckpt_path": PATH.or_(None),
    "optimized_metric": WORD,
    "assistants": LIST.or_(None),
    "preview.enabled": SWITCH,
    "preview.row": whole(0),
    "preview.epochs": whole(1),
    "sweep.resume": PATH.or_(None),
    "decision": OBJECT,
    "decision.confidence": SHARE,
    "decision.costs": PATH.or_(None),
    "paths.cache": PATH,
    "paths.output_dir": PATH,
    **under("student", MODEL),
    **TRAINING,
    "data.batch_size": whole(1),
    "data.num_workers": whole(0),
    "data.image_size": SIZE.or_(None),
    "data.split_seed": SEED,
    "data.seed": SEED,
    "data.val_fraction": real(0, 1),
    "data.test_fraction": real(0, 1),
    "data.view": OBJECT.or_(None),
    "data.views_per_step": whole(1, 2),
    "data.strong_view": OBJECT.or_(None),
    "data.root": PATH.or_(None),
    "data.timeout": FROM_ZERO,
    "data.retries": whole(0),
    "data.cache_gb": POSITIVE,
    "data.shuffle_window": whole(1),
    "data.label_key": WORD.or_(None),
    "data.name": Kind("a name", lambda v: isinstance(v, str)),
    "data.splits": OBJECT,
    "data.options": OBJECT.or_(None),
    "data.verify": one_of("new", "all", "none"),
    "data.resident": SWITCH,
    "data.download": SWITCH,
    "data.decoder": one_of(*CHOICES),
    "data.labels": one_of("fine", "coarse"),
    "data.unlabeled": Kind("a folder, or a source with _target_",
                           lambda v: v is None or isinstance(v, dict) or WORD.holds(v)),
    "data.unlabeled_share": real(0, 1).or_(None),
    **under("teacher", MODEL),
    "teacher.precision": one_of("fp32", "bf16", "fp16", "int8").or_(None),
    "teacher.device": Kind("a device, such as cpu or cuda:1", WORD.holds).or_(None),
    "teacher.batch_size": whole(1).or_(None),
    "teacher.classes": PATH.or_(None),
    "teacher.image_size": SIZE.or_(None),
    "teacher.checkpoints": listed(PATH),
    "teacher.weights": listed(FROM_ZERO).or_(None),
    "teacher.fit": OBJECT.or_(None),
    "teacher.fit.max_epochs": whole(1),
    "teacher.fit.batch_size": whole(1),
    "teacher.fit.seed": SEED,
    "teacher.fit.from_weights": SWITCH,
    "teacher.fit.head_epochs": whole(0),
    "teacher.fit.patience": whole(1).or_(None),
    "teacher.fit.ema": SHARE.or_(None),
    "teacher.fit.label_smoothing": SHARE,
    "imports": listed(WORD),
    **under("teacher.fit", TRAINING),
    "condition.seed": SEED,
    "objective.terms": OBJECT,
    "objective.stages": listed(Kind("a whole number", lambda v: type(v) is int)),
    "calibration": one_of("bundle", "refit").or_(None),
    "store.mode": one_of("auto", "disk").or_(None),
    "store.path": PATH,
    "store.dtype": one_of("float16", "float32"),
    "store.topk": whole(1).or_(None, "auto"),
    "store.part": whole(0).or_(None),
    "store.parts": whole(1).or_(None),
    "store.views": whole(1).or_(None),
    "store.max_gb": FROM_ZERO.or_(None),
    "store.device_gb": FROM_ZERO,
    "trainer.max_epochs": whole(1),
    "trainer.num_nodes": whole(1),
    "trainer.devices": Kind("a number of devices, a list of them or auto",
                            lambda v: v == "auto" or isinstance(v, list)
                            or (type(v) is int and (v > 0 or v == -1))
                            or (isinstance(v, str) and v.replace(",", "").isdigit())),
    "trainer.gradient_clip_val": FROM_ZERO.or_(None),
    "trainer.accumulate_grad_batches": whole(1),
    "trainer.max_steps": whole(1).or_(-1),
    "trainer.check_val_every_n_epoch": whole(1).or_(None),
    "trainer.val_check_interval": BATCHES.or_(None),
    "trainer.limit_train_batches": BATCHES,
    "trainer.limit_val_batches": BATCHES,
    "trainer.log_every_n_steps": whole(1),
    "trainer.deterministic": SWITCH.or_("warn"),
    "trainer.graph": one_of("auto", "on", "off").or_(True, False),
    "trainer.compile": SWITCH.or_(None, "default", "reduce-overhead", "max-autotune",
                                  "max-autotune-no-cudagraphs"),
    "plan.devices": Kind("a number of devices, or a list of such numbers",
                         lambda v: all(type(n) is int and n > 0
                                       for n in (v if isinstance(v, list) else [v]))),
    "plan.seconds": POSITIVE,
    "plan.json": PATH.or_(None),
    "callbacks.last.every_n_train_steps": whole(1).or_(None),
    "callbacks.last.every_minutes": POSITIVE.or_(None),
    "callbacks.ema.decay": SHARE,
    "callbacks.early_stopping.patience": whole(0),
    "callbacks.sparsity.groups": SWITCH,
    "export.formats": listed(WORD),
    "export.calibration_images": whole(1),
    "export.max_drop": FROM_ZERO,
    **under("export", dict.fromkeys(
        ("preprocessing", "temperature", "activations", "study"), SWITCH)),
}  # fmt: skip
TRAINED_BASELINE, KNOWN_BASELINE = SWITCH, PATH.or_(None)


def kinds_of(cfg: DictConfig) -> dict[str, Kind]:
    """Return what kind of value each key of this configuration holds."""
    trains = cfg.get("task_name") != "eval"
    kinds = {**KINDS, "baseline": TRAINED_BASELINE if trains else KNOWN_BASELINE}
    in_shards = OmegaConf.select(cfg, "data.shuffle_window") is not None
    return kinds | {"data.root": ADDRESSES} if in_shards else kinds


def check_values(cfg: DictConfig) -> None:
    """Refuse the first value that is of another kind than its key asks for.

    Raises:
        ValueError: naming the key, what it is to be, and what was given.
        MissingMandatoryValue: if a value without a default was not given.
    """
    for key, kind in kinds_of(cfg).items():
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(cfg, parent) if parent else cfg
        if not isinstance(node, DictConfig) or name not in node:
            continue
        value = node[name]
        value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        if not kind.holds(value):
            raise ValueError(f"{key} must be {kind.name}, got {shown(value)}")


def resolved_paths(cfg: DictConfig, base: str | None = None) -> DictConfig:
    """Return a configuration with each path as what it means, so that all use the same.

    Args:
        cfg: whose values have been checked.
        base: the folder that relative paths count from, where it is not the current one.
    """
    resolved: dict[str, Any] = {}
    for key in (key for key, kind in kinds_of(cfg).items() if kind.is_path):
        given = OmegaConf.select(cfg, key)
        if isinstance(given, str) and given:
            path = resolved_place(given, base)
        elif isinstance(given, ListConfig):
            path = [resolved_place(one, base) for one in given]  # type: ignore[assignment]
        else:
            continue
        if path != given:
            resolved[key] = path
    return with_values(cfg, resolved)


def resolved_place(place: str, base: str | None) -> str:
    """Return what a path means; an address of another file system is returned as it is."""
    return place if "://" in place else str(resolved_path(place, base))


def check_folder(key: str, path: str) -> None:
    """Refuse a folder that cannot be written to, before hours of work are to be kept there."""
    folder = resolved_path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{key}={path} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{key}={path} may not be written to")
