"""A folder in which a command is at work: a second one changes nothing there."""

import subprocess
import sys
from contextlib import contextmanager

import pytest

from distill.report.leaderboard import sweep_rows
from distill.utils.files import held_elsewhere, only_run_in
from tests.commands import attempt
from tests.utils.test_files import HOLD

QUICK = "teacher=none baseline=false report=false objective=supervised"


@contextmanager
def held(folder):
    folder.mkdir(parents=True, exist_ok=True)
    with subprocess.Popen([sys.executable, "-c", HOLD, folder / ".lock"],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:  # fmt: skip
        assert holder.stdout.readline() == b"held\n"
        yield


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("line", "busy", "message"),
    [
        (f"distill hydra.run.dir=run {QUICK}", "run", "run: another run"),
        ("distill-eval hydra.run.dir=run student.checkpoint=x", "run", "run: another run"),
        ("distill-export hydra.run.dir=run student.checkpoint=x", "run", "run: another run"),
        ("distill-store hydra.run.dir=run", "run", "run: another run"),
        (f"distill -m hydra.sweep.dir=run {QUICK} seed=1,2", "run", "run: another run"),
        (f"distill -m sweep.resume=run {QUICK} seed=1,2", "run/t/0", "run/t/0: another run"),
        (f"distill hydra.run.dir=run/0 {QUICK}", "run", "run/0 belongs to a sweep that is being"),
    ],
)
def test_the_second_command_ends_in_one_line_and_changes_no_file(tmp_path, line, busy, message):
    for job in ("0", "t/0"):
        (tmp_path / "run" / job / ".hydra").mkdir(parents=True)
        (tmp_path / "run" / job / ".hydra" / "overrides.yaml").write_text("- seed=7\n")
    (tmp_path / "run" / "multirun.yaml").write_text("")
    with held(tmp_path / busy):
        before = content(tmp_path)
        ended = attempt(line, tmp_path)
        left = {path: text for path, text in content(tmp_path).items() if path.name != ".lock"}
    assert ended.code == 2
    assert ended.errors.startswith(f"distill: {message}")
    assert ended.errors.count("\n") == 1
    assert left == {path: text for path, text in before.items() if path.name != ".lock"}


def test_two_commands_of_one_second_have_two_folders(tmp_path):
    line = "distill-store teacher=none hydra.run.dir=runs/${now:%Y}"
    assert attempt(line, tmp_path).code == 2  # there is no teacher
    (year,) = (tmp_path / "runs").iterdir()
    before = content(year)
    with held(year):
        assert "there is no teacher" in attempt(line, tmp_path).errors
    other = year.with_name(f"{year.name}-2")
    assert (other / ".hydra" / "overrides.yaml").is_file()
    assert {path: text for path, text in content(year).items() if path.name != ".lock"} == {
        path: text for path, text in before.items() if path.name != ".lock"
    }


def test_asking_changes_nothing_and_a_process_may_ask_for_its_own_again(tmp_path):
    assert not held_elsewhere(tmp_path)
    assert not list(tmp_path.iterdir())
    with only_run_in(tmp_path):
        with only_run_in(tmp_path):
            assert not held_elsewhere(tmp_path)
        asked = "import sys, pathlib; from distill.utils.files import held_elsewhere; " \
                "sys.exit(held_elsewhere(pathlib.Path(sys.argv[1])))"  # fmt: skip
        assert subprocess.run([sys.executable, "-c", asked, tmp_path]).returncode == 1
    assert subprocess.run([sys.executable, "-c", asked, tmp_path]).returncode == 0


def test_a_job_that_is_at_work_has_not_failed(tmp_path):
    for job in ("0", "1", "2"):
        (tmp_path / job / ".hydra").mkdir(parents=True)
        (tmp_path / job / ".hydra" / "overrides.yaml").write_text(f"- seed={job}\n")
    (tmp_path / "2" / ".hydra" / "failed").touch()
    with held(tmp_path / "0"):
        assert [row["status"] for row in sweep_rows(tmp_path)] == ["running", "failed", "failed"]
    with held(tmp_path):
        assert [row["status"] for row in sweep_rows(tmp_path)] == ["running", "running", "failed"]
    assert [row["status"] for row in sweep_rows(tmp_path)] == ["failed"] * 3
