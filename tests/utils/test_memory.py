"""Freed memory is kept: a second pass over blocks of the same size touches no new page."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from distill.utils.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
import torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**24) + 1  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is of glibc")
def test_blocks_are_used_again_without_asking_the_system():
    found = {
        mode: int(subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True,
                                 text=True, check=True).stdout)
        for mode in ("kept", "given back")
    }  # fmt: skip
    assert found["kept"] < found["given back"] / 10
