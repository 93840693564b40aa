"""Time how pictures on disk become batches: against timm's loader and against decoding alone.

Ours is the loader that training has, to float32 in [0, 1] where it trains; timm's is its
`create_loader` with the same crop and flip, as many workers and the same batch size, to normalised
float32: without its prefetcher, as on a CPU, and with it, which sends uint8 as ours does. Both show
each picture once in a turn. Their rates are images for each second of a CPU, in all processes
together, which a busy machine does not change much; `wall` is by the clock. This process has one
thread, unless `--threads` says otherwise: a second one spins while it waits for the next batch to
be converted, which takes a quarter of all CPU time and makes nothing. Decoding alone is Pillow's,
whole, in this process.

The pictures are parts of scikit-learn's two sample photographs, of 500 × 375 pixels or a mosaic of
2,000 × 1,500, with grain, saved at JPEG quality 90.

Then start-up: seconds until the first batch of a folder of small files (hard links of 40 pictures),
never seen before and known, and the memory that all its processes take together (PSS) beyond what
the imports take; the same of an index without files; and shards against the folder they were
written from.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import Any

import distill  # noqa: F401  (first: it makes torchvision importable)

# isort: split
import numpy as np
import torch
from measure import Row, print_rows, ratio, rounds
from PIL import Image

from distill.data import DataModule, sources
from distill.data.sources.packed import PackedStrings
from distill.data.sources.splits import DIGEST, Source, Streamed
from distill.data.views.views import StreamedView
from distill.utils.memory import keep_freed_memory

BATCH = 32
SHOWN = 224
SCALE = (0.35, 1.0)
GRAIN = 8.0  # standard deviation in grey levels: so that a file is as large as a camera's
SIZES = {"500 × 375": (500, 1), "2,000 × 1,500": (2000, 4)}  # width, and mosaic tiles along it
LINKED = 40  # pictures, of which the files of a large folder are hard links
ROOT = Path(__file__).parents[2]
TICKS = os.sysconf("SC_CLK_TCK")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", type=int, default=768, help="of 500 × 375 in a turn")
    parser.add_argument("--files", type=int, default=200_000, help="of the large folder")
    parser.add_argument("--entries", type=int, default=1_300_000, help="of the index")
    parser.add_argument("--decoder", default="auto", help="data.decoder")
    parser.add_argument("--only", choices=["loaders", "start", "shards"], help="one table")


def measure(options: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    keep_freed_memory()  # as the command does; it serves timm's loader too
    rows: list[Row] = []
    tables: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="distill-bench-") as made:
        for name, part in {"loaders": loaders, "start": start, "shards": shards}.items():
            if options.only in (None, name):
                found, tables[name] = part(Path(made), options)
                rows += found
    return rows, tables


# Loaders


def loaders(made: Path, options: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    torch.set_num_threads(options.threads or 1)
    rows, tables = [], {}
    for size, (width, tiles) in SIZES.items():
        root = made / str(width)
        count = max(2, options.pictures * 500 // width // BATCH) * BATCH
        weight = write_photographs(root, width, tiles, count)
        print(f"{size}: {count} pictures, {weight / 1e3:,.0f} kB on average", flush=True)
        for workers in (1, 2):
            wall: dict[str, list[float]] = {}
            turns = turns_of(root, workers, options.decoder, wall)
            repeats = options.repeats or 5
            taken = rounds(turns, repeats)
            for side, other, least in (
                ("ours", "timm", 1.5),
                ("ours", "timm's prefetcher", None),
                ("ours", "decoding alone", None),
            ):
                by_clock = median(
                    a / b for a, b in zip(wall[side][1:], wall[other][1:], strict=True)
                )
                rates = (median(taken[one]) for one in (side, other))
                note = " and ".join(f"{rate:,.0f}" for rate in rates) + " images/CPU s"
                if other != "decoding alone":
                    note += f"; wall {by_clock:.2f}"
                name = f"{size}, {workers} worker{'s' * (workers > 1)}: {other}"
                rows.append(Row(name, ratio(taken, side, other), least=least, note=note))
            print_rows(rows[-3:])
            tables[f"{size}, {workers} workers"] = {"per_cpu_second": taken, "wall": wall}
    return rows, tables


def turns_of(
    root: Path, workers: int, decoder: str, wall: dict[str, list[float]]
) -> dict[str, Callable[[], float]]:
    """Return side → images per CPU second of an epoch; its rate by the clock goes into `wall`."""
    own = module(uncut(sources.folder(str(root))), workers, decoder)
    sides = {
        "ours": epochs_of(own),
        "timm": timm_epochs(root, workers, prefetch=False),
        "timm's prefetcher": timm_epochs(root, workers, prefetch=True),
        "decoding alone": lambda: decoded_alone(root),
    }

    def turn(side: str) -> float:
        began, spent = time.perf_counter(), cpu_seconds()
        images = sum(sides[side]())
        wall.setdefault(side, []).append(images / (time.perf_counter() - began))
        return images / (cpu_seconds() - spent)

    return {side: lambda side=side: turn(side) for side in sides}  # type: ignore[misc]


def module(source: Source, workers: int, decoder: str = "auto") -> DataModule:
    view = {"scale": SCALE, "hflip": 0.5, "color_jitter": 0.0}
    return DataModule(
        source,
        view=view,
        image_size=SHOWN,
        batch_size=BATCH,
        num_workers=workers,
        decoder=decoder,
    )


def uncut(source: Source) -> Source:
    """Return a source whose training split is all of it, as it is for timm."""
    few = source.train.subset(torch.arange(2))
    return replace(source, val=few, test=few)


def epochs_of(data: DataModule) -> Callable[[], Iterable[int]]:
    loader = data.train_dataloader()
    assert isinstance(data.view, StreamedView)
    device = "cuda" if data.view.decoder.on_device else "cpu"
    return lambda: (len(data.on_after_batch_transfer(batch.to(device), 0).view) for batch in loader)


def timm_epochs(root: Path, workers: int, prefetch: bool) -> Callable[[], Iterable[int]]:
    from timm.data import create_dataset, create_loader

    loader = create_loader(
        create_dataset("", str(root)),
        (3, SHOWN, SHOWN),
        BATCH,
        is_training=True,
        scale=SCALE,
        color_jitter=0.0,
        num_workers=workers,
        use_prefetcher=prefetch,
        device=torch.device("cpu"),
    )
    return lambda: (len(images) for images, _ in loader)


def decoded_alone(root: Path) -> Iterable[int]:
    for path in root.rglob("*.jpg"):
        with Image.open(path) as picture:
            picture.load()
        yield 1


def cpu_seconds() -> float:
    """Return the CPU time of this process and of the workers that it has."""
    ids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    ticks = 0
    for one in ids:
        with suppress(FileNotFoundError):
            ticks += sum(map(int, Path(f"/proc/{one}/stat").read_text().split()[13:15]))
    return ticks / TICKS


def write_photographs(root: Path, width: int, tiles: int, count: int) -> float:
    """Write pictures of 4:3 into two class folders; return their mean size in bytes."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(width)
    size = width, width * 3 // 4
    for number in range(count):
        mosaic = Image.new("RGB", size)
        for tile in range(tiles * tiles):
            place = (tile % tiles * size[0] // tiles, tile // tiles * size[1] // tiles)
            mosaic.paste(part(photographs, rng).resize((size[0] // tiles, size[1] // tiles)), place)
        grain = rng.normal(0, GRAIN, (size[1], size[0], 1))
        pixels = (np.asarray(mosaic) + grain).clip(0, 255).astype(np.uint8)
        folder = root / ("even", "odd")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=90)
    return mean(path.stat().st_size for path in root.rglob("*.jpg"))


def part(photographs: Sequence[Image.Image], rng: np.random.Generator) -> Image.Image:
    """Return 500 × 375 pixels of one of the photographs."""
    whole = photographs[int(rng.integers(len(photographs)))]
    left, top = int(rng.integers(whole.width - 499)), int(rng.integers(whole.height - 374))
    return whole.crop((left, top, left + 500, top + 375))


# Start-up and memory


def start(made: Path, options: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    few = write_links(made / "few", 1000)
    root = write_links(made / "links", options.files)
    files, entries = f"{options.files:,} files", f"{options.entries:,} entries"
    cache = str(made / "cache")
    first = elsewhere("folder", str(few), cache)
    table = {
        f"{files}, never seen": elsewhere("folder", str(root), cache),
        f"{files}, known": elsewhere("folder", str(root), cache),
        f"index of {entries}": elsewhere("index", str(options.entries)),
    }
    print(f"{'beyond a folder of 1,000 files':32}{'s':>8}{'MB':>8}")
    for name, row in table.items():
        more = {key: row[key] - first[key] for key in row}
        print(f"{name:32}{more['seconds']:8.1f}{more['bytes'] / 1e6:8.0f}", flush=True)
    return [], {"1,000 files": first, **table}


def write_links(root: Path, count: int) -> Path:
    """Write a folder of ten classes and so many files, all hard links of a few small pictures."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    first = []
    for number in range(LINKED):
        first.append(root.parent / f"first-{number}.jpg")
        part(photographs, rng).resize((64, 48)).save(first[-1])
    for number in range(count):
        folder = root / f"class-{number % 10}"
        if number < 10:
            folder.mkdir(parents=True)
        os.link(first[number % LINKED], folder / f"picture_{number:08}.jpg")
    return root


def elsewhere(*arguments: str) -> dict[str, float]:
    """Return what a start takes in a process of its own."""
    command = [sys.executable, __file__, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def started(kind: str, *arguments: str) -> dict[str, float]:
    """Return seconds until the first batches of two workers, and what memory they take."""
    keep_freed_memory()
    before, began = pss(), time.perf_counter()
    if kind == "index":
        source = index_of(int(arguments[0]))
    else:
        source = sources.folder(arguments[0], cache=arguments[1])
    loader = module(source, workers=2).train_dataloader()
    batches = iter(loader)
    next(batches)
    seconds = time.perf_counter() - began
    for _ in islice(batches, 50):
        pass
    return {"seconds": seconds, "bytes": pss() - before}


def index_of(count: int) -> Source:
    """Return a source of so many names, labels and digests, of which each is the same picture."""
    names = PackedStrings.of(f"class-{k % 1000:03}/picture_{k:08}.jpg" for k in range(count))
    digests = np.frombuffer(np.random.default_rng(0).bytes(16 * count), DIGEST)
    labels = torch.arange(count) % 1000
    classes = [f"class-{k:03}" for k in range(1000)]
    return Source("index", classes, 3, Streamed(flat, labels, names, digests=digests))


def flat(position: int) -> Image.Image:
    return Image.new("RGB", (64, 48))


def pss() -> int:
    """Return bytes that this process and its workers take, shared ones in parts."""
    ids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    total = 0
    for one in ids:
        lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        total += next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


# Shards


def shards(made: Path, options: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    read = getattr(sources, "shards", None)
    if read is None:
        print("shards against folder: left out, distill.data.sources has no shards", flush=True)
        return [], {}
    root, packed = made / "photographs", made / "shards"
    write_photographs(root, 500, 1, options.pictures)
    subprocess.run(
        [sys.executable, ROOT / "scripts" / "shards", root, packed],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    sides = {
        "shards": epochs_of(module(uncut(read(root=str(packed))), 2, options.decoder)),
        "folder": epochs_of(module(uncut(sources.folder(str(root))), 2, options.decoder)),
    }

    def turn(side: str) -> float:
        spent = cpu_seconds()
        return sum(sides[side]()) / (cpu_seconds() - spent)

    turns = {side: lambda side=side: turn(side) for side in sides}
    taken = rounds(turns, options.repeats or 5)
    rows = [Row("500 × 375, 2 workers: shards, folder", ratio(taken, "shards", "folder"))]
    print_rows(rows)
    return rows, {"per_cpu_second": taken}


if __name__ == "__main__":
    print(json.dumps(started(*sys.argv[1:])))
