"""What is said to a person: errors of other libraries in one line, and names of strangers."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def printable(text: str) -> str:
    """Return a text in which nothing commands a terminal: it may hold names of a stranger's."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
