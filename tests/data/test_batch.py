"""One type for what a data module serves and what a loader of one's own gives."""

import pickle

import pytest
import torch

from distill.data.batch import Batch

VIEW, TARGET = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 1])


@pytest.mark.parametrize(
    ("given", "index"),
    [
        ((VIEW, TARGET), None),
        ([VIEW, TARGET, torch.tensor([5, 7, -1])], [5, 7, -1]),
        ((VIEW, TARGET, torch.tensor([5, 7, 9]), "more", None), [5, 7, 9]),
        ((VIEW, TARGET, ["a.png", "b.png", "c.png"]), None),  # no indices: files, weights, boxes
        ((VIEW, TARGET, torch.rand(3)), None),
        ((VIEW, TARGET, torch.zeros(3, 4).long()), None),
        ({"image": VIEW, "label": TARGET}, None),
        ({"pixel_values": VIEW, "labels": TARGET, "index": torch.arange(3), "id": 4}, [0, 1, 2]),
    ],
)
def test_what_a_loader_gives_becomes_a_batch(given, index):
    batch = Batch.of(given)
    assert batch.view is VIEW
    assert batch.target is TARGET
    assert (None if batch.index is None else batch.index.tolist()) == index
    assert (batch.view_number, batch.split, batch.labeled) == (None, None, None)
    assert len(batch) == 3
    assert Batch.of(batch) is batch


def test_indices_stay_where_they_can_be_looked_up():
    index = torch.arange(3)
    moved = Batch(VIEW, TARGET, index, 2, "train", 1).to("meta")
    assert moved.view.is_meta
    assert moved.target.is_meta
    assert moved.index is index
    assert (moved.view_number, moved.split, moved.labeled) == (2, "train", 1)


def test_batches_can_be_sent_by_workers():
    sent = pickle.loads(pickle.dumps(Batch(VIEW, TARGET, torch.arange(3), 2, "val")))
    assert torch.equal(sent.view, VIEW)
    assert (sent.view_number, sent.split) == (2, "val")
