"""Models, batches and targets of one's own, from Python: taken where clear, else one line."""

import logging
from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from distill import Distiller, Objective, Teacher
from distill.training.callbacks.finite import FiniteLoss
from distill.training.callbacks.speed import Speed
from tests.data.conftest import refusal

KD = {"ce": "cross_entropy", "kl": "kl_divergence"}
IMAGES = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(32) % 4


class Rows(torch.utils.data.Dataset):
    """Samples that one function makes of an image and a label."""

    def __init__(self, made, images=IMAGES, labels=LABELS):
        self.made, self.images, self.labels = made, images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, place):
        return self.made(self.images[place], self.labels[place])


def loader(made=lambda image, label: (image, label), **options):
    return DataLoader(Rows(made, **options), batch_size=16)


class Answering(nn.Module):
    """A model whose answer one function makes of logits."""

    def __init__(self, model, made):
        super().__init__()
        self.model, self.made, self.num_classes = model, made, model.num_classes

    def forward(self, x):
        return self.made(self.model(x))


def trained(folder, tiny, train, val=None, wrap=lambda model: model, objective=None, **options):
    """The weights of a student after two epochs."""
    torch.manual_seed(0)
    teacher, student = tiny(width=16), tiny()
    student.body[3] = nn.Identity()
    module = Distiller(wrap(student), wrap(teacher), objective or Objective(KD, 4.0, 0.5),
                       topk=(1,), **options)  # fmt: skip
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[FiniteLoss(), Speed()],
    )  # fmt: skip
    trainer.fit(module, train, val or train)
    return torch.cat([p.detach().flatten() for p in student.parameters()])


Output = namedtuple("Output", "loss logits")


@pytest.mark.parametrize(
    "made",
    [
        lambda logits: {"logits": logits, "hidden": None},
        lambda logits: OrderedDict(logits=logits),
        lambda logits: SimpleNamespace(logits=logits),
        lambda logits: Output(None, logits),
    ],
    ids=["dict", "ordered", "attribute", "named tuple"],
)
def test_models_that_answer_with_logits_among_others_are_as_those_that_answer_with_them(
    tiny, tmp_path, made
):
    plain = trained(tmp_path, tiny, loader())
    wrapped = trained(tmp_path, tiny, loader(), wrap=lambda model: Answering(model, made))
    assert torch.equal(plain, wrapped)


@pytest.mark.parametrize(
    ("made", "what"),
    [
        (lambda logits: (logits, logits), "tuple of 2"),
        (lambda logits: [logits], "list of 1"),
        (lambda logits: {"scores": logits, "z": 0}, "dict of scores, z"),
        (lambda logits: None, "NoneType"),
    ],
)
def test_other_answers_are_refused(tiny, tmp_path, made, what):
    for width, who in ((16, "teacher"), (8, "student")):

        def wrap(model, width=width):
            return Answering(model, made) if model.head.in_features == width else model

        message = refusal(lambda wrap=wrap: trained(tmp_path, tiny, loader(), wrap=wrap))
        assert f"the {who} answers with a {what}, not with logits [N, K]" in message


def test_answers_of_another_shape_are_refused(tiny):
    student = Answering(tiny(), lambda logits: logits[:, :3])
    refusal(lambda: Distiller(student)(IMAGES[:5]), "5 images", "[5, 3]", "[5, 4]", "num_classes")


@pytest.mark.parametrize(
    "names", [("image", "label"), ("pixel_values", "labels"), ("x", "y"), ("img", "target")]
)
def test_batches_may_be_mappings_with_the_usual_names(tiny, tmp_path, names):
    def made(image, label):
        return {names[0]: image, "note": 1, names[1]: label}

    assert torch.equal(trained(tmp_path, tiny, loader()), trained(tmp_path, tiny, loader(made)))


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda x, y: {"pixels": x, "label": y}, ("no images", "pixels, label", "pixel_values")),
        (lambda x, y: {"image": x, "class": y}, ("no targets", "image, class")),
        (lambda x, y: {"image": x, "x": x, "label": y}, ("image or x", "images")),
        (lambda x, y: x, ("a batch is (images, targets)", "Tensor")),
        (lambda x, y: (x,), ("a batch is (images, targets)", "of 1")),
    ],
)
def test_other_batches_are_refused(tiny, tmp_path, made, words):
    refusal(lambda: trained(tmp_path, tiny, loader(made)), *words)


def test_bytes_are_scaled_once_for_student_and_teacher_and_said_once(tiny, tmp_path, caplog):
    pixels = (IMAGES * 255).round().to(torch.uint8)
    with caplog.at_level(logging.INFO, "distill"):
        scaled = trained(tmp_path, tiny, loader(images=pixels))
    assert len([r for r in caplog.records if "scaled from 0" in r.getMessage()]) == 1
    assert torch.equal(scaled, trained(tmp_path, tiny, loader(images=pixels.float() / 255)))
    model = tiny().eval()
    assert torch.equal(Teacher(model)(pixels), Teacher(model)(pixels.float() / 255))
    wide = loader(images=pixels.int())
    refusal(lambda: trained(tmp_path, tiny, wide), "int32 [16, 1, 8, 8]", "uint8")


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.int16])
def test_labels_may_be_any_whole_numbers(tiny, tmp_path, kind):
    plain = trained(tmp_path, tiny, loader())
    assert torch.equal(plain, trained(tmp_path, tiny, loader(labels=LABELS.to(kind))))


HOT = nn.functional.one_hot(LABELS, 4)
MULTI = HOT.float() + HOT.roll(1, 1)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (MULTI, ("class probabilities", "sums to 2")),
        (HOT * 3.0 - 0.5, ("class probabilities", "one is -0.5")),
        (torch.zeros(32, 4), ("sums to 0",)),
        (torch.full((32, 4), float("nan")), ("class probabilities",)),
        (torch.full((32, 5), 0.2), ("float32 [16, 5]", "4 classes")),
        (HOT, ("int64 [16, 4]", "class indices [N]")),
        (MULTI > 0, ("bool [16, 4]", "class indices [N]")),
        (LABELS.float(), ("float32 [16]", "whole numbers")),
        (LABELS[:, None], ("int64 [16, 1]", "class indices [N]")),
        (LABELS - 1, ("a target is -1", "from 0 to 3")),
        (LABELS + 1, ("a target is 4", "from 0 to 3")),
    ],
)
def test_targets_that_are_no_labels_and_no_distribution_are_refused(tiny, tmp_path, targets, words):
    bad = loader(labels=targets)
    refusal(lambda: trained(tmp_path, tiny, bad, loader()), *words)
    objective, logits = Objective(KD, 4.0, 0.5), torch.zeros(16, 4)
    refusal(lambda: objective(logits, logits, targets[:16]), *words)
    if not targets.is_floating_point():
        refusal(lambda: trained(tmp_path, tiny, loader(), bad), *words)


def test_distributions_are_learned_from_and_not_judged_by(tiny, tmp_path):
    soft = 0.9 * HOT + 0.025
    assert torch.equal(
        trained(tmp_path, tiny, loader(labels=HOT.float()), loader()),
        trained(tmp_path, tiny, loader(labels=HOT.double()), loader()),
    )
    trained(tmp_path, tiny, loader(labels=soft.half()), loader())
    refusal(lambda: trained(tmp_path, tiny, loader(), loader(labels=soft)), "val", "class indices")


def test_the_first_batch_of_each_epoch_is_looked_at_and_no_other(tiny, tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(
        "distill.objective.objective.check_targets",
        lambda target, classes: looked.append(len(target)),
    )
    trained(tmp_path, tiny, loader())
    # The sanity check, then training and validation of two epochs of two batches.
    assert len(looked) == 5


def test_the_number_of_classes_is_asked_for_where_no_model_says_it(tiny):
    silent = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    refusal(lambda: Distiller(silent), "give num_classes")
    refusal(lambda: Distiller(silent, num_classes="4"), "give num_classes", "'4'")
    assert Distiller(silent, num_classes=4).num_classes == 4
    silent.config = SimpleNamespace(num_labels=4)
    assert Distiller(silent).num_classes == 4
