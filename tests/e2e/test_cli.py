import csv
import json
import os
import re
import resource
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.data.conftest import write_folder


def test_the_traceback_is_there_for_those_who_ask(command):
    done = command("distill", "objective.temperature=0", check=False, HYDRA_FULL_ERROR="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def processor_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("name", ["distill", "distill-eval", "distill-export", "distill-store"])
def test_help_is_quick_and_written_for_a_person(command, name, tmp_path):
    start = processor_seconds()
    done = command(name, "--help")
    assert processor_seconds() - start < 3  # whatever else the machine does meanwhile
    for word in ("Examples", "Groups", "data.root=", "teacher: ", "--cfg job"):
        assert word in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("distill objective=", {"objective=kd", "objective=soft_hinge"}),
        ("distill objective=kd objective.te", {"objective.temperature=", "objective.terms."}),
    ],
)
def test_tab_completion_is_quick_and_knows_groups_and_keys(command, line, words):
    start = time.perf_counter()
    done = command("distill", "-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert time.perf_counter() - start < 3
    assert words <= set(done.stdout.split())


def test_nothing_heavy_is_imported_for_help(command):
    done = command("python", "-X", "importtime", "-c", "import distill.cli, distill.sweep.table")
    imported = {row.rpartition("|")[2].strip() for row in done.stderr.splitlines()}
    assert not imported & {"torch", "timm", "pytorch_lightning", "numpy", "sklearn", "rich"}
    assert "hydra" in imported


WITH_WORKERS = (
    "trainer.accelerator=cpu", "trainer.max_epochs=1000", "teacher=none", "objective=supervised",
    "baseline=false", "logger=none", "data=folder", "data.root=photos", "data.num_workers=2",
    "data.batch_size=4", "hydra.run.dir=run",
)  # fmt: skip


def processes_of(parent=None, session=None):
    """The processes of a parent or a session that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, *numbers = path.read_text().rpartition(")")[2].split()[:4]
            if state != "Z" and int(numbers[0 if parent else 2]) == (parent or session):
                found.append(int(path.parent.name))
    return found


def test_ctrl_c_exits_quietly_and_leaves_no_process(spawn, tmp_path):
    write_folder(tmp_path / "photos")
    process = spawn("distill", *WITH_WORKERS)
    while "epoch 1/" not in process.said():
        assert process.poll() is None, process.said()
        time.sleep(0.02)
    assert len(processes_of(session=process.pid)) > 2
    for patience in (30, 60):  # Python drops one that comes while it finalises an object
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            break
    assert process.poll() == 130, process.said()
    assert "Traceback" not in process.said()
    assert "the same command with hydra.run.dir=run resume=auto goes on" in process.said()
    assert not (tmp_path / "run" / "summary.json").exists()
    deadline = time.monotonic() + 20
    while processes_of(session=process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_data_worker_that_is_killed_ends_the_run_in_one_line(spawn, tmp_path):
    write_folder(tmp_path / "photos")
    process = spawn("distill", *WITH_WORKERS)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    while not last.exists():
        assert process.poll() is None, process.said()
        time.sleep(0.02)
    os.kill(max(processes_of(parent=process.pid)), signal.SIGKILL)
    assert process.wait(timeout=120) == 2
    # A thread of multiprocessing, in another worker, may say that who asked it has gone.
    assert "/distill/" not in process.said()
    said = process.said().splitlines()[-1]
    assert said.startswith("distill: a data worker died (DataLoader worker (pid")
    assert torch.load(last, weights_only=True)["epoch"] >= 0


def test_a_sweep_over_keys_that_are_new_says_each_thing_once_and_keeps_what_was_typed(
    command, tmp_path
):
    write_folder(tmp_path / "größe (1)")
    line = (
        "student.args={drop_rate: 0.1}", "optimizer.betas=[0.9,0.98],[0.9,0.999]", "-m",
        "teacher=none", "objective=supervised", "baseline=false", "report=false", "logger=none",
        "trainer.max_epochs=2", "trainer.limit_train_batches=1", "data=folder",
        'data.root="größe (1)"', "data.batch_size=4", "data.num_workers=0", "sweep.resume=sweep",
    )  # fmt: skip
    done = command("distill", *line)
    begun = r"student: training slim_resnet10_4, [\d,]+ parameters, for 2 epochs under ce"
    assert len(re.findall(begun, done.stdout)) == 2
    ended = r"student: 2 epochs in \d+ s, val/top1 [\d.]+ \(best [\d.]+ in epoch [12]\)"
    assert len(re.findall(ended, done.stdout)) == 2
    notes = [text for text in done.stdout.splitlines() if "top-5 is left out" in text]
    assert len(notes) == len(set(notes)) == 2  # one for each job
    assert "distilled" not in done.stdout
    for job, betas in enumerate(("[0.9,0.98]", "[0.9,0.999]")):
        folder = tmp_path / "sweep" / str(job)
        typed = (folder / ".hydra" / "overrides.yaml").read_text()
        assert f"optimizer.betas={betas}" in typed
        assert "++" not in typed
        config = json.loads((folder / "summary.json").read_text())["config"]
        assert str(config["optimizer"]["betas"]).replace(" ", "") == betas
        assert config["student"]["args"] == {"drop_rate": 0.1}
        history = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
        rates = [float(row["train/lr"]) for row in history if row["train/lr"]]
        assert rates == pytest.approx([0.03, 0.015])  # cosine of each epoch's one update
        assert all(0 <= float(row["train/top1"]) <= 1 for row in history if row["train/top1"])
    again = command("distill", *line)
    assert "training" not in again.stdout
    assert again.stdout.count("has been run before") == 2
