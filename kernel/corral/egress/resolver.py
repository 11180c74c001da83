"""Names to addresses, each in a thread of its own, for nothing can end the call: a name server that does not answer
keeps nobody else waiting, but for names of its own zone.
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

NAME, RESOLVE_SECONDS, PAUSE = "egress-resolver", 3.0, 0.01
MOST, MOST_OF_ZONE = 256, 8
_asked: Counter[str] = Counter()  # look-ups under way by zone, given up or not
_counting = threading.Lock()

Resolver = Callable[[str, int], Awaitable[list[str]]]
"""Every address of a host, as text; raises `Unresolved`."""


class Unresolved(Exception):
    """The name has no address, or its servers did not answer in time."""


async def resolve(host: str, port: int) -> list[str]:
    """What the system says, spellings such as `0x7f.1` included; asked once, for at most 3 s."""
    zone = ".".join(host.split(".")[-2:])
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(RESOLVE_SECONDS):
            while not _count(zone, 1):  # noqa: ASYNC110  (room is made by threads)
                await asyncio.sleep(PAUSE)
            answer: Future[list[str]] = Future()
            answer.set_running_or_notify_cancel()  # who gives up leaves it as it is
            try:
                threading.Thread(target=_ask, args=(host, port, zone, answer), name=NAME, daemon=True).start()
            except RuntimeError:  # the machine gives no further one
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
    """Whether there was room for one look-up more."""
    with _counting:
        if change > 0 and (_asked[zone] >= MOST_OF_ZONE or _asked.total() >= MOST):
            return False
        _asked[zone] += change
        if not _asked[zone]:
            del _asked[zone]
        return True


def of_this_machine(addresses: Iterable[str]) -> list[str]:
    """Those of the addresses that this machine has: only they can be bound."""
    return [text for text in addresses if _is_bindable(text)]


def _is_bindable(text: str) -> bool:
    family = socket.AF_INET6 if ipaddress.ip_address(text.partition("%")[0]).version == 6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((text, 0))
    except OSError:
        return False
    return True
