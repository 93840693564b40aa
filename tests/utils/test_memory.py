"""Freed memory is kept: a second pass over blocks of the same size touches no new page."""

import os
import platform
import subprocess
import sys

import pytest

from distill.utils.memory import available_bytes, bytes_text

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


def test_free_memory_is_no_more_than_there_is():
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available_bytes() <= whole


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0.0 kB"), (1_500, "1.5 kB"), (184_320_000, "184.3 MB"), (2 * 10**12, "2,000.0 GB")],
)
def test_bytes_are_written_in_the_unit_that_suits_them(count, text):
    assert bytes_text(count) == text
