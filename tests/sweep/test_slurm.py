"""`hydra/launcher=submitit_slurm` and `srun`, under a Slurm of the test's own."""

import os
import secrets
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.conftest import free_port
from tests.sweep.conftest import assert_all_done, until

DAEMONS = ("munged", "slurmctld", "slurmd")
SBIN = os.pathsep.join(("/usr/sbin", "/sbin", os.environ["PATH"]))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(shutil.which(name, path=SBIN) for name in DAEMONS),
        reason="needs root and Slurm: apt-get install slurm-wlm munge",
    ),
]

OPTIONS = ("trainer.accelerator=cpu", "trainer.limit_train_batches=2", "teacher.fit.max_epochs=1",
           "baseline=false", "report=false", "logger=none")  # fmt: skip
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmdPort={node}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
MpiDefault=none
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/control.pid
SlurmdPidFile={folder}/node.pid
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 Gres=gpu:2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
GPUS = "NodeName={host} Name=gpu Count=2 File={folder}/gpu[0-1]\n"


@pytest.fixture
def short_folder():
    """A folder of few letters: the names of sockets have a limit."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        yield Path(name)


@pytest.fixture
def slurm(monkeypatch, spawn, short_folder):
    """A cluster of this machine: daemons that run until the test ends."""
    folder = short_folder
    facts = {"folder": folder, "host": socket.gethostname().partition(".")[0],
             "control": free_port(), "node": free_port()}  # fmt: skip
    for name in ("state", "spool"):
        (folder / name).mkdir()
    for number in range(2):  # Slurm takes devices only: these are called null elsewhere
        try:
            os.mknod(folder / f"gpu{number}", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("this container may not make devices")
    (folder / "slurm.conf").write_text(CONF.format(**facts))
    (folder / "gres.conf").write_text(GPUS.format(**facts))
    (folder / "key").touch(mode=0o600)
    (folder / "key").write_bytes(secrets.token_bytes(128))
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    monkeypatch.setenv("PATH", SBIN)
    own = [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
    munged = spawn("munged", "--foreground", "--force", f"--key-file={folder}/key",
                   f"--socket={folder}/munge", *own)  # fmt: skip
    until((folder / "munge").exists, munged)
    control, node = spawn("slurmctld", "-D"), spawn("slurmd", "-D")
    try:
        until(lambda: "idle" in ask("sinfo", "--noheader", "--format=%T"), control, seconds=30)
    except AssertionError:
        pytest.skip(f"Slurm does not run here: {control.said()} {node.said()}")
    yield
    for daemon in (node, control, munged):
        daemon.terminate()
        daemon.wait(timeout=30)


def ask(*arguments):
    return subprocess.run(arguments, capture_output=True, text=True, timeout=60).stdout


def test_each_trial_of_a_job_array_has_a_gpu_of_its_own(slurm, command, watched, tmp_path):
    done = command("distill", "-m", "hydra/launcher=submitit_slurm", "objective.temperature=1,4,-1",
                   "hydra.launcher.cpus_per_task=1", "objective.terms.ce.loss=watched.loss",
                   "trainer.max_epochs=2", *OPTIONS, "sweep.resume=sweep",
                   check=False)  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert_all_done(tmp_path / "sweep", 2, failed=1)
    assert len(watched.lives()) == 2
    assert set(watched.gpus_not_shared().values()) <= {"0", "1"}
    (log,) = (tmp_path / "sweep" / ".submitit").glob("*_2/*_log.err")
    assert "job 2: objective.temperature must be a number above 0" in log.read_text()


def test_two_ranks_under_srun_end_together_at_a_signal_and_go_on(slurm, spawn, watched, tmp_path):
    def train(folder):
        return spawn("srun", "--ntasks=2", "--ntasks-per-node=2", "distill", "trainer=ddp",
                     "trainer.devices=2", "trainer.max_epochs=4", *OPTIONS, "resume=auto",
                     "objective.terms.ce.loss=watched.loss", f"hydra.run.dir={folder}")  # fmt: skip

    whole = train("whole")
    assert whole.wait(timeout=300) == 0, whole.said()
    told = train("told")
    until((tmp_path / "told" / "checkpoints" / "last.ckpt").exists, told)
    watched.hold.touch()
    ask("scancel", "--signal=USR1", ask("squeue", "--noheader", "--format=%i").strip())
    time.sleep(1)  # both have heard it
    watched.hold.unlink()
    assert told.wait(timeout=60) == 75, told.said()
    assert told.said().count("SIGUSR1: stopped") == 1
    again = train("told")
    assert again.wait(timeout=300) == 0, again.said()
    assert again.said().count("going on from") == 1
    student = Path("student", "model.safetensors")
    assert (tmp_path / "told" / student).read_bytes() == (tmp_path / "whole" / student).read_bytes()
