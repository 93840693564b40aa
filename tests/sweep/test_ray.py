"""`hydra/launcher=ray`: real sweeps on one machine, and on a cluster that loses a node."""

import os
import random
import secrets
import shutil
import tempfile
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import free_port
from tests.sweep.conftest import assert_all_done, overlap, until

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

OPTIONS = ("-m", "hydra/launcher=ray", "objective.terms.ce.loss=watched.loss",
           "trainer.accelerator=cpu", "trainer.limit_train_batches=2", "teacher.fit.max_epochs=1",
           "baseline=false", "report=false", "logger=none")  # fmt: skip
EIGHT = "objective.temperature=1,2,3,4,5,6,7,8"
LAST = Path("checkpoints") / "last.ckpt"
NO_GPU = "hydra.launcher.ray.remote.num_gpus=0"


@pytest.fixture
def ray(watched, monkeypatch):
    """The folder of a Ray of this test's own."""
    short = tempfile.mkdtemp(prefix="ray-")  # the names of sockets have a limit
    monkeypatch.setenv("RAY_TMPDIR", short)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # else Ray would keep one in the home directory
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex())
    yield short
    shutil.rmtree(short, ignore_errors=True)


def test_two_cores_take_eight_trials_two_at_a_time_and_one_that_fails(
    ray, command, watched, tmp_path
):
    done = command("distill", *OPTIONS, f"{EIGHT},-1", NO_GPU, "trainer.max_epochs=1",
                   "hydra.launcher.ray.init.num_cpus=2", "hydra.sweep.dir=sweep",
                   check=False)  # fmt: skip
    assert done.returncode == 2
    assert "job 8: objective.temperature must be a number above 0" in done.stdout + done.stderr
    assert_all_done(tmp_path / "sweep", 8, failed=1)
    alive = watched.lives().values()
    assert len(alive) == 8  # a process for each
    assert {one["job"] for one in watched.all()} == set(range(8))
    assert max(sum(overlap((began, began), life) for life in alive) for began, _ in alive) == 2


def test_each_trial_sees_a_gpu_of_its_own_before_torch_is_there(ray, command, watched, tmp_path):
    command("distill", *OPTIONS, "objective.temperature=1,2,4",
            "hydra.launcher.ray.init.num_gpus=2", "hydra.launcher.ray.init.num_cpus=2",
            "trainer.max_epochs=1", "hydra.sweep.dir=sweep")  # fmt: skip
    assert_all_done(tmp_path / "sweep", 3)
    assert set(watched.gpus_not_shared().values()) == {"0", "1"}
    assert len(watched.lives()) == 3


@pytest.fixture
def cluster(ray, spawn):
    """Two nodes of a core each: the address of the first, and the command that is the second."""
    network = f"127.{random.randint(1, 254)}.{random.randint(1, 254)}"  # Ray's ports are its own
    address = f"{network}.1:{free_port()}"
    common = ("--block", "--num-cpus=1", "--num-gpus=0", f"--temp-dir={ray}")
    head = spawn("ray", "start", "--head", f"--node-ip-address={network}.1", "--port",
                 address.partition(":")[2], "--include-dashboard=false", *common)  # fmt: skip
    until(lambda: "Ray runtime started" in head.said(), head)
    node = spawn("ray", "start", f"--address={address}", f"--node-ip-address={network}.2",
                 *common[:3])  # fmt: skip
    until(lambda: "Ray runtime started" in node.said(), node)
    return address, node


def held(node, watched, sweep):
    """The process and the job of a node's trial that is held in training, half the sweep on."""
    found = at_work(node, watched, sweep)
    if found is None:
        return None
    watched.hold.touch()
    time.sleep(2)  # whoever was past training has ended
    if found == at_work(node, watched, sweep):
        return found
    watched.hold.unlink()
    return None


def at_work(node, watched, sweep):
    """The process and the job of a node's trial that has a checkpoint and no numbers yet."""
    notes = watched.all()
    if len({one["job"] for one in notes}) > 4:
        for one in reversed(notes):
            job = sweep / str(one["job"])
            mine = not gone(one["pid"]) and os.getsid(one["pid"]) == node.pid
            if mine and (job / LAST).is_file() and not (job / "summary.json").exists():
                return one["pid"], one["job"]
    return None


def epochs_done(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    return content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]


def gone(pid):
    try:
        return not Path(f"/proc/{pid}/cmdline").read_bytes()  # nobody may wait for it
    except FileNotFoundError:
        return True


def test_a_sweep_outlives_a_node_of_its_cluster(cluster, spawn, watched, tmp_path):
    (address, node), folder = cluster, tmp_path / "sweep"
    sweep = spawn("distill", *OPTIONS, EIGHT, NO_GPU, "trainer.max_epochs=4",
                  f"hydra.launcher.ray.init.address={address}",
                  f"sweep.resume={folder}")  # fmt: skip
    found = []
    until(lambda: found.append(held(node, watched, folder)) or found[-1], sweep)
    pid, job = found[-1]
    node.kill()
    until(lambda: gone(pid), sweep, seconds=10)
    watched.hold.unlink()
    done = epochs_done(folder / str(job) / LAST)
    assert not (folder / str(job) / "summary.json").exists()
    assert sweep.wait(timeout=300) == 0, sweep.said()
    assert_all_done(folder, 8)
    assert len({one["pid"] for one in watched.all() if one["job"] == job}) == 2
    log = (folder / str(job) / "distill.log").read_text()
    assert 0 < done < 4
    assert "going on from" in log
    assert f": {done} epochs done" in log
