"""Resolves host names, each in its own thread, because a lookup by the operating system cannot be cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future

THREAD_NAME, RESOLVE_SECONDS, MAX_LOOKUPS = "egress-resolver", 3.0, 256
_lookups = threading.BoundedSemaphore(MAX_LOOKUPS)  # running lookups, including abandoned ones

Resolver = Callable[[str, int], Awaitable[list[str]]]
"""A function that returns the addresses of a host as text, or raises `Unresolved`."""


class Unresolved(Exception):
    """Raised when a host name has no address, or when its name servers do not answer in time."""


async def resolve(host: str, port: int) -> list[str]:
    """Return the addresses that the operating system reports for a host. Notations such as `0x7f.1` are also resolved.

    Raise `Unresolved` if the system reports no address within 3 s, or while `MAX_LOOKUPS` other lookups are running.
    """
    answer: Future[list[str]] = Future()
    answer.set_running_or_notify_cancel()  # a caller that times out must not cancel the lookup
    if _lookups.acquire(blocking=False):
        threading.Thread(target=_look_up, args=(host, port, answer), name=THREAD_NAME, daemon=True).start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RESOLVE_SECONDS):
                if found := await asyncio.wrap_future(answer):
                    return found
    raise Unresolved(f"{host} does not resolve")


def _look_up(host: str, port: int, answer: Future[list[str]]) -> None:
    found: list[str] = []
    try:
        with contextlib.suppress(OSError, UnicodeError):
            places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found = list(dict.fromkeys(str(place[0]) for _, _, _, _, place in places))
    finally:
        _lookups.release()
        answer.set_result(found)


def is_local(text: str) -> bool:
    """Return whether an address belongs to this machine, that is, whether a socket can be bound to it."""
    family = socket.AF_INET6 if ipaddress.ip_address(text.partition("%")[0]).version == 6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((text, 0))
    except OSError:
        return False
    return True
