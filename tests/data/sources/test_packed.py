"""Strings in two arrays."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.data.sources import packed
from distill.data.sources.packed import PackedStrings

TEXTS = [
    "",
    "a",
    "ä/ö.jpg",
    "",
    "日本",
    os_name := b"\xff.png".decode(errors="surrogateescape"),
    "",
]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=9))
def test_they_are_read_as_a_list_of_them_is(texts):
    packed = PackedStrings.of(texts)
    assert len(packed) == len(texts)
    assert list(packed) == texts
    assert [packed[place] for place in range(-len(texts), len(texts))] == texts * 2
    assert list(packed[1:-1]) == texts[1:-1]
    assert list(packed[::-2]) == texts[::-2]


def test_names_that_are_no_unicode_are_kept():
    assert list(PackedStrings.of(TEXTS)) == TEXTS
    assert PackedStrings.of(TEXTS)[5] == os_name


def test_some_may_be_taken_more_than_once():
    taken = PackedStrings.of(TEXTS).take(np.array([4, 0, 4, 2]))
    assert list(taken) == ["日本", "", "日本", "ä/ö.jpg"]


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
def test_however_many_are_taken_together(at_once, monkeypatch):
    monkeypatch.setattr(packed, "AT_ONCE", at_once)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    assert list(PackedStrings.of(TEXTS).take(order)) == [TEXTS[place] for place in order]
    assert list(PackedStrings.of([]).take(order[:0])) == []


def test_they_are_joined_and_compared():
    parts = [PackedStrings.of(TEXTS[:3]), PackedStrings.of([]), PackedStrings.of(TEXTS[3:])]
    whole = PackedStrings.joined(parts)
    assert list(whole) == TEXTS
    assert whole.sound
    assert whole.same(PackedStrings.of(TEXTS))
    assert not whole.same(PackedStrings.of([*TEXTS[:-2], "", ""]))
    assert not PackedStrings.of(["ab", "c"]).same(PackedStrings.of(["a", "bc"]))
    assert len(PackedStrings.joined([])) == 0


@pytest.mark.parametrize("place", [7, -8])
def test_there_is_none_beyond(place):
    with pytest.raises(IndexError):
        PackedStrings.of(TEXTS)[place]


def test_workers_are_handed_two_arrays_and_no_objects():
    many = PackedStrings.of(["n01440764/n01440764_10026.JPEG"] * 10_000)
    assert len(pickle.dumps(many)) < 10_000 * 30 + 10_000 * 8 + 1_000
