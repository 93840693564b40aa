"""A soak of shards in short: what it reads, what it holds, and that growth is seen."""

import pytest

from tests import soaking_shards
from tests.soaking_shards import Held, grown


@pytest.mark.slow
def test_a_short_stream_is_read_whole_by_two_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(soaking_shards, "CLASSES", 10)
    monkeypatch.setattr(soaking_shards, "HELD_OUT", 20)
    soaking_shards.write(tmp_path / "shards", 4096, each=1000)
    held = list(soaking_shards.stream(tmp_path / "shards", tmp_path / "cache", 2, points=8))
    assert [one.samples for one in held] == [1024 * k for k in range(1, 9)]
    assert all(one.main > 50 and one.workers > 5 for one in held)


def test_growth_is_told_from_a_start():
    flat = [Held(k, 100 + min(k, 9), 100) for k in range(40)]
    growing = [Held(k, 100, 100 + k) for k in range(40)]
    assert grown(flat) == 0
    assert grown(growing) > soaking_shards.MOST
