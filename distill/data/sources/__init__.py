"""The functions that `conf/data` names, each of which reads one kind of data set."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distill.data.sources.arrays import arrays
from distill.data.sources.cifar import cifar10, cifar100
from distill.data.sources.folder import folder
from distill.data.sources.idx import idx
from distill.data.sources.images import resize
from distill.data.sources.shards import shards
from distill.data.sources.splits import Resident, Source, stratified
from distill.data.sources.table import table
from distill.data.sources.timm_data import timm_dataset

__all__ = [
    "arrays",
    "cifar10",
    "cifar100",
    "digits",
    "folder",
    "idx",
    "shards",
    "table",
    "timm_dataset",
]


def digits(image_size: int | Sequence[int] = 32, test_size: int = 800) -> Source:
    """Return scikit-learn's 1,797 handwritten digits, enlarged to `image_size` pixels.

    The test split is stratified and always the same. Source: UCI, Alpaydin and Kaynak 1998.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float().mul(255 / 16).round().to(torch.uint8)
    split = Resident(resize(images[:, None], image_size), torch.from_numpy(data.target).long())
    test, train = stratified(split.labels, test_size / len(split), seed=1)
    classes = [str(name) for name in data.target_names]
    return Source("digits", classes, 1, split.subset(train), test=split.subset(test))
