"""Pickles give arrays and names, whoever wrote them, and nothing in them is ever run."""

import doctest
import os
import pickle
import re

import numpy as np
import pytest

from distill.data.sources import pickled
from distill.data.sources.pickled import PickledArray, read_pickle, text
from tests.data.conftest import refusal
from tests.data.sources.pickle_cases import python2, running

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
WAYS = sorted(running("x"))
ARRAYS = {
    "rows": np.arange(24, dtype=np.uint8).reshape(4, 6),
    "columns": np.asfortranarray(np.arange(24, dtype=np.uint8).reshape(4, 6)),
    "cube": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    "labels": np.array([3, -1, 2**40]),
    "big endian": np.array([3, -1, 500], ">i4"),
    "all bytes": np.arange(256, dtype=np.uint8),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_read_of_any_writer(name):
    array = ARRAYS[name]
    for content in (python2(array), *(pickle.dumps(array, n) for n in PROTOCOLS)):
        found = read_pickle(content).integers()
        assert found.dtype == array.dtype
        assert np.array_equal(found, array)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_of_numpy_1_are_read(protocol):
    content = pickle.dumps(ARRAYS["rows"], protocol)
    if protocol >= 4:  # where a frame and a name have a length before them
        content = content[:2] + content[11:]
        content = re.sub(rb".(?=numpy._core)", lambda m: bytes([m[0][0] - 1]), content, flags=re.S)
    older = content.replace(b"numpy._core", b"numpy.core")
    assert older != content
    assert np.array_equal(read_pickle(older).integers(), ARRAYS["rows"])


def test_containers_strings_and_numbers_are_read():
    value = {b"a": [1, b"x"], b"b": {b"c": [2**31 - 1]}}
    assert read_pickle(python2(value)) == value
    value = {"a": (1, 2.5, None, True), "ä": {"x"}, b"c": b"\xff"}
    for protocol in PROTOCOLS:
        kept = value if protocol >= 4 else {k: v for k, v in value.items() if k != "ä"}
        assert read_pickle(pickle.dumps(kept, protocol)) == kept


@pytest.mark.parametrize("way", WAYS)
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    before = {key: one.make for key, one in pickled.STAND_INS.items()}
    refusal(lambda: read_pickle(running(tmp_path / "made")[way]), error=ValueError)
    assert os.listdir(tmp_path) == []
    assert {key: one.make for key, one in pickled.STAND_INS.items()} == before


def test_what_a_pickle_would_have_run_is_named_without_commanding_the_terminal():
    refusal(
        lambda: read_pickle(b"cos\n\x1b[2Jsystem\n."), r"would run os.\x1b[2Jsystem, and nothing"
    )


def test_arrays_of_what_is_no_number_are_refused():
    for array in (np.array([{}]), np.array(["a"]), np.array([1.5]), np.array([1j])):
        for protocol in (2, 4):
            try:
                found = read_pickle(pickle.dumps(array, protocol))
            except ValueError:
                continue
            refusal(found.integers, "does not hold whole numbers")


def test_arrays_with_other_bytes_than_their_shape_says_are_refused():
    whole = python2(ARRAYS["rows"])
    for old, new in ((b"J\x04\x00\x00\x00", b"J\x05\x00\x00\x00"), (b"J\x06", b"J\x00"),
                     (b"u1", b"u8"), (b"J\x04\x00\x00\x00", b"J\xff\xff\xff\xff"),
                     (b"J\x04\x00\x00\x00", b"J\x00\x00\x00\x7f")):  # fmt: skip
        changed = whole.replace(old, new, 1)
        assert changed != whole
        refusal(read_pickle(changed).integers, "other bytes than its shape says")
    array = PickledArray()
    for state in ((1, 4, array.kind, False, b"1234"), (1, (4,), "u1", False, b"1234")):
        array.__setstate__(state)
        refusal(array.integers, "an array in it")


@pytest.mark.parametrize("keep", [0, 1, 3, 20, -30, -1])
def test_a_truncated_pickle_is_no_pickle(keep):
    content = python2({b"data": ARRAYS["rows"]})
    refusal(lambda: read_pickle(content[:keep]), "no pickle, or a damaged one", error=ValueError)


HUGE = b"\xff" * 7 + b"\x3f"


@pytest.mark.parametrize(
    "content",
    [
        *(b"\x80\x02]" + put for put in (b"r\xff\xff\xff\x3f", b"q\x03", b"p1000000000\n")),
        *(b"\x80\x05" + size for size in (b"\x96" + HUGE, b"\x8e" + HUGE, b"T\xff\xff\xff\x7f")),
    ],
)
def test_a_pickle_cannot_ask_for_more_memory_than_it_is_long(content):
    refusal(lambda: read_pickle(content + b"."), error=ValueError)


def test_text_may_be_of_python_2_or_3():
    assert (text(b"caf\xc3\xa9"), text("café")) == ("café", "café")
    refusal(lambda: text(3), "int where text belongs")


def test_the_example_gives_what_it_shows():
    result = doctest.testmod(pickled)
    assert result.attempted == 2
    assert result.failed == 0
