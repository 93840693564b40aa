"""What files hold is found out once, and again when they may have changed."""

import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from distill.data.sources import contents
from distill.data.sources.contents import Kept, Piece, read_contents
from tests.data.conftest import truncated, write_image

LONG_AGO = 1_600_000_000_000_000_000


@pytest.fixture
def root(tmp_path):
    for k in range(3):
        write_image(tmp_path / "photos" / f"{k}.bmp", (k, 0, 0))
        age(tmp_path / "photos" / f"{k}.bmp")
    return tmp_path / "photos"


@pytest.fixture
def examined(monkeypatch):
    """The pieces that were read, by name."""
    names, real = [], contents.examine

    def examine(piece, decode):
        names.append(piece.path.name)
        return real(piece, decode)

    monkeypatch.setattr(contents, "examine", examine)
    return names


def age(path, ns=LONG_AGO):
    os.utime(path, ns=(ns, ns))


def read(root, cache=None, **options):
    return read_contents(root, [Piece(p) for p in sorted(root.iterdir())], cache=cache, **options)


def test_a_digest_is_of_every_byte_and_of_nothing_else(root):
    expected = [hashlib.blake2b(p.read_bytes(), digest_size=16) for p in sorted(root.iterdir())]
    assert [one.digest for one in read(root)] == [one.hexdigest() for one in expected]
    assert {one.fault for one in read(root)} == {""}
    assert {one.fault for one in read(root, decode=False)} == {None}


def test_a_part_of_a_file_is_read_as_a_part(root):
    whole = (root / "0.bmp").read_bytes()
    (one,) = read_contents(root, [Piece(root / "0.bmp", 3, 5)], decode=False)
    assert one.digest == hashlib.blake2b(whole[3:8], digest_size=16).hexdigest()


def test_what_was_read_is_not_read_again(root, tmp_path, examined):
    first = read(root, tmp_path / "cache")
    assert sorted(examined) == ["0.bmp", "1.bmp", "2.bmp"]
    assert read(root, tmp_path / "cache") == first
    assert read(root, tmp_path / "cache", decode=False) == first
    assert len(examined) == 3


def test_a_file_of_another_time_size_or_inode_is_read_again(root, tmp_path, examined):
    first = read(root, tmp_path / "cache")
    write_image(root / "1.bmp", (99, 0, 0))  # of the same size
    age(root / "1.bmp", LONG_AGO + 1)
    second = read(root, tmp_path / "cache")
    assert examined[3:] == ["1.bmp"]
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, False, True]
    write_image(root / "other", (77, 0, 0), format="bmp")
    (root / "other").replace(root / "2.bmp")  # as rsync does, which can keep times, too
    age(root / "2.bmp")
    assert read(root, tmp_path / "cache")[2] != second[2]


def test_a_change_that_restores_size_and_time_is_seen(root, tmp_path):
    first = read(root, tmp_path / "cache")
    with (root / "0.bmp").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    age(root / "0.bmp")
    assert read(root, tmp_path / "cache")[0] != first[0]


def test_nothing_is_kept_of_a_file_that_has_just_changed(root, tmp_path, examined):
    os.utime(root / "0.bmp")
    for _ in range(2):
        read(root, tmp_path / "cache")
    assert sorted(examined) == ["0.bmp", "0.bmp", "1.bmp", "2.bmp"]


def test_only_hashes_are_no_proof_that_images_can_be_decoded(root, tmp_path, examined):
    truncated(root / "3.png")
    age(root / "3.png")
    assert not any(one.fault for one in read(root, tmp_path / "cache", decode=False))
    faults = [one.fault for one in read(root, tmp_path / "cache")]
    assert [bool(fault) for fault in faults] == [False, False, False, True]
    assert len(examined) == 8
    assert [one.fault for one in read(root, tmp_path / "cache")] == faults
    assert len(examined) == 8


def test_another_pillow_decodes_again_but_hashes_hold(root, tmp_path, examined, monkeypatch):
    first = read(root, tmp_path / "cache")
    monkeypatch.setattr(contents.PIL, "__version__", "0.1")
    assert len(read(root, tmp_path / "cache", decode=False)) == 3
    assert len(examined) == 3
    assert read(root, tmp_path / "cache") == first
    assert len(examined) == 6


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"form": 1}', b"\xff\xfe", b'"x"',
    b'{"form": 1, "pillow": "1", "images": {"0.bmp": [1]}}',
    b'{"form": 1, "pillow": "1", "images": [7]}'])  # fmt: skip
def test_a_damaged_file_of_what_was_found_is_ignored(root, tmp_path, examined, damage):
    first = read(root, tmp_path / "cache")
    kept = Kept(tmp_path / "cache", root).path
    kept.write_bytes(damage)
    assert read(root, tmp_path / "cache") == first
    assert len(examined) == 6
    assert sorted(json.loads(kept.read_text())["images"]) == ["0.bmp", "1.bmp", "2.bmp"]


def test_readers_of_different_images_of_a_root_keep_each_others(root, tmp_path, examined):
    for k in range(20):
        write_image(root / f"{k}.bmp", (k, 0, 0))
        age(root / f"{k}.bmp")

    def one(k):
        return read_contents(root, [Piece(root / f"{k}.bmp")], cache=tmp_path / "cache")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(one, range(20)))
    assert len(read(root, tmp_path / "cache")) == 20
    assert len(examined) == 20
    (root / "0.bmp").unlink()
    write_image(root / "x.bmp", 0)
    age(root / "x.bmp")
    read(root, tmp_path / "cache")
    assert len(json.loads(Kept(tmp_path / "cache", root).path.read_text())["images"]) == 20


def test_a_cache_that_cannot_be_written_is_said(root, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.INFO):
        assert len(read(root, tmp_path / "file")) == 3
    assert "is not kept" in caplog.text


def test_long_reading_is_announced(root, caplog, monkeypatch):
    monkeypatch.setattr(contents, "MANY", 3)
    with caplog.at_level(logging.INFO):
        read(root)
    assert f"{root}: reading 3 images once" in caplog.text
