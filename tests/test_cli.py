"""Errors as one line, in this process; tests/e2e/test_cli.py drives the installed command."""

import errno
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.types import RunMode

from distill import cli
from distill.cli import CONF, one_line, refuse, report


def message_of(*overrides):
    with (
        pytest.raises(HydraException) as caught,
        initialize_config_dir(str(CONF), version_base="1.3"),
    ):
        compose("train", overrides=list(overrides))
    return one_line(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective=kdd", "there is no objective=kdd; did you mean kd?"),
        (
            "objective=zzz",
            "there is no objective=zzz; there are attention_transfer, class_balanced",
        ),
        ("trainer.max_epohcs=1", "did you mean trainer.max_epochs?"),
        ("zzz=1", "there are hydra, task_name"),
        ("a=[", "cannot read 'a=['"),
    ],
)
def test_a_wrong_override_is_explained(override, message):
    line = message_of(override)
    assert message in line
    assert "\n" not in line


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
    assert capsys.readouterr().err == "distill: no\n"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "holds neither a finished run nor a sweep"),
        (lambda folder: folder.mkdir(), "holds neither a finished run nor a sweep"),
        (lambda folder: folder.write_text("x"), "holds neither a finished run nor a sweep"),
        (
            lambda folder: (folder.mkdir(), (folder / "summary.json").write_text("{")),
            "summary.json is damaged",
        ),
    ],
)
def test_a_page_of_nothing_is_refused_in_one_line(make, message, tmp_path, monkeypatch, capsys):
    make(tmp_path / "x")
    monkeypatch.setattr("sys.argv", ["distill-report", str(tmp_path / "x")])
    with pytest.raises(SystemExit) as stopped:
        report()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "report.html").exists()


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
