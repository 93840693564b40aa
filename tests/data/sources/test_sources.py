"""The sources that conf/data names: the digits, and what holds for all of them."""

import warnings

import numpy as np
import torch
from sklearn.datasets import load_digits

from distill.data.sources import digits, folder, timm_dataset
from tests.data.conftest import refusal, write_folder


def test_digits_are_those_of_scikit_learn():
    source = digits(image_size=8)
    data = load_digits()
    assert source.classes == [str(k) for k in range(10)]
    assert (len(source.train), len(source.test), source.channels) == (997, 800, 1)
    for split in (source.train, source.test):
        expected = np.rint(data.images[split.index] * 255 / 16)
        assert np.array_equal(split.images[:, 0].numpy(), expected)
        assert np.array_equal(split.labels.numpy(), data.target[split.index])
    together = torch.cat([source.train.index, source.test.index])
    assert together.sort().values.equal(torch.arange(1797))
    shares = torch.bincount(source.test.labels) / torch.bincount(torch.tensor(data.target))
    assert (shares - 800 / 1797).abs().max() < 0.01


def test_digits_come_in_any_size():
    assert digits(image_size=5).train.images.shape[1:] == (1, 5, 5)
    refusal(lambda: digits(image_size=0), "data.image_size")


def test_reading_any_source_warns_of_nothing(tmp_path):
    write_folder(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source in (folder(str(tmp_path)), timm_dataset(root=str(tmp_path))):
            source.train.load(0)
