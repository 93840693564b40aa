"""Commands that are killed at random points, again and again, and end as if they never were."""

import json
import os
import random
import signal
import time
from contextlib import suppress

import numpy as np
import pytest

from tests.e2e import killing

pytestmark = pytest.mark.slow


def kill_later(child, progress, chosen, longest):
    """Kill a process some time after what it does has moved on."""
    before = progress()
    deadline = time.monotonic() + 120
    while progress() == before and child.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(chosen.uniform(0, longest))
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL, "it came to its end before it was killed"


def views(folder):
    """Return every file of every store under a folder, by the store and its name."""
    return {
        f"{path.parent.name}/{path.name}": path.read_bytes()
        for path in folder.glob("answers/*/view-*.bin")
    }


def test_a_fill_that_is_killed_twenty_times_ends_in_the_store_of_one_that_was_not(
    start, finish, tmp_path
):
    options = (*killing.QUICK, "data.batch_size=64", "store.views=60", "store.path=answers")
    finish("store", "whole", *options)
    whole = views(tmp_path / "whole")
    assert len(whole) == 61

    def records():
        """Return how many rows have been written."""
        contents = views(tmp_path / "killed").values()
        return sum(int(np.frombuffer(c, np.uint32).reshape(-1, 11)[:, 0].astype(bool).sum())
                   for c in contents)  # fmt: skip

    chosen = random.Random(0)
    filled = []
    for _ in range(20):
        kill_later(start("store", "killed", *options), records, chosen, longest=0.1)
        filled.append(records())
        for name, content in views(tmp_path / "killed").items():
            here = np.frombuffer(content, np.uint8).reshape(-1, 44)
            there = np.frombuffer(whole[name], np.uint8).reshape(-1, 44)
            written = here[:, :4].any(axis=1)
            assert np.array_equal(here[written], there[written])
    assert filled == sorted(set(filled))
    assert filled[-1] < sum(len(content) // 44 for content in whole.values())
    finish("store", "killed", *options)
    assert views(tmp_path / "killed") == whole


def test_processes_that_fill_a_store_together_make_that_of_one_though_one_is_killed(
    start, finish, tmp_path
):
    options = (*killing.QUICK, "data.batch_size=64", "store.views=40", "store.path=answers")
    finish("store", "whole", *options)
    together = [start("store", "shared", *options) for _ in range(3)]
    answers = tmp_path / "shared" / "answers"
    victim, deadline = None, time.monotonic() + 120
    while victim is None:
        assert time.monotonic() < deadline
        for path in answers.glob("*/claims/view-*"):
            with suppress(OSError, ValueError):
                pid = json.loads(path.read_text())["pid"]
                victim = next(child for child in together if child.pid == pid)
                victim.kill()
                break
    for child in together:
        child.join()
    said = (tmp_path / "shared" / "output.txt").read_text()
    assert sorted(child.exitcode for child in together) == [-signal.SIGKILL, 0, 0], said
    assert "is taken over from a process that ended" in said
    assert said.count("complete, ") == 2
    assert views(tmp_path / "shared") == views(tmp_path / "whole")
    assert not list(answers.glob("*/claims/view-*"))


def test_a_run_that_is_told_to_end_or_killed_goes_on_as_if_it_had_not_been(start, finish, tmp_path):
    def begin(folder, arguments):
        return start("train", folder.name, *arguments)

    options = (*killing.RUN, *killing.ALL, "trainer.max_epochs=6")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    longest = killing.timed(begin, whole, (*options, "store=off"))
    options += ("store=disk", "store.path=answers", "resume=auto")
    last = killed / "run" / "checkpoints" / "last.ckpt"
    for number, name in ((signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, "SIGUSR1")):
        child = begin(killed, options)
        written = last.exists() and last.stat().st_mtime_ns
        while not last.exists() or last.stat().st_mtime_ns == written:
            assert child.is_alive()
            time.sleep(0.005)
        if name == "SIGTERM":
            os.kill(child.pid, signal.SIGSTOP)
            said = finish("train", "killed", *options, code=2)
            assert f"another run (process {child.pid}) is writing there" in said
            os.kill(child.pid, signal.SIGCONT)
        os.kill(child.pid, number)
        child.join()
        assert child.exitcode == 75
        said = (killed / "output.txt").read_text().splitlines()[-1]
        assert said == (
            f"distill: {name}: stopped; the same command with hydra.run.dir=run resume=auto goes on"
        )
    outcome = killing.survive(begin, killed, whole, options, 2, killing.moments(1, longest))
    assert outcome.survived, outcome
