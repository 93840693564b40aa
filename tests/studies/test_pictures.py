"""The study of few labels runs as printed, on a small folder, and goes on where it was."""

import pytest
import timm
import torch
from PIL import Image

import distill.models.slim  # noqa: F401  (registers the default architectures)
from tests.conftest import ROOT


def write_folder(folder, classes=4, known=12, held_out=6):
    for split, count in (("train", known), ("val", held_out)):
        for label in range(classes):
            (folder / split / f"c{label}").mkdir(parents=True)
            for k in range(count):
                shade = (60 * label + k, 200 - 50 * label, 40 + 3 * k)
                file = folder / split / f"c{label}" / f"{k:02d}.png"
                Image.new("RGB", (34, 34), shade).save(file)


@pytest.mark.slow
def test_the_table_has_its_four_lines_and_what_has_run_is_not_run_again(command, tmp_path):
    write_folder(tmp_path / "all")
    torch.manual_seed(0)
    weights = timm.create_model("slim_resnet10_8", num_classes=5).state_dict()
    torch.save({f"theirs.{k}": v for k, v in enumerate(weights.values())}, tmp_path / "w.pth")
    words = (
        "python", ROOT / "scripts/studies/pictures.py", "all", "--weights", "w.pth",
        "--out", "case",
        "--teacher", "slim_resnet10_8", "--student", "slim_resnet10_4", "--classes", 2,
        "--labelled", 8, "--size", 32, "--seeds", 2, "--epochs", 2, "--teacher-epochs", 2,
        "--override", "data.num_workers=0", "--override", "teacher.fit.patience=null",
    )  # fmt: skip
    command(*words)
    table = (tmp_path / "case/table.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in table[2:]] == [
        "teacher, fine-tuned", "student alone", "distilled",
        "distilled, also on unlabelled pictures",
    ]  # fmt: skip
    assert len(list((tmp_path / "case/unlabelled").iterdir())) == 2 * 4
    assert len(list((tmp_path / "case/pictures/train").rglob("*.png"))) == 2 * 8
    again = command(*words)
    assert "finished before" in again.stdout
    assert (tmp_path / "case/table.md").read_text().splitlines() == table
