"""What is said to a person: errors of other libraries in one line, and names of strangers."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def printable(text: str) -> str:
    """Return a text with its control characters escaped: it may hold names from untrusted files."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
