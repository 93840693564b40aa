"""What runs keep for each other: models trained on labels, and the teacher's answers."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from omegaconf import DictConfig
from torch import Tensor, nn

from distill.config import read
from distill.config.keys import is_bookkeeping
from distill.data import DataModule
from distill.data.sources.splits import Split
from distill.data.views.views import RECIPE
from distill.models.build import channels_last
from distill.models.bundle import load_student, read_facts
from distill.models.checkpoint import read_checkpoint
from distill.objective.objective import Objective
from distill.teacher.cached import CachedTeacher
from distill.teacher.ensemble import Ensemble
from distill.teacher.records import Layout
from distill.teacher.room import check_size, describe
from distill.teacher.store import TeacherStore, store_folder
from distill.teacher.teacher import Teacher
from distill.training import auxiliary
from distill.utils.files import remove_stale
from distill.utils.provenance import versions
from distill.utils.run_folder import METRICS, by_epoch, read_history

log = logging.getLogger(__name__)

# Keys that decide nothing of one model's training, or whose outcome `fit_key` has instead.
ELSEWHERE = (
    *("data", "condition", "teacher", "assistants", "baseline", "store", "objective", "annealing"),
    *("topk", "optimized_metric", "shot_groups", "decision", "imports"),
)
COSMETIC = ("accelerator", "log_every_n_steps", "compile", "graph", "_target_")  # of the trainer
LOST = "lost"  # the fact of a bundle that says without which images its model was trained
AUTO, MANY_CLASSES, AUTO_TOPK = "auto", 2000, 32  # of store.topk
FOR_CALLBACKS = ("limit_val_batches", "check_val_every_n_epoch", "val_check_interval")
Train = Callable[[DictConfig, DataModule, str, Path, Teacher | None], None]


def trained_once(
    cfg: DictConfig,
    data: DataModule,
    role: str,
    train_and_keep: Train,
    teacher: Teacher | None = None,
) -> nn.Module:
    """Return a trained model, from the cache if the same was trained before.

    One that was trained without some of the images, as shards of them were lost on the way, is not
    for others: it lies in the folder of its run, which finds it there when it goes on.

    Args:
        cfg: the configuration of the run that trains it.
        data: the run's data; seed and batch size are taken from `cfg`.
        role: `teacher`, `baseline` or `assistant-1`, for messages and the folder's name.
        train_and_keep: trains the model and writes its bundle into the folder that it is given.
        teacher: whom it learns from; None trains it on labels.
    """
    data = as_fitted(cfg, data)
    kept = kept_in(cfg, data, role, teacher)
    kept.parent.mkdir(parents=True, exist_ok=True)
    if (there := trained_before(cfg, kept)) is not None:
        log.info("%s: %s, trained before, from %s", role, cfg.student.name, there)
        if lost := read_facts(there).get(LOST):
            log.warning("%s: %s", role, lost)
        show_history(cfg, there)
        return load_kept(there)
    if read.processes(cfg) > 1:  # every rank takes part in training: a lock would wait for itself
        train_and_keep(cfg, data, role, kept, teacher)
        if (there := trained_before(cfg, kept)) is None:
            raise ValueError(f"{role}: {kept} is not on this machine: let all share paths.cache")
        return load_kept(there)
    # Runs in turns would wait for the lock, and this one for them; a parallel trial waits for it.
    with data.sharing.hold_turn(), waited_for(FileLock(f"{kept}.lock"), role):
        remove_stale(kept.parent, kept.name)
        if not kept.is_dir():
            train_and_keep(cfg, data, role, kept, teacher)
    there = trained_before(cfg, kept) or kept
    show_history(cfg, there)
    return load_kept(there)


def trained_before(cfg: DictConfig, kept: Path) -> Path | None:
    """Return where a model is kept, in the run's own folder before the cache; None if nowhere."""
    return next((path for path in (own_place(cfg, kept), kept) if path.is_dir()), None)


def own_place(cfg: DictConfig, kept: Path) -> Path:
    """Return the folder of a model that is for its run alone, in the place of the cache's."""
    return Path(cfg.paths.output_dir) / kept.name


def as_fitted(cfg: DictConfig, data: DataModule) -> DataModule:
    """Return the data as the run of a configuration shows them."""
    options = {key: cfg.data[key] for key in ("seed", "batch_size", "views")}
    return data.with_options(
        **options,
        unlabeled=cfg.data.get("unlabeled") is not None,
        two_views=cfg.data.get("views_per_step", 1) > 1,
    )


def kept_in(cfg: DictConfig, data: DataModule, role: str, teacher: Teacher | None = None) -> Path:
    """Return the folder that a model is kept in, once it has been trained on these data."""
    return Path(cfg.paths.cache) / f"{role}-{fit_key(cfg, data, teacher)}"


def known_baseline(cfg: DictConfig, data: DataModule) -> float | None:
    """Return the last validation top-1 of a run's student without a teacher, where one is kept."""
    own = auxiliary.supervised_config(cfg, "baseline")
    history = read_history(kept_in(own, as_fitted(own, data), "baseline") / METRICS)
    found = by_epoch(history, "val/top1")[1]
    return found[-1] if found else None


@contextmanager
def waited_for(lock: FileLock, role: str) -> Iterator[None]:
    """Hold a lock, saying so if another run has it; the system takes it from one that has ended."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s: waiting for another run that trains the same", role)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def keep_history(cfg: DictConfig, kept: Path) -> None:
    """Keep what was logged while a model was trained."""
    shutil.copyfile(Path(cfg.paths.output_dir) / METRICS, kept / METRICS)


def show_history(cfg: DictConfig, kept: Path) -> None:
    """Put what was logged while a kept model was trained into this run's directory."""
    if (kept / METRICS).is_file():
        folder = Path(cfg.paths.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(kept / METRICS, folder / METRICS)


def load_kept(path: Path) -> nn.Module:
    """Load a kept model; its memory layout is not part of the file."""
    return channels_last(load_student(path))


def fit_key(cfg: DictConfig, data: DataModule, teacher: Teacher | None = None) -> str:
    """Return a hash of everything that decides a fit's outcome.

    Of the configuration that is every key but those that are known to decide nothing: one that is
    new may train a model once more, and never passes a stale one off.
    """
    values = read.plain(cfg)
    callbacks = {k: node for k, node in (values["callbacks"] or {}).items() if k != "progress"}
    ignored = COSMETIC if callbacks else COSMETIC + FOR_CALLBACKS
    trainer = {k: v for k, v in values["trainer"].items() if k not in ignored}
    decided = {k: v for k, v in values.items() if not (k in ELSEWHERE or is_bookkeeping(k))}
    decided |= {"trainer": trainer, "view": values["data"]["view"], "size": data.image_size}
    decided |= {"batch_size": data.batch_size, "data": data.fingerprint, "order": data.seed}
    decided |= {"channels": data.in_chans, "classes": data.num_classes, "views": data.views}
    decided["balance"] = data.balance
    if data.shuffle_window is not None:
        decided["shuffle_window"] = data.shuffle_window
    decided["decoder"] = [data.decoded_by(split) for split in ("train", "val")]
    if data.unlabeled is not None:
        decided["unlabeled_per_batch"] = data.unlabeled_per_batch
    if data.views_per_step > 1:
        decided["strong_view"] = values["data"]["strong_view"]
    decided["gpu"] = read.on_gpu(cfg)
    if cfg.student.checkpoint:  # a path may come to hold other weights
        start = read_checkpoint(cfg.student.checkpoint)
        about = repr((start.architecture, start.args, start.preprocessing, list(start.classes)))
        decided["student"]["checkpoint"] = digest(start.weights, about)
    decided["callbacks"] = callbacks
    if teacher is not None:
        decided |= {key: values[key] for key in ("objective", "annealing")}
        kept = ("mode", "dtype", "topk", "max_gb")  # which decide whether answers are rounded
        decided["store"] = {key: values["store"].get(key) for key in kept}
        decided["store"]["topk"] = topk_of(cfg, data)
        decided["teacher"] = identity_of(teacher)
    decided["versions"] = versions()
    text = json.dumps(decided, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest(tensors: Mapping[str, Tensor], about: str = "") -> str:
    """Return a hash of named tensors, and of what else is to be told apart."""
    found = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def identity(module: nn.Module) -> str:
    """Return a hash of all that decides a module's answers."""
    return digest(module.state_dict(), repr(module))


def identity_of(teacher: Teacher) -> list[str]:
    """Return hashes of all that decides a teacher's answers: its model and its normalisation.

    Beside them is the precision that it was given, where it was.
    """
    own = [] if teacher.precision is None else [teacher.precision]
    return [identity(teacher.model), identity(teacher.normalize), *own]


def open_cached(
    cfg: DictConfig, data: DataModule, teacher: Teacher, objective: Objective, rank: int = 0
) -> CachedTeacher:
    """Return the teacher with a run's stores behind it, if it has any.

    With `store=auto` whatever stands in the way turns the store off and says so.

    Raises:
        ValueError: with `store=disk`, if the answers cannot be kept.
    """
    options = cfg.get("store")
    if not options or not options.mode:
        return CachedTeacher(teacher)
    try:
        check_store(cfg, data, objective, teacher.model)
        stores = open_stores(cfg, data, teacher, rank)
    except ValueError as error:
        if options.mode == "disk":
            raise
        log.info("teacher store: off (%s)", error)
        return CachedTeacher(teacher)
    log.info("teacher store: %s, in %s", expected(cfg, data), options.path)
    return CachedTeacher(teacher, stores, options.device_gb if read.on_gpu(cfg) else 0.0)


def open_stores(
    cfg: DictConfig, data: DataModule, teacher: Teacher, rank: int = 0, shared: bool = False
) -> dict[str, TeacherStore]:
    """Return the stores of a run's training and validation views.

    Args:
        cfg: its configuration.
        data: its data.
        teacher: whose answers they keep.
        rank: of this process among those of the run.
        shared: whether several processes fill them together.

    Raises:
        ValueError: if the answers cannot be kept; then none is left open.
    """
    stores: dict[str, TeacherStore] = {}
    try:
        for split in ("train", "val"):
            stores[split] = open_store(cfg, data, teacher, split, rank, shared)
    except ValueError:
        for store in stores.values():
            store.close()
        raise
    return stores


def check_store(
    cfg: DictConfig, data: DataModule, objective: Objective, model: nn.Module | None = None
) -> None:
    """Refuse a store for what it cannot hold, or that would not fit its limit."""
    options = cfg.store
    if objective.needs_teacher_features:
        raise ValueError(
            "store: this objective compares features, and only the teacher's logits are kept: give "
            "store=off"
        )
    if data.views_per_step > 1:
        raise ValueError(
            "store: data.views_per_step=2 shows two views of each picture in a step, and of one an "
            "answer is kept: give store=off"
        )
    alone = cfg.teacher.get("combine") if not cfg.get("assistants") else None
    if alone == "draw" or (isinstance(model, Ensemble) and model.combine == "draw"):
        raise ValueError("store: an ensemble that draws its answers has no lasting one")
    layout = Layout(data.num_classes, options.dtype, topk_of(cfg, data))
    check_size(rows(data, "train"), views_per_sample(cfg, data), layout, options.max_gb)


def open_store(
    cfg: DictConfig,
    data: DataModule,
    teacher: Teacher,
    split: str,
    rank: int = 0,
    shared: bool = False,
) -> TeacherStore:
    """Return the store of one split, whose name is a hash of all that decides an answer."""
    options = cfg.store
    facts = {
        "split": split,
        "teacher": identity(teacher.model),
        "preprocessing": identity(teacher.normalize),
        "data": data.fingerprint,
        "image_size": list(data.image_size),
        "view": [RECIPE, read.plain(cfg.data.view)],
        "decoder": data.decoded_by(split),
        "seed": data.seed if split == "train" else None,  # a clean view is drawn from nothing
        "batch_size": teacher.batch_size,
        "precision": precision_of(cfg, teacher),
        "gpu": read.on_gpu(cfg) if teacher.device is None else teacher.device.type == "cuda",
        "versions": {key: versions()[key] for key in ("distill", "torch", "timm")},
    }
    samples, classes, kept = (
        rows(data, split),
        data.num_classes,
        (options.dtype, topk_of(cfg, data)),
    )
    folder = store_folder(options.path, facts, samples, classes, *kept)
    shown = views_per_sample(cfg, data) if split == "train" else 1
    limits = (options.max_gb, rank)
    return TeacherStore(folder, facts, samples, classes, shown, *kept, *limits, shared=shared)


def topk_of(cfg: DictConfig, data: DataModule) -> int | None:
    """Return how many logits a store keeps of an answer; None is all of them.

    With `store.topk=auto` all are kept up to 2,000 classes, and 32 of more.
    """
    topk: str | int | None = cfg.store.get("topk")
    if isinstance(topk, str):
        return AUTO_TOPK if data.num_classes > MANY_CLASSES else None
    return topk


def precision_of(cfg: DictConfig, teacher: Teacher) -> str:
    """Return what a teacher's answers are computed in."""
    trained = str(cfg.trainer.precision)
    return trained if teacher.precision is None else f"{teacher.precision} under {trained}"


def rows(data: DataModule, split: str) -> int:
    """Return how many rows a split's store has: one for each index up to its largest."""
    return int(stored(data, split).index.max()) + 1


def stored(data: DataModule, split: str) -> Split:
    """Return the samples whose answers a split's store keeps."""
    found: Split = data.pool if split == "train" else getattr(data, split)
    return found


def views_per_sample(cfg: DictConfig, data: DataModule) -> int:
    """Return how many views of a training image a run shows."""
    return data.views or int(cfg.trainer.max_epochs)


def expected(cfg: DictConfig, data: DataModule) -> str:
    """Return what a store will hold and how large it will be, for people."""
    kept = (cfg.store.dtype, topk_of(cfg, data))
    said = describe(len(data.pool), data.num_classes, views_per_sample(cfg, data), *kept)
    chosen = cfg.store.topk == AUTO and kept[1] is not None
    return f"{said} (store.topk=auto; null keeps all)" if chosen else said
