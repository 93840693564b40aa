"""From configuration to objects: the only caller of Hydra's `instantiate`."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from distill.config.keys import with_values
from distill.config.read import model_spec, own_size, plain
from distill.data import DataModule
from distill.data.sources.judged import Judged
from distill.data.sources.sizes import ModelSize
from distill.models.build import ModelSpec, resolved
from distill.models.bundle import read_facts
from distill.models.checkpoint import FACTS, read_checkpoint
from distill.models.own import import_modules
from distill.models.sizes import declared_size
from distill.models.weights import DataShape
from distill.objective.objective import Objective
from distill.utils.errors import first_line
from distill.utils.files import resolved_path
from distill.utils.sharing import Sharing

log = logging.getLogger(__name__)

CONFIGURED = "distill.data.module.configured"
EXTRAS = ("wandb", "mlflow")
ELSEWHERE = ("schedules", "views_per_step")  # of an objective: callbacks and data read them
MOVED = {  # beginnings of names that configurations have used → where these are now
    "distill.callbacks.": "distill.training.callbacks.",
    "distill.objectives.": "distill.objective.objective.",
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
        target = str(node.get("_target_"))
        for before, now in MOVED.items():
            if isinstance(cause, ImportError) and target.startswith(before):
                raise ValueError(
                    f"{label}._target_={target} is {target.replace(before, now)} now"
                ) from error
        name = label.rpartition(".")[2]
        package = f"distill-kd[{name}]" if name in EXTRAS else getattr(cause, "name", None)
        if isinstance(cause, ModuleNotFoundError) and package:
            raise ValueError(f"{label} needs pip install '{package}' ({cause})") from error
        raise ValueError(f"{label}: {first_line(cause)}") from error


def build_data(
    cfg: DictConfig, judged: Judged | None = None, sharing: Sharing | None = None
) -> DataModule:
    """Return the data module; of runs that share, each has its own with the same splits.

    Args:
        cfg: the configuration.
        judged: what a trained model brings that is only judged on the data.
        sharing: the run's part in what runs that take turns share.
    """
    sharing = sharing or Sharing()
    given = {"model_size": model_size(cfg), "judged": judged}
    if CONFIGURED not in str(cfg.data.get("_target_")):
        given = {}
    data = sharing.once(
        shared_key(cfg, "data") + repr(judged), lambda: make(cfg.data, "data", **given)
    )
    if not isinstance(data, DataModule):
        raise ValueError("data must be a distill.data.DataModule")
    own = data.with_options(seed=data.seed, batch_size=data.batch_size, views=data.views)
    own.sharing = sharing
    return own


def to_judge(cfg: DictConfig, whole: bool = True) -> Judged:
    """Return what the student brings to the data that it is judged on.

    Args:
        cfg: the configuration.
        whole: whether data without a train split are judged as a whole.
    """
    label = f"student.checkpoint={cfg.student.checkpoint}"
    facts = kept_facts(cfg.student.checkpoint)
    checkpoint = read_checkpoint(cfg.student.checkpoint) if cfg.student.checkpoint else None
    refit = cfg.get("calibration") == "refit"
    shown = checkpoint.preprocessing if checkpoint else {}
    return Judged(label, facts.get("classes") or (), shown, whole, refit)


def kept_facts(path: str | None) -> dict[str, Any]:
    """Return what a bundle says of itself; nothing of what is no bundle."""
    folder = resolved_path(path or "")
    return read_facts(folder) if path and (folder / FACTS).is_file() else {}


def note_training_pictures(cfg: DictConfig, data: DataModule) -> None:
    """Note that the pictures which are all judged are those that the student was trained on."""
    pictures = kept_facts(cfg.student.checkpoint).get("pictures")
    if pictures and not len(data.train) and pictures == data.pictures:
        data.notes.append(
            "these are the pictures that the student was trained on: most numbers below are of "
            "training pictures, and say little of new ones"
        )


def calibrations(cfg: DictConfig, data: DataModule) -> dict[str, dict[str, Any]] | None:
    """Return role → what its bundle says of its calibration, or None to fit it on validation.

    Raises:
        ValueError: if the requested one is not there.
    """
    there, requested = bool(len(data.val)), cfg.calibration
    if requested == "refit" or (requested is None and there):
        return None
    paths = {"student": cfg.student.checkpoint, "teacher": cfg.teacher.checkpoint}
    kept = {role: kept_facts(path) for role, path in {**paths, "baseline": cfg.baseline}.items()}
    if requested == "bundle" and not kept["student"]:
        raise ValueError(
            f"calibration=bundle: student.checkpoint={cfg.student.checkpoint} is no student bundle "
            "that knows one"
        )
    temperature = kept["student"].get("temperature")
    text = "none is known" if temperature is None else f"the bundle's {temperature:.4g} is applied"
    log.info("temperature: %s, nothing is fitted on %s", text, data.source.name)
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
        for length in ("max_epochs", "max_steps"):
            decided["trainer"].pop(length, None)
    return json.dumps([what, decided], sort_keys=True, default=str)


def build_objective(cfg: DictConfig, data: DataModule) -> Objective:
    """Return the objective, which learns from the data how many samples each class has."""
    node = OmegaConf.masked_copy(cfg.objective, [k for k in cfg.objective if k not in ELSEWHERE])
    if node.get("temperature") == "auto":  # any will do until the teacher is there to be asked
        node.temperature = 1.0
    return make(node, "objective", class_counts=data.class_counts)


def with_architecture(cfg: DictConfig) -> DictConfig:
    """Return a configuration that names the architecture which `student.checkpoint` brings."""
    spec = resolved(model_spec(cfg.student))
    learning_rate = cfg.student.lr  # as recommended for what was named
    student = {"name": spec.name, "args": dict(spec.args), "lr": learning_rate}
    return with_values(cfg, {f"student.{key}": value for key, value in student.items()})


def run_imports(cfg: DictConfig) -> None:
    """Import the user's own modules; see `distill.models.own`."""
    import_modules(plain(cfg.get("imports")) or [])


def data_shape(data: DataModule) -> DataShape:
    """Return what the data ask of a model."""
    return DataShape(data.num_classes, data.in_chans, data.image_size, tuple(data.classes))


def model_shape(node: DictConfig, data: DataModule) -> DataShape:
    """Return the shape a teacher or student is built for: the data's, or its own image size."""
    shape = data_shape(data)
    return replace(shape, image_size=own_size(node) or shape.image_size)
