"""One run over two machines, played by two agents on one."""

import json

import pytest

from tests.conftest import BIN, free_port


def torchrun(port, node):
    """What one types on each machine where nothing else starts processes."""
    return (
        "torchrun", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}", "--no-python", BIN / "distill",
    ), {}  # fmt: skip


def srun(port, node):
    """What `srun distill` runs in a Slurm job of two nodes with a task each."""
    return ("distill",), {
        "SLURM_JOB_ID": str(port - 15000),  # Lightning makes the port of it
        "SLURM_JOB_NAME": "distill",
        "SLURM_NODELIST": "localhost,other",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_PROCID": str(node),
        "SLURM_NODEID": str(node),
        "SLURM_LOCALID": "0",
    }


@pytest.mark.slow
@pytest.mark.parametrize("starter", [torchrun, srun])
def test_two_agents_train_one_student(command, spawn, starter, tmp_path):
    options = (
        "trainer.accelerator=cpu", "trainer.max_epochs=2", "teacher.fit.max_epochs=1",
        "baseline=false", "report=false", "logger=none", "trainer.limit_train_batches=6",
        "data.batch_size=16", "store=disk", "store.path=answers",
    )  # fmt: skip
    command("distill", *options, "teacher.fit.batch_size=32", "hydra.run.dir=one")  # and a teacher
    port = free_port()
    agents = []
    for node in range(2):
        start, environment = starter(port, node)
        agents.append(
            spawn(*start, *options, "trainer=ddp", "trainer.num_nodes=2", "trainer.devices=1",
                  "hydra.run.dir=two", **environment)
        )  # fmt: skip
    codes = [one.wait(timeout=300) for one in agents]
    said = [one.said() for one in agents]
    assert codes == [0, 0], "\n".join(said)
    assert sum("test split, last epoch" in text for text in said) == 1
    summaries = [
        json.loads((tmp_path / run / "summary.json").read_text()) for run in ("one", "two")
    ]
    assert [summary["epochs"]["last"] for summary in summaries] == [2, 2]
    assert (tmp_path / "two" / "student" / "model.safetensors").is_file()
    # The ranks answer for different samples, each with a writer of its own.
    locks = {path.name for path in (tmp_path / "answers").glob("*/writer-*.lock")}
    assert locks == {"writer-0.lock", "writer-1.lock"}
