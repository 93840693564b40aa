"""The house: which folder may use which, and that no file needs itself."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "distill"
# From the top down: a folder, or a module beside them, uses only what is below it.
ORDER = ("plan", "sweep", "cli", "run", "deploy", "evaluation", "report", "training", "config",
         "teacher", "objective", "models", "data", "metrics", "losses", "utils")  # fmt: skip
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


# State

MUTATING = {"append", "add", "clear", "discard", "extend", "insert", "pop", "popleft", "popitem",
            "remove", "setdefault", "update", "enter_context"}  # fmt: skip
STATE = {
    "distill.utils.torchvision_operators": {"_declared"},  # torch withdraws what is collected
    "distill.metrics.cost": {"_measured"},  # measured again, an architecture would have two speeds
    "distill.utils.signals": {"_State"},  # signals are the process's, whichever run is at work
    "distill.utils.files": {"_locks", "_holders"},  # the system gives locks to the process
    "distill.sweep.alone": {"COMMAND"},  # the folders that a command holds until it ends
}


def root(node):
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def changed_by_functions(tree):
    """The names of a module's own objects, or of classes, that its functions change."""
    assigned = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    targets = [target for node in assigned for target in
               (node.targets if isinstance(node, ast.Assign) else [node.target])]  # fmt: skip
    outer = {name.id for target in targets for name in ast.walk(target)
             if isinstance(name, ast.Name)}  # fmt: skip
    outer |= {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    outer |= {alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom)
              for alias in node.names if alias.name.isupper()}  # fmt: skip
    found = set()
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Global):
                found |= set(node.names)
            elif isinstance(node, ast.Assign | ast.AugAssign | ast.Delete):
                targets = [node.target] if isinstance(node, ast.AugAssign) else node.targets
                parts = (t for target in targets for t in ast.walk(target))
                found |= {root(part) for part in parts
                          if isinstance(part, ast.Attribute | ast.Subscript)}  # fmt: skip
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                found |= {root(node.func)} if node.func.attr in MUTATING else set()
    return found & outer


@pytest.mark.parametrize("module", sorted(FILES))
def test_no_module_has_state_but_what_is_listed(module):
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    assert changed_by_functions(tree) == STATE.get(module, set())


def test_state_is_recognised():
    code = "a, B = {}, 0\nb = []\nc = d = {}\nclass E: pass\n" \
           "def f():\n global a\n b.append(1)\n c['x'].y = 2\n E.z = 3\n d.get(1)"  # fmt: skip
    assert changed_by_functions(ast.parse(code)) == {"a", "b", "c", "E"}
