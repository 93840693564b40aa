"""Commands that are killed at random points, again and again, and end as if they never were."""

import random
import signal
import time

import numpy as np
import pytest

pytestmark = pytest.mark.slow
QUICK = (
    "trainer.accelerator=cpu", "teacher.fit.max_epochs=1", "logger=none", "baseline=false",
    "report=false", "callbacks=[checkpoints,progress]", "store.dtype=float32",
)  # fmt: skip


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
    options = (*QUICK, "data.batch_size=64", "store.views=60", "store.path=answers")
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


def test_training_that_is_killed_and_resumed_from_its_store_gives_the_same_student(
    start, finish, tmp_path
):
    options = (*QUICK, "trainer.max_epochs=6", "+callbacks.last.every_n_train_steps=5",
               "+callbacks.last.save_on_train_epoch_end=false")  # fmt: skip
    finish("train", "live", *options, "store=off", "hydra.run.dir=run")
    options += ("store=disk", "store.path=answers")
    chosen = random.Random(1)
    resume = ()
    for attempt in range(5):
        folder = tmp_path / "killed" / f"run-{attempt}"
        last = folder / "checkpoints" / "last.ckpt"
        child = start("train", "killed", *options, f"hydra.run.dir={folder}", *resume)
        kill_later(child, lambda last=last: last.exists() and last.stat().st_mtime_ns, chosen, 0.15)
        if last.exists():
            resume = (f"ckpt_path={last}",)
    finish("train", "killed", *options, "hydra.run.dir=run", *resume)
    weights = [
        tmp_path / name / "run" / "student" / "model.safetensors" for name in ("live", "killed")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    output = (tmp_path / "killed" / "output.txt").read_text()
    assert "Traceback" not in output
