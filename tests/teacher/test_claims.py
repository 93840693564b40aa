"""Work that processes divide among themselves: never two at it, and nothing that is left undone."""

import errno
import json
import os
import signal

import pytest
import torch

from distill.teacher import claims
from distill.teacher.claims import Claims, is_running, read_owner, start_of, this_process
from distill.teacher.room import FILE_BYTES, files_of_view
from distill.teacher.store import TeacherStore, store_folder
from distill.teacher.store_folder import IN_FILES, identity
from tests.teacher import store_filler
from tests.teacher.store_filler import FACTS, SHAPE, truth

PARTED = {**SHAPE, "files": 5}
EVERYTHING = torch.arange(SHAPE["samples"])


def old(path, seconds):
    """Let a claim's last sign of life be so long ago."""
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def claims_left(folder):
    return list((folder / "claims").iterdir())


def elsewhere(folder, name="work", number=0, **changes):
    """Leave a claim of another machine."""
    (folder / "claims").mkdir(parents=True, exist_ok=True)
    path = folder / "claims" / f"{name}.{number:04}"
    about = {"machine": "other", "pid": os.getpid(), "started": 1}
    path.write_text(json.dumps({**about, **changes}))
    return path


def test_one_process_holds_a_piece_of_work_until_it_lets_go(tmp_path):
    one, other = Claims(tmp_path), Claims(tmp_path)
    assert one.take("work")
    assert not other.take("work")
    assert other.take("more")
    one.release()
    other.release()
    assert other.take("work")
    other.release()
    assert not list((tmp_path / "claims").iterdir())


def test_a_silent_process_of_another_machine_is_taken_over_and_notices(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0)
    path = elsewhere(tmp_path)
    old(path, 590)
    one = Claims(tmp_path)
    assert not one.take("work")
    old(path, 20)
    assert one.take("work")
    assert one.beat()
    old(tmp_path / "claims" / "work.0001", 700)
    monkeypatch.setattr(claims, "is_running", lambda *_: True)
    other = Claims(tmp_path)
    assert other.take("work")
    assert not one.beat()
    assert other.beat()
    one.release()
    assert [path.name for path in (tmp_path / "claims").iterdir()] == ["work.0002"]
    other.release()
    assert not claims_left(tmp_path)


def test_a_sign_of_life_keeps_what_is_held(tmp_path, monkeypatch):
    one, other = Claims(tmp_path), Claims(tmp_path)
    assert one.take("work")
    path = tmp_path / "claims" / "work.0000"
    old(path, 700)
    assert one.beat()  # too soon after the claim
    monkeypatch.setattr(claims, "BEAT", 0)
    assert one.beat()
    assert not other.take("work")


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"machine": "here"}'])
def test_a_claim_that_does_not_say_whose_it_is_counts_by_its_age(tmp_path, content):
    path = elsewhere(tmp_path)
    path.write_text(content)
    assert not Claims(tmp_path).take("work")
    old(path, 601)
    assert Claims(tmp_path).take("work")


def test_a_number_that_another_process_was_given_later_is_not_the_owners(tmp_path):
    own = this_process()
    assert is_running(own.pid, own.started)
    elsewhere(tmp_path, machine=own.machine, pid=own.pid, started=own.started - 1)
    assert Claims(tmp_path).take("work")
    assert start_of(2**22 + 1) is None


def test_the_claim_of_a_killed_process_is_free_at_once_and_only_for_one(tmp_path, process):
    child, ready = process(store_filler.hold, tmp_path, 30)
    assert ready.recv() == 30
    assert not any(Claims(tmp_path).take(f"work-{k}") for k in range(30))
    child.kill()
    child.join()
    racing = [process(store_filler.race, tmp_path, 30)[1] for _ in range(4)]
    for pipe in racing:
        pipe.recv()
    for pipe in racing:
        pipe.send("now")
    taken = [name for pipe in racing for name in pipe.recv()]
    assert sorted(taken) == sorted(f"work-{k}" for k in range(30))


def test_work_is_free_at_once_wherever_its_process_was_killed(tmp_path, process):
    child, lines = process(store_filler.claim_until_line, tmp_path / "whole", 0)
    count = lines.recv()
    child.join()
    killed = [process(store_filler.claim_until_line, tmp_path / str(line), line)[0]
              for line in range(1, count + 1)]  # fmt: skip
    for line, child in enumerate(killed, start=1):
        child.join()
        assert child.exitcode == -signal.SIGKILL
        one = Claims(tmp_path / str(line))
        assert one.take("work"), line
        one.release()
        assert not claims_left(tmp_path / str(line))  # not even what was begun


def test_claims_hold_where_files_cannot_be_linked(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    one, other = Claims(tmp_path), Claims(tmp_path)
    assert one.take("work")
    assert read_owner(tmp_path / "claims" / "work.0000") == this_process()
    assert not other.take("work")
    one.release()
    assert other.take("work")


def test_a_claim_that_a_network_granted_and_then_denied_holds(tmp_path, monkeypatch):
    link = os.link

    def twice(draft, path):
        for _ in range(2):
            link(draft, path)

    monkeypatch.setattr(os, "link", twice)
    one = Claims(tmp_path)
    assert one.take("work")
    assert [path.name for path in claims_left(tmp_path)] == ["work.0000"]
    monkeypatch.setattr(claims, "is_running", lambda *_: False)
    elsewhere(tmp_path, number=1)
    monkeypatch.setattr(os, "link", link)
    assert not Claims(tmp_path).take("work")


# Stores in several files.


def test_a_view_is_divided_so_that_it_can_be_shared():
    assert files_of_view(1, 20) == files_of_view(65_536, 204) == 1
    assert files_of_view(65_537, 204) == 2
    assert files_of_view(1_281_167, 200) == 20
    assert files_of_view(100_000_000, 200) == 32
    for samples, size in ((40_000_000, 2004), (60_000, 80_004), (3, 2**31)):
        files = files_of_view(samples, size)
        assert -(-samples // files) == 1 or -(-samples // files) * size <= FILE_BYTES


@pytest.mark.parametrize("files", [2, 5, 300])  # the last are more than are kept open
def test_a_view_in_several_files_reads_as_one_in_one(tmp_path, files):
    shape = {**SHAPE, "files": files}
    rows = EVERYTHING[torch.randperm(6000, generator=torch.Generator().manual_seed(0))]
    with TeacherStore(tmp_path, FACTS, **shape) as store:
        written = store.write(1, rows[:4000], truth(1, rows[:4000]))
        logits, there = store.read(1, rows)
        assert torch.equal(logits[:4000], written)
        assert torch.equal(written, truth(1, rows[:4000]))
        assert there.tolist() == [True] * 4000 + [False] * 2000
        assert not store.read(0, rows)[1].any()
    with TeacherStore(tmp_path, FACTS, **shape) as store:
        assert store.filled(1) == 4000
        parts = store.parts(0)
        assert [row for part in parts for row in part.rows] == list(range(6000))
        assert len(parts) == files
    sizes = [path.stat().st_size for path in tmp_path.glob("view-0001-part-*.bin")]
    assert sizes == [len(parts[0].rows) * 80] * files


def test_files_change_places_only_to_be_noticed(tmp_path):
    with TeacherStore(tmp_path, FACTS, **PARTED) as store:
        store.write(0, EVERYTHING, truth(0, EVERYTHING))
    one, other = (tmp_path / f"view-0000-part-{k:04}.bin" for k in (1, 2))
    other.write_bytes(one.read_bytes())
    with TeacherStore(tmp_path, FACTS, **PARTED) as store:
        assert store.filled(0) == 4800
        assert store.damaged == 1200


def test_a_store_of_one_large_file_is_still_read_and_goes_on(tmp_path):
    many = {"samples": 70_000, "classes": 3, "views": 1}
    rows = torch.arange(69_990, 70_000)
    root = tmp_path / "answers"
    new = store_folder(root, FACTS, 70_000, 3)
    before = root / f"answers-{store_filler.name_of(FACTS, 70_000, 3)}"
    assert before != new
    with TeacherStore(before, FACTS, **many, files=1) as store:
        store.write(0, rows, truth(0, rows, 3))
    assert (before / "view-0000.bin").is_file()
    assert store_folder(root, FACTS, 70_000, 3) == before
    with TeacherStore(before, FACTS, **many) as store:
        assert store.files == 1
        assert torch.equal(store.read(0, rows)[0], truth(0, rows, 3))
        store.write(0, rows - 100, truth(0, rows - 100, 3))
        assert store.filled(0) == 20
    with TeacherStore(new, FACTS, **many) as store:
        assert store.files == 2
        about = json.loads((new / "store.json").read_text())
        assert (about["format"], about["files"]) == (IN_FILES, 2)
        assert store.identity == identity(FACTS, 70_000, store.layout, 2)


def test_a_shared_store_is_written_only_where_it_was_claimed(tmp_path):
    with (
        TeacherStore(tmp_path, FACTS, **PARTED, shared=True) as one,
        TeacherStore(tmp_path, FACTS, **PARTED, shared=True) as other,
    ):
        assert not one.writes
        first, second = one.parts(0)[:2]
        assert one.claim(first)
        assert not other.claim(first)
        assert other.claim(second)
        for store in (one, other):
            store.write(0, EVERYTHING, truth(0, EVERYTHING))
        _, there = one.read(0, EVERYTHING)
        assert there.nonzero().flatten().tolist() == list(range(2400))
        one.release()
        one.write(0, EVERYTHING, truth(0, EVERYTHING))
        assert one.filled(0) == 2400
        with TeacherStore(tmp_path, FACTS, **PARTED) as run:  # a training run, meanwhile
            run.write(0, EVERYTHING, truth(0, EVERYTHING))
            assert run.filled(0) == 6000


def test_many_processes_fill_a_store_as_one_does_though_one_is_killed(tmp_path, process):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    child, _ = process(store_filler.share, whole, PARTED, 0.0)
    child.join()
    children = [process(store_filler.share, shared, PARTED, 0.0005)[0] for _ in range(3)]
    while not list(shared.glob("claims/*")):
        pass
    victim, *others = children
    signalled = False
    while not signalled:  # in the midst of its work
        held = [json.loads(path.read_text() or "{}") for path in shared.glob("claims/*.0000")]
        signalled = any(about.get("pid") == victim.pid for about in held)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    for one in others:
        one.join()
        assert one.exitcode == 0
    assert victim.exitcode == -signal.SIGKILL

    def contents(folder):
        return {path.name: path.read_bytes() for path in folder.glob("view-*.bin")}

    assert contents(shared) == contents(whole)
    assert len(contents(whole)) == 15
    assert not claims_left(shared)
    with TeacherStore(shared, FACTS, **PARTED) as store:
        assert store.complete
