"""Runs that ask the teacher once: the same students, from the store as from a live teacher."""

import logging
import re

import pytest
import torch
from hydra import compose, initialize_config_dir

from distill import run
from distill.config import build
from distill.config.overrides import CONF
from distill.teacher.teacher import Teacher
from distill.training import cache, fit, teachers

QUICK = ("trainer.max_epochs=2", "trainer.limit_train_batches=4", "teacher.fit.max_epochs=1",
         "trainer.accelerator=cpu", "logger=none", "callbacks=none", "baseline=false",
         "report=false", "data.batch_size=30")  # fmt: skip
EXACT = ("store=disk", "store.dtype=float32")


@pytest.fixture
def fitted(tmp_path, cache, monkeypatch):
    """Train, and return the student's weights and how often training asked the teacher."""
    asked = []
    answer = Teacher.__call__
    monkeypatch.setattr(
        Teacher, "__call__", lambda self, *given: asked.append(1) or answer(self, *given)
    )

    def trained(*overrides, task=fit.fit):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            paths = (f"paths.output_dir={tmp_path}", f"paths.cache={cache}")
            stored = () if "store=off" in overrides else (f"store.path={tmp_path / 'answers'}",)
            cfg = compose("train", overrides=[*paths, *QUICK, *overrides, *stored])
        if task is run.fill_store:
            return task(cfg)
        data = build.build_data(cfg)
        teacher = teachers.prepare_teacher(cfg, data)
        asked.clear()
        student, _ = fit.fit(cfg, data, teacher)
        return student.student.state_dict(), len(asked)

    return trained


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_run_from_the_store_is_the_run_with_a_live_teacher(fitted):
    live, asked_live = fitted("store=off")
    first, asked_first = fitted(*EXACT)
    second, asked_second = fitted(*EXACT)
    assert same(live, first)
    assert same(live, second)
    assert asked_live > 0
    assert asked_first < asked_live  # clean views are asked for once
    assert asked_second == 0
    assert fitted(*EXACT, "trainer.max_epochs=3")[1] == 4  # the third epoch


def test_samples_that_balance_repeats_are_asked_once_and_known_after(fitted):
    balanced = ("data.balance=0", "condition=long_tail", "condition.imbalance=9")
    live, asked_live = fitted("store=off", *balanced)
    first, asked_first = fitted(*EXACT, *balanced)
    second, asked_second = fitted(*EXACT, *balanced)
    assert same(live, first)
    assert same(live, second)
    assert asked_live >= asked_first > asked_second == 0


def test_half_precision_trains_on_the_same_numbers_when_filling_as_when_reading(fitted):
    live, _ = fitted("store=off")
    first, _ = fitted("store=auto")
    second, asked = fitted("store=auto")
    assert same(first, second)
    assert asked == 0
    assert not same(live, first)
    for name, value in live.items():  # eight steps apart by rounding of 2^-11
        if value.is_floating_point():
            assert (value - first[name]).abs().max() < 0.5, name


def test_views_come_again_and_a_store_filled_ahead_leaves_nothing_to_ask(fitted, caplog):
    caplog.set_level(logging.INFO, "distill")
    live, _ = fitted("store=off", "store.views=1", "data.view.pad=2")
    fitted(*EXACT, "store.views=1", "data.view.pad=2", task=run.fill_store)
    assert "complete, 997 of 997 answers asked for now" in caplog.text
    stored, asked = fitted(*EXACT, "store.views=1", "data.view.pad=2")
    assert asked == 0
    assert same(live, stored)
    new, _ = fitted("store=off", "data.view.pad=2")
    assert not same(live, new)  # without store.views the second epoch shows other views
    caplog.clear()
    fitted(*EXACT, "store.views=1", "data.view.pad=2", task=run.fill_store)
    assert "complete, 0 of 997 answers asked for now" in caplog.text


def test_what_topk_costs_is_said_once(fitted, caplog):
    caplog.set_level(logging.INFO, "distill")
    fitted("store=disk", "store.topk=3")
    said = [r.message for r in caplog.records if "keeping 3 of 10 logits" in r.message]
    assert len(said) == 1
    costs = [float(cost) for cost in re.findall(r"([\d.e-]+) nats", said[0])]
    assert len(costs) == 3
    assert all(cost > 0 for cost in costs)
    caplog.clear()
    fitted("store=disk", "store.topk=3")
    assert "keeping" not in caplog.text


def test_damage_is_said_and_asked_again(fitted, tmp_path, caplog):
    first, _ = fitted(*EXACT)
    largest = max(tmp_path.glob("answers/*/view-0000.bin"), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    written = next(i for i, byte in enumerate(content) if byte) // 44 * 44
    content[written + 8] ^= 0xFF
    largest.write_bytes(bytes(content))
    second, asked = fitted(*EXACT)
    assert asked == 1
    assert same(first, second)
    assert "damaged" in caplog.text
    assert fitted(*EXACT)[1] == 0


def test_mixed_views_are_stored_like_any_other(fitted):
    mixed = ("data.view.mixup=0.4", "data.view.cutmix=1.0", "data.view.flip=true")
    live, _ = fitted("store=off", *mixed)
    assert same(live, fitted(*EXACT, *mixed)[0])
    again, asked = fitted(*EXACT, *mixed)
    assert asked == 0
    assert same(live, again)
    assert not same(live, fitted("store=off")[0])


@pytest.mark.parametrize("change", [
    "data.view.pad=3", "data.seed=5", "data.split_seed=1", "trainer.precision=bf16-mixed",
    "data.batch_size=20", "teacher.fit.seed=1", "store.dtype=float16", "store.topk=3",
    "data.image_size=24", "teacher.precision=bf16", "teacher.precision=fp32",
    "teacher.batch_size=15",
])  # fmt: skip
def test_whatever_decides_an_answer_makes_another_store(fitted, tmp_path, change):
    def folders():
        return {path.name for path in tmp_path.glob("answers/*")}

    fitted(*EXACT, "trainer.limit_train_batches=1", "trainer.limit_val_batches=1")
    before = folders()
    fitted(*EXACT, change, "trainer.limit_train_batches=1", "trainer.limit_val_batches=1")
    assert len(before) == 2
    # The clean validation views know nothing of the seed of the training views.
    assert len(folders() - before) == (1 if change == "data.seed=5" else 2)


def test_what_cannot_be_stored_is_refused_or_left(fitted, caplog):
    caplog.set_level(logging.INFO, "distill")
    for options, message in (
        (("objective=hint",), "only the teacher's logits are kept"),
        (("store.max_gb=1e-6",), r"store\.max_gb"),
        (("store.topk=10",), r"store\.topk=10"),
        (("store.dtype=int8",), r"store\.dtype=int8"),
    ):
        with pytest.raises(ValueError, match=message):
            fitted("store=disk", *options)
    fitted("store=auto", "objective=hint")
    assert "teacher store: off (store: this objective compares features" in caplog.text


def test_the_same_padded_batch_gives_the_same_answer_to_any_number_of_views(tiny):
    torch.manual_seed(0)
    teacher = Teacher(tiny(width=32), batch_size=16)
    views = torch.rand(37, 1, 8, 8)
    whole = teacher(views)
    assert whole.shape == (37, 4)
    for size in (1, 7, 16, 20):
        assert torch.equal(torch.cat([teacher(part) for part in views.split(size)]), whole)


def test_the_digest_tells_weights_and_structures_apart(tiny):
    def digest(model):
        return cache.digest(model.state_dict(), repr(model))

    torch.manual_seed(0)
    one, other = torch.nn.Sequential(tiny()), torch.nn.Sequential(tiny())
    assert digest(one) != digest(other)
    other.load_state_dict(one.state_dict())
    assert digest(one) == digest(other)
    other[0].body[2] = torch.nn.GELU()
    assert digest(one) != digest(other)


def test_a_preview_is_a_picture(tmp_path, cache):
    from PIL import Image

    def start(*overrides):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            paths = (f"paths.output_dir={tmp_path}", f"paths.cache={cache}")
            return run.train(compose("train", overrides=[*paths, *overrides]))

    assert start("preview.enabled=true", "preview.epochs=8", "data.view.rotate=10") is None
    with Image.open(tmp_path / "views.png") as picture:
        assert picture.size[0] > 3 * 96
    assert not (tmp_path / "summary.json").exists()
    with pytest.raises(ValueError, match="no training image 5000"):
        start("preview.enabled=true", "preview.row=5000")
