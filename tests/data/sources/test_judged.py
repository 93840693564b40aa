"""Any labelled folder can be judged: every picture of it, by the model's own classes."""

import pytest
import torch

from distill.data.module import configured
from distill.data.sources.folder import folder
from distill.data.sources.judged import Judged, place_of, with_model_classes
from distill.data.sources.splits import Resident, Source
from distill.data.sources.table import table
from distill.data.sources.timm_data import timm_dataset
from tests.data.conftest import COLOURS, colours, write_folder

CLASSES = ["eel", "dog", "cat"]  # another order than the folders'


def judged(root, source=folder, classes=CLASSES, refit=False, **options):
    bundle = Judged("student.checkpoint=x", classes, {"crop_pct": 0.875}, refit=refit)
    group = {"batch_size": 4, "num_workers": 0, "image_size": 8, "split_seed": 0}
    group |= {"val_fraction": 0.25, "root": str(root), **options}
    return configured(source, bundle, **group)


def check_labels(data, count):
    """Each picture has the colour of the class that its label names."""
    assert len(data.test) == count
    for colour, label in zip(colours(data.test), data.test.labels.tolist(), strict=True):
        assert colour[:2] == list(COLOURS[CLASSES[label]][:2])
    assert data.classes == CLASSES


@pytest.mark.parametrize("place", ["", "test"])
def test_every_picture_is_judged_by_the_models_classes(tmp_path, place):
    written = write_folder(tmp_path, ("test",), classes=("cat", "dog", "eel"), count=5)
    data = judged(written if place else written / "test")
    check_labels(data, 15)
    assert (len(data.train), len(data.val)) == (0, 0)
    assert len(data.predict_dataloader()) == 1
    assert any("all 15 pictures" in note for note in data.notes)
    assert data.preprocessing["crop_pct"] == 0.875


def test_classes_may_be_absent_or_written_in_other_letters(tmp_path):
    write_folder(tmp_path, ("test",), classes=("cat",), count=2)
    (tmp_path / "test" / "cat").rename(tmp_path / "test" / "CAT")
    data = judged(tmp_path)
    assert data.test.labels.tolist() == [2, 2]
    assert any("test has no image of eel, dog" in note for note in data.notes)
    write_folder(tmp_path, ("test",), classes=("cat",), count=2)
    with pytest.raises(ValueError, match=r"two of .* are the same class"):
        judged(tmp_path)


def test_names_are_matched_as_written_first():
    assert place_of("a", ["A", "a"]) == 1
    assert place_of("B", ["A", "b"]) == 1
    assert place_of("É", ["x", "é"]) == 1
    assert place_of("Ab", ["ab", "AB"]) is None  # either could be meant
    assert place_of("c", ["A", "b"]) is None


def test_an_unknown_class_is_refused_and_named(tmp_path):
    write_folder(tmp_path, ("test",), classes=("cat", "fox"))
    with pytest.raises(ValueError, match=r"student.checkpoint=x knows .* does not know fox \(1\)"):
        judged(tmp_path)


def test_splits_are_judged_as_in_training_where_there_is_something_to_train_on(tmp_path):
    write_folder(tmp_path, ("train", "val"), classes=("cat", "dog", "eel"), count=4)
    write_folder(tmp_path, ("test",), classes=("cat", "dog", "eel"), count=3)
    data = judged(tmp_path)
    check_labels(data, 9)
    assert (len(data.train), len(data.val)) == (12, 12)


def test_validation_beside_test_is_there_to_fit_on(tmp_path):
    write_folder(tmp_path, ("val", "test"), classes=("cat", "dog", "eel"), count=4)
    (tmp_path / "val" / "dog").rename(tmp_path / "elsewhere")  # another numbering than test's
    data = judged(tmp_path)
    check_labels(data, 12)
    assert data.val.labels.tolist() == [2] * 4 + [0] * 4


def test_what_is_to_be_fitted_is_cut_off_only_when_it_is_asked_for(tmp_path):
    write_folder(tmp_path, ("test",), classes=("cat", "dog", "eel"), count=8)
    data = judged(tmp_path, refit=True)
    check_labels(data, 18)
    assert torch.bincount(data.val.labels).tolist() == [2, 2, 2]
    assert not set(data.val.index.tolist()) & set(data.test.index.tolist())


def test_a_timm_data_set_without_train_is_judged_whole(tmp_path):
    write_folder(tmp_path, ("test",), classes=("cat", "dog"), count=3)
    data = judged(
        tmp_path, timm_dataset, splits={"train": None, "test": "test"}, name="", channels=3
    )
    check_labels(data, 6)


def test_a_table_without_splits_is_judged_whole(tmp_path):
    write_folder(tmp_path, ("x",), classes=("cat", "dog"), count=3)
    rows = [f"x/{name}/{k}.png,{name}" for name in ("cat", "dog") for k in range(3)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    check_labels(judged(tmp_path, table, file="labels.csv"), 6)


def test_labels_of_any_source_are_matched_by_name():
    images = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    split = Resident(images, torch.tensor([0, 1, 1, 0]))
    source = Source("toy", ["cat", "dog"], 1, split, test=split)
    found = with_model_classes(source, Judged("x", CLASSES))
    assert found.train.labels.tolist() == found.test.labels.tolist() == [2, 1, 1, 2]
    assert found.val is None
    assert split.labels.tolist() == [0, 1, 1, 0]
