"""Files are whole or not there, and a folder has one run at a time."""

import errno
import os
import subprocess
import sys

import pytest

from distill.utils.files import (
    PART,
    only_run_in,
    remove_stale,
    under_construction,
    write_whole,
    writing,
)

HOLD = (
    "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); "
    "print('held', flush=True); sys.stdin.read()"
)


def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(tmp_path):
    def fill_up():
        with writing(tmp_path / "a.txt") as file:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_whole(tmp_path / "a.txt", "old")
    with pytest.raises(OSError, match="No space left"):
        fill_up()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    keep = [".hidden", "last.ckpt", ".gitignore.12", f"mine{PART}"]
    for name in (*keep, under_construction(tmp_path / "last.ckpt").name):
        (tmp_path / name).touch()
    other = under_construction(tmp_path / "student")
    (other / "inside").mkdir(parents=True)
    remove_stale(tmp_path, "last.ckpt")
    assert sorted(os.listdir(tmp_path)) == sorted([*keep, other.name])
    remove_stale(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(keep)


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    with only_run_in(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text() == str(os.getpid())
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run" / ".lock"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    with holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=r"run: another run .* is writing there"):
            only_run_in(tmp_path / "run").__enter__()
        holder.kill()
        holder.wait()
        with only_run_in(tmp_path / "run"):
            pass
