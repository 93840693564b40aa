"""torchvision imports beside a torch it was built for, and beside one it was not."""

import subprocess
import sys

PROBE = """
import distill, sys
assert "torch" not in sys.modules and "torchvision" not in sys.modules
from distill.utils import torchvision_operators
import torch
def load_library(path):
    {outcome}
torch.ops.load_library = load_library
{use}
print(len(torchvision_operators._declared))
"""


def declared(outcome, use):
    probe = [sys.executable, "-c", PROBE.format(outcome=outcome, use=use)]
    return int(subprocess.run(probe, check=True, capture_output=True, text=True).stdout)


def test_beside_a_torch_it_was_not_built_for_the_operators_are_declared_and_it_imports():
    use = "import torchvision; from torchvision.transforms import v2"
    assert declared("raise OSError('libcudart.so: cannot open shared object file')", use) == 1


def test_beside_its_own_torch_nothing_is_declared():
    assert declared("return None", "torchvision_operators.declare_missing_operators()") == 0
