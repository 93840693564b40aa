"""Time the data path alone: views in memory against torchvision's transforms in two workers.

Ours makes float32 batches from uint8 images in this process, with as many threads as torch has.
The reference is torchvision on PIL images in two worker processes; their start does not count, nor
does anything that follows the batch. Both shuffle.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import islice
from statistics import median
from typing import Any

from measure import Row, print_rows, ratio, rounds
from PIL import Image
from steps import BATCH, random_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from distill.data import DataModule
from distill.data.sources.splits import Resident, Source

WORKERS = 2
SIDE = 32
RECIPES: dict[str, tuple[dict[str, Any], list[Any], float | None]] = {  # ours, theirs, the least
    "pad-crop, flip, erasing (CIFAR)": (
        {"pad": 4, "flip": True, "erase": 0.25},
        [
            T.RandomCrop(SIDE, padding=4),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.RandomErasing(0.25),
        ],
        10.0,
    ),
    "resized crop, flip, colour jitter": (
        {
            "crop_scale": [0.25, 1.0],
            "flip": True,
            **{key: 0.4 for key in ("brightness", "contrast", "saturation")},
        },
        [
            T.RandomResizedCrop(SIDE, scale=(0.25, 1.0)),
            T.RandomHorizontalFlip(),
            T.ColorJitter(0.4, 0.4, 0.4),
            T.ToTensor(),
        ],
        None,
    ),
    "rotation, shear, zoom, bilinear": (
        {"rotate": 15, "shear": 10, "zoom": [0.8, 1.2], "translate": 0.1},
        [
            T.RandomAffine(
                15,
                shear=10,
                scale=(0.8, 1.2),
                translate=(0.1, 0.1),
                interpolation=T.InterpolationMode.BILINEAR,
            ),
            T.ToTensor(),
        ],
        None,
    ),
}


class Pictures(Dataset[tuple[Tensor, int]]):
    """Images in memory, transformed one by one."""

    def __init__(self, split: Resident, transform: Any) -> None:
        self.pixels = split.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels, self.transform = split.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, at: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[at])), self.labels[at]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batches", type=int, default=100, help="of a turn")


def measure(options: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    split = random_split((options.batches + 2) * BATCH, (3, SIDE, SIDE), 100)
    small = random_split(200, (3, SIDE, SIDE), 100)
    names = [str(k) for k in range(100)]
    source = Source("random", names, 3, train=split, val=small, test=small)
    rows, tables = [], {}
    for name, (view, theirs, least) in RECIPES.items():
        data = DataModule(source, view=view, batch_size=BATCH)
        loader = DataLoader(
            Pictures(split, T.Compose(theirs)),
            batch_size=BATCH,
            shuffle=True,
            num_workers=WORKERS,
            drop_last=True,
        )

        def ours(data: DataModule = data) -> float:
            return speed(
                (data.on_after_batch_transfer(b, 0).view for b in data.train_dataloader()),
                options.batches,
            )

        def reference(loader: DataLoader[Any] = loader) -> float:
            return speed((images for images, _ in loader), options.batches)

        taken = rounds({"ours": ours, "torchvision": reference}, options.repeats or 7)
        note = " and ".join(f"{median(values):,.0f}" for values in taken.values()) + " images/s"
        rows.append(Row(name, ratio(taken, "ours", "torchvision"), least=least, note=note))
        tables[name] = taken
    print_rows(rows)
    return rows, {"images_per_second": tables}


def speed(batches: Iterator[Tensor], count: int) -> float:
    """Return images per second after the first batches, which workers have prepared by then."""
    for _ in islice(batches, 2):
        pass
    start = time.perf_counter()
    images = sum(len(images) for images in islice(batches, count))
    return images / (time.perf_counter() - start)
