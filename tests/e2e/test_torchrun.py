"""One run over two machines, played by two torchrun agents on one."""

import json
import os
import socket
import subprocess

import pytest

from tests.conftest import BIN


@pytest.mark.slow
def test_two_agents_train_one_student(command, cache, tmp_path):
    options = (
        "trainer.accelerator=cpu", "trainer.max_epochs=2", "teacher.fit.max_epochs=1",
        "baseline=false", "report=false", "logger=none", "trainer.limit_train_batches=6",
        "data.batch_size=16", "store=disk", "store.path=answers",
    )  # fmt: skip
    command("distill", *options, "teacher.fit.batch_size=32", "hydra.run.dir=one")  # and a teacher
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agent = (
        BIN / "torchrun", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}", "--no-python", BIN / "distill", *options,
        "trainer=ddp", "trainer.num_nodes=2", "trainer.devices=1", "hydra.run.dir=two",
    )  # fmt: skip
    environment = {**os.environ, "DISTILL_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    agents = [
        subprocess.Popen(
            [*map(str, agent)], cwd=tmp_path, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for _ in range(2)
    ]  # fmt: skip
    said = [one.communicate(timeout=300)[0] for one in agents]
    assert [one.returncode for one in agents] == [0, 0], "\n".join(said)
    assert sum("test split, last epoch" in text for text in said) == 1
    summaries = [
        json.loads((tmp_path / run / "summary.json").read_text()) for run in ("one", "two")
    ]
    assert [summary["epochs"]["last"] for summary in summaries] == [2, 2]
    assert (tmp_path / "two" / "student" / "model.safetensors").is_file()
    # The ranks answer for different samples, each with a writer of its own.
    locks = {path.name for path in (tmp_path / "answers").glob("*/writer-*.lock")}
    assert locks == {"writer-0.lock", "writer-1.lock"}
