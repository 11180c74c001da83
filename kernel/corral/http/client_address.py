"""Determines the address of the client and checks the `Host` header. No other module does this."""

from __future__ import annotations

import functools
import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from corral.auth.principal import is_in_networks
from corral.egress.guard import canonical_address

LOOPBACK = frozenset({"localhost", "localhost.localdomain", "ip6-localhost"})


class ClientAddress:
    """Determines the client's address: the TCP peer, or the address that trusted proxies send in `X-Forwarded-For`."""

    def __init__(self, trusted: Iterable[str]) -> None:
        self._trusted = tuple(trusted)

    def __call__(self, peer: str, forwarded_for: bytes) -> str:
        """Return the client's address in canonical form, or "" for a Unix socket.

        The canonical form of an IPv4-mapped IPv6 address is the IPv4 address. `forwarded_for` contains all lines of the
        header `X-Forwarded-For`, joined by commas.
        """
        address = canonical_ip(peer)
        for hop in reversed(forwarded_for.decode("latin1").split(",")):
            if not is_in_networks(address, self._trusted):
                break
            without_port = hop.rpartition(":")[0]  # some proxies add the port
            given = canonical_ip(hop.strip(" []")) or canonical_ip(without_port.strip(" []"))
            if not given:
                break
            address = given
        return address


def canonical_ip(text: str) -> str:
    """Return an IP address in canonical form, or "" if the text is not an IP address.

    The canonical form of an IPv4-mapped IPv6 address is the IPv4 address.
    """
    try:
        return str(canonical_address(text))
    except ValueError:
        return ""


@functools.lru_cache(maxsize=8192)
def address_key(client_ip: str) -> str:
    """Return the key that identifies a client in rate limits: the IPv4 address, or an IPv6 /64 network."""
    if ":" not in client_ip:
        return client_ip
    return str(ipaddress.ip_network(f"{client_ip}/64", strict=False).network_address)


def is_loopback(host: str) -> bool:
    """Return whether a server that listens on this host (a name or an address) is reachable only from this machine."""
    address = canonical_ip(host.strip("[]"))
    return ipaddress.ip_address(address).is_loopback if address else host.lower() in LOOPBACK


class Hosts:
    """Checks `Host` headers.

    IP addresses, loopback names, the machine's name, the host of the public URL and the configured allowed hosts are
    accepted.
    """

    def __init__(self, public_url: str | None, allowed: Iterable[str]) -> None:
        urls = [public_url or "", *(f"//{name}" for name in allowed)]  # ports make no difference
        self._names = {(urlsplit(url).hostname or "").rstrip(".") for url in urls} | LOOPBACK
        self._names = self._names - {""} | {socket.gethostname().lower()}

    def __call__(self, header: bytes | None) -> bool:
        """Return whether the header is accepted. A missing header (HTTP/1.0) is refused."""
        text = (header or b"").decode("latin1").strip()
        if not text or any(mark in text for mark in "@/\\?# ,"):
            return False
        try:
            split = urlsplit(f"//{text}")
            name, _ = split.hostname or "", split.port
        except ValueError:
            return False
        return bool(canonical_ip(name)) or name.rstrip(".").lower() in self._names
