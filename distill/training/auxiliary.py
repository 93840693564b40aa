"""The configurations of what a run trains beside its student: teacher, assistants, baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from distill.config.read import model_spec, plain, present, teacher_name
from distill.config.resolvers import recommended_lr
from distill.models.build import resolved
from distill.objective.objective import Objective
from distill.training.module import logged_names

STOPPED_EARLY = "early_stopping"
SEEDS_APART = 1000  # of the weights of a student and of its assistants
BY_STEPS = ("max_steps", "val_check_interval")  # of the student; a teacher's recipe has epochs
SUPERVISED = {
    "_target_": "distill.objective.objective.Objective",
    "terms": {"ce": {"loss": "cross_entropy"}},
}


def auxiliary_config(cfg: DictConfig, role: str) -> DictConfig:
    """Return the configuration of an auxiliary run, of which only the model is kept."""
    derived = cfg.copy()
    OmegaConf.set_struct(derived, False)
    derived.logger, derived.ckpt_path, derived.resume = {}, None, None
    derived.sweep.resume = None
    derived.callbacks = {
        name: node for name, node in present(cfg.callbacks) if "dirpath" not in node
    }
    derived.paths.output_dir = str(Path(cfg.paths.output_dir) / role)
    return derived


def assistant_config(cfg: DictConfig, number: int) -> DictConfig:
    """Return the configuration of the run that trains an assistant, counted from 1.

    It is the student's, but for what `assistants` says, and for the seed of its weights: one like
    the student would otherwise begin as the student does.
    """
    derived = auxiliary_config(cfg, f"assistant-{number}")
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


def supervised_config(cfg: DictConfig, role: str) -> DictConfig:
    """Return the configuration of a run that trains the teacher or the baseline, on labels only."""
    derived = auxiliary_config(cfg, role)
    if "views_per_step" in cfg.data:  # which may be its objective's: a baseline sees the student's
        derived.data.views_per_step = cfg.data.views_per_step
    derived.objective, derived.annealing = SUPERVISED, {}
    derived.data.unlabeled = None  # nobody teaches there
    kept = logged_names((), 2, Objective({"ce": "cross_entropy"}), with_teacher=False)
    if cfg.optimized_metric.removeprefix("val/") not in kept:
        derived.optimized_metric = "val/top1"  # the run's own may compare with a teacher
    if role == "teacher":
        recipe = cfg.teacher.fit
        start = ("name", "args", "pretrained", "checkpoint", "key_map", "image_size")
        derived.student = {key: cfg.teacher.get(key) for key in start}
        spec = resolved(model_spec(derived.student))  # a checkpoint brings its own
        derived.student.name, derived.student.args = spec.name, dict(spec.args)
        if share := recipe.get("label_smoothing"):
            derived.objective.label_smoothing = share
        derived.optimizer, derived.scheduler = plain(recipe.optimizer), plain(recipe.scheduler)
        derived.trainer.max_epochs = recipe.max_epochs
        for name in BY_STEPS:
            derived.trainer.pop(name, None)
        derived.trainer.check_val_every_n_epoch = derived.trainer.check_val_every_n_epoch or 1
        derived.seed = derived.data.seed = recipe.seed
        derived.data.batch_size = recipe.batch_size
        derived.data.views = None  # its answers are kept for the student, not for itself
        derived.data.views_per_step = 1
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
            "_target_": "distill.training.callbacks.head_first.HeadFirst",
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


def direct_teacher(cfg: DictConfig) -> str | None:
    """Return what a person calls the model that the student learns from."""
    last = len(cfg.get("assistants") or [])
    return (
        f"{assistant_config(cfg, last).student.name}, assistant {last}"
        if last
        else teacher_name(cfg)
    )
