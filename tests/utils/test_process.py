"""How a command's process begins and ends."""

import gc
import os
import subprocess
import sys

import pytest

from distill.utils import process
from tests.conftest import BIN

END = """
import atexit, sys, threading, time
from pathlib import Path
before = atexit._ncallbacks()
import distill.cli
from distill.utils.process import as_program
print("handlers", before, atexit._ncallbacks())

class Slow:
    def __del__(self):
        print("taken apart")

kept = Slow()

def late():
    time.sleep(0.2)
    Path("thread").touch()

@as_program
def main():
    import multiprocessing.util
    atexit.register(lambda: Path("handler").touch())
    threading.Thread(target=late).start()
    print("done")
    {end}

main()
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [("", 0), ("sys.exit(2)", 2), ("raise SystemExit(130)", 130), ("sys.exit('why')", 1),
     ("raise KeyError('x')", 1)],
)  # fmt: skip
@pytest.mark.parametrize("name", ["distill", "distill-eval", "other.py"])
def test_a_command_ends_with_its_status_and_what_others_do_at_exit(name, end, code, tmp_path):
    (tmp_path / name).write_text(END.format(end=end))
    done = subprocess.run([sys.executable, name], cwd=tmp_path, capture_output=True, text=True,
                          timeout=60)  # fmt: skip
    assert done.returncode == code
    # logging's is the one handler that comes after ours, which does the same
    assert done.stdout.startswith("handlers 0 1\ndone\n")
    assert (tmp_path / "handler").is_file()
    assert (tmp_path / "thread").is_file()
    at_once = name != "other.py" and end not in ("sys.exit('why')", "raise KeyError('x')")
    assert ("taken apart" in done.stdout) == (not at_once)
    assert ("KeyError: 'x'" in done.stderr) == ("KeyError" in end)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device")
def test_what_cannot_be_printed_is_told(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run([BIN / "distill", "--help"], stdout=full, stderr=subprocess.PIPE,
                              text=True, timeout=60)  # fmt: skip
    assert done.returncode != 0
    assert "No space left" in done.stderr


def test_the_collector_rests_while_a_module_is_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "rests.py").write_text("import gc\nenabled = gc.isenabled()\n")
    (tmp_path / "fails.py").write_text("import no_such_module\n")
    assert process.import_heavy("rests").enabled is False
    assert gc.isenabled()
    with pytest.raises(ModuleNotFoundError):
        process.import_heavy("fails")
    assert gc.isenabled()
