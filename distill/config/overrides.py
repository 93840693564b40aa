"""What a person types: flags anywhere on the line, keys that may be new, keys that were meant.

Hydra composes a configuration from files, and then applies `key=value`. Here is what becomes of
these: below the dictionaries in `OPEN`, which are keywords of somebody else's function, any key may
be given, and a whole dictionary takes the place of the one that is there. Everywhere else a key has
to exist, and one that does not is answered with the one that was probably meant.

Nothing heavy may be imported here: the commands do it before they print their help.
"""

from __future__ import annotations

import argparse
import difflib
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from distill.utils.compat import replace_application_of_overrides
from distill.utils.files import resolved_path

PACKAGE = Path(__file__).resolve().parents[1]
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"

# Keywords of functions of timm, Lightning and torch, which refuse what they do not know.
OPEN = (
    *("student.args", "teacher.args", "optimizer", "scheduler"),
    *("teacher.fit.optimizer", "teacher.fit.scheduler", "data.view", "data.strong_view"),
    *("data.options", "trainer", "objective.terms", "callbacks", "logger"),
)
# Of these each entry is something of its own, which begins with this key.
NAMED = {"objective.terms": "loss", "callbacks": "_target_", "logger": "_target_"}
# Paths that are used before a run could resolve its own.
EARLY_PATHS = ("hydra.run.dir", "hydra.sweep.dir", "sweep.resume")
# Keys that have been renamed → what they are now, and the value to give, where it is another too.
RENAMED = {
    "objective.keep": ("objective.sample_selection", ""),
    "objective.schedules.keep": ("objective.schedules.sample_selection", ""),
    "views": ("preview.enabled", "true"),
}
# What people call a key elsewhere; where several keys have it as their last part, the one meant.
MEANT = {
    **dict.fromkeys(("lr", "learning_rate", "base_lr"), "optimizer.lr"),
    **dict.fromkeys(("wd", "weight_decay"), "optimizer.weight_decay"),
    **dict.fromkeys(("opt", "optim", "optimizer.name"), "optimizer.opt"),
    **dict.fromkeys(("momentum", "betas", "eps"), "optimizer."),
    **dict.fromkeys(("sched", "lr_scheduler", "scheduler.name"), "scheduler.sched"),
    **dict.fromkeys(("warmup", "warmup_epochs"), "scheduler.warmup_epochs"),
    **dict.fromkeys(("epochs", "epoch", "num_epochs", "max_epochs", "n_epochs"),
                    "trainer.max_epochs"),
    **dict.fromkeys(("batch_size", "batch", "bs", "batchsize"), "data.batch_size"),
    **dict.fromkeys(("workers", "num_workers", "n_workers"), "data.num_workers"),
    **dict.fromkeys(("img_size", "image_size", "imgsz", "input_size", "resolution"),
                    "data.image_size"),
    **dict.fromkeys(("root", "path", "folder", "data_dir", "data_path", "data_root", "dir"),
                    "data.root"),
    **dict.fromkeys(("dataset", "dataset.name"), "data"),
    **dict.fromkeys(("temperature", "temp", "tau", "T"), "objective.temperature"),
    "alpha": "objective.alpha",
    **dict.fromkeys(("loss", "criterion"), "objective"),
    **dict.fromkeys(("model", "arch", "model.name", "model_name", "student_name", "student_model"),
                    "student.name"),
    **dict.fromkeys(("teacher_name", "teacher_model"), "teacher.name"),
    **dict.fromkeys(("teacher_checkpoint", "teacher_path", "teacher_weights"),
                    "teacher.checkpoint"),
    **dict.fromkeys(("student_checkpoint", "weights"), "student.checkpoint"),
    **dict.fromkeys(("device", "accelerator"), "trainer.accelerator"),
    **dict.fromkeys(("devices", "gpus", "num_gpus"), "trainer.devices"),
    **dict.fromkeys(("precision", "amp", "dtype"), "trainer.precision"),
    **dict.fromkeys(("grad_clip", "clip_grad"), "trainer.gradient_clip_val"),
    **dict.fromkeys(("output", "output_dir", "out", "save_dir", "run_dir"), "hydra.run.dir"),
    "random_seed": "seed",
}  # fmt: skip
COUNTED = ("num_classes", "nb_classes", "n_classes", "in_chans", "in_channels")
FLAGS: dict[tuple[str, ...], dict[str, Any]] = {  # Hydra's, which has no public parser of them
    **{names: {"action": "store_true"} for names in (
        ("--help", "-h"), ("--hydra-help",), ("--version",), ("--resolve",), ("--run", "-r"),
        ("--multirun", "-m"), ("--shell-completion", "-sc"))},
    **{names: {} for names in (
        ("--cfg", "-c"), ("--package", "-p"), ("--config-path", "-cp"), ("--config-name", "-cn"),
        ("--config-dir", "-cd"), ("--experimental-rerun",))},
    ("--info", "-i"): {"nargs": "?", "const": "all"},
}  # fmt: skip
FLAGS["--cfg", "-c"] = {"choices": ("job", "hydra", "all")}


# Flags


def in_hydras_order(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """Return a command line with its flags first, wherever they were.

    Args:
        parser: an empty one, whose `error` says what cannot be read.
        arguments: what was typed after the command's name.
    """
    given, overrides = flags_and_overrides(parser, arguments)
    flags = [(f"--{name.replace('_', '-')}", value) for name, value in given.items() if value]
    words = [[flag] if value is True else [flag, value] for flag, value in flags]
    return [*(word for pair in words for word in pair), *overrides]


def flags_and_overrides(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return Hydra's flags by their names, such as `config_dir`, and the overrides."""
    parser.add_argument("overrides", nargs="*")
    for names, options in FLAGS.items():
        parser.add_argument(*names, **options)
    given = vars(parser.parse_intermixed_args(rejoined(arguments)))
    overrides = given.pop("overrides")
    if given["config_dir"]:
        given["config_dir"] = str(resolved_path(given["config_dir"]))
    return given, overrides


def rejoined(arguments: Sequence[str]) -> list[str]:
    """Return arguments of which lists and dictionaries that a shell took apart are whole again."""
    whole: list[str] = []
    for argument in arguments:
        if whole and is_open(whole[-1]) and not ("=" in argument or argument.startswith("--")):
            whole[-1] += f" {argument}"
        else:
            whole.append(argument)
    return whole


def is_open(argument: str) -> bool:
    """Whether a value begins a list or a dictionary that does not end."""
    value = argument.partition("=")[2]
    return value.startswith(("[", "{")) and any(
        value.count(start) > value.count(end) for start, end in ("[]", "{}")
    )


# Keys


def apply(overrides: list[Override], cfg: DictConfig) -> None:
    """Apply `key=value` to a configuration that was composed from files, as said above.

    Raises:
        HydraException: for a key that does not exist, naming the one that was meant.
    """
    for override in overrides:
        changes = override.type == OverrideType.CHANGE and override.package is None
        if changes and may_be_new(override, cfg, overrides):
            put(cfg, override.key_or_group, override.value())
        elif changes and not holds(cfg, override.key_or_group):
            raise ConfigCompositionException(unknown(override, cfg))
        else:
            hydras_own([override], cfg)
    for key in EARLY_PATHS:
        resolve_early(cfg, key)


# What is typed stays what is recorded, in every launcher's process.
hydras_own = replace_application_of_overrides(apply)


def may_be_new(override: Override, cfg: DictConfig, others: Sequence[Override]) -> bool:
    """Whether an override is of an open dictionary, or of what lies in one."""
    key = override.key_or_group
    root = next((root for root in OPEN if f"{key}.".startswith(f"{root}.")), None)
    if root is None or not holds(cfg, root):
        return False
    if root not in NAMED or key == root:
        return True
    entry, *below = key.removeprefix(f"{root}.").split(".")
    begins = f"{root}.{entry}.{NAMED[root]}"
    made = any(other.key_or_group in (begins, f"{root}.{entry}") for other in others)
    return holds(cfg, f"{root}.{entry}") or (made if below else names_itself(override, root))


def names_itself(override: Override, root: str) -> bool:
    """Whether the value of a whole new entry says what it is."""
    value = override.value()
    return NAMED[root] in value if isinstance(value, dict) else root == "objective.terms"


def put(cfg: DictConfig, key: str, value: Any) -> None:
    """Give a key a value; a dictionary takes the other's place, but for what it is made of."""
    there = OmegaConf.select(cfg, key, throw_on_missing=False)
    made = isinstance(there, DictConfig) and "_target_" in there
    merge = isinstance(value, dict) and made and "_target_" not in value
    OmegaConf.update(cfg, key, value, merge=merge, force_add=True)


def holds(cfg: DictConfig, key: str) -> bool:
    """Whether a configuration has a key, with or without a value."""
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent, throw_on_resolution_failure=False) if parent else cfg
    return isinstance(node, DictConfig) and name in set(node)


def resolve_early(cfg: DictConfig, key: str) -> None:
    """Resolve `~` in a path that Hydra uses itself."""
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent)
    raw = OmegaConf.to_container(node, resolve=False).get(name) if node else None  # type: ignore[union-attr]
    if isinstance(raw, str) and raw.startswith("~"):
        with open_dict(cfg):
            node[name] = str(resolved_path(raw))


# Keys that were meant


def unknown(override: Override, cfg: DictConfig) -> str:
    """Return what to say of a key that does not exist."""
    key = override.key_or_group
    value = (override.input_line or "").partition("=")[2]
    for before, (now, taken) in RENAMED.items():
        if key == before or key.startswith(f"{before}."):
            own = f"{now}{key.removeprefix(before)}={shlex.quote(taken or value)}"
            return f"Could not override '{key}': {before} is {now} now, give {own}"
    return f"Could not override '{key}'{hint(key, value, cfg)}"


def hint(key: str, value: str, cfg: DictConfig) -> str:
    """Return a hint at what was meant by a key that does not exist, as it can be typed."""
    if key.rpartition(".")[2] in COUNTED:
        return ": the data decide it, and there is no key for it"
    parent, siblings = nearest_parent(key, cfg)
    head, *below = key.removeprefix(parent).split(".")
    options = options_with(key) if parent else []
    if options:
        return f": it goes with {' or '.join(options)}"
    of_another_command = below and head in {name.partition(".")[0] for name in MEANT.values()}
    candidates = [] if of_another_command else same_name(key, cfg)
    if candidates:
        typed_anew = [f"{name}={shlex.quote(value)}" for name in candidates]
        return f"; did you mean {' or '.join(typed_anew)}?{with_option(candidates[0], cfg)}"
    near = difflib.get_close_matches(head, siblings, n=1, cutoff=0.5)
    if near and not of_another_command:
        corrected = ".".join([parent + near[0], *below])
        if below and not holds(cfg, corrected):
            return hint(corrected, value, cfg)
        return f"; did you mean {corrected}={shlex.quote(value)}?"
    close = difflib.get_close_matches(key.rpartition(".")[2], MEANT, n=1, cutoff=0.8)
    if close and not of_another_command and present(cfg, meant(close[0])):
        return f"; did you mean {meant(close[0])}={shlex.quote(value)}?"
    return f"; there are {', '.join(siblings)}" if siblings else f": {parent[:-1]} has no keys"


def same_name(key: str, cfg: DictConfig) -> list[str]:
    """Return the keys that people mean by a name, or that end with it: the first, or the few."""
    parent, _, last = key.rpartition(".")
    if (
        parent
        and last in MEANT
        and holds(cfg, there := f"{parent}.{meant(last).rpartition('.')[2]}")
    ):
        return [there]
    ending = [name for name in keys(plain(cfg)) if name.rpartition(".")[2] == last]
    beside = [name for name in ending if name.partition(".")[0] == key.partition(".")[0]]
    synonyms = [meant(name) for name in (key, last) if name in MEANT]
    synonyms = beside + [name for name in synonyms if name != key and present(cfg, name)]
    if synonyms:
        return synonyms[:1]
    ending.sort(key=lambda name: name.count("."))
    return [name for name in ending if name.count(".") == ending[0].count(".")][:2]


def meant(name: str) -> str:
    """Return the key that is meant by a name; of a keyword that nobody has given, its place."""
    return MEANT[name] + (name if MEANT[name].endswith(".") else "")


def present(cfg: DictConfig, key: str) -> bool:
    """Whether a key can be given: it is there, in an open dictionary, or of another option."""
    root = key.rpartition(".")[0]
    return holds(cfg, key) or (root in OPEN and holds(cfg, root)) or bool(
        holds(cfg, key.partition(".")[0]) and options_with(key))  # fmt: skip


def with_option(key: str, cfg: DictConfig) -> str:
    """Return with which option of its group a key goes, where it does not with this one."""
    options = [] if holds(cfg, key) else options_with(key)
    return f" (with {' or '.join(options)})" if options else ""


def plain(cfg: DictConfig) -> dict[Any, Any]:
    """Return a configuration's own keys as they are written, without Hydra's."""
    content = OmegaConf.to_container(cfg, resolve=False)
    return {k: v for k, v in content.items() if k != "hydra"} if isinstance(content, dict) else {}


def keys(content: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    """Yield the keys of a configuration in their order."""
    for name, value in content.items():
        if str(name).startswith("_"):
            continue
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{name}.")


def nearest_parent(key: str, cfg: DictConfig) -> tuple[str, list[str]]:
    """Return the longest beginning of a key that is there, with its dot, and what lies below."""
    parts = key.split(".")[:-1]
    while parts and not isinstance(OmegaConf.select(cfg, ".".join(parts)), DictConfig):
        parts.pop()
    node = OmegaConf.select(cfg, ".".join(parts)) if parts else cfg
    return "".join(f"{part}." for part in parts), [str(name) for name in node]


def options_with(key: str) -> list[str]:
    """Return the options of a key's group, such as `data=folder`, whose files have the key."""
    group, _, rest = key.partition(".")
    options = []
    for path in sorted((CONF / group).glob("*.yaml")) if rest else []:
        if any(holds(one, rest) for one in contents(path)):
            options.append(f"{group}={path.stem}")
    return [option for option in options if not option.endswith(("=base", "=resident"))]


def contents(path: Path) -> Iterator[DictConfig]:
    """Yield what an option's file says, and the files of its group that it begins with."""
    content = OmegaConf.load(path)
    if not isinstance(content, DictConfig):
        return
    yield content
    for name in content.get("defaults") or []:
        if isinstance(name, str) and (path.parent / f"{name}.yaml").is_file():
            yield from contents(path.parent / f"{name}.yaml")


def closest(name: str, candidates: Iterable[str], prefix: str = "") -> str:
    """Return a hint at the keyword of a dictionary that was probably meant; or nothing."""
    names = list(candidates)
    there = meant(name) if name in MEANT else ""
    if there.startswith(prefix) and there.removeprefix(prefix) in names:
        return f"; did you mean {there}?"
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


# Values


def typed(key: str, value: object) -> str:
    """Return `key=value` as it is typed in a shell, quoted for it and for Hydra where needed."""
    text = str(value)
    return f"{key}={shlex.quote(text if reads_as(text) else quoted(text))}"


def quoted(text: str) -> str:
    """Return a text in quotes that Hydra takes as it is.

    A backslash is one, but before a quote; `${` would begin an interpolation.
    """
    body = text.replace("${", "\\${")
    ending = len(body) - len(body.rstrip("\\"))
    parts = body.split('"')
    doubled = [part + "\\" * (len(part) - len(part.rstrip("\\"))) for part in parts[:-1]]
    return '"' + '\\"'.join([*doubled, parts[-1] + "\\" * ending]) + '"'


def reads_as(text: str) -> bool:
    """Whether Hydra reads a bare value as this very text."""
    try:
        parsed = OverridesParser.create().parse_override(f"key={text}")
    except HydraException:
        return False
    return "${" not in text and not parsed.is_sweep_override() and parsed.value() == text


def requoted(override: str) -> str | None:
    """Return an override that Hydra cannot read as it can be typed, or None if quotes are no help.

    Of a list, each item is quoted that needs it.
    """
    key, equals, value = override.partition("=")
    if not equals or not key.strip("+~"):
        return None
    if value.startswith("[") and value.endswith("]"):
        items = [item.strip() for item in value[1:-1].split(",")]
        inside = ",".join(item if reads_as(item) else quoted(item.strip("\"'")) for item in items)
        answer, readable = f"{key}={shlex.quote(f'[{inside}]')}", f"{key}=[{inside}]"
    elif (
        value.startswith(("[", "{"))
        and not value.rstrip().endswith(("]", "}"))
        and " " not in (value)
    ):
        return None  # a list or a dictionary without its end
    else:
        answer, readable = typed(key, value), f"{key}={quoted(value)}"
    try:
        OverridesParser.create().parse_override(readable)
    except HydraException:
        return None
    return answer
