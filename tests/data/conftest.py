"""What the tests of the sources share: images on disk, their colours, and refusals."""

import os
import tarfile

import numpy as np
import pytest
from PIL import Image

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # read when first imported


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Keep what configured data sets find out about files of a test away from a person's cache."""
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path_factory.getbasetemp() / "data-cache"))


COLOURS = {"cat": (200, 0, 0), "dog": (0, 200, 0), "eel": (0, 0, 200)}


def write_image(path, colour, size=(20, 16), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


def write_folder(root, splits=("train", "val", "test"), classes=("cat", "dog"), count=3, ext="png"):
    """Write a folder whose images have the colour of their class, and their number in blue."""
    for split in splits:
        for name in classes:
            for k in range(count):
                red, green, blue = COLOURS.get(name, (9, 9, 9))
                write_image(root / split / name / f"{k}.{ext}", (red, green, blue + k))
    return root


def fields(batch):
    return batch.view, batch.target, batch.index, batch.view_number


def write_tar(path, root):
    with tarfile.open(path, "w") as tar:
        for name in sorted(os.listdir(root)):
            tar.add(root / name, arcname=name)
    return path


def truncated(path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def colour(image):
    return np.asarray(image).reshape(-1, len(image.getbands()))[0].tolist()


def colours(split):
    return [colour(split.load(i)) for i in split.index.tolist()]


def refusal(action, *words, error=(ValueError, OSError)):
    """Return the message of a refusal: one line, a ValueError or OSError, with these words."""
    with pytest.raises(error) as caught:
        action()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    for word in words:
        assert str(word) in message
    return message
