"""Strings in two arrays."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

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


READ_BY_A_WORKER = """
import gc, os, sys
from distill.data.sources.packed import PackedStrings

def own_megabytes():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1e3

texts = [f"n{k % 1000:08}/n{k % 1000:08}_{k:08}.JPEG" for k in range(200_000)]
texts = PackedStrings.of(texts) if sys.argv[1] == "packed" else texts
gc.freeze()  # or its own notes of what it looks through would be written
if not os.fork():
    before = own_megabytes()
    kept = [k for k in range(len(texts)) if texts[k].endswith("00.png")]
    print(own_megabytes() - before, flush=True)
    os._exit(0)
os.wait()
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux tells this")
def test_a_worker_that_reads_all_comes_to_own_none_of_them():
    def grown(kind):
        command = [sys.executable, "-c", READ_BY_A_WORKER, kind]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert grown("list") > 8  # megabytes: each of 200,000 counts who refers to it
    assert grown("packed") < 3
