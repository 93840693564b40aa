"""The wheel, installed where nothing of this checkout can be seen."""

import json
import os
import site
import subprocess
import sys
import venv
import zipfile

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_the_installed_wheel_runs_from_another_directory(tmp_path, cache):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("distill_kd-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "distill/conf/train.yaml" in names
    assert "hydra_plugins/distill_fused/launcher.py" in names
    assert not [name for name in names if name.startswith(("tests/", "conf/", "scripts/"))]

    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    packages = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    installed = subprocess.run(
        [python, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet",
         "--disable-pip-version-check", wheel],
        capture_output=True, text=True,
    )  # fmt: skip
    assert installed.returncode == 0, installed.stderr
    # The dependencies of this environment, behind the venv's own packages; editable installs are
    # .pth files, which this does not read, so that the checkout stays out of sight.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    work = tmp_path / "work"
    work.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [python.with_name("distill"), "trainer.max_epochs=1", "teacher.fit.max_epochs=1",
         "trainer.accelerator=cpu", "hydra.run.dir=run"],
        cwd=work, capture_output=True, text=True, timeout=600,
        env={**environment, "DISTILL_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((work / "run" / "summary.json").read_text())["epochs"]["last"] == 1
    where = subprocess.run(
        [python, "-c", "import distill; print(distill.__file__)"],
        capture_output=True, text=True, check=True, cwd=work,
    )  # fmt: skip
    assert str(packages) in where.stdout
