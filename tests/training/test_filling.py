"""Stores that are filled ahead: who fills what, what is said of it, and what is kept by default."""

import logging
import re

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from distill import run
from distill.config import build
from distill.config.overrides import CONF
from distill.data.sources.splits import PARTS
from distill.teacher.records import TopkCost, topk_error
from distill.teacher.teacher import Teacher
from distill.training import cache as kept
from distill.training.filling import Filler, Progress
from distill.training.trainer import single_device

QUICK = ("trainer.max_epochs=2", "teacher.fit.max_epochs=1", "trainer.accelerator=cpu",
         "logger=none", "data.batch_size=64", "data.view.pad=1")  # fmt: skip


@pytest.fixture
def filled(tmp_path, cache):
    """Fill a store, and return how many views the teacher was asked about meanwhile."""

    def fill(*overrides, folder="answers"):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            paths = (f"paths.output_dir={tmp_path}", f"paths.cache={cache}")
            own = f"store.path={tmp_path / folder}"
            cfg = compose("train", overrides=[*paths, *QUICK, own, *overrides])
        run.fill_store(cfg)

    return fill


def contents(folder):
    return {
        f"{path.parent.name}/{path.name}": path.read_bytes() for path in folder.glob("*/view-*.bin")
    }


def test_jobs_that_fill_a_part_each_make_the_store_of_one_that_fills_all(filled, tmp_path, caplog):
    caplog.set_level(logging.INFO, "distill")
    filled("store.views=3", folder="whole")
    assert f"897 images × 3 views × 10 classes in float16: 64.6 kB, 4 files in {tmp_path}" in (
        caplog.text
    )
    for part in (2, 0, 1):
        filled("store.views=3", "store.parts=3", f"store.part={part}", folder="parts")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert len(contents(tmp_path / "whole")) == 4
    said = [r.message for r in caplog.records if "of 3, counted from 0" in r.message]
    assert [line.partition("part ")[2] for line in said] == [
        "2 of 3, counted from 0, is 1 of 4 files, 897 answers",
        "0 of 3, counted from 0, is 2 of 4 files, 997 answers",
        "1 of 3, counted from 0, is 1 of 4 files, 897 answers",
    ]
    caplog.clear()
    filled("store.views=3", folder="parts")
    assert "complete, 0 of 2,791 answers asked for now" in caplog.text


def test_a_view_is_the_same_in_one_file_and_in_several(filled, tmp_path, monkeypatch):
    filled(folder="whole")
    monkeypatch.setattr("distill.teacher.room.FILE_SAMPLES", 300)
    filled(folder="parted")

    def records(folder):
        content = contents(tmp_path / folder)
        joined = b"".join(content[name] for name in sorted(content) if "view-0001" in name)
        return np.frombuffer(joined, np.uint8).reshape(-1, 24)

    whole, parted = records("whole"), records("parted")
    files = list((tmp_path / "parted").glob("*/view-0001-part-*.bin"))
    assert len(files) == -(-len(whole) // 300) > 1
    assert np.array_equal(whole[:, 4:], parted[:, 4:])  # a checksum is of a store and its name


def test_a_mistake_in_the_shares_is_one_line(filled):
    for given, why in (
        (("store.part=1",), r"store\.part=1 needs store\.parts=N"),
        (("store.parts=4",), r"needs store\.part, from 0 to 3: -m 'store\.part=range\(4\)'"),
        (("store.part=4", "store.parts=4"), r"store\.part=4 must lie between 0 and 3"),
        (("store.part=-1", "store.parts=4"), r"store\.part must be a whole number of at least 0"),
        (("store.topk=some",), r"store\.topk must be a whole number of at least 1 or null or auto"),
    ):
        with pytest.raises(ValueError, match=why):
            filled(*given)


def test_a_share_without_files_ends_at_once(filled, tmp_path, caplog):
    caplog.set_level(logging.INFO, "distill")
    filled("store.views=1", "store.part=6", "store.parts=7")
    assert "part 6 of 7, counted from 0, is 0 of 2 files, 0 answers" in caplog.text
    assert not contents(tmp_path / "answers")


def test_what_another_process_fills_is_waited_for_and_then_seen(
    filled, tmp_path, caplog, monkeypatch
):
    caplog.set_level(logging.INFO, "distill")
    waits = []
    claim = kept.TeacherStore.claim
    monkeypatch.setattr("distill.training.filling.time.sleep", waits.append)
    monkeypatch.setattr(
        kept.TeacherStore, "claim", lambda self, part: len(waits) > 1 and claim(self, part)
    )
    filled("store.views=1")
    assert len(waits) == 2
    assert caplog.text.count("other processes fill 2 more files: waiting for them") == 1
    assert "complete, 997 of 997 answers asked for now" in caplog.text


def test_who_was_silent_for_too_long_leaves_the_rest_to_another(filled, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "distill")
    signs = iter([True, False])
    monkeypatch.setattr(kept.TeacherStore, "still_claimed", lambda self: next(signs, True))
    filled("store.views=1")
    assert "another process took over view 0, file 0: this one was silent" in caplog.text
    assert "complete, 997 of 997 answers asked for now" in caplog.text


# What is said.


def test_progress_says_how_long_it_takes_and_when_it_ends(caplog):
    caplog.set_level(logging.INFO, "distill")
    now = [0.0]
    progress = Progress(36_000, clock=lambda: now[0])
    progress.found(1000)
    for _ in range(40):
        now[0] += 2.5  # of which each takes as long as the first
        progress.add(100)
    first, *lines = [r.message for r in caplog.records]
    assert first == (
        "teacher store: 34,500 more answers at 40 images/s, 14 min 22 s at most by this process "
        "alone"
    )
    assert len(lines) == 2  # one every 30 s
    assert re.fullmatch(
        r"teacher store: 8 % \(2,700 of 36,000 answers\), 40 images/s, by "
        r"(\d{4}-\d\d-\d\d )?\d\d:\d\d at the latest", lines[0]
    )  # fmt: skip
    assert (progress.asked, progress.there, progress.left) == (4000, 1000, 31_000)


def test_hours_are_hours(caplog):
    now = [0.0]
    progress = Progress(1_000_000, clock=lambda: now[0])
    for _ in range(3):
        now[0] += 1
        progress.add(5)
    assert progress.rate_text == "5 images/s"
    assert progress.time_text == "55 h 33 min"


def test_the_cost_of_topk_is_the_mean_over_all_answers():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 20, generator=generator) / 3
    cost = TopkCost(4)
    for part in logits.split([7, 20, 3]):
        cost.add(part)
    expected = ", ".join(f"{topk_error(logits, 4, t):.2g} nats at T = {t}" for t in (1, 4, 16))
    assert cost.described() == (
        "keeping 4 of 20 logits moves the teacher's probabilities by a KL of "
        f"{expected} (mean over 30 answers)"
    )
    cost.add(100 * logits)
    assert cost.described().endswith("; a larger store.topk is closer, and null keeps all")


# What is kept by default.


@pytest.fixture
def many_classes(tmp_path, cache):
    """A configuration of pictures of 2,001 classes."""
    images, labels = np.zeros((2001, 8, 8), np.uint8), np.arange(2001)
    arrays = {f"x_{part}": images for part in PARTS} | {f"y_{part}": labels for part in PARTS}
    np.savez(tmp_path / "many.npz", **arrays)

    def make(*overrides):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            paths = (f"paths.output_dir={tmp_path}", f"paths.cache={cache}")
            data = ("data=arrays", f"data.root={tmp_path}/many.npz", "store.views=1",
                    "trainer.accelerator=cpu", f"store.path={tmp_path}/answers")  # fmt: skip
            return compose("train", overrides=[*paths, *data, *overrides])

    return make


def test_of_many_classes_the_largest_logits_are_kept_and_all_of_few(many_classes, filled):
    cfg = many_classes()
    data = build.build_data(cfg)
    assert kept.topk_of(cfg, data) == 32
    assert kept.expected(cfg, data).endswith("kB (store.topk=auto; null keeps all)")
    assert kept.topk_of(many_classes("store.topk=null"), data) is None
    assert kept.topk_of(many_classes("store.topk=5"), data) == 5
    objective = build.build_objective(cfg, data)
    kept.check_store(many_classes("store.max_gb=0.002"), data, objective)  # which sees the 32
    with pytest.raises(ValueError, match=r"2,001 classes in float16: .* more than store\.max_gb"):
        kept.check_store(many_classes("store.max_gb=0.002", "store.topk=null"), data, objective)
    data.source.classes.pop()
    assert kept.topk_of(cfg, data) is None


def test_what_topk_costs_is_said_of_all_that_was_asked(many_classes, tiny, caplog):
    caplog.set_level(logging.INFO, "distill")
    cfg = many_classes()
    data = build.build_data(cfg)
    teacher = Teacher(tiny(num_classes=2001, width=4), batch_size=data.batch_size)
    stores = kept.open_stores(cfg, data, teacher, shared=True)
    Filler(cfg, data, teacher, stores, single_device(cfg)).run()
    for store in stores.values():
        assert store.layout.topk == 32
        store.close()
    asked = len(data.train) + len(data.val)
    (said,) = [r.message for r in caplog.records if "keeping 32 of 2,001" in r.message]
    assert f"(mean over {asked:,} answers)" in said


# Streamed pictures, and other machines.


@pytest.fixture
def pictures(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        for name in ("a", "b"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 256, (40, 48, 3), generator=generator).byte().numpy()
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "photos"


def test_a_store_of_streamed_views_is_used_where_it_was_copied_to(
    filled, pictures, tmp_path, caplog, monkeypatch
):
    caplog.set_level(logging.INFO, "distill")
    given = ("data=folder", "data.image_size=32", "data.batch_size=4", "store.views=3")
    monkeypatch.setattr("tests.training.test_filling.QUICK", QUICK[:-2])
    filled(*given, f"data.root={pictures}")
    assert "complete, 80 of 80 answers asked for now" in caplog.text
    caplog.clear()
    (tmp_path / "answers").rename(tmp_path / "copied")
    elsewhere = tmp_path / "another" / "machine"
    elsewhere.mkdir(parents=True)
    pictures.rename(elsewhere / "pictures")
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    filled(*given, f"data.root={elsewhere / 'pictures'}", folder="copied")
    assert "complete, 0 of 80 answers asked for now" in caplog.text
