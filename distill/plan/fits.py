"""What a run trains: its teacher if need be, assistants, the baseline, and its student."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from omegaconf import DictConfig
from torch import nn

from distill.config import build, read
from distill.config.keys import flat, is_bookkeeping
from distill.data import DataModule
from distill.models.build import ModelSpec, build_model, resolved
from distill.models.weights import DataShape
from distill.teacher.teacher import Teacher
from distill.training import auxiliary
from distill.training.cache import as_fitted, kept_in, views_per_sample
from distill.training.fit import baseline_config
from distill.training.teachers import as_configured, as_teacher, load_teacher
from distill.training.trainer import batches_per_epoch, updates_of, updates_per_epoch

STUDENT = "student"


@dataclass(frozen=True)
class Fit:
    """One model that a run trains.

    Args:
        role: what it is called: `teacher`, `assistant 1`, `baseline` or `student`.
        cfg: the configuration of what trains it.
        data: as it is shown them.
        key: the same for what is trained once for several runs.
        taught_by: the role of what it learns from, or None where it learns from labels alone.
        kept: whether the same was trained before, and is kept.
    """

    role: str
    cfg: DictConfig
    data: DataModule
    key: str
    taught_by: str | None = None
    kept: bool = False

    @property
    def model(self) -> str:
        """The architecture that is trained."""
        return str(self.cfg.student.name)

    @property
    def epochs(self) -> int:
        """How many passes over the data there are, at most."""
        return int(self.cfg.trainer.max_epochs)

    @property
    def images_per_epoch(self) -> int:
        """How many images an epoch shows, on all devices; unlabelled ones too."""
        batches = batches_per_epoch(self.cfg, self.data) * read.processes(self.cfg)
        return batches * self.data.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """How many optimiser updates an epoch has."""
        return updates_per_epoch(self.cfg, self.data)

    @property
    def steps(self) -> int:
        """How many optimiser updates there are."""
        return updates_of(self.cfg, self.data)

    @property
    def images(self) -> int:
        """How many images are shown."""
        return round(self.images_per_epoch * self.steps / self.steps_per_epoch)

    @property
    def new_views(self) -> int:
        """How many epochs show views that none before them has."""
        return min(self.epochs, views_per_sample(self.cfg, self.data))


def fits_of(cfg: DictConfig, data: DataModule) -> list[Fit]:
    """Return what a run trains, in its order.

    Of the teacher and the baseline it is known whether the same was trained before; of assistants
    only once there is their teacher.
    """
    found, teacher = [], "teacher" if read.teacher_name(cfg) else None
    if read.to_be_trained(cfg.teacher):
        found.append(from_labels(auxiliary.supervised_config(cfg, "teacher"), data, "teacher"))
    for number in range(1, len(cfg.assistants or []) + 1):
        own, role = auxiliary.assistant_config(cfg, number), f"assistant {number}"
        found.append(Fit(role, own, as_fitted(own, data), recipe(own, role), teacher))
        teacher = role
    if cfg.baseline:
        found.append(from_labels(baseline_config(cfg, data), data, "baseline"))
    return [*found, Fit(STUDENT, cfg, data, recipe(cfg, STUDENT), teacher)]


def from_labels(own: DictConfig, data: DataModule, role: str) -> Fit:
    """Return what is trained on labels alone, and kept."""
    kept = kept_in(own, as_fitted(own, data), role)
    return Fit(role, own, as_fitted(own, data), str(kept), kept=kept.is_dir())


def stand_ins(cfg: DictConfig, data: DataModule) -> dict[str, Teacher]:
    """Return role → a teacher that takes as much time and memory as the one a run will have.

    Weights that lie in files are loaded, so that what the run would refuse of them is refused;
    others are random.
    """
    found: dict[str, Teacher] = {}
    source = cfg.teacher
    random = read.to_be_trained(source) or source.pretrained
    if read.teacher_name(cfg):
        if random:
            shape = build.model_shape(source, data)
            model = architecture(read.model_spec(source), shape, "teacher")
            teacher = as_teacher(model, data, read.own_size(source))
            found["teacher"] = as_configured(cfg, data, teacher)
        elif (loaded := load_teacher(cfg, data)) is not None:
            found["teacher"] = loaded
    for number in range(1, len(cfg.assistants or []) + 1):
        own, role = auxiliary.assistant_config(cfg, number), f"assistant {number}"
        model = architecture(read.model_spec(own.student), build.data_shape(data), role)
        found[role] = as_teacher(model, data)
    return found


def architecture(spec: ModelSpec, shape: DataShape, role: str) -> nn.Module:
    """Return a model as a spec says, with random weights."""
    named = replace(resolved(spec), checkpoint=None, key_map=None, pretrained=False)
    return build_model(named, shape, role, any_classes=True)


def recipe(cfg: DictConfig, role: str) -> str:
    """Return a text that is the same for what is trained in the same way."""
    values = flat(read.plain(cfg))
    decided = {name: value for name, value in values.items() if not is_bookkeeping(name)}
    return json.dumps([role, decided], sort_keys=True, default=str)
