"""Who is at the other end, and which host they meant: the one client-IP function and the one host check."""

from __future__ import annotations

import functools
import ipaddress
import socket
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

LOOPBACK = frozenset({"localhost", "localhost.localdomain", "ip6-localhost"})


class ClientAddress:
    """The client's address: the TCP peer, or what trusted proxies say in `X-Forwarded-For`, from right to left."""

    def __init__(self, trusted: Iterable[str]) -> None:
        self._fold = functools.lru_cache(maxsize=1024)(fold)
        self._trusted = [ipaddress.ip_network(network, strict=False) for network in trusted]

    def __call__(self, scope: Mapping[str, Any]) -> str:
        """The address in its shortest form; IPv4-mapped ones are folded. An empty peer (a unix socket) stays empty."""
        address = self._fold((scope.get("client") or ("",))[0])
        if not self._trusted or not self._is_trusted(address):
            return address
        lines = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]  # of each proxy one, perhaps
        for hop in reversed(b",".join(lines).decode("latin1").split(",")):
            given = fold(hop.strip(" []")) or fold(hop.rpartition(":")[0].strip(" []"))  # some proxies tell a port
            if not given:
                return address
            address = given
            if not self._is_trusted(address):
                return address
        return address

    def _is_trusted(self, address: str) -> bool:
        return bool(address) and any(ipaddress.ip_address(address) in network for network in self._trusted)


def fold(text: str) -> str:
    """An address in canonical form, IPv4-mapped IPv6 as IPv4; "" when it is not one."""
    try:
        parsed = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return ""
    mapped = getattr(parsed, "ipv4_mapped", None)
    return str(mapped or parsed)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on a host, given as a name or an address."""
    address = fold(host.strip("[]"))
    return ipaddress.ip_address(address).is_loopback if address else host.lower() in LOOPBACK


class Hosts:
    """Which `Host` headers are of this installation: IP literals, loopback, the machine, public URL, the allowed."""

    def __init__(self, public_url: str | None, allowed: Iterable[str]) -> None:
        urls = [public_url or "", *(f"//{name}" for name in allowed)]  # a port says nothing here
        self._names = {(urlsplit(url).hostname or "").rstrip(".") for url in urls} | LOOPBACK
        self._names = self._names - {""} | {socket.gethostname().lower()}

    def __call__(self, header: bytes | None) -> bool:
        """Whether the header names this installation; a missing one (HTTP/1.0) does not."""
        text = (header or b"").decode("latin1").strip()
        if not text or any(mark in text for mark in "@/\\?# ,"):
            return False
        try:
            split = urlsplit(f"//{text}")
            name, _ = split.hostname or "", split.port
        except ValueError:
            return False
        return bool(fold(name)) or name.rstrip(".").lower() in self._names
