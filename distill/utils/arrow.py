"""The memory of a Pillow image without a copy of it, by Arrow's C data interface."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

CHANNELS = 4  # that Pillow keeps of a colour pixel; the last means nothing


class ArrowArray(ctypes.Structure):
    """The head of Arrow's structure of that name, up to what is read here."""


_POINTERS = ctypes.POINTER(ctypes.POINTER(ArrowArray))
ArrowArray._fields_ = [
    *((name, ctypes.c_int64) for name in ("length", "null_count", "offset")),
    *((name, ctypes.c_int64) for name in ("n_buffers", "n_children")),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", _POINTERS),
]
_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype = ctypes.c_void_p
_pointer_of.argtypes = [ctypes.py_object, ctypes.c_char_p]


class _Lent:
    """What NumPy makes an array of, which keeps this object and so the image's memory."""

    def __init__(self, capsule: Any, address: int, shape: tuple[int, ...]) -> None:
        self.capsule = capsule
        self.__array_interface__ = {
            "data": (address, False), "shape": shape, "typestr": "|u1", "version": 3,
        }  # fmt: skip


def lent_pixels(image: Image.Image) -> npt.NDArray[np.uint8] | None:
    """Return a colour image's own memory, uint8 `[H, W, 4]`, whose last channel means nothing.

    None where Pillow does not lend it: before 11.2, of another mode than RGB, or where the image
    lies in several pieces, as above 16 MB.

    Reference:
        https://arrow.apache.org/docs/format/CDataInterface.html
    """
    if image.mode != "RGB" or not hasattr(image, "__arrow_c_array__"):
        return None
    image.load()
    try:
        _, capsule = image.__arrow_c_array__()
    except ValueError:  # it lies in several pieces
        return None
    pixels = ArrowArray.from_address(_pointer_of(capsule, b"arrow_array"))
    count = image.height * image.width
    if pixels.n_children != 1 or pixels.length != count:
        return None
    values = pixels.children[0].contents
    if values.length != CHANNELS * count or values.offset or values.n_buffers != 2:
        return None
    shape = image.height, image.width, CHANNELS
    return np.asarray(_Lent(capsule, values.buffers[1], shape))
