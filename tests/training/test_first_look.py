"""A teacher is looked at before it is believed, once, and without changing what is learned."""

import json
import logging

import numpy as np
import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss

from distill import evaluation, run, save_student
from distill.config import build
from distill.config.overrides import CONF
from distill.objective.objective import Objective
from distill.sweep.lockstep import in_turns
from distill.teacher.teacher import Teacher
from distill.training import teachers
from distill.training.first_look import Look, looked_at, measured, on_validation

ARGS = {"layers": [1, 1, 1, 1], "channels": [4, 8, 16, 32], "stem_type": "deep", "stem_width": 4}
KD = Objective({"kl": "kl_divergence"})


@pytest.fixture
def composed(tmp_path):
    def make(*overrides, folder="run"):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            paths = (f"paths.output_dir={tmp_path / folder}", f"paths.cache={tmp_path / 'cache'}")
            quick = ("trainer.accelerator=cpu", "logger=none", "callbacks=none")
            return compose("train", overrides=[*paths, *quick, *overrides])

    return make


@pytest.fixture
def constant(tmp_path):
    """A bundle that always names the first of its classes: 0."""
    model = timm.create_model("resnet18", num_classes=10, in_chans=1, **ARGS)
    torch.nn.init.zeros_(model.fc.weight)
    torch.nn.init.zeros_(model.fc.bias)
    return save_student(model, tmp_path / "constant", classes=list("0123456789"), mean=[0.5],
                        std=[0.5], input_size=(1, 32, 32))  # fmt: skip


class Counted(torch.nn.Module):
    """The nearest mean of the training digits, which counts the images that it is shown."""

    num_classes = 10

    def __init__(self, data):
        super().__init__()
        images = self.small(data.train.images.float() / 255)
        means = torch.stack([images[data.train.labels == k].mean(0) for k in range(10)])
        self.weight = torch.nn.Parameter(means.T)
        self.bias = torch.nn.Parameter(-means.square().sum(1) / 2)
        self.seen = 0

    def small(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 8).flatten(1)

    def forward(self, images):
        self.seen += len(images)
        return self.small(images) @ self.weight + self.bias


def test_the_numbers_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 3, generator=generator)
    target = torch.tensor([0] * 30 + [1] * 15 + [2] * 5)
    found = measured(logits, target, ["cat", "dog", "eel"], "teacher")
    named = logits.argmax(1)
    assert found.top1 == pytest.approx(accuracy_score(target, named))
    assert found.balanced_accuracy == pytest.approx(balanced_accuracy_score(target, named))
    assert found.nll == pytest.approx(log_loss(target, logits.double().softmax(1)), rel=1e-5)
    assert (found.majority, found.most_frequent, found.classes) == (0.6, "cat", 3)


def test_it_is_said_in_one_line_and_doubted_with_reason():
    good = Look("teacher", 0.869, 0.851, 0.41, 0.412, "cat", 1968, 4)
    assert good.described() == (
        "teacher: validation top-1 86.9 %, balanced accuracy 85.1 %, NLL 0.41; always answering "
        "the most frequent class (cat) would be right on 41.2 %"
    )
    assert good.doubts() == good.doubts(0.869) == []
    (worse,) = good.doubts(0.9)
    assert worse.startswith("teacher: right on 86.9 % of 1,968 validation images, and the student")
    assert "learns without it on 90.0 %" in worse
    useless = Look("assistant 1", 0.412, 0.25, 9.0, 0.412, "cat", 1968, 4)
    (majority,) = useless.doubts()
    assert majority.startswith("assistant 1: right on 41.2 %")
    assert len(useless.doubts(0.5)) == 2
    (guessing,) = Look("teacher", 0.43, 0.262, 1.3, 0.412, "cat", 1968, 4).doubts()
    assert "its balanced accuracy is 26.2 %, where guessing comes to 25.0 %" in guessing
    assert Look("teacher", 0.09, 0.09, 4.0, 0.01, "cat", 1000, 100).doubts() == []


def test_answers_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="the teacher's answers are not finite"):
        measured(torch.tensor([[np.nan, 0.0]]), torch.tensor([0]), ["a", "b"], "teacher")


def test_a_teacher_is_asked_once_and_nothing_random_moves(composed, caplog):
    caplog.set_level(logging.INFO, "distill")
    cfg = composed("objective.temperature=auto", "data.batch_size=25")
    data = build.build_data(cfg)
    model = Counted(data)
    teacher = Teacher(model, batch_size=25)
    before = torch.get_rng_state()
    found = looked_at(cfg, data, KD, teacher, "teacher")
    assert torch.equal(torch.get_rng_state(), before)
    cfg = teachers.resolve_auto_temperature(cfg, data, teacher)
    assert model.seen == len(data.val)
    logits, labels = on_validation(cfg, data, teacher)
    assert model.seen == len(data.val)
    expected = evaluation.predict(cfg, evaluation.as_module(teacher, data), data).of(
        "student", "val"
    )
    torch.testing.assert_close(logits, expected[0])
    assert torch.equal(labels, expected[1])
    assert found.top1 == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert found.described() in caplog.text


def test_runs_that_share_a_teacher_look_once(composed, caplog):
    caplog.set_level(logging.INFO, "distill")
    cfg = composed()
    data = build.build_data(cfg)
    model = Counted(data)
    teacher, found = Teacher(model), []

    def look(sharing):
        own = data.with_options(seed=0, batch_size=data.batch_size)
        own.sharing = sharing
        found.append(looked_at(cfg, own, KD, teacher, "teacher"))

    in_turns([look] * 3)
    assert found[0] is found[1] is found[2]
    assert model.seen == len(data.val)
    assert caplog.text.count("validation top-1") == 1


def test_a_teacher_that_is_asked_nothing_is_not_looked_at(composed, monkeypatch):
    cfg = composed()
    data = build.build_data(cfg)
    model = Counted(data)
    supervised = Objective({"ce": "cross_entropy"})
    assert looked_at(cfg, data, supervised, Teacher(model), "teacher") is None
    assert looked_at(cfg, data, KD, None, "teacher") is None
    monkeypatch.setenv("RANK", "1")  # of several processes the first looks
    assert looked_at(cfg, data, KD, Teacher(model), "teacher") is None
    assert model.seen == 0


@pytest.mark.slow
def test_doubts_are_in_the_numbers_and_on_the_page_and_change_no_byte(
    composed, constant, tmp_path, caplog, monkeypatch
):
    caplog.set_level(logging.INFO, "distill")
    known = ("teacher=timm", f"teacher.checkpoint={constant}", "trainer.max_epochs=3")

    def done(*more, folder):
        caplog.clear()
        run.train(composed(*known, *more, folder=folder))
        summary = json.loads((tmp_path / folder / "summary.json").read_text())
        student = (tmp_path / folder / "student" / "model.safetensors").read_bytes()
        return summary["warnings"], student

    (majority,), student = done("baseline=false", folder="first")
    assert "always answering the most frequent class (0)" in majority
    assert [r.levelno for r in caplog.records if r.getMessage() == majority] == [logging.WARNING]
    page = (tmp_path / "first/report.html").read_text()
    assert majority[1:] in page
    assert page.index('class="warning"') < page.index('class="lead"')

    (_, worse), again = done(folder="second")  # with its baseline, which is kept
    assert "the student that learns without it on" in worse
    assert again == student
    warnings, _ = done("baseline=false", folder="third")
    assert warnings == [majority, worse]
    assert [r.levelno for r in caplog.records if r.getMessage() == worse] == [logging.WARNING]

    monkeypatch.setattr(teachers, "looked_at", lambda *_: None)
    warnings, unseen = done("baseline=false", "report=false", folder="fourth")
    assert warnings == []
    assert unseen == student
    warnings, _ = done("objective=supervised", "report=false", folder="fifth")
    assert warnings == []
