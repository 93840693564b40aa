"""What other processes do to a store in tests/teacher/test_store.py."""

import hashlib
import json
import os
import random
import signal
import sys
import time
from contextlib import contextmanager

import torch

from distill.teacher import claims, records, room, store, store_folder
from distill.teacher.claims import Claims
from distill.teacher.store import TeacherStore

SHAPE = {"samples": 6000, "classes": 37, "views": 3}
FACTS = {"teacher": "sine", "seed": 3}


def truth(view, rows, classes=SHAPE["classes"]):
    """The teacher's answers: exact in float16, and different in every element."""
    places = (rows[:, None] * classes + torch.arange(classes)) * 3 + view
    return (places * 7919 % 4096 - 2048).float() / 64


def opened(folder, **options):
    return TeacherStore(folder, FACTS, **{**SHAPE, **options})


def fill(folder, seed, ready):
    """Fill a store in an order of one's own, a few rows at a time."""
    generator = torch.Generator().manual_seed(seed)
    with opened(folder) as store:
        ready.send(store.writes)
        for view in torch.randperm(store.views, generator=generator).tolist():
            for rows in torch.randperm(store.samples, generator=generator).split(4):
                _, there = store.read(view, rows)
                store.write(view, rows[~there], truth(view, rows[~there]))


@contextmanager
def killed_at(line, *modules):
    """Kill this process at the n-th line of code of modules; count them all where n is 0."""
    counted, traced = [], {module.__file__ for module in modules}

    def trace(frame, event, argument):
        if frame.f_code.co_filename not in traced:
            return None
        if event == "line":
            counted.append(frame.f_lineno)
        if len(counted) == line > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    yield counted
    sys.settrace(None)


def write_until_line(folder, last, ready):
    """Write once; be killed at the n-th line of the store's code, or say how many they are."""
    with killed_at(last, records, room, store, store_folder) as lines, opened(folder) as writer:
        writer.write(0, torch.arange(8), truth(0, torch.arange(8)))
    ready.send(len(lines))


def hold(folder, count, ready):
    """Claim pieces of work, and do nothing."""
    held = [Claims(folder) for _ in range(count)]
    ready.send(sum(one.take(f"work-{k}") for k, one in enumerate(held)))
    time.sleep(60)


def claim_until_line(folder, last, ready):
    """Claim a piece of work; be killed at the n-th line of the claims' code, or say how many."""
    with killed_at(last, claims) as lines:
        Claims(folder).take("work")
    ready.send(len(lines))


def race(folder, count, ready):
    """Claim what can be claimed of pieces of work, once told to, and say what that was."""
    ready.send("ready")
    ready.recv()
    ready.send([f"work-{k}" for k in range(count) if Claims(folder).take(f"work-{k}")])
    time.sleep(60)  # who has ended holds nothing


def share(folder, shape, pause, ready):
    """Fill a store beside others, a few rows at a time, until it is whole."""
    with TeacherStore(folder, FACTS, **shape, shared=True) as store:
        waiting = [part for view in range(store.views) for part in store.parts(view)]
        while waiting:
            for part in list(waiting):
                if not store.claim(part):
                    continue
                for rows in torch.arange(part.rows.start, part.rows.stop).split(64):
                    _, there = store.read(part.view, rows)
                    store.write(part.view, rows[~there], truth(part.view, rows[~there]))
                    time.sleep(pause)
                store.release()
                waiting.remove(part)


def name_of(facts, samples, classes):
    """The name of a store as it was before views lay in several files."""
    about = {"format": 1, "samples": samples, "classes": classes, "dtype": "float16", "topk": None}
    text = json.dumps({**about, "facts": facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def watch(folder):
    """Read a store that another process fills until it is full; say what was seen."""
    chosen, partial = random.Random(0), 0
    with opened(folder) as store:
        print("writes" if store.writes else "reads", flush=True)
        while not store.complete:
            view = chosen.randrange(store.views)
            rows = torch.tensor(chosen.sample(range(store.samples), 64))
            logits, there = store.read(view, rows)
            assert torch.equal(logits[there], truth(view, rows[there]))
            partial += int(0 < there.sum() < 64)
        assert store.damaged == 0
    print(partial)


if __name__ == "__main__":
    watch(sys.argv[1])
