"""Pictures are shown at the model's own size, bounded by theirs, and it is said."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import distill
from distill.data.module import DataModule
from distill.data.sources import digits
from distill.data.sources.folder import folder
from distill.data.sources.images import cropped, resize
from distill.data.sources.sizes import (
    Header,
    ModelSize,
    as_size,
    chosen_size,
    grey_note,
    header_of,
    sampled_headers,
    size_note,
)
from distill.data.sources.splits import Streamed
from distill.data.views.build import build_view
from distill.data.views.views import CLEAN
from distill.models.build import ModelSpec
from distill.models.sizes import declared_size
from tests.data.conftest import write_folder, write_image


def of(*sizes, grey=False):
    return [Header(size, grey) for size in sizes]


@pytest.mark.parametrize(
    ("asked", "model", "sizes", "shown"),
    [
        (48, (224, 224), [(300, 300)], (48, 48)),  # what is asked for is done
        ([96, 128], (224, 224), [(300, 300)], (96, 128)),
        (None, (224, 224), [(300, 300)], (224, 224)),  # the model's own
        (None, (299, 299), [(299, 400)], (299, 299)),
        (None, (224, 224), [(96, 96)], (96, 96)),  # the pictures' own
        (None, (224, 224), [(100, 150), (100, 100), (500, 500)], (96, 96)),  # median, in steps
        (None, (224, 224), [(28, 28)], (32, 32)),  # at least one step
        (None, (32, 32), [(28, 28)], (32, 32)),
        (None, (32, 32), [(640, 480)], (32, 32)),
        (None, (256, 128), [(64, 64)], (128, 64)),  # the model's proportions
        (None, (224, 224), [], (224, 224)),  # nothing is known of the pictures
    ],
)
def test_the_size_that_is_shown(asked, model, sizes, shown):
    assert chosen_size(asked, ModelSize(model), of(*sizes)) == shown


def test_a_model_of_one_size_keeps_it_and_one_that_does_not_say_is_as_usual():
    assert chosen_size(None, ModelSize((224, 224), exact=True), of((64, 64))) == (224, 224)
    assert chosen_size(None, None, of((500, 500))) == (224, 224)


@pytest.mark.parametrize("wrong", [0, -1, [96], [1, 2, 3], [96, 0], "96", 96.5, True, [96.0, 96]])
def test_sizes_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match=r"data\.image_size must be at least 1 pixel"):
        as_size(wrong)


def test_models_say_their_training_size_and_whether_it_is_the_only_one(tmp_path):
    resnet = declared_size(ModelSpec("resnet50.a1_in1k"))  # of which the test size is 288
    assert (resnet.size, resnet.exact) == ((224, 224), False)
    vit = declared_size(ModelSpec("vit_tiny_patch16_224"))
    assert (vit.size, vit.exact) == ((224, 224), True)
    told = declared_size(ModelSpec("vit_tiny_patch16_224", {"img_size": 64}))
    assert (told.size, told.exact) == ((64, 64), True)
    assert declared_size(ModelSpec("cifar_resnet8x4")).size == (32, 32)
    assert declared_size(ModelSpec()) is None
    assert declared_size(ModelSpec("no_such_model")) is None
    model = timm.create_model("cifar_resnet8x4", num_classes=2)
    path = distill.save_student(model, tmp_path / "student", input_size=(3, 64, 96))
    recorded = declared_size(ModelSpec(checkpoint=str(path)))
    assert (recorded.size, recorded.exact) == ((64, 96), True)


def test_headers_are_read_without_decoding(tmp_path):
    write_folder(tmp_path, ("train",), count=2)
    path = tmp_path / "train" / "cat" / "0.png"
    path.write_bytes(path.read_bytes()[:60])  # a header, and pixels that are cut off
    (tmp_path / "train" / "dog" / "0.png").write_bytes(b"")
    split = folder(str(tmp_path), verify="none").train
    assert sampled_headers(split) == of(*[(16, 20)] * 3)
    assert sampled_headers(Streamed(lambda _: None, torch.zeros(1), [""])) == []


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_header_says_the_size_of_the_upright_picture(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("L", (30, 20)).save(tmp_path / "x.jpg", exif=exif)
    expected = (20, 30) if orientation < 5 else (30, 20)
    with (tmp_path / "x.jpg").open("rb") as file:
        assert header_of(file) == Header(expected, grey=True)


def test_what_is_done_is_said_in_one_line():
    square = size_note(1968, of((300, 300)), (96, 96))
    assert square == "1,968 pictures of 300 × 300 shown at 96 × 96"
    other = size_note(5, of((480, 640), (90, 100), (100, 90)), (96, 128))
    assert other == "5 pictures of 90 × 100 to 480 × 640 shown at 96 × 128 (height × width)"
    assert size_note(5, [], (96, 96)) is None
    assert "data.channels=1" in grey_note(of((4, 4), grey=True), 3)
    assert grey_note(of((4, 4), grey=True), 1) is None
    assert grey_note([*of((4, 4), grey=True), *of((4, 4))], 3) is None


def test_a_folder_is_shown_at_the_models_size_and_grey_is_noticed(tmp_path):
    for name in ("cat", "dog"):
        for k in range(12):
            write_image(tmp_path / "train" / name / f"{k}.png", 9, (70, 100), mode="L")
    data = DataModule(folder(str(tmp_path)), batch_size=4, model_size=ModelSize((224, 224)))
    assert data.image_size == (64, 64)
    assert data.preprocessing["input_size"] == (3, 64, 64)
    assert f"{len(data.train)} pictures of 100 × 70 shown at 64 × 64 (height × width)" in data.notes
    assert any("grey" in note for note in data.notes)
    wide = DataModule(folder(str(tmp_path)), batch_size=4, image_size=[32, 48])
    assert wide.clean_test_images(torch.tensor([0])).shape == (1, 3, 32, 48)
    assert next(iter(wide.train_dataloader())).view.shape == (4, 3, 32, 48)
    assert wide.preprocessing["input_size"] == (3, 32, 48)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("no_aug", [True, False])
def test_views_that_are_not_square_are_timms_of_height_and_width(mode, no_aug):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    options = {"crop_mode": mode, "crop_pct": 0.9, "no_aug": no_aug}
    split = Streamed(lambda _: None, torch.zeros(1), [""])
    view = build_view(split, options, [32, 48], 3)
    config = {"input_size": (3, 32, 48), "interpolation": "bilinear"}
    expected = timm.data.create_transform(**config, crop_pct=0.9, crop_mode=mode, normalize=False)(
        image
    )
    assert torch.equal(view(image, 0, CLEAN, 0), expected)
    if no_aug:  # nothing is squashed
        kept = timm.data.create_transform(**config, crop_pct=1.0, normalize=False)(image)
        assert torch.equal(view(image, 0, 3, 0), kept)


def test_images_in_memory_are_resized_and_cropped_to_height_and_width():
    ramp = torch.arange(0, 240, 10, dtype=torch.uint8).expand(1, 1, 12, 24)
    assert resize(ramp, [6, 24]).shape == (1, 1, 6, 24)
    assert torch.equal(resize(ramp, [6, 24])[0, 0, 3], ramp[0, 0, 0])
    picture = Image.fromarray(np.full((50, 100), 7, np.uint8))
    assert cropped(picture, 1, (40, 20)).shape == (1, 40, 20)
    assert digits(image_size=[8, 16]).train.images.shape[1:] == (1, 8, 16)
