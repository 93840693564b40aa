"""What tests of teachers and their stores share."""

import multiprocessing

import pytest


@pytest.fixture
def process():
    """Start a function of `store_filler` in a process of its own, with the end of a pipe."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distill.teacher.store"])
    started = []

    def start(function, *arguments):
        here, there = context.Pipe()
        child = context.Process(target=function, args=(*arguments, there))
        child.start()
        started.append(child)
        return child, here

    yield start
    for child in started:
        child.kill()
        child.join()
