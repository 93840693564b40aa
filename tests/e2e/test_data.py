"""What a run makes of folders as they lie, from the command to the numbers."""

import json
import os

import pytest

from tests.data.conftest import truncated, write_image

LONG_AGO = 1_600_000_000
QUICK = ("data.batch_size=4", "data.num_workers=0", "data.image_size=16", "trainer.max_epochs=1",
         "teacher.fit.max_epochs=1", "baseline=false", "trainer.accelerator=cpu")  # fmt: skip


def write_photos(root, shift=0):
    """Write flat class folders, of which one has a single image; all files are equally large."""
    for label, count in (("blue", 12), ("green", 12), ("rare", 1)):
        for k in range(count):
            path = root / label / f"{k}.bmp"
            write_image(path, (len(label) * 20 + shift, 9 * k, 40), size=(16, 16))
            os.utime(path, (LONG_AGO + shift, LONG_AGO + shift))


@pytest.mark.slow
def test_a_run_on_a_folder_as_it_lies(finish, tmp_path):
    write_photos(tmp_path / "photos")
    truncated(tmp_path / "photos" / "blue" / "x.png")
    (tmp_path / "photos" / "green" / ".ipynb_checkpoints").mkdir()
    told = ("data=folder", f"data.root={tmp_path / 'photos'}", *QUICK)
    said = finish("train", ".", *told, code=2)
    assert said.splitlines()[-1].startswith("distill: broken image ")

    said = finish("train", ".", *told, "data.broken=skip", "hydra.run.dir=first")
    assert "teacher: training" in said
    summary = json.loads((tmp_path / "first" / "summary.json").read_text())
    notes = "\n".join(summary["notes"])
    for words in ("no folders of splits", "1 broken image is left out (blue/x.png)", "hidden",
                  "only in train: rare", "val has no image of rare", "test has no"):  # fmt: skip
        assert words in notes
        assert words in said
    assert [value is None for value in summary["student"]["recall"]] == [False, False, True]
    assert summary["student"]["balanced_accuracy"] is not None

    def teachers():
        """How often a teacher was trained, and how often it was there, in all runs so far."""
        said = (tmp_path / "output.txt").read_text()
        return said.count("teacher: training"), said.count("trained before")

    finish("train", ".", *told, "data.broken=skip", "hydra.run.dir=second")
    assert teachers() == (1, 1)
    write_photos(tmp_path / "photos", shift=1)  # exported anew, under the same names and sizes
    finish("train", ".", *told, "data.broken=skip", "hydra.run.dir=third")
    assert teachers() == (2, 1)
