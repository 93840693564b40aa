"""Contact sheets: the clean image, then the views of the first epochs, in one picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from distill.data import DataModule
from distill.data.sources.splits import Resident, Source, Streamed
from distill.data.views.preview import GAP, contact_sheet, tile, tiled


def picture(index, size=(20, 16)):
    rng = np.random.default_rng(index)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def resident(channels=3, **view):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60, channels, 8, 6), dtype=torch.uint8, generator=generator)
    split = Resident(images, torch.arange(60) % 2)
    return DataModule(Source("noise", ["a", "b"], channels, split), view, batch_size=4)


def streamed(**view):
    split = Streamed(picture, torch.arange(60) % 2, [str(k) for k in range(60)])
    return DataModule(Source("noise", ["a", "b"], 3, split), view, batch_size=4, image_size=16)


def tiles(path, height, width, factor, columns):
    """Return the tiles of a sheet, at their own size again, uint8 `[n, C, H, W]`."""
    sheet = np.asarray(Image.open(path))
    sheet = sheet[..., None] if sheet.ndim == 2 else sheet
    found = []
    for top in range(GAP, len(sheet) - 1, height * factor + GAP):
        for left in range(GAP, GAP + columns * (width * factor + GAP), width * factor + GAP):
            cut = sheet[top : top + height * factor, left : left + width * factor]
            assert np.array_equal(cut, cut[::factor, ::factor].repeat(factor, 0).repeat(factor, 1))
            found.append(cut[::factor, ::factor].transpose(2, 0, 1))
    return torch.from_numpy(np.stack(found))


@pytest.mark.parametrize("mixing", [{}, {"mixup": 1.0, "cutmix": 1.0}])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_shows_the_clean_image_and_then_every_epochs_view(tmp_path, channels, mixing):
    data = resident(channels, pad=2, flip=True, **mixing)
    contact_sheet(data, 5, 7, tmp_path / "sheets" / "views.png")
    found = tiles(tmp_path / "sheets" / "views.png", 8, 6, 16, 3)
    assert torch.equal(found[0], data.train.images[5])
    for epoch in range(7):
        expected = data.training_views(epoch, torch.tensor([5]))[0]
        assert torch.equal(found[1 + epoch], expected)
    assert found[8].eq(255).all()  # nothing is left to show


def test_a_sheet_of_streamed_views(tmp_path):
    data = streamed(scale=[0.3, 1.0])
    contact_sheet(data, 0, 3, str(tmp_path / "views.png"))
    found = tiles(tmp_path / "views.png", 16, 16, 6, 2)
    assert len(torch.unique(found, dim=0)) == 4
    assert torch.equal(found[2], data.training_views(1, torch.tensor([0]))[0])


def test_the_views_of_a_few_come_again(tmp_path):
    data = resident(pad=2)
    data.views = 2
    contact_sheet(data, 0, 3, tmp_path / "views.png")
    found = tiles(tmp_path / "views.png", 8, 6, 16, 2)
    assert torch.equal(found[1], found[3])


def test_large_views_keep_their_size():
    assert tile(torch.zeros(3, 200, 100, dtype=torch.uint8)).size == (100, 200)
    assert tile(torch.zeros(1, 40, 60, dtype=torch.uint8)).size == (180, 120)
    assert tiled([torch.zeros(1, 96, 96, dtype=torch.uint8)]).size == (100, 100)


@pytest.mark.parametrize(
    ("row", "epochs", "word"),
    [
        (-1, 3, "no training image -1"),
        (10_000, 3, "no training image 10000; they go from 0 to 42"),
        (0, 0, "at least 1 epoch"),
    ],
)
def test_what_cannot_be_shown_is_refused_and_nothing_is_written(tmp_path, row, epochs, word):
    with pytest.raises(ValueError, match=word):
        contact_sheet(resident(), row, epochs, tmp_path / "views.png")
    assert list(tmp_path.iterdir()) == []


def test_a_sheet_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "views.png"
    contact_sheet(resident(), 0, 1, path)
    before = path.read_bytes()

    def full(self, file, *arguments):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="no space"):
        contact_sheet(resident(pad=1), 0, 1, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_where_a_step_shows_two_views_a_sheet_does(tmp_path):
    source = Source("noise", ["a", "b"], 3, resident().train)
    strong = {"rotate": 30, "erase": 1}
    data = DataModule(source, {"pad": 2}, batch_size=4, views_per_step=2, strong_view=strong)
    contact_sheet(data, 5, 2, tmp_path / "views.png")
    found = tiles(tmp_path / "views.png", 8, 6, 16, 3)
    assert torch.equal(found[0], data.train.images[5])
    rows = torch.tensor([5])
    expected = torch.cat([data.training_views(epoch, rows) for epoch in range(2)])
    assert torch.equal(found[1:5], expected)
    assert not torch.equal(found[1], found[2])
