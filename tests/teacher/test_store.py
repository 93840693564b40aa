"""A store gives back what it was given, or nothing, whatever happened to it in between."""

import json
import logging
import math
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from distill.teacher import records
from distill.teacher.records import Layout, topk_error
from distill.teacher.room import describe, expected_bytes
from distill.teacher.store import TeacherStore, store_folder
from distill.teacher.store_folder import store_name
from tests.conftest import ROOT
from tests.teacher import store_filler
from tests.teacher.store_filler import FACTS, SHAPE, truth

ROWS = torch.arange(20)
SMALL = {"samples": 20, "classes": 5, "views": 2}


def small(folder, facts=FACTS, **options):
    return TeacherStore(folder, facts, **{**SMALL, **options})


def answers(view=0, rows=ROWS, classes=5):
    return truth(view, rows, classes)


@pytest.fixture
def folder(tmp_path):
    """A full store in a folder."""
    with small(tmp_path / "store") as store:
        for view in (0, 1):
            store.write(view, ROWS, answers(view))
        assert store.complete
    return tmp_path / "store"


def numbers(count, classes, largest):
    values = st.floats(-largest, largest, width=32)
    return hnp.arrays(np.float32, (count, classes), elements=values).map(torch.from_numpy)


# What is read is what was written.


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_what_is_read_is_what_was_written_rounded_once(dtype, data):
    classes, count = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 12))
    logits = data.draw(numbers(count, classes, 60000 if dtype == "float16" else 2.0**100))
    rows = torch.tensor(data.draw(st.permutations(range(20))))[:count]
    with tempfile.TemporaryDirectory() as path:
        with small(path, classes=classes, dtype=dtype) as store:
            written = store.write(1, rows, logits)
            torch.testing.assert_close(store.rounded(logits), written, rtol=0, atol=0)
        with small(path, classes=classes, dtype=dtype) as store:
            read, there = store.read(1, ROWS)
            assert (store.filled(0), store.filled(1), store.damaged) == (0, count, 0)
    assert there.tolist() == [row in rows.tolist() for row in range(20)]
    assert read.dtype == written.dtype == torch.float32
    assert torch.equal(read[rows], written)
    assert torch.equal(written, logits.to(getattr(torch, dtype)).float())
    assert not read[~there].any()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_the_largest_logits_are_kept_and_the_mass_of_the_rest_is_exact(dtype, data):
    classes = data.draw(st.integers(2, 30))
    k = data.draw(st.integers(1, classes - 1))
    logits = data.draw(numbers(4, classes, 30))
    layout = Layout(classes, dtype, k)
    fields = layout.encode(logits)
    kept = layout.decode(layout.unpack(layout.pack(fields)))
    largest = logits.topk(k).values
    rounded = largest.to(getattr(torch, dtype)).float()
    assert torch.equal(kept.gather(1, fields["ids"]), rounded)
    assert torch.equal(logits.gather(1, fields["ids"]), largest)
    mass, expected = (z.double().softmax(1).gather(1, fields["ids"]).sum(1) for z in (kept, logits))
    torch.testing.assert_close(mass, expected, rtol=0, atol=1e-6)
    rest = kept.scatter(1, fields["ids"], math.inf).sort().values[:, : classes - k]
    assert (rest == rest[:, :1]).all()


def test_a_hundred_thousand_classes_keep_their_largest_on_disk(tmp_path):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 100_000, generator=generator)
    places = torch.tensor([[0, 65_535, 65_536, 99_999]] * 6)
    logits.scatter_(1, places, torch.tensor([[20.0, 18.0, 16.0, 14.0]] * 6))
    with small(tmp_path, classes=100_000, topk=4) as store:
        assert torch.equal(store.write(0, ROWS[:6], logits), store.rounded(logits))
        assert store.layout.record.itemsize == 4 + 4 * 4 + 4 + 4 * 2
        assert (tmp_path / "view-0000.bin").stat().st_size == 20 * 32
    with small(tmp_path, classes=100_000, topk=4) as store:
        read, there = store.read(0, ROWS)
    assert there.sum() == 6
    assert torch.equal(read[:6].topk(4).indices, places)
    assert not read[6:].any()
    mass, expected = (z.double().softmax(1).gather(1, places).sum(1) for z in (read[:6], logits))
    torch.testing.assert_close(mass, expected, rtol=0, atol=1e-6)


def test_a_record_is_what_the_format_says(folder):
    raw = (folder / "view-0001.bin").read_bytes()
    assert len(raw) == 20 * 16  # a checksum, five halves, and two bytes to a multiple of four
    halves = np.frombuffer(raw, np.uint8).reshape(20, 16)[:, 4:14].copy().view(np.float16)
    assert np.array_equal(halves, answers(1).numpy())
    about = json.loads((folder / "store.json").read_text())
    assert about == {
        "name": store_name({key: about[key] for key in about if key != "name"}),
        "format": 1,
        "samples": 20,
        "classes": 5,
        "dtype": "float16",
        "topk": None,
        "facts": FACTS,
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_answers_come_as_the_teacher_gives_them(tmp_path, dtype):
    with torch.inference_mode():
        logits = answers().to(dtype)
    with small(tmp_path) as store:
        written = store.write(0, ROWS, logits)
        assert torch.equal(store.read(0, ROWS)[0], written)
    assert torch.equal(written, logits.float().half().float())


def test_what_is_read_has_single_precision_where_training_has_less(tmp_path):
    try:
        torch.set_default_dtype(torch.bfloat16)  # as Lightning does under bf16-true
        with small(tmp_path) as store:
            blank, there = store.read(0, ROWS)
            written = store.write(0, ROWS, answers())
            read = store.read(0, ROWS)[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert not there.any()
    assert {t.dtype for t in (blank, written, read)} == {torch.float32}


def test_rows_come_in_the_order_asked_for_as_often_as_asked_for(folder):
    rows = torch.tensor([7, 3, 7, 19, 0])
    with small(folder) as store:
        logits, there = store.read(1, rows)
        assert [part.shape for part in store.read(1, rows[:0])] == [(0, 5), (0,)]
    assert there.all()
    assert torch.equal(logits, answers(1, rows))


def test_of_a_row_given_twice_one_answer_is_kept_whole(tmp_path):
    with small(tmp_path) as store:
        store.write(0, torch.tensor([4, 4]), torch.stack([torch.zeros(5), torch.ones(5)]))
        logits, there = store.read(0, torch.tensor([4]))
        assert there.all()
        assert store.damaged == 0
    assert len(logits.unique()) == 1


def test_logits_and_checksums_of_zero_are_an_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "crc32", lambda *a: 0)
    with small(tmp_path) as store:
        store.write(0, ROWS, torch.zeros(20, 5))
        assert store.filled(0) == 20


def test_what_is_there_is_never_written_again(folder):
    before = (folder / "view-0000.bin").read_bytes()
    with small(folder) as store:
        store.write(0, ROWS, answers() + 1)
        assert torch.equal(store.read(0, ROWS)[0], answers())
    assert (folder / "view-0000.bin").read_bytes() == before


def test_a_longer_run_goes_on_where_a_shorter_one_ended(folder):
    with small(folder, views=4) as store:
        assert [store.filled(view) for view in range(4)] == [20, 20, 0, 0]
        assert not store.complete
        store.write(3, ROWS, answers(3))
        assert torch.equal(store.read(3, ROWS)[0], answers(3))
    with small(folder, views=1) as store:
        assert store.complete


def test_a_record_is_checked_once_per_process(folder, monkeypatch):
    calls = []
    crc32 = records.crc32
    with small(folder) as store:
        monkeypatch.setattr(records, "crc32", lambda *a: calls.append(a) or crc32(*a))
        store.read(0, ROWS[:8])
        once = len(calls)
        store.read(0, ROWS[:8])
        assert len(calls) == once >= 8
        assert store.filled(0) == 20
        assert len(calls) == once + 12


# What cannot be kept is refused.


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("topk", [None, 2])
def test_logits_that_are_not_finite_are_refused(tmp_path, bad, topk):
    logits = answers()
    logits[3, 4] = bad
    with small(tmp_path, topk=topk) as store:
        for use in (store.rounded, lambda z: store.write(0, ROWS, z)):
            with pytest.raises(ValueError, match="not finite"):
                use(logits)
        assert store.filled(0) == 0


@pytest.mark.parametrize("topk", [None, 2])
def test_logits_beyond_float16_are_refused_and_fit_into_float32(tmp_path, topk):
    logits = answers()
    logits[3, 4] = 65_504.0
    with small(tmp_path / "16", topk=topk) as store:
        assert store.write(0, ROWS, logits)[3, 4] == 65_504
        logits[3, 4] = -70_000.0 if topk is None else 70_000.0
        with pytest.raises(ValueError, match=r"reach 70000, .* set store\.dtype=float32"):
            store.write(1, ROWS, logits)
        assert store.filled(1) == 0
    with small(tmp_path / "32", topk=topk, dtype="float32") as store:
        assert store.write(0, ROWS, logits)[3, 4] == logits[3, 4]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dtype": "bfloat16"}, r"store\.dtype=bfloat16 is unknown; there are float16, float32"),
        ({"topk": 0}, r"store\.topk=0 must lie between 1 and 4"),
        ({"topk": 5}, r"store\.topk=5 must lie between 1 and 4: there are 5 classes"),
        ({"views": 0}, r"store\.views must be at least 1, got 0"),
        ({"samples": 0}, r"store\.samples must be at least 1"),
    ],
)
def test_an_impossible_store_is_refused_and_leaves_nothing(tmp_path, options, why):
    with pytest.raises(ValueError, match=why):
        small(tmp_path / "store", **options)
    assert not (tmp_path / "store").exists()


def test_wrong_views_rows_and_shapes_are_refused(folder):
    with small(folder) as store:
        for view in (-1, 2):
            with pytest.raises(ValueError, match=f"no view {view}: they go from 0 to 1"):
                store.read(view, ROWS)
        for row in (-1, 20):
            with pytest.raises(ValueError, match=f"no row {row}: they go from 0 to 19"):
                store.write(0, torch.tensor([3, row]), torch.zeros(2, 5))
        with pytest.raises(ValueError, match="holds 5 classes"):
            store.write(0, ROWS, torch.zeros(20, 6))
        with pytest.raises(ValueError, match="20 rows for 19 answers"):
            store.write(0, ROWS, torch.zeros(19, 5))


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be kept in .*file/store: Not a directory"):
        small(tmp_path / "file" / "store")


def test_a_folder_that_cannot_be_written_to_is_read(folder, caplog):
    (folder / "writer-0.lock").unlink()
    (folder / "writer-0.lock").mkdir()
    with small(folder) as store:
        store.write(0, ROWS, answers())
        assert not store.writes
        assert store.complete
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"{folder} is only read"
    ]


# Room.


def test_the_size_is_known_before(tmp_path):
    assert expected_bytes(50_000, 100, 300) == 50_000 * 300 * 204
    assert expected_bytes(50_000, 100, 300, "float32") == 50_000 * 300 * 404
    assert expected_bytes(10, 1000, 1, topk=10) == 10 * (4 + 40 + 4 + 20)
    assert describe(50_000, 100, 300) == (
        "50,000 images × 300 views × 100 classes in float16: 3.1 GB"
    )
    assert describe(10, 1000, 1, "float32", 5) == (
        "10 images × 1 view × 5 of 1,000 classes in float32: 0.5 kB"
    )
    with small(tmp_path) as store:
        store.write(0, ROWS[:1], answers()[:1])
        size = (tmp_path / "view-0000.bin").stat().st_size
    assert 2 * size == expected_bytes(**SMALL)


def test_a_store_larger_than_allowed_is_refused(tmp_path):
    why = r"50,000 images .* 3\.1 GB\) are more than store\.max_gb=3: raise it, lower store\.views"
    big = {"samples": 50_000, "classes": 100, "views": 300}
    with pytest.raises(ValueError, match=why):
        small(tmp_path / "store", **big, max_gb=3)
    assert not (tmp_path / "store").exists()
    small(tmp_path / "store", **big, max_gb=3.1).close()


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1200))
    with pytest.raises(ValueError, match=r"need 0\.6 kB more, and .* has 1\.2 kB free: lower st"):
        small(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["writer-0.lock"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1280))
    with small(tmp_path) as store:
        store.write(0, ROWS, answers())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 640))
    with small(tmp_path) as store:  # half of it is there already
        assert store.writes


def test_a_disk_that_fills_up_is_said_in_one_line(tmp_path):
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    with small(tmp_path) as store:
        store.write(0, ROWS, answers())
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, unlimited[1]))
        try:
            with pytest.raises(ValueError, match=r"view-0001\.bin cannot grow to 0\.3 kB: .*lower"):
                store.write(1, ROWS, answers(1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert (store.filled(0), store.filled(1)) == (20, 0)
        store.write(1, ROWS, answers(1))
        assert store.complete


def test_the_space_of_a_view_is_taken_when_it_begins(tmp_path):
    with small(tmp_path, samples=60_000) as store:
        store.write(1, ROWS[:1], answers()[:1])
    assert not (tmp_path / "view-0000.bin").exists()
    assert (tmp_path / "view-0001.bin").stat().st_blocks * 512 >= 60_000 * 16


# Whose answers they are.


def test_any_other_fact_is_another_store(tmp_path):
    asked = dict(root=tmp_path, facts=FACTS, samples=20, classes=5, dtype="float16", topk=None)
    others = [
        {"facts": {**FACTS, "seed": 4}},
        {"facts": {**FACTS, "more": None}},
        {"samples": 21},
        {"classes": 6},
        {"dtype": "float32"},
        {"topk": 2},
    ]
    folders = [store_folder(**{**asked, **other}) for other in [{}, *others]]
    assert len(set(folders)) == 7
    assert store_folder(**{**asked, "facts": dict(reversed(FACTS.items()))}) == folders[0]
    assert folders[0].parent == tmp_path
    assert len(folders[0].name) == len("answers-") + 16
    assert store_name({"b": 1, "a": 2}) == store_name({"a": 2, "b": 1}) != store_name({"a": 2})


@pytest.mark.parametrize(
    ("facts", "options", "why"),
    [
        ({**FACTS, "seed": 4}, {}, "seed is 3 there, and 4 here"),
        ({"teacher": "sine"}, {}, "seed is 3 there, and None here"),
        (FACTS, {"dtype": "float32"}, "dtype is 'float16' there, and 'float32' here"),
        (FACTS, {"classes": 6}, "classes is 5 there, and 6 here"),
        (FACTS, {"samples": 30}, "samples is 20 there, and 30 here"),
        (FACTS, {"topk": 2}, "topk is None there, and 2 here"),
    ],
)
def test_a_folder_of_other_answers_is_refused_and_left_as_it_is(folder, facts, options, why):
    with pytest.raises(ValueError, match="holds other answers of a teacher") as refused:
        small(folder, facts, **options)
    with small(folder) as store:
        assert str(refused.value).endswith(why)
        assert store.writes  # the lock was given back
        assert store.complete


def test_facts_that_json_changes_are_the_same_facts_again(tmp_path):
    facts = {"size": (3, 32), 1: None, "path": tmp_path}
    small(tmp_path, facts).close()
    small(tmp_path, facts).close()


def test_records_of_another_store_or_view_or_row_do_not_pass(folder, tmp_path):
    with small(tmp_path / "other", {"teacher": "cosine"}) as store:
        shutil.copy(folder / "view-0000.bin", tmp_path / "other" / "view-0000.bin")
        assert (store.filled(0), store.damaged) == (0, 20)
    shutil.copy(folder / "view-0000.bin", folder / "view-0001.bin")
    with small(folder) as store:
        assert (store.filled(0), store.filled(1), store.damaged) == (20, 0, 20)
    path = folder / "view-0000.bin"
    raw = path.read_bytes()
    path.write_bytes(raw[16:] + raw[:16])
    with small(folder) as store:
        assert (store.filled(0), store.damaged) == (0, 20)


# Damage.


def spoil(path, offset, change=0xFF):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ change]))


@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}, {"topk": 2}])
def test_any_flipped_bit_is_noticed_said_once_and_repaired(tmp_path, options, caplog):
    chosen = random.Random(0)
    with small(tmp_path, **options) as store:
        expected = store.write(0, ROWS, answers())
        size = store.layout.record.itemsize
    for _ in range(12):
        caplog.clear()
        offsets = {chosen.randrange(20) * size + chosen.randrange(size) for _ in range(3)}
        for offset in offsets:
            spoil(tmp_path / "view-0000.bin", offset, 1 << chosen.randrange(8))
        broken = sorted({offset // size for offset in offsets})
        with small(tmp_path, **options) as store:
            for _ in range(2):
                logits, there = store.read(0, ROWS)
                assert torch.nonzero(~there).flatten().tolist() == broken
                assert not logits[~there].any()
                assert torch.equal(logits[there], expected[there])
            assert store.damaged == len(broken)
            store.write(0, ROWS[~there], answers()[~there])
            assert torch.equal(store.read(0, ROWS)[0], expected)
            assert store.filled(0) == 20
        (record,) = caplog.records
        assert (record.name, record.levelno) == ("distill.teacher.store", logging.WARNING)
        assert f"view 0, row {broken[0]} is damaged ({len(broken)} of" in record.getMessage()


def test_a_truncated_file_lacks_its_end_and_is_filled_again(folder, caplog):
    path = folder / "view-0001.bin"
    whole = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(7 * 16 + 5)
    with small(folder) as store:
        assert not store.read(1, ROWS)[1].any()  # none of a file that is not of its size
        assert torch.equal(store.read(0, ROWS)[0], answers(0))
        store.write(1, ROWS, answers(1))
        assert store.complete
        assert store.damaged == 1  # the row that was cut
        assert "view 1, row 7 is damaged" in caplog.text
    assert path.read_bytes() == whole


def test_a_record_not_written_to_its_end_is_absent_not_damaged(folder):
    path = folder / "view-0000.bin"
    raw = bytearray(path.read_bytes())
    raw[3 * 16 : 3 * 16 + 4] = bytes(4)
    raw[3 * 16 + 8 : 4 * 16] = bytes(8)
    path.write_bytes(raw)
    with small(folder) as store:
        assert (store.filled(0), store.damaged) == (19, 0)
        assert not store.read(0, ROWS)[0][3].any()


def without(path):
    path.unlink()


def emptied(path):
    path.write_bytes(b"")


def flipped(path):
    path.write_text(path.read_text().replace('"seed": 3', '"seed": 7'))


def of_other_kind(path):
    path.write_text("[1]")


@pytest.mark.parametrize("damage", [without, emptied, flipped, of_other_kind])
def test_a_folder_that_does_not_say_what_it_holds_is_made_anew(folder, damage):
    with small(folder) as writer:
        damage(folder / "store.json")
        with small(folder) as reader:
            assert reader.filled(0) == 0
        assert writer.filled(0) == 20  # it knows whose they are
    with small(folder) as store:
        assert (store.filled(0), store.damaged) == (0, 0)
        assert not list(folder.glob("view-*"))
        store.write(0, ROWS, answers())
    with small(folder) as store:
        assert store.filled(0) == 20


# Several processes.


def test_one_writes_and_others_read_until_it_lets_go(tmp_path):
    first, second = small(tmp_path), small(tmp_path)
    assert (first.writes, second.writes) == (True, False)
    assert torch.equal(second.write(0, ROWS, answers()), answers())
    assert not list(tmp_path.glob("view-*"))
    first.write(0, ROWS[:5], answers()[:5])
    assert second.read(0, ROWS)[1].sum() == 5
    first.write(0, ROWS[5:9], answers()[5:9])
    assert second.read(0, ROWS)[1].sum() == 9
    second.write(0, ROWS, answers())
    assert second.filled(0) == 9
    first.close()
    second.write(0, ROWS, answers())
    assert second.writes
    assert second.filled(0) == 20
    with small(tmp_path) as third:
        assert (third.writes, third.filled(0)) == (False, 20)
    second.close()


def test_ranks_write_side_by_side_once_the_first_has_made_the_folder(tmp_path):
    with small(tmp_path, rank=1) as one:
        one.write(0, ROWS[1::2], answers()[1::2])
        assert not list(tmp_path.glob("view-*"))
        with small(tmp_path) as zero:
            assert zero.writes
            assert one.writes
            zero.write(0, ROWS[::2], answers()[::2])
            one.write(0, ROWS[1::2], answers()[1::2])
            for store in (zero, one):
                assert torch.equal(store.read(0, ROWS)[0], answers())


@pytest.mark.slow
def test_a_reader_in_another_process_sees_only_whole_answers(tmp_path):
    with store_filler.opened(tmp_path) as store:
        command = [sys.executable, "-m", "tests.teacher.store_filler", tmp_path]
        reader = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert reader.stdout.readline() == "reads\n"
        for view in range(store.views):
            for rows in torch.randperm(store.samples).split(16):
                store.write(view, rows, truth(view, rows))
        partial = reader.communicate(timeout=60)[0]
    assert reader.returncode == 0
    assert int(partial) > 0


@pytest.mark.slow
def test_a_writer_that_is_killed_again_and_again_leaves_a_correct_store(tmp_path, process):
    chosen = random.Random(0)
    everything = torch.arange(SHAPE["samples"])
    filled = [0]
    for attempt in range(20):
        child, ready = process(store_filler.fill, tmp_path, attempt)
        assert ready.recv()  # the lock of a killed writer is free
        time.sleep(chosen.uniform(0, 0.03))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        with store_filler.opened(tmp_path) as store:
            filled.append(sum(store.filled(view) for view in range(store.views)))
            for view in range(store.views):
                logits, there = store.read(view, everything)
                assert torch.equal(logits[there], truth(view, everything[there]))
            assert store.damaged == 0
    assert filled == sorted(filled)
    assert 0 < filled[-1] < 3 * len(everything)
    child, _ = process(store_filler.fill, tmp_path, 0)
    child.join()
    with store_filler.opened(tmp_path) as store:
        assert store.complete
        for view in range(store.views):
            assert torch.equal(store.read(view, everything)[0], truth(view, everything))


def test_a_kill_at_any_line_leaves_a_correct_store(tmp_path, process):
    rows = torch.arange(8)
    _, lines = process(store_filler.write_until_line, tmp_path / "whole", 0)
    count = lines.recv()
    for last in [*range(1, count - 50, 8), *range(count - 50, count)]:
        child, _ = process(store_filler.write_until_line, tmp_path / str(last), last)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        with store_filler.opened(tmp_path / str(last)) as store:
            assert store.writes
            logits, there = store.read(0, rows)
            assert torch.equal(logits[there], truth(0, rows[there]))
            store.write(0, rows, truth(0, rows))
            assert torch.equal(store.read(0, rows)[0], truth(0, rows))
            assert store.damaged == 0


# What top-k costs.


def test_the_error_of_topk_is_the_divergence_from_the_full_answer():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(16, 12, generator=generator) * 3
    for temperature in (0.5, 1.0, 4.0):
        expected = 0.0
        for row in logits.double():
            order = row.argsort(descending=True)
            kept = row.clone()
            kept[order[4:]] = row[order[4:]].logsumexp(0) - math.log(8)
            full, part = ((z / temperature).log_softmax(0) for z in (row, kept))
            expected += float((full.exp() * (full - part)).sum()) / 16
        assert topk_error(logits, 4, temperature) == pytest.approx(expected, rel=1e-4)


def test_the_error_of_topk_falls_with_k_to_nothing():
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)) * 4
    errors = [topk_error(logits, k, 2.0) for k in (1, 5, 20, 49)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(0, abs=1e-6)
    assert topk_error(torch.zeros(3, 7), 2) == pytest.approx(0, abs=1e-7)
