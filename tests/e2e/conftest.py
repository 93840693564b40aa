"""Commands without the seconds that a new process takes to import its libraries."""

import multiprocessing

import pytest

from tests.e2e import forked


@pytest.fixture
def start(tmp_path, cache, monkeypatch):
    """Start a function of `distill.cli` in a folder, in a process that is forked for it."""
    monkeypatch.setenv("DISTILL_CACHE", str(cache))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distill.run", "tests.e2e.forked"])
    started = []

    def run(name, folder, *arguments):
        (tmp_path / folder).mkdir(exist_ok=True)
        child = context.Process(target=forked.command, args=(name, tmp_path / folder, arguments))
        child.start()
        started.append(child)
        return child

    yield run
    for child in started:
        child.kill()
        child.join()


@pytest.fixture
def finish(start, tmp_path):
    """Run one to its end, and return what it has printed."""

    def run(name, folder, *arguments, code=0):
        child = start(name, folder, *arguments)
        child.join(timeout=600)
        output = (tmp_path / folder / "output.txt").read_text()
        assert child.exitcode == code, output
        return output

    return run
