"""What lies elsewhere: how it is reached, and asked again where it does not answer."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from distill.data.sources.errors import ShardLost, reason

T = TypeVar("T")
REMOTE = "://"
# What a server of HTTP answers where there is no such file, and where it may not be read.
MISSING, DENIED = (404, 410), (401, 403)
CONNECT, SILENCE = 30, 60  # seconds until a server is there, and until it sends more
PAUSE, LONGER = 0.1, 4  # seconds before the first retry, and how many times longer each next one


def file_system(address: str) -> tuple[Any, str]:
    """Return what reads an address, and what it calls the place."""
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(address, **connection(address))
    except (ImportError, ValueError) as error:  # a protocol that needs a package, or is none
        raise ValueError(f"data.root={unsigned(address)}: {reason(ValueError(error))}") from error
    return files, str(path)


def is_http(address: str) -> bool:
    """Whether an address is a server's of HTTP."""
    return address.startswith(("http://", "https://"))


def unsigned(address: str) -> str:
    """Return an address without the query that signs one of HTTP."""
    return address.partition("?")[0] if is_http(address) else address


def connection(address: str) -> dict[str, Any]:
    """Return what a client of HTTP is told beside what `fsspec` is configured to.

    It waits for as long as bytes come: aiohttp ends a copy after five minutes, however large.
    """
    if not is_http(address):
        return {}
    from aiohttp import ClientTimeout
    from fsspec.config import conf

    configured = {
        key: value
        for protocol in ("http", "https")
        for key, value in conf.get(protocol, {}).get("client_kwargs", {}).items()
    }
    patience = ClientTimeout(total=None, sock_connect=CONNECT, sock_read=SILENCE)
    options: dict[str, Any] = {"client_kwargs": {"timeout": patience, **configured}}
    signed = unsigned(address) != address  # and is not to be written in another way
    return options | {"encoded": True} if signed else options


def retried(action: Callable[[], T], retries: int, place: str) -> T:
    """Return what an action returns that may fail a few times, with longer pauses between.

    Raises:
        ShardLost: naming the place, if it fails once more, or is not allowed.
    """
    for attempt in range(retries + 1):
        try:
            return action()
        except Exception as error:  # back ends raise whatever they stumble on
            if attempt == retries or denies(error):
                tried = f", tried {attempt + 1} times" if attempt else ""
                raise ShardLost(f"{place} cannot be read: {why(error)}{tried}") from error
            time.sleep(PAUSE * LONGER**attempt)
    raise AssertionError


def if_there(action: Callable[[], T]) -> T | None:
    """Return what an action returns that reads a file elsewhere; None where there is none.

    Only a server that says so makes it missing: one that is busy, refuses or cannot be reached
    leaves it open, and another data set must not come of that.
    """
    try:
        return action()
    except Exception as error:  # back ends raise whatever they stumble on
        met = met_in(error)
        if isinstance(met, FileNotFoundError) or status_of(met) in MISSING:
            return None
        raise met from None


def listed(place: str, retries: int) -> list[str]:
    """Return the addresses of all files below a folder, or of those that a pattern with `*` means.

    Raises:
        ShardLost: if any folder that is there is not listed, after `retries` more tries.
    """
    files, path = file_system(place)
    if is_http(place):
        return list(dict.fromkeys(pages(files, place, retries)))
    search = files.glob if "*" in place else files.find
    names = answered(partial(search, path), retries, place)
    return [str(files.unstrip_protocol(name)) for name in names]


def pages(files: Any, place: str, retries: int) -> Iterator[str]:
    """Yield what a server's pages link to; `fsspec` passes over folders it cannot reach."""
    from fsspec.utils import glob_translate

    above, star, _ = place.partition("*")
    meant = re.compile(glob_translate(place)) if star else None
    depth = place.count("/") if star and "**" not in place else None
    folders = [f"{above.rpartition('/')[0]}/" if star else place]
    while folders:
        folder = folders.pop()
        links = answered(partial(files.ls, folder, detail=False), retries, folder)
        for link in sorted(links):
            if not link.endswith("/"):
                if meant is None or meant.match(link):
                    yield link
            elif depth is None or link.count("/") <= depth:
                folders.append(link)


def answered(listing: Callable[[], list[str]], retries: int, place: str) -> list[str]:
    """Return what a listing says, nothing of a folder that is not there."""
    try:
        return retried(lambda: if_there(listing), retries, place) or []
    except ShardLost as error:
        raise ShardLost(
            f"{error}; if it cannot be listed, give the addresses of the shards, such as "
            "train-{0000..0146}.tar"
        ) from error


def met_in(error: Exception) -> Exception:
    """Return what an HTTP client met: `fsspec` calls any such error a missing file."""
    from aiohttp import ClientError

    cause = error.__cause__
    if not isinstance(error, FileNotFoundError | TimeoutError):
        return error
    return cause if isinstance(cause, ClientError | TimeoutError | ConnectionError) else error


def status_of(error: Exception) -> int | None:
    """Return the status that a server of HTTP answered with, or None of any other error."""
    status = getattr(error, "status", None)
    return status if isinstance(status, int) else None


def denies(error: BaseException | None) -> bool:
    """Whether an error says that something may not be read, and will not be next time."""
    if not isinstance(error, Exception):
        return False
    met = met_in(error)
    return isinstance(met, PermissionError) or status_of(met) in DENIED


def why(error: Exception) -> str:
    """Return why something cannot be read, for people."""
    met = met_in(error)
    status = status_of(met)
    if status is None:
        return reason(met)
    return f"its server answers {status} {getattr(met, 'message', '')}".strip()
