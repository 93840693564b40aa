"""Runs a command in a process that is forked from one that has imported everything."""

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
    sys.path.insert(0, os.getcwd())
    getattr(cli, name)()
