"""Resolves host names, each in its own thread, because the system call cannot be cancelled.

The number of lookups per zone is limited, so a name server that does not answer delays only names of its own zone.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Future

THREAD_NAME, RESOLVE_SECONDS, POLL_SECONDS = "egress-resolver", 3.0, 0.01
MAX_LOOKUPS, MAX_LOOKUPS_PER_ZONE = 256, 8
_lookups: Counter[str] = Counter()  # running lookups by zone, including abandoned ones
_counting = threading.Lock()

Resolver = Callable[[str, int], Awaitable[list[str]]]
"""Returns the addresses of a host as text, or raises `Unresolved`."""


class Unresolved(Exception):
    """Raised when a name has no address, or its name servers did not answer in time."""


async def resolve(host: str, port: int) -> list[str]:
    """Return the addresses that the system reports within 3 s, also for notations such as `0x7f.1`.

    Raises `Unresolved`.
    """
    zone = ".".join(host.split(".")[-2:])
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(RESOLVE_SECONDS):
            while not _count(zone, 1):  # noqa: ASYNC110  (threads lower the count)
                await asyncio.sleep(POLL_SECONDS)
            answer: Future[list[str]] = Future()
            answer.set_running_or_notify_cancel()  # a caller that times out must not cancel the lookup
            try:
                threading.Thread(target=_ask, args=(host, port, zone, answer), name=THREAD_NAME, daemon=True).start()
            except RuntimeError:  # the system cannot start another thread
                _count(zone, -1)
                raise
            if found := await asyncio.wrap_future(answer):
                return found
    raise Unresolved(f"{host} does not resolve")


def _ask(host: str, port: int, zone: str, answer: Future[list[str]]) -> None:
    found: list[str] = []
    try:
        with contextlib.suppress(OSError, UnicodeError):
            places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found = list(dict.fromkeys(str(place[0]) for _, _, _, _, place in places))
    finally:
        _count(zone, -1)
        answer.set_result(found)


def _count(zone: str, change: int) -> bool:
    """Change the number of running lookups of a zone. Return False if the limit is reached."""
    with _counting:
        if change > 0 and (_lookups[zone] >= MAX_LOOKUPS_PER_ZONE or _lookups.total() >= MAX_LOOKUPS):
            return False
        _lookups[zone] += change
        if not _lookups[zone]:
            del _lookups[zone]
        return True


def of_this_machine(addresses: Iterable[str]) -> list[str]:
    """Return the addresses that belong to this machine, which are the addresses that can be bound."""
    return [text for text in addresses if _is_bindable(text)]


def _is_bindable(text: str) -> bool:
    family = socket.AF_INET6 if ipaddress.ip_address(text.partition("%")[0]).version == 6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((text, 0))
    except OSError:
        return False
    return True
