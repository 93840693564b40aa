"""Pickles as Python 2 wrote them, opcode by opcode, and ones that would run code."""

import os
import pickle
import struct


def python2(value):
    """Return a value as Python 2 and its NumPy pickled it at protocol 2."""
    return b"\x80\x02" + opcodes(value) + b"."


def opcodes(value):
    if isinstance(value, bytes):  # its `str`
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(opcodes, value)) + b"e"
    if isinstance(value, dict):
        items = b"".join(opcodes(key) + opcodes(held) for key, held in value.items())
        return b"}(" + items + b"u"
    return array_opcodes(value)


def array_opcodes(array):
    shape = b"(" + b"".join(opcodes(side) for side in array.shape) + b"t"
    code = opcodes(array.dtype.str[1:].encode()) + b"K\x00K\x01\x87"
    kind = b"cnumpy\ndtype\n" + code + b"R"
    order = opcodes(array.dtype.str[:1].encode())
    kind += b"(K\x03" + order + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    by_columns = array.flags.f_contiguous and not array.flags.c_contiguous
    content = opcodes(array.tobytes("F" if by_columns else "C"))
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + opcodes(b"b")
    state = b"(K\x01" + shape + kind + (b"\x88" if by_columns else b"\x89") + content + b"tb"
    return empty + b"\x87R" + state


class Runs:
    """What would make a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def running(path):
    """Return name → a pickle that would make this folder, each by another way."""
    name = os.mkdir.__module__.encode()  # posix, or nt
    text = str(path).encode()
    word = b"U" + bytes([len(text)]) + text
    call = name + b"\nmkdir\n"
    return {
        **{f"reduce{n}": pickle.dumps(Runs(path), n) for n in range(pickle.HIGHEST_PROTOCOL + 1)},
        "in a list": pickle.dumps([0, {"data": Runs(path)}], 2),
        "instance": b"(S'" + text + b"'\ni" + call + b".",
        "object": b"(c" + call + b"S'" + text + b"'\no.",
        "new": b"\x80\x02c" + call + word + b"\x85\x81.",
        "import": b"c__builtin__\n__import__\n(S'os'\ntR.",
        "attribute": b"cnumpy.core.multiarray\nfromfile\n(S'" + text + b"'\ntR.",
        "inner name": pickle.dumps(Runs(path), 4).replace(b"mkdir", b"path."),
        "evaluation": b'cbuiltins\neval\n(S\'__import__("os").mkdir("x")\'\ntR.',
        "state of a function": b"cnumpy.core.multiarray\n_reconstruct\n}(U\x04makecos\nsystem\nub.",
        "state of a stand-in": b"c_codecs\nencode\nN}U\x04makeU\x01xs\x86b.",
        "other code": b"c_codecs\nencode\n(X\x01\x00\x00\x00xX\x05\x00\x00\x00rot13tR.",
        "persistent": b"Pwhatever\n.",
        "extension": b"\x80\x02\x82\x01.",
        "buffer": b"\x80\x05\x97.",
    }
