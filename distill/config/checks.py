"""What can be refused before any teacher trains, and the message that a person gets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor, nn

from distill.config.library import OURS
from distill.config.overrides import closest
from distill.config.read import on_gpu, plain, processes, swept, teacher_name
from distill.config.schema import check_values, resolved_paths
from distill.data import DataModule
from distill.data.condition.costs import read_costs
from distill.data.sources.judged import named
from distill.data.sources.listing import some
from distill.data.views.build import CLEAN_VIEW, border
from distill.data.views.views import StreamedView, is_range
from distill.losses import ModelInfo, dist
from distill.models.build import check_name, normalization
from distill.models.bundle import read_facts
from distill.models.checkpoint import FACTS, existing, read_checkpoint
from distill.objective.objective import Objective
from distill.objective.term import Term
from distill.teacher.precision import checked_device
from distill.utils.errors import first_line
from distill.utils.files import resolved_path
from distill.utils.numbers import is_number


def with_checked_values(cfg: DictConfig) -> DictConfig:
    """Return a configuration whose values are of the kinds their keys ask for, its paths resolved.

    Where `hydra.job.chdir` leads a run into its own folder, relative paths still count from where
    the command was typed.

    Raises:
        ValueError: naming the key.
    """
    check_given_once()
    check_values(cfg)
    elsewhere = HydraConfig.initialized() and HydraConfig.get().job.chdir
    check_trainer_keys(cfg)
    return resolved_paths(cfg, HydraConfig.get().runtime.cwd if elsewhere else None)


def check_given_once() -> None:
    """Refuse several places of the data, of which the last would be taken and no other.

    That is what a shell makes of `data.root=train-{000..146}.tar` without quotes.
    """
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    places = [override for override in given if override.startswith("data.root=")]
    if len(set(places)) > 1:
        raise ValueError(
            f"data.root is given {len(places)} times ({some(places)}): braces need quotes within "
            "quotes, such as data.root='\"train-{0000..0146}.tar\"'"
        )


def check_trainer_keys(cfg: DictConfig) -> None:
    """Refuse what is no option of Lightning's trainer, before anything is read."""
    options = [*signature(pl.Trainer.__init__).parameters, *OURS]
    for name in cfg.get("trainer") or {}:
        if name not in (*options, "_target_"):
            raise ValueError(f"trainer has no option {name}{closest(name, options, 'trainer.')}")


def check_pair() -> None:
    """Refuse a pair of models where there is to be no teacher."""
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    if choices.get("pair") and choices.get("teacher") == "none":
        raise ValueError(
            f"pair={choices['pair']} names a teacher, and teacher=none: give student.name=… in its "
            "place"
        )


def check_multirun(cfg: DictConfig) -> None:
    """Refuse a sweep whose every job would start subprocesses that repeat the whole sweep."""
    if swept() and processes(cfg) > 1:
        raise ValueError(
            f"a sweep (-m) with trainer.strategy={cfg.trainer.strategy} and trainer.devices="
            f"{cfg.trainer.devices} would repeat the sweep in every process: use trainer.devices=1 "
            "(one trial per device), or one torchrun per job without -m"
        )


def check_objective(cfg: DictConfig, data: DataModule, objective: Objective) -> None:
    """Refuse an objective that these classes, or this batch size, leave undefined."""
    given = cfg.objective.get("temperature", 1)
    if given != 1 and not objective.uses_temperature:
        raise ValueError("objective.temperature: no term of this objective takes one")
    if given == "auto" and teacher_name(cfg) is None:
        raise ValueError("objective.temperature=auto asks the teacher, and there is none")
    for name, term in objective.terms.items():
        if term.loss.function is dist and data.batch_size * processes(cfg) == 1:
            raise ValueError(f"objective.terms.{name}: dist has no columns at data.batch_size=1")
        if objective.alpha == 1 and term.uses_teacher and term.uses_labels:
            raise ValueError(
                f"objective.alpha=1 is to learn without labels, and objective.terms.{name} reads "
                "them: give the others no weight instead, such as objective.terms.ce.weight=0"
            )
    try_objective(objective, data)


def try_objective(objective: Objective, data: DataModule) -> None:
    """Call each term on made-up logits, which finds what the classes leave undefined."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, data.num_classes, generator=generator)
    classifier = torch.nn.utils.skip_init(torch.nn.Linear, 8, data.num_classes)
    info = ModelInfo((8,) * len(objective.stages), 8, data.num_classes, classifier)
    maps, embedding = [torch.ones(2, 8, 4, 4) for _ in objective.stages], torch.ones(2, 8)
    target = torch.tensor([0, 1])
    if data.soft_targets:
        target = torch.nn.functional.one_hot(target, data.num_classes).float()
    inputs = {"student": student, "teacher": teacher, "target": target}
    inputs |= {"temperature": objective.temperature, "class_counts": data.class_counts}
    inputs |= {"student_maps": maps, "teacher_maps": maps}
    inputs |= {"student_embedding": embedding, "teacher_embedding": embedding}
    inputs |= {"student_token": student}
    for name, term in objective.terms.items():
        if term.loss.learns:
            try_learned(name, term, info, inputs)
            continue
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
    objective.sample_selection(torch.zeros(2), teacher, target)


def try_learned(name: str, term: Term, info: ModelInfo, inputs: Mapping[str, Any]) -> None:
    """Make what learns with a student, and call it, which leaves the run's random numbers alone."""
    try:
        with torch.random.fork_rng(devices=[]):
            term(inputs, term.module(info, info).eval())
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"objective.terms.{name}: {first_line(error)}") from error


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
    if "teacher" in cfg and cfg.teacher.get("device") is not None:
        check_shared_device(cfg)
        checked_device(cfg.teacher.device)
    if cfg.data.get("decoder") == "gpu" and not on_gpu(cfg):
        raise ValueError(
            "data.decoder=gpu decodes where the model is, and this run has no GPU: give "
            "data.decoder=auto"
        )
    if cfg.get("ckpt_path") and not Path(cfg.ckpt_path).is_file():
        raise FileNotFoundError(f"ckpt_path={cfg.ckpt_path} does not exist")
    for number, own in enumerate(cfg.get("assistants") or [], start=1):
        if isinstance(own, DictConfig) and own.get("name"):
            check_name(own.name, f"assistant {number}.name")


def check_shared_device(cfg: DictConfig) -> None:
    """Refuse a device of its own for the teacher that the teachers of all ranks would lie on."""
    device, count = str(cfg.teacher.device), processes(cfg)
    if count > 1 and device.partition(":")[0] != "cpu":
        raise ValueError(
            f"teacher.device={device} would hold the teachers of all {count} processes "
            f"(trainer.devices={cfg.trainer.devices}): give teacher.device=cpu, or null, which is "
            "each student's own device"
        )


def check_classes(cfg: DictConfig, data: DataModule) -> None:
    """Refuse to judge a student on data of other classes than its own: `data=` was forgotten."""
    bundle = resolved_path(cfg.student.checkpoint or "")
    if not cfg.student.checkpoint or not (bundle.is_file() or (bundle / FACTS).is_file()):
        return
    names = read_facts(bundle).get("classes")
    if names and names != data.classes:  # of data that are not read by names of classes
        raise ValueError(
            f"student.checkpoint={bundle} knows the classes {named(names)} and {data.source.name} "
            f"has {named(data.classes)}: give the data it was trained on (data=…)"
        )


def differing_views(cfg: DictConfig, data: DataModule) -> str | None:
    """Return how the data's clean views differ from those that a bundle was trained for, or None.

    Of data in memory only the size counts: nothing resizes or crops them for evaluation.
    """
    if not cfg.student.checkpoint:
        return None
    preprocessing = read_checkpoint(cfg.student.checkpoint).preprocessing
    if "input_size" not in preprocessing:  # weights alone, or a Lightning checkpoint
        return None
    wanted = {"image_size": written_size(preprocessing["input_size"][1:])}
    shown: dict[str, Any] = {"image_size": written_size(data.image_size)}
    if isinstance(data.view, StreamedView):
        wanted |= {key: preprocessing[key] for key in CLEAN_VIEW if key in preprocessing}
        shown |= data.preprocessing
    differing = [key for key, value in wanted.items() if value != shown[key]]
    if not differing:
        return None
    trained, actual = (", ".join(f"{k}={v[k]}" for k in differing) for v in (wanted, shown))
    missing = " ".join(f"{override_of(cfg, key)}={wanted[key]}" for key in differing)
    return (
        f"student.checkpoint={cfg.student.checkpoint} was trained for {trained} and "
        f"{data.source.name} is shown at {actual}: add {missing}"
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


def check_decision(cfg: DictConfig, data: DataModule) -> Tensor | None:
    """Refuse a confidence, groups or a table of costs that no numbers could be made with.

    Returns:
        What each decision costs for each true class, where a table is given. It is read once, when
        a run begins: it may be gone or changed when training ends.
    """
    sure = cfg.decision and cfg.decision.confidence
    if not (is_number(sure) and 0 <= sure <= 1):
        raise ValueError(f"decision.confidence must lie in [0, 1], got {sure}")
    if not is_range(plain(cfg.shot_groups), 0, math.inf):
        raise ValueError(
            "shot_groups must be two numbers of training images, few ≤ many, got "
            f"{plain(cfg.shot_groups)}"
        )
    path = cfg.decision.costs
    if not path:
        return None
    try:
        return read_costs(path, data.classes)[0]
    except OSError as error:
        raise ValueError(f"decision.costs={path}: {error.strerror}") from error
