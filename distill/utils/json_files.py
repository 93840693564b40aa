"""JSON files, written whole and without a number that JSON cannot hold."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from distill.utils.files import write_whole


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all; a number that is not finite becomes null."""
    text = json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False)
    # A list of numbers is one line; strings hold no line breaks, so nothing else can match.
    text = re.sub(r"\[\n[^\[\]{}\"]+\]", lambda match: one_line(match.group()), text)
    write_whole(path, text + "\n")


def one_line(text: str) -> str:
    """Return JSON of several lines as one."""
    return re.sub(r"\s+", " ", text).replace("[ ", "[").replace(" ]", "]")


def finite(value: Any) -> Any:
    """Return a value whose numbers JSON can hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
