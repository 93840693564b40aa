"""What processes of a sweep saw: `watched/` is on their path and takes notes."""

import csv
import itertools
import json
import time
from pathlib import Path

import pytest


class Notes:
    """What `watched.loss` has noted, as `objective.terms.ce.loss`."""

    def __init__(self, path):
        self.path = path

    @property
    def hold(self):
        """A file: while it is there, nothing trains on."""
        return self.path.with_name(f"{self.path.name}.hold")

    def all(self):
        return (
            list(map(json.loads, self.path.read_text().splitlines())) if self.path.exists() else []
        )

    def lives(self):
        """When each process was first and last seen at work."""
        found = {}
        for one in self.all():
            began, _ = found.get(one["pid"], (one["time"], None))
            found[one["pid"]] = (began, one["time"])
        return found

    def gpus(self):
        """The GPU of each process, which it saw from before it imported torch."""
        assert all(one["gpu"] == one["gpu_at_import"] for one in self.all())
        return {one["pid"]: one["gpu"] for one in self.all()}

    def gpus_not_shared(self):
        """The GPU of each process, which no other had while it was at work."""
        gpu, lives = self.gpus(), self.lives()
        for one, other in itertools.combinations(lives, 2):
            assert gpu[one] != gpu[other] or not overlap(lives[one], lives[other])
        return gpu


def overlap(one, other):
    return one[0] <= other[1] and other[0] <= one[1]


def assert_all_done(sweep, count, failed=0):
    with (sweep / "sweep.csv").open() as file:
        found = [row["status"] for row in csv.DictReader(file)]
    assert found == ["done"] * count + ["failed"] * failed
    for job in range(count):
        assert json.loads((sweep / str(job) / "summary.json").read_text())["student"]
        assert (sweep / str(job) / "student" / "model.safetensors").is_file()


def until(reached, process, seconds=120):
    """Wait for something that a process is to do."""
    end = time.monotonic() + seconds
    while not reached():
        assert process.poll() is None, process.said()
        assert time.monotonic() < end, process.said()
        time.sleep(0.05)


@pytest.fixture
def watched(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "watched"))
    monkeypatch.setenv("WATCHED", str(tmp_path / "watched.jsonl"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return Notes(tmp_path / "watched.jsonl")
