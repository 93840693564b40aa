"""Splits keep what belongs together, know what they hold, and are cut fairly."""

import numpy as np
import pytest
import torch

from distill.data.sources.splits import DIGEST, Resident, Source, Streamed, stratified
from tests.data.conftest import refusal


def test_a_source_says_what_it_lacks():
    source = Source("x", ["a"], 1, Resident(torch.zeros(1, 1, 1, 1), torch.zeros(1)))
    assert (source.val, source.test, source.notes) == (None, None, [])


def test_subsets_keep_images_labels_and_indices_together():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1)
    split = Resident(images, torch.arange(6) * 10)
    part = split.subset(torch.tensor([4, 1, 5])).subset(torch.tensor([2, 0]))
    assert part.images.flatten().tolist() == [5, 4]
    assert part.labels.tolist() == [50, 40]
    assert part.index.tolist() == [5, 4]


def test_images_in_memory_may_know_the_files_that_they_are_from():
    images = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1)
    split = Resident(images, torch.tensor([0, 1, 0]), digests=np.array([b"a", b"b", b"c"], DIGEST))
    part = split.subset(torch.tensor([2, 0])).relabelled(torch.tensor([1, 1]))
    assert part.contents().tolist() == [b"c", b"a"]
    assert len(split.subset(torch.arange(0)).contents()) == 0
    pixels = Resident(images, split.labels)
    assert len(set(pixels.contents().tolist())) == 3
    assert pixels.fingerprint() == split.fingerprint()


def test_the_fingerprint_of_images_in_memory_is_of_pixels_labels_and_indices():
    images = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    labels = torch.tensor([0, 1, 0, 1])
    first = Resident(images, labels).fingerprint()
    assert Resident(images.clone(), labels.clone()).fingerprint() == first
    pixel, label = images.clone(), labels.clone()
    pixel[3, 0, 1, 1], label[0] = 1, 1
    others = [
        Resident(pixel, labels),
        Resident(images, label),
        Resident(images, labels, torch.arange(1, 5)),
        Resident(images.view(4, 1, 1, 4), labels),
    ]
    assert len({first, *(other.fingerprint() for other in others)}) == 5


def test_the_fingerprint_of_streamed_images_is_of_names_labels_and_indices():
    labels, names = torch.tensor([0, 1]), ["a:1", "b:2"]
    first = Streamed(str, labels, names).fingerprint()
    assert Streamed(repr, labels.clone(), list(names)).fingerprint() == first
    others = [
        Streamed(str, labels, ["a:1", "b:3"]),
        Streamed(str, labels.flip(0), names),
        Streamed(str, labels, names, torch.tensor([1, 0])),
    ]
    assert len({first, *(other.fingerprint() for other in others)}) == 4


def test_stratified_takes_the_share_of_every_class():
    labels = torch.tensor([0] * 100 + [1] * 60 + [2] * 40)[torch.randperm(200)]
    part, rest = stratified(labels, 0.1, seed=3)
    assert torch.cat([part, rest]).sort().values.equal(torch.arange(200))
    assert torch.bincount(labels[part]).tolist() == [10, 6, 4]
    assert part.equal(part.sort().values)
    assert rest.equal(rest.sort().values)
    assert part.equal(stratified(labels, 0.1, seed=3)[0])
    assert not part.equal(stratified(labels, 0.1, seed=4)[0])


@pytest.mark.parametrize("seed", range(5))
def test_stratified_gives_rare_classes_one_sample_each(seed):
    labels = torch.tensor([0] * 200 + [1] * 2 + [2] * 3)
    part, rest = stratified(labels, 0.1, seed)
    assert torch.cat([part, rest]).sort().values.equal(torch.arange(205))
    assert torch.bincount(labels[part]).tolist()[1:] == [1, 1]
    assert torch.bincount(labels[rest]).tolist()[1:] == [1, 2]


def test_a_share_smaller_than_the_classes_cannot_be_stratified():
    refusal(lambda: stratified(torch.arange(100) // 2, 0.05, 0), "cannot cut 5% of 100 images")
