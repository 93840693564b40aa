"""The house: which folder may use which, and that no file needs itself."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "distill"
# From the top down: a folder, or a module beside them, uses only what is below it.
ORDER = ("sweep", "cli", "run", "deploy", "evaluation", "report", "training", "config", "teacher",
         "objective", "models", "data", "metrics", "losses", "utils")  # fmt: skip
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if "plugins" not in path.parts
}


def imported(path):
    """Return the modules of this project that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
    return {name for name in found if name.split(".")[0] == "distill"}


def place(module):
    return ORDER.index(module.split(".")[1])


@pytest.mark.parametrize("module", sorted(set(FILES) - {"distill"}))
def test_imports_lead_downwards(module):
    upwards = [name for name in imported(FILES[module]) if name != "distill"
               and place(name) < place(module)]  # fmt: skip
    assert upwards == []


def test_no_file_needs_itself():
    tuple(TopologicalSorter({name: imported(path) for name, path in FILES.items()}).static_order())


def test_few_modules_lie_beside_the_folders():
    assert len(list(PACKAGE.glob("*.py"))) <= 6
    folders = {path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")}
    assert {Path(name).stem for name in folders} == {"__init__", *ORDER}
