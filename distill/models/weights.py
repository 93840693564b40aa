"""Whether weights fit a model under some of the names they go by, and what to say where not."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
from torch import Tensor, nn

from distill.models.classes import shared_rows

SHOWN = 3  # tensors that a message names
COUNTERS = ("total_ops", "total_params")  # what the FLOP counter thop leaves in state dicts
UNTRACKED = "num_batches_tracked"  # which older files lack, and nothing reads but its counter
ORDER = "order"
KeyMap = str | Mapping[str, str]


@dataclass(frozen=True)
class DataShape:
    """What a data set asks of a model: K, channels, height and width in pixels; its class names."""

    num_classes: int
    in_chans: int
    image_size: tuple[int, int]
    classes: tuple[str, ...] = ()


def renamed(weights: Mapping[str, Tensor], model: Any, key_map: KeyMap | None) -> dict[str, Tensor]:
    """Return weights under the model's own names, where it is plain which is which.

    A prefix that all of the model's tensors share in the file goes, counters of other tools go,
    and what older files lack is filled in. Names of the literature that the model's family knows
    (`literature_keys`) are translated.

    Args:
        weights: name → tensor, as the file has them.
        model: what they are for.
        key_map: `order` pairs tensors in the order of the file and of the model; a mapping is
            applied to each name in turn, `{regular expression: replacement}`.

    Raises:
        ValueError: if the map pairs tensors of other shapes, or is none.
    """
    own = model.state_dict()
    weights = {k: v for k, v in weights.items() if not k.endswith(COUNTERS) or k in own}
    if isinstance(key_map, str):
        if key_map != ORDER:
            raise ValueError(f"key_map={key_map} is neither order nor a mapping of patterns")
        return in_order(weights, own)
    if key_map is not None:
        weights = mapped(weights, key_map)
    prefix = shared_prefix(weights, own)
    weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    rules = getattr(model, "literature_keys", None)
    if rules and key_map is None and not own.keys() & weights.keys():
        weights = mapped(weights, rules)
    untracked = {k: v for k, v in own.items() if k.endswith(UNTRACKED) and k not in weights}
    return {**untracked, **weights}


def in_order(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights paired with a model's tensors by their order alone."""
    names = list(own)
    if len(names) > len(weights):
        names = [name for name in names if not name.endswith(UNTRACKED)]
    if len(names) != len(weights):
        raise ValueError(
            f"key_map=order pairs {len(weights)} tensors with the model's {len(names)}"
        )
    paired = dict(zip(names, weights.values(), strict=True))
    return {**{name: value for name, value in own.items() if name not in paired}, **paired}


def mapped(weights: Mapping[str, Tensor], rules: Mapping[str, str]) -> dict[str, Tensor]:
    """Return weights with each name changed by every `{regular expression: replacement}`."""
    tensors: dict[str, Tensor] = {}
    for name, value in weights.items():
        new = name
        for pattern, replacement in rules.items():
            try:
                new = re.sub(pattern, replacement, new)
            except re.error as error:
                raise ValueError(f"key_map: {pattern!r} → {replacement!r}: {error}") from error
        if new in tensors:
            raise ValueError(f"key_map gives two tensors the name {new}, the second is {name}")
        tensors[new] = value
    return tensors


def shared_prefix(weights: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Return what stands before the model's names in the file, such as `student.`.

    Raises:
        ValueError: if the file holds several models that would do.
    """
    counts: Counter[str] = Counter()
    for name in weights:
        parts = name.split(".")
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in own:
                counts["".join(f"{part}." for part in parts[:cut])] += 1
    if not counts:
        return ""
    most = max(counts.values())
    best = [prefix for prefix, count in counts.items() if count == most]
    if len(best) > 1 and most > len(own) // 2:
        raise ValueError(f"it holds several such models: {', '.join(best)}")
    return "" if counts[""] == most or most <= len(own) // 4 else best[0]


def settings_of(model: Any) -> Mapping[str, Any]:
    """Return timm's configuration of a model; an architecture of a user's own may have none."""
    return getattr(model, "pretrained_cfg", None) or {}


def with_own_head(
    weights: Mapping[str, Tensor], model: Any, names: Sequence[str], wanted: Sequence[str]
) -> dict[str, Tensor]:
    """Return weights with the model's own last layer, which takes over the rows of shared classes.

    Args:
        weights: name → tensor, under the model's own names.
        model: what they are for.
        names: the class names of the weights, none where they have none.
        wanted: the class names of the data.
    """
    head = prefixes(settings_of(model).get("classifier"))
    rows = shared_rows(names, wanted)
    kept = {name: value for name, value in weights.items() if not name.startswith(head)}
    own = {name: value for name, value in model.state_dict().items() if name.startswith(head)}
    return kept | {
        name: with_rows(value, weights.get(name), rows, len(names)) for name, value in own.items()
    }


def with_rows(own: Tensor, theirs: Tensor | None, rows: Mapping[int, int], count: int) -> Tensor:
    """Return a tensor whose rows are taken from another, own row → the other's."""
    if theirs is None or not rows or theirs.shape != (count, *own.shape[1:]):
        return own
    mixed = own.clone()
    mixed[list(rows)] = theirs[list(rows.values())].to(own.dtype)
    return mixed


def size_along(weights: Mapping[str, Tensor], key: Any, axis: int) -> int | None:
    """Return how many classes or input channels weights have; None where they do not say."""
    layer = layer_in(weights, key)
    weight = weights[f"{layer}.weight"] if layer else None
    return weight.shape[axis] if weight is not None and weight.ndim > axis else None


def layer_in(weights: Mapping[str, Tensor], key: Any) -> str | None:
    """Return the layer that is meant by timm's name of it, or of several, where it has a weight."""
    # timm's deep stems are sequences, and a distilled transformer has two classifiers
    names = [f"{stem}{end}".rstrip(".") for stem in prefixes(key) for end in ("", "0")]
    return next((name for name in names if f"{name}.weight" in weights), None)


def prefixes(key: Any) -> tuple[str, ...]:
    """Return what the tensors of one or several layers begin with."""
    keys = [key] if isinstance(key, str) else key or []
    return tuple(f"{name}." for name in keys)


def classes_of(weights: Mapping[str, Tensor], name: str) -> int | None:
    """Return how many classes the weights of an architecture tell apart, where they say so."""
    settings = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    key = settings.classifier if settings else None
    prefix = shared_prefix(weights, dict.fromkeys(f"{stem}weight" for stem in prefixes(key)))
    return size_along({k.removeprefix(prefix): v for k, v in weights.items()}, key, 0)


def fits(model: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Whether each of the model's tensors is there in its shape, and no other."""
    own = model.state_dict()
    return own.keys() == weights.keys() and all(own[k].shape == weights[k].shape for k in own)


def check_tensors_fit(model: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Refuse weights unless each of the model's tensors is there in its shape, and no other."""
    own = model.state_dict()
    differing = [
        key
        for key in [*own, *sorted(weights.keys() - own.keys())]
        if shape_in(weights, key) != shape_in(own, key)
    ]
    if not differing:
        return
    examples = [f"{k} ({shape_in(weights, k)} for {shape_in(own, k)})" for k in differing[:SHOWN]]
    more = " …" if len(differing) > SHOWN else ""
    spare = sorted(weights.keys() - own.keys())
    near = difflib.get_close_matches(differing[0], spare, n=1, cutoff=0.3)
    nearest = f"; nearest to {differing[0]} is {near[0]} (see key_map)" if near else ""
    raise ValueError(
        f"{origin} does not fit the architecture: {len(differing)} of "
        f"{len(own.keys() | weights.keys())} tensors differ: {', '.join(examples)}{more}{nearest}"
    )


def shape_in(tensors: Mapping[str, Tensor], key: str) -> str:
    """Return a tensor's shape in words."""
    if key not in tensors:
        return "none"
    return "×".join(map(str, tensors[key].shape)) or "scalar"
