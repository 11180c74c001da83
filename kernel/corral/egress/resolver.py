"""Names to addresses, in threads of their own: a name server that does not answer keeps nobody else waiting."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

RESOLVE_SECONDS = 3.0
_threads = ThreadPoolExecutor(8, thread_name_prefix="egress-resolver")

Resolver = Callable[[str, int], Awaitable[list[str]]]
"""Every address of a host, as text; raises `Unresolved`."""


class Unresolved(Exception):
    """The name has no address, or its servers did not answer in time."""


async def resolve(host: str, port: int) -> list[str]:
    """What the system says, spellings such as `0x7f.1` included; asked once, for at most 3 s."""
    try:
        asked = asyncio.get_running_loop().run_in_executor(_threads, _ask, host, port)
        found = await asyncio.wait_for(asked, RESOLVE_SECONDS)
    except (OSError, UnicodeError, TimeoutError):
        raise Unresolved(f"{host} does not resolve") from None
    if not found:
        raise Unresolved(f"{host} does not resolve")
    return found


def _ask(host: str, port: int) -> list[str]:
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(place[0]) for _, _, _, _, place in answers))


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
