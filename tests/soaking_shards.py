"""A long stream of samples from shards, and the memory of whoever reads them.

`scripts/soak --shards` does it at length, `test_soak_shards.py` in short.
"""

import gc
import io
import os
import statistics
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from distill.data import DataModule
from distill.data.sources import shards

CLASSES = 1000
EACH = 10_000  # samples of a shard
HELD_OUT = 2 * CLASSES
BATCH = 512
VIEW = {"scale": [0.35, 1.0], "hflip": 0.5, "color_jitter": 0.0}  # what training has without more
MOST = 0.02  # by which memory may grow from the first quarter's end to the last's


@dataclass(frozen=True)
class Held:
    """What processes hold after so many samples, in MB."""

    samples: int
    main: float
    workers: float

    @property
    def total(self):
        return self.main + self.workers


def pictures(count=64):
    """Small JPEGs of noise."""
    noise = np.random.default_rng(0)
    for _ in range(count):
        file = io.BytesIO()
        pixels = noise.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "JPEG", quality=60)
        yield file.getvalue()


def write(root, samples, each=EACH):
    """Write shards of so many samples for training, and one to be held out."""
    images = list(pictures())
    root.mkdir(parents=True)
    for number, first in enumerate(range(0, samples, each)):
        write_one(root / f"train-{number:05}.tar", range(first, min(first + each, samples)), images)
    for part in ("val", "test"):
        write_one(root / f"{part}-0.tar", range(HELD_OUT), images)


def write_one(path, numbers, images):
    """Write a shard of these samples, whose files are as short as they can be."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in numbers:
            for ending, content in (("cls", str(number % CLASSES).encode()),
                                    ("jpg", images[number % len(images)])):  # fmt: skip
                member = tarfile.TarInfo(f"{number:09}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def pss(pid):
    """Return a process's proportional set size in MB (Linux only).

    Pages of files, such as libraries, are left out: the system drops and reads them as it likes.
    """
    rows = dict(
        line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    )
    return sum(int(rows[name].split()[0]) for name in ("Pss_Anon", "Pss_Shmem")) / 1024


def workers_of(pid):
    """Return the processes that one has started."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def stream(root, cache, epochs, workers=2, points=100):
    """Yield what is held while epochs of a folder of shards are read, at so many points.

    What was imported is frozen first, as commands do (`import_heavy`): at its first full collection
    each process would write to all objects, and so come to own a copy of every page.
    """
    gc.freeze()
    source = shards(str(root), cache=str(cache))
    data = DataModule(
        source, VIEW, batch_size=BATCH, image_size=16, num_workers=workers, decoder="pil"
    )
    loader = data.train_dataloader()
    every = max(1, epochs * len(loader) // points)
    steps = 0
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        seen = torch.zeros(len(data.train), dtype=torch.uint8)
        for batch in loader:
            seen[batch.index] += 1
            steps += 1
            if steps % every == 0:
                held = [pss(child) for child in workers_of(os.getpid())]
                yield Held(steps * BATCH, pss(os.getpid()), sum(held))
        assert int(seen.max()) == 1
        assert int(seen.sum()) == len(loader) * BATCH


def grown(held):
    """Return by what share memory has grown from the first quarter to the end: of medians."""
    quarter = len(held) // 4
    early, late = held[quarter : 2 * quarter], held[-quarter:]
    before, after = (statistics.median(one.total for one in part) for part in (early, late))
    return after / before - 1


def soak(folder, samples, epochs, say=print):
    """Stream `epochs` times `samples`; return whether memory was flat."""
    began = time.monotonic()
    write(folder / "shards", samples)
    say(f"{samples:,} samples written in {time.monotonic() - began:.0f} s")
    began, held = time.monotonic(), []
    for one in stream(folder / "shards", folder / "cache", epochs):
        held.append(one)
        if len(held) % 10 == 0:
            say(f"{one.samples:12,} samples {one.samples / (time.monotonic() - began):8,.0f}/s  "
                f"main {one.main:7.1f} MB, workers {one.workers:7.1f} MB", flush=True)  # fmt: skip
    growth = grown(held)
    say(f"{held[-1].samples:,} samples; memory grew by {growth:.2%}, at most {MOST:.0%}")
    return growth <= MOST
