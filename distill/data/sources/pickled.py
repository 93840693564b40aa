"""Arrays and names in pickles of strangers, of which nothing is run."""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from distill.utils.errors import first_line, printable

INTEGERS = re.compile(r"[iu][1248]")  # NumPy's codes of the types that are read
ORDERS = ("<", ">", "=", "|")  # of their bytes
REMEMBERS = ("PUT", "BINPUT", "LONG_BINPUT")  # operations that number what comes up again


class PickledType:
    """What a pickle says of an array's type: its code, and the order of its bytes."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = text(state[1])


class PickledArray:
    """What a pickle says of an array: its bytes, their type, its shape, and whether by columns."""

    __slots__ = ("by_columns", "content", "kind", "shape")

    def __init__(self, *_: Any) -> None:
        self.content, self.kind, self.shape, self.by_columns = b"", PickledType(""), (0,), False

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.kind, self.by_columns, self.content = state

    def integers(self) -> np.ndarray[Any, Any]:
        """Return the array, read-only.

        Raises:
            ValueError: if it does not hold whole numbers, or not as many as its shape says.
        """
        code, order = text(getattr(self.kind, "code", "")), getattr(self.kind, "order", "")
        if not INTEGERS.fullmatch(code) or order not in ORDERS:
            raise ValueError("an array in it does not hold whole numbers")
        shape, content = self.shape, self.content
        whole = isinstance(shape, tuple) and all(type(side) is int and side >= 0 for side in shape)
        counted = whole and math.prod(shape) * int(code[1]) == len(content)
        if not isinstance(content, bytes | bytearray) or not counted:
            raise ValueError("an array in it has other bytes than its shape says")
        flat = np.frombuffer(content, np.dtype(order + code))
        return flat.reshape(shape, order="F" if self.by_columns else "C")


def from_buffer(content: Any, kind: Any, shape: Any, order: Any, *_: Any) -> PickledArray:
    """Return what a pickle of protocol 5 says of an array."""
    if order not in ("C", "F"):
        raise pickle.UnpicklingError("an array in it is neither by rows nor by columns")
    array = PickledArray()
    array.__setstate__((1, shape, kind, order == "F", content))
    return array


def latin_bytes(content: str, code: str) -> bytes:
    """Return bytes that Python 3 writes as text at protocols below 3."""
    if code != "latin1":
        raise pickle.UnpicklingError(f"it encodes text as {printable(str(code))[:40]}")
    return content.encode("latin1")


class StandIn:
    """What is called in place of a function or class that a pickle names, and cannot be changed."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make

    def __call__(self, *arguments: Any) -> Any:
        """Return what is kept of a call's arguments."""
        return self.make(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes what it names")


ARRAY, TYPE, BUFFER = StandIn(PickledArray), StandIn(PickledType), StandIn(from_buffer)
STAND_INS = {  # of the names in pickles of arrays by NumPy 1 and 2, and of bytes by Python 3
    ("_codecs", "encode"): StandIn(latin_bytes),
    ("numpy", "ndarray"): ARRAY,
    ("numpy", "dtype"): TYPE,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): ARRAY for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): BUFFER for core in ("core", "_core")},
}


class Inert(pickle.Unpickler):
    """Build numbers, strings, containers and `PickledArray`s, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of what a pickle names.

        Raises:
            UnpicklingError: if it has none.
        """
        if (module, name) not in STAND_INS:
            named = printable(f"{module}.{name}")[:80]
            raise pickle.UnpicklingError(f"it would run {named}, and nothing of it was run")
        return STAND_INS[module, name]


def read_pickle(content: bytes) -> Any:
    """Return what a pickle holds; strings of Python 2 are bytes, and arrays `PickledArray`s.

    Nothing is imported, and nothing called but what is defined here: names of NumPy in it stand for
    what keeps the raw bytes, their type and shape, and any other name ends the reading.

    Args:
        content: the pickle, of any protocol.

    Raises:
        ValueError: if it is damaged, or names anything else.

    Example:
        >>> array = read_pickle(pickle.dumps({"data": np.ones((2, 3), np.uint8)}))["data"]
        >>> array.integers().tolist()
        [[1, 1, 1], [1, 1, 1]]
    """
    try:
        check_memory(content)
        return Inert(io.BytesIO(content), encoding="bytes").load()
    except pickle.UnpicklingError as error:
        raise ValueError(first_line(error)) from error
    except Exception as error:  # what is damaged calls, looks up and adds to whatever there is
        raise ValueError(f"it is no pickle, or a damaged one ({first_line(error)})") from error


def check_memory(content: bytes) -> None:
    """Refuse a pickle of a few bytes that numbers what it remembers by billions.

    Python keeps a table as long as the largest number; whoever writes a pickle counts from 0 or 1.

    Raises:
        UnpicklingError: if it does so.
        ValueError: if it is no pickle.
    """
    for count, (operation, number, _) in enumerate(pickletools.genops(content)):
        if operation.name in REMEMBERS and int(number or 0) > count:
            raise pickle.UnpicklingError(f"it is damaged: its item {count} has number {number}")


def text(value: Any) -> str:
    """Return a string, which Python 2 wrote as bytes.

    Raises:
        ValueError: if it is none.
    """
    if isinstance(value, bytes):
        return value.decode()
    if not isinstance(value, str):
        raise ValueError(f"{type(value).__name__} where text belongs")
    return value
