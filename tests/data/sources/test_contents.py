"""What files hold is found out once, and again when they may have changed."""

import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL
import pytest

from distill.data.sources import contents
from distill.data.sources.contents import read_contents
from distill.data.sources.known import KnownFile
from distill.data.sources.pieces import Piece, Pieces
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

    def examine(piece):
        names.append(piece.path.name)
        return real(piece)

    monkeypatch.setattr(contents, "examine", examine)
    return names


def age(path, ns=LONG_AGO):
    os.utime(path, ns=(ns, ns))


def read(root, cache=None, **options):
    """Return digest and fault of each file of a folder."""
    pieces = Pieces.of(root, [Piece(path) for path in sorted(root.iterdir())])
    known = read_contents(pieces, cache=cache, **options)
    assert list(known.names) == [path.name for path in sorted(root.iterdir())]
    return [(digest, known.faults.get(n, "")) for n, digest in enumerate(known.digests.tolist())]


def kept_names(cache, root):
    return sorted(KnownFile(cache, root).load().names)


def test_a_digest_is_of_every_byte_and_of_nothing_else(root):
    expected = [hashlib.blake2b(p.read_bytes(), digest_size=16) for p in sorted(root.iterdir())]
    assert read(root) == [(one.digest(), "") for one in expected]


def test_a_part_of_a_file_is_read_as_a_part(root):
    whole = (root / "0.bmp").read_bytes()
    pieces = Pieces.of(root, [Piece(root / "0.bmp", 3, 5, "in/side.bmp")])
    known = read_contents(pieces)
    assert list(known.names) == ["0.bmp#3+5"]
    assert known.digests.tolist() == [hashlib.blake2b(whole[3:8], digest_size=16).digest()]
    assert list(known.faults) == [0]
    assert pieces[0].shown(root) == "0.bmp/in/side.bmp"
    assert pieces.sizes(pieces.stamps()).tolist() == [5]


def test_what_was_read_is_not_read_again(root, tmp_path, examined):
    first = read(root, tmp_path / "cache")
    assert sorted(examined) == ["0.bmp", "1.bmp", "2.bmp"]
    assert read(root, tmp_path / "cache") == first
    assert len(examined) == 3
    assert read(root, tmp_path / "cache", verify="all") == first
    assert len(examined) == 6


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


def test_what_cannot_be_decoded_is_known_of_the_others_too(root, tmp_path, examined):
    truncated(root / "3.png")
    age(root / "3.png")
    first = read(root, tmp_path / "cache")
    assert [bool(fault) for _, fault in first] == [False, False, False, True]
    assert read(root, tmp_path / "cache") == first
    assert len(examined) == 4
    (root / "1.bmp").unlink()  # the others' places change
    assert read(root, tmp_path / "cache") == [first[0], *first[2:]]
    assert len(examined) == 4


def test_what_was_read_before_an_interruption_is_not_read_again(root, tmp_path, monkeypatch):
    names, real = [], contents.examine

    def interrupted(piece):
        names.append(piece.path.name)
        if names.count("2.bmp") == 1 and piece.path.name == "2.bmp":
            raise KeyboardInterrupt
        return real(piece)

    monkeypatch.setattr(contents, "examine", interrupted)
    monkeypatch.setattr(contents, "AT_ONCE", 1)
    with pytest.raises(KeyboardInterrupt):
        read(root, tmp_path / "cache")
    assert len(read(root, tmp_path / "cache")) == 3
    assert sorted(names) == ["0.bmp", "1.bmp", "2.bmp", "2.bmp"]


def test_another_pillow_reads_again(root, tmp_path, examined, monkeypatch):
    first = read(root, tmp_path / "cache")
    monkeypatch.setattr(PIL, "__version__", "0.1")
    assert read(root, tmp_path / "cache") == first
    assert len(examined) == 6


@pytest.mark.parametrize("damage", [b"", b"{", b"PK\x03\x04", b"\x93NUMPY", b"\xff\xfe"])
def test_a_damaged_file_of_what_was_found_is_ignored(root, tmp_path, examined, damage):
    first = read(root, tmp_path / "cache")
    KnownFile(tmp_path / "cache", root).path.write_bytes(damage)
    assert read(root, tmp_path / "cache") == first
    assert len(examined) == 6
    assert kept_names(tmp_path / "cache", root) == ["0.bmp", "1.bmp", "2.bmp"]


@pytest.mark.parametrize("name", ["names", "name_ends", "stamps", "digests", "faulty", "form"])
@pytest.mark.parametrize("change", [
    lambda array: array[..., :0] if array.ndim else array + 1,
    lambda array: np.zeros(array.shape, "U4"),
    lambda array: array[None],
    lambda array: np.array([{}], dtype=object),  # which only a pickle could hold
])  # fmt: skip
def test_a_file_of_other_arrays_is_ignored(root, tmp_path, examined, name, change):
    truncated(root / "3.png")
    age(root / "3.png")
    first = read(root, tmp_path / "cache")
    path = KnownFile(tmp_path / "cache", root).path
    with np.load(path) as saved:
        arrays = dict(saved)
    arrays[name] = change(arrays[name])
    np.savez(path, **arrays)
    assert read(root, tmp_path / "cache") == first
    assert len(examined) == 8


def test_bytes_that_were_changed_anywhere_end_no_run(root, tmp_path):
    first = read(root, tmp_path / "cache")
    path = KnownFile(tmp_path / "cache", root).path
    whole = path.read_bytes()
    draw = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[draw.integers(len(damaged))] ^= 1 << draw.integers(8)
        path.write_bytes(damaged[: draw.integers(len(damaged)) if draw.random() < 0.3 else None])
        read(root, tmp_path / "cache")
    path.write_bytes(whole)
    assert read(root, tmp_path / "cache") == first


def test_readers_of_different_images_of_a_root_keep_each_others(root, tmp_path, examined):
    for k in range(20):
        write_image(root / f"{k}.bmp", (k, 0, 0))
        age(root / f"{k}.bmp")

    def one(k):
        pieces = Pieces.of(root, [Piece(root / f"{k}.bmp")])
        return read_contents(pieces, cache=tmp_path / "cache")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(one, range(20)))
    assert len(read(root, tmp_path / "cache")) == 20
    assert len(examined) == 20
    (root / "0.bmp").unlink()
    write_image(root / "x.bmp", 0)
    age(root / "x.bmp")
    read(root, tmp_path / "cache")
    assert len(kept_names(tmp_path / "cache", root)) == 20


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
