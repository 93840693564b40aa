"""Processes of a sweep: each at its own place, and what happens when one dies."""

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from distill.sweep import workers
from distill.sweep.workers import GPU, places, spread, started
from distill.utils import signals


@dataclass(frozen=True)
class Job:
    number: int
    folder: Path
    seconds: float = 0.0
    dies: int = 0  # how often the process that runs it is killed

    @property
    def name(self):
        return str(self.number)


def run(chunk, report):
    """Say where each job ran and when; die where told."""
    first_import = "torch" not in sys.modules
    for job in chunk:
        marks = [job.folder / f"{job.number}-{k}" for k in range(job.dies)]
        for mark in marks:
            if not mark.exists():
                mark.touch()
                os._exit(9)
        began = time.monotonic()
        time.sleep(job.seconds)
        about = {"pid": os.getpid(), "gpu": os.environ.get(GPU), "before_torch": first_import}
        report(job.number, {**about, "began": began, "ended": time.monotonic()})


def spread_over(where, *chunks):
    results = {}
    with started(where, "json") as idle:
        spread(run, chunks, idle, results)
        alive = [worker.process for worker in idle]
    assert not any(process.is_alive() for process in alive)
    return results


def test_each_process_sees_its_own_gpu_before_torch_is_there(tmp_path, monkeypatch):
    monkeypatch.delenv(GPU, raising=False)
    monkeypatch.setattr(workers, "gpus", lambda: list("01234567"))
    jobs = [Job(number, tmp_path, seconds=0.3) for number in range(6)]
    found = spread_over(places([3, 5]), *([job] for job in jobs))
    assert sorted(found) == list(range(6))
    assert {done["gpu"] for done in found.values()} == {"3", "5"}
    assert all(done["before_torch"] for done in found.values())
    pids = {done["gpu"]: {d["pid"] for d in found.values() if d["gpu"] == done["gpu"]}
            for done in found.values()}  # fmt: skip
    assert all(len(of_gpu) == 1 for of_gpu in pids.values())  # no two share one
    assert GPU not in os.environ


@pytest.mark.slow
def test_jobs_on_two_gpus_see_one_each_before_torch_is_there(command, watched, tmp_path):
    command("distill", "-m", "hydra.launcher.devices=[3,5]", "objective.temperature=1,2,4,8",
            "objective.terms.ce.loss=watched.loss", "trainer.accelerator=cpu",
            "trainer.max_epochs=1", "trainer.limit_train_batches=2", "teacher.fit.max_epochs=1",
            "baseline=false", "report=false", "logger=none", "hydra.sweep.dir=sweep")  # fmt: skip
    assert sorted(watched.gpus().values()) == ["3", "5"]  # of the two processes
    assert len(list((tmp_path / "sweep").glob("*/summary.json"))) == 4


def test_a_free_process_takes_what_is_left(tmp_path):
    slow = [Job(0, tmp_path, seconds=2.0)]
    quick = [[Job(number, tmp_path)] for number in range(1, 6)]
    found = spread_over(places(2), slow, *quick)
    assert len({found[number]["pid"] for number in range(1, 6)}) == 1
    assert max(found[number]["ended"] for number in range(1, 6)) < found[0]["ended"]


def test_a_process_that_dies_gives_its_jobs_back_once(tmp_path, capfd):
    once, twice = Job(1, tmp_path, dies=1), Job(4, tmp_path, dies=2)
    chunk = [Job(0, tmp_path), once, Job(2, tmp_path)]
    found = spread_over(places(2), chunk, [Job(3, tmp_path), twice])
    assert sorted(found) == [0, 1, 2, 3, 4]
    for number in (0, 1, 2, 3):
        assert found[number]["pid"] != os.getpid()
    assert found[4].return_value is None  # it came to nothing
    said = capfd.readouterr().err
    assert "a worker died; its jobs (1, 2) run again" in said
    assert "a worker died; its jobs (4) came to nothing" in said


def test_processes_that_get_nothing_to_do_end(tmp_path):
    with started(places(3), "json") as idle:
        processes = [worker.process for worker in idle]
        spread(run, [[Job(0, tmp_path)]], idle, {})
    assert len(processes) == 3
    assert [process.exitcode for process in processes] == [0, 0, 0]


def test_what_cannot_be_imported_gives_the_jobs_up(tmp_path, capfd):
    results = {}
    with started(places(2), "no_such_module") as idle:
        spread(run, [[Job(0, tmp_path)], [Job(1, tmp_path)]], idle, results)
    assert [results[number].return_value for number in (0, 1)] == [None, None]
    assert "ModuleNotFoundError" in capfd.readouterr().err


def work_until_told(chunk, report):
    """Write a checkpoint when told to end, as students do."""
    (folder,) = (job.folder for job in chunk)
    with signals.deferred():
        (folder / f"at-work-{os.getpid()}").touch()
        while not signals.pending():
            time.sleep(0.01)
        time.sleep(0.2)
        (folder / f"checkpoint-{os.getpid()}").touch()
    signals.stop_if_told()


def test_processes_that_are_told_to_end_write_their_checkpoints_and_say_nothing(tmp_path, capfd):
    def tell():
        while len(list(tmp_path.glob("at-work-*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=tell, daemon=True).start()
    parts = [[Job(0, tmp_path)], [Job(1, tmp_path)]]
    told = pytest.raises(signals.Preempted, match="SIGTERM")
    with told, signals.heeded(), started(places(2), "json") as idle:
        spread(work_until_told, parts, idle, {})
    found = [path.name.rpartition("-")[2] for path in tmp_path.glob("checkpoint-*")]
    assert len(found) == 2
    assert not any(os.path.exists(f"/proc/{pid}") for pid in found)
    assert capfd.readouterr().err == ""


def test_places_share_out_gpus_or_cores(monkeypatch):
    monkeypatch.setattr(workers, "gpus", lambda: ["4", "6", "7"])
    assert places("auto") == [{GPU: "4"}, {GPU: "6"}, {GPU: "7"}]
    assert places(2) == [{GPU: "4"}, {GPU: "6"}]
    assert places([1]) == places(["6"]) == [{GPU: "6"}]  # as torch counts, or by name
    for absent in (3, -1, "5", "1"):
        with pytest.raises(ValueError, match=f"names GPU {absent}, and there are 3"):
            places([absent])
    with pytest.raises(ValueError, match="devices=4, and there are 3 GPUs"):
        places(4)
    monkeypatch.setattr(workers, "gpus", list)
    monkeypatch.setattr(workers, "cores", lambda: 8)
    assert places("auto") == []
    with pytest.raises(ValueError, match="names GPU 0, and there are 0"):
        places([0])
    assert [place["OMP_NUM_THREADS"] for place in places(3)] == ["2", "2", "2"]
    for wrong in (0, -1, "all", True, 1.5):
        with pytest.raises(ValueError, match=r"hydra\.launcher\.devices="):
            places(wrong)


def test_jobs_that_ask_for_no_gpu_are_not_counted_by_gpus(monkeypatch):
    monkeypatch.setattr(workers, "gpus", lambda: ["0", "1"])
    monkeypatch.setattr(workers, "cores", lambda: 8)
    assert places("auto", on_gpus=False) == []
    assert [place["OMP_NUM_THREADS"] for place in places(4, on_gpus=False)] == ["2"] * 4


def test_the_gpus_that_are_named_are_the_ones_to_use(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv(GPU, "5, 7")
    assert workers.gpus() == ["5", "7"]
    monkeypatch.delenv(GPU)
    assert workers.gpus() == ["0", "1"]
