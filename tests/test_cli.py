"""Errors as one line, in this process; tests/config/test_mistakes.py has the mistakes."""

import errno
from types import SimpleNamespace

import pytest
import torch
from hydra.types import RunMode

from distill import cli
from distill.config.explain import one_line, refuse


def test_other_errors_are_one_line_too(capsys):
    assert one_line(ValueError("first\n\n second")) == "first, second"
    assert one_line(ValueError("")) == "ValueError"
    missing = FileNotFoundError(2, "No such file or directory", "/photos")
    assert one_line(missing) == "No such file or directory: /photos"
    worker = "Caught ValueError in worker 0.\nOriginal Traceback\n  ...\nValueError: broken image x"
    assert one_line(ValueError(worker)) == "broken image x"
    with pytest.raises(SystemExit) as stopped:
        refuse(ValueError("no"))
    assert stopped.value.code == 2
    with pytest.raises(SystemExit):
        refuse(ValueError("a\x1b[2Jb é"))
    assert capsys.readouterr().err == "distill: no\ndistill: a\\x1b[2Jb é\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            "out of memory: lower data.batch_size",
        ),
        (MemoryError(), "out of memory: lower data.batch_size"),
        (
            RuntimeError("[enforce fail] CPU: can't allocate memory"),
            "out of memory",
        ),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "a data worker died"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nmore"),
            "(DataLoader worker (pid 7) is killed by signal: Killed): lower data.num_workers",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "last.ckpt"), "on device: last.ckpt"),
        (OSError(errno.EROFS, "Read-only file system", "run"), "Read-only file system: run"),
    ],
)
def test_what_a_machine_lacks_is_one_line(error, message, capsys, monkeypatch):
    def fail(cfg):
        raise error

    monkeypatch.setattr(cli.HydraConfig, "get", lambda: SimpleNamespace(mode=RunMode.RUN))
    with pytest.raises(SystemExit) as stopped:
        cli.Task("train", explain=True).explained(fail, None)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("distill: ")
    assert message in said
    assert said.count("\n") == 1
