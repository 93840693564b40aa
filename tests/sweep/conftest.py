"""What processes of a sweep saw: `watched/` is on their path and takes notes."""

import json
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


@pytest.fixture
def watched(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "watched"))
    monkeypatch.setenv("WATCHED", str(tmp_path / "watched.jsonl"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return Notes(tmp_path / "watched.jsonl")
