"""The order of an epoch: permutations, and draws in proportion to a power of the class's size."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.data import DataModule
from distill.data.loading import KeySampler
from distill.data.sources.splits import Resident, Source
from distill.data.views.order import InShards, epoch_order
from tests.data.conftest import fields

LABELS = torch.tensor([0] * 60 + [1] * 15 + [2] * 5)[torch.randperm(80)]


def toy(**options):
    index = torch.arange(80)
    images = index.to(torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4).contiguous()
    split = Resident(images, LABELS, index)
    return DataModule(Source("toy", list("abc"), 1, split, split, split), **options)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    balance=st.floats(0, 1),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 99),
)
def test_classes_and_samples_are_drawn_by_their_share_to_within_one(sizes, balance, seed, epoch):
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    drawn = torch.bincount(epoch_order(seed, epoch, labels, balance), minlength=len(labels))
    assert drawn.sum() == len(labels)
    whole = sum(size**balance for size in sizes)
    for k, size in enumerate(sizes):
        share = len(labels) * size**balance / whole
        assert abs(int(drawn[labels == k].sum()) - share) < 1 + 1e-9
        each = drawn[labels == k]
        assert each.min() >= math.floor(share / size - 1e-9)
        assert each.max() <= math.ceil(share / size + 1e-9)


def test_once_each_is_the_limit_of_balance():
    assert epoch_order(0, 3, LABELS).sort().values.equal(torch.arange(80))
    nearly = epoch_order(0, 3, LABELS, 1 - 1e-12)
    assert nearly.sort().values.equal(torch.arange(80))


@pytest.mark.parametrize("balance", [0.0, 0.5])
def test_every_place_in_the_order_has_the_classes_probabilities(balance):
    classes = torch.stack([LABELS[epoch_order(0, e, LABELS, balance)] for e in range(3000)])
    sizes = torch.tensor([60.0, 15.0, 5.0], dtype=torch.float64)
    expected = 3000 * sizes**balance / (sizes**balance).sum()
    for column in classes.T:
        found = torch.bincount(column, minlength=3)
        assert ((found - expected) ** 2 / expected).sum() < 30  # 2 degrees of freedom: p < 4e-7


def test_over_epochs_a_classs_images_come_equally_often():
    orders = torch.cat([epoch_order(0, epoch, LABELS, 0.0) for epoch in range(600)])
    counts = torch.bincount(orders, minlength=80)[LABELS == 0].double()
    expected = 600 * 80 / 3 / 60
    assert abs(counts.mean() - expected) < 1
    assert ((counts - expected) ** 2 / expected).sum() < 120  # 59 degrees of freedom: p < 1e-5


def drawn(ranks=1, batch_size=12, skip=0, balance=0.0):
    shares = []
    for rank in range(ranks):
        sampler = KeySampler(80, batch_size // ranks, 7, True, rank, ranks, LABELS, balance)
        sampler.set_epoch(2)
        sampler.skip = skip
        shares.append([keys for _, keys in sampler])
    return [torch.stack(parts, 1).flatten() for parts in zip(*shares, strict=True)]


def test_balanced_batches_are_the_same_for_ranks_batch_sizes_and_after_a_resume():
    whole = drawn()
    assert len(whole) == 6
    assert torch.cat(drawn(ranks=3)).equal(torch.cat(whole))
    assert torch.cat(drawn(batch_size=4))[:72].equal(torch.cat(whole))
    assert torch.cat(drawn(skip=4)).equal(torch.cat(whole[4:]))


def test_what_is_drawn_again_in_an_epoch_is_seen_alike_and_counts_stay_the_datas():
    data = toy(batch_size=80, balance=0.0, view={"pad": 2})
    assert data.class_counts == [60, 15, 5]
    assert data.with_options(seed=1, batch_size=8).balance == 0.0
    loader = data.train_dataloader()
    loader.sampler.set_epoch(1)
    (batch,) = data.train_dataloader()
    views, target, index, _ = fields(data.on_after_batch_transfer(batch, 0))
    assert torch.bincount(target).tolist() in ([27, 27, 26], [27, 26, 27], [26, 27, 27])
    rows = [views[index == k] for k in index.unique()]
    assert max(map(len, rows)) > 4
    assert all(torch.equal(row, row[:1].expand_as(row)) for row in rows)


@pytest.mark.parametrize("balance", [-0.1, 1.5, True, "all", float("nan")])
def test_a_power_that_is_none_is_refused(balance):
    with pytest.raises(ValueError, match=r"data\.balance is the power"):
        toy(batch_size=8, balance=balance)


# Shard by shard


def in_shards(sizes, window):
    return InShards(torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)), window)


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    window=st.integers(1, 120),
    balance=st.sampled_from([1.0, 0.5, 0.0]),
    seed=st.integers(0, 99),
)
def test_shards_change_where_a_draw_comes_and_not_what_is_drawn(sizes, window, balance, seed):
    where = in_shards(sizes, window)
    labels = torch.arange(len(where.numbers)) % 3
    order = epoch_order(seed, 2, labels, balance, where)
    anywhere = epoch_order(seed, 2, labels, balance)
    assert order.sort().values.equal(anywhere.sort().values)
    assert order.equal(epoch_order(seed, 2, labels, balance, where))


@given(
    sizes=st.lists(st.integers(5, 30), min_size=1, max_size=12),
    window=st.integers(1, 120),
    seed=st.integers(0, 99),
)
def test_a_window_lies_in_the_shards_that_hold_it(sizes, window, seed):
    where = in_shards(sizes, window)
    labels = torch.zeros(len(where.numbers), dtype=torch.long)
    shards = where.numbers[epoch_order(seed, 0, labels, 1.0, where)].tolist()
    for begin in range(0, len(shards), window):
        assert len(set(shards[begin : begin + window])) <= window // min(sizes) + 2
    seen = [set(shards[begin : begin + window]) for begin in range(0, len(shards), window)]
    for number in range(len(sizes)):  # a shard is read in one stretch of windows
        places = [place for place, here in enumerate(seen) if number in here]
        assert places == list(range(places[0], places[-1] + 1))


def test_orders_of_shards_differ_by_seed_and_epoch():
    where, labels = in_shards([20] * 5, 30), torch.zeros(100, dtype=torch.long)
    orders = [epoch_order(seed, epoch, labels, 1.0, where) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert len({tuple(where.shard_order(order)) for order in orders}) > 1


@pytest.mark.parametrize(("sizes", "window"), [([6], 1), ([6], 4), ([2, 4], 6), ([1, 2, 3], 99)])
def test_one_shard_or_a_window_of_all_is_a_full_shuffle(sizes, window):
    where, labels = in_shards(sizes, window), torch.zeros(6, dtype=torch.long)
    orders = torch.stack([epoch_order(0, e, labels, 1.0, where) for e in range(3000)])
    for column in orders.T:
        counts = torch.bincount(column, minlength=6)
        assert ((counts - 500) ** 2 / 500).sum() < 40  # 5 degrees of freedom: p < 2e-7
    pairs = torch.bincount(orders[:, 0] * 6 + orders[:, 1], minlength=36).view(6, 6)
    assert pairs.diagonal().sum() == 0
    assert ((pairs[~torch.eye(6, dtype=torch.bool)] - 100) ** 2 / 100).sum() < 80  # 29: p < 1e-6


def test_shards_are_named_by_when_they_are_first_read():
    where = InShards(torch.tensor([0, 0, 2, 1, 2]), 3)
    assert where.shard_order(torch.tensor([2, 4, 0, 3, 1])) == [2, 0, 1]
    assert where.shard_order(torch.tensor([3])) == [1]
    assert where.shard_order(torch.tensor([], dtype=torch.long)) == []


def test_batches_over_ranks_are_those_of_one():
    where, labels = in_shards([16] * 5, 20), LABELS
    one = KeySampler(80, 8, 0, True, labels=labels, in_shards=where)
    halves = [KeySampler(80, 4, 0, True, r, 2, labels, in_shards=where) for r in range(2)]
    for whole, first, second in zip(one, *halves, strict=True):
        assert whole[1].equal(torch.stack([first[1], second[1]], 1).flatten())


def test_what_is_read_next_is_told_once_a_window():
    told = []
    where = InShards(torch.arange(80) // 16, 16, told.append)
    list(KeySampler(80, 8, 0, True, in_shards=where))
    assert len(told) == 5
    assert all(len(shards) <= 4 for shards in told)
    assert told[0][0] == where.numbers[epoch_order(0, 0, torch.zeros(80), 1.0, where)[0]]
    again = KeySampler(80, 8, 0, True, in_shards=where)
    again.skip = 3
    list(again)
    assert len(told) == 5 + 1 + 3
