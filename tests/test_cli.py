"""Errors as one line, in this process; tests/test_mistakes.py has the mistakes."""

import pytest

from distill.cli import one_line, refuse


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
