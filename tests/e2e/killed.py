"""Runs an installed command in a process that tests/e2e/test_kills.py may kill."""

import os
import sys

import torch

from distill import cli


def command(name, folder, arguments):
    """Run a function of `distill.cli` in a folder, its output in a file there."""
    torch.set_num_threads(1)
    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [name, *arguments]
    getattr(cli, name)()
