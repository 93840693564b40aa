import os
import resource
import time

import pytest


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


def test_ctrl_c_exits_quietly(command, tmp_path):
    import signal
    import subprocess

    from tests.conftest import BIN

    process = subprocess.Popen(
        [BIN / "distill", "trainer.accelerator=cpu", "trainer.max_epochs=1000", "teacher=none",
         "objective=supervised", "baseline=false", "hydra.run.dir=run"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for line in process.stdout:
        if "epoch 1/" in line:
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not (tmp_path / "run" / "summary.json").exists()
