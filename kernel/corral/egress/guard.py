"""The egress guard, which decides which URLs, ports and addresses Corral may connect to.

This module itself does not use the network.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from corral.errors import StartupError

if TYPE_CHECKING:
    import httpx2

Profile = Literal["public", "internal"]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
HostPort = tuple[str, int]
"""A host name or address, and a port number."""

LONGEST_URL = 8 * 1024
PORTS = "80, 443, 1024-65535"
INTERNAL_PORTS = (22, 25, 465, 587)  # SSH and mail


def _networks(text: str) -> tuple[Network, ...]:
    return tuple(map(ipaddress.ip_network, text.split()))


DENIED = _networks(
    "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 "
    "192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4 "
    "168.63.129.16/32 ::/3 2001::/23 2001:db8::/32 2002::/16 3fff::/20 4000::/2 8000::/1"
)  # the public addresses of IPv6 are in 2000::/3
PRIVATE = _networks("10.0.0.0/8 100.64.0.0/10 172.16.0.0/12 192.168.0.0/16 fc00::/7")
METADATA = _networks("100.100.100.200 fd00:ec2::254 fd20:ce::254")  # metadata services in private ranges
_AUTHORITY = re.compile(r"(?:\[[^\[\]]*\]|[^:\[\]\s]*)(?::[0-9]*)?")
_NAME = re.compile(r"[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?")
_DENIED = "is or resolves to an address that is not allowed. An operator can allow it with CORRAL_EGRESS_ALLOW="


class EgressBlocked(Exception):
    """Raised when the guard refuses a connection.

    `code` is `egress.scheme`, `egress.userinfo`, `egress.port`, `egress.address` or `egress.own_listener`.
    """

    def __init__(self, code: str, reason: str) -> None:
        self.code, self.reason = code, reason
        super().__init__(reason)


class Destination(NamedTuple):
    """A parsed URL as it will be requested, with its host and port. The host's addresses have not been checked."""

    url: httpx2.URL
    host: str
    port: int


class Exemption(NamedTuple):
    """An exemption from the checks, which the operator configured for a host name or a network.

    The exemption applies to one port, or to all ports if `port` is None.
    """

    name: str
    network: Network | None
    port: int | None

    def covers(self, host: str, port: int, address: Address | None) -> bool:
        """Return whether the exemption applies to this port of the host or, if an address is given, of the address."""
        if self.port not in (None, port):
            return False
        if self.network is None:
            return self.name == host
        return address is not None and address.version == self.network.version and address in self.network


class Policy(NamedTuple):
    """The destinations that a client may reach.

    If `child` is set, the client may reach only this child process. Otherwise, it may reach the destinations that
    `profile` allows, and the hosts and ports that the operator configured (`operator`), which are exempt from all
    checks of addresses and ports. Hosts have the form that `read_url` returns.
    """

    profile: Profile = "public"
    operator: frozenset[HostPort] = frozenset()
    child: HostPort | None = None


class EgressGuard:
    """Checks hosts, ports and addresses.

    `listeners` contains Corral's own addresses, and `children` contains the addresses of plugins' child processes.
    """

    def __init__(self, allow: Iterable[str] = ()) -> None:
        self.allowed = tuple(allow)
        self._exempt = [read_exempt(text) for text in self.allowed]
        self.listeners: set[HostPort] = set()
        self.children: set[HostPort] = set()

    def check_destination(self, host: str, port: int, policy: Policy) -> bool:
        """Check a host and port before the host is resolved. Raise `EgressBlocked` if they are refused.

        Return True if the host may be reached at any address, or False if its addresses must be checked.
        """
        if policy.child is not None:
            if (host, port) != policy.child or policy.child not in self.children:
                raise EgressBlocked("egress.address", "This client may connect to its own child process only.")
            return True
        if (host, port) in policy.operator or any(each.covers(host, port, None) for each in self._exempt):
            return True
        if not any(each.port in (None, port) for each in self._exempt):
            _check_port(port, policy.profile)
        return False

    def check_addresses(self, host: str, port: int, addresses: Sequence[str], policy: Policy) -> None:
        """Raise `EgressBlocked` if any of the addresses is refused."""
        for address in map(canonical_address, addresses):
            if any(each.covers(host, port, address) for each in self._exempt):
                continue
            _check_port(port, policy.profile)
            if is_denied(address, policy.profile):
                raise EgressBlocked("egress.address", f"{host} {_DENIED}{f'[{host}]' if ':' in host else host}:{port}.")

    def check_listeners(self, port: int, addresses: Sequence[str], is_local: Callable[[str], bool]) -> None:
        """Raise `EgressBlocked` if Corral itself listens on one of the addresses.

        `is_local` returns whether an address belongs to this machine.
        """
        for host, listening in self.listeners:
            if listening != port:
                continue
            bound = canonical_address(host) if _is_address(host) else None
            is_everywhere = bound is None or bound.is_unspecified
            if any(canonical_address(text) == bound or (is_everywhere and is_local(text)) for text in addresses):
                raise EgressBlocked("egress.own_listener", "Corral itself listens on this address.")


def check_peer(peer: tuple[object, ...] | None, address: str) -> None:
    """Raise `EgressBlocked` if the peer of a connection does not have the address that was checked."""
    if peer is None or canonical_address(str(peer[0])) != canonical_address(address):
        raise EgressBlocked("egress.address", "The connection did not reach the checked address.")


def _check_port(port: int, profile: Profile) -> None:
    further = INTERNAL_PORTS if profile == "internal" else ()
    if port not in (80, 443) and port not in further and not 1024 <= port <= 65535:
        raise EgressBlocked("egress.port", f"Port {port} is not allowed; use {PORTS}.")


def is_denied(address: Address, profile: Profile) -> bool:
    """Return whether the profile denies connections to the address."""
    if profile == "internal" and _within(address, PRIVATE):
        return _within(address, METADATA)
    return _within(address, DENIED)


def _within(address: Address, networks: Iterable[Network]) -> bool:
    return any(address.version == each.version and address in each for each in networks)


def canonical_address(text: str) -> Address:
    """Return the IP address without a zone identifier. An IPv4-mapped IPv6 address is returned as IPv4."""
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


@functools.lru_cache(maxsize=256)  # parsing a URL costs as much as the rest of the checks of a request
def read_url(url: str) -> Destination:
    """Parse a URL once, for both the checks and the request. Raise `EgressBlocked` if no client may use the URL."""
    import httpx2

    if len(url) > LONGEST_URL:
        raise EgressBlocked("egress.address", "The URL is longer than 8 KiB.")
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise EgressBlocked("egress.address", f"The URL is not valid: {error}") from None
    if parsed.scheme not in ("http", "https"):
        raise EgressBlocked("egress.scheme", "The scheme must be http or https.")
    authority = re.split(r"[/?#]", url.partition("//")[2], maxsplit=1)[0]
    if parsed.userinfo or "@" in authority:
        raise EgressBlocked("egress.userinfo", "The URL must not contain a user or password.")
    if not _AUTHORITY.fullmatch(authority):
        raise EgressBlocked("egress.address", "The host or port of the URL is not valid.")
    host = read_host(parsed.raw_host.decode("ascii"))
    port = parsed.port if parsed.port is not None else {"http": 80, "https": 443}[parsed.scheme]
    try:
        return Destination(parsed.copy_with(host=host, fragment=None), host, port)
    except httpx2.InvalidURL:  # such as 0127.0.0.1 with a trailing dot
        raise EgressBlocked("egress.address", "The host is not valid.") from None


def read_host(text: str) -> str:
    """Return the canonical form of a host. Raise `EgressBlocked` if the host is not valid.

    The canonical form is in lower case without a trailing dot. Names are in ASCII (IDNA), and addresses have no
    brackets.
    """
    host = text.lower().removesuffix(".")
    if ":" in host and _is_address(host) and "%" not in host:
        return host
    if len(host) > 253 or not _NAME.fullmatch(host):
        raise EgressBlocked("egress.address", "The host is not valid.")
    return host


def read_exempt(text: str) -> Exemption:
    """Parse an entry of `CORRAL_EGRESS_ALLOW`: host, host:port, CIDR or CIDR:port.

    Raise `StartupError` if the entry does not have one of these forms.
    """
    match = re.fullmatch(r"(?:\[([\da-f:.]+)\]|([^\[\]/]+?))(/\d+)?(?::(\d+))?", text.strip().lower())
    bare = match is not None and match[1] is None and text.count(":") > 1 and "/" not in text  # IPv6 without brackets
    name, prefix, at = (text, "", None) if match is None or bare else (match[1] or match[2], match[3] or "", match[4])
    try:
        port = None if at is None else int(at)
        if port is not None and not 1 <= port <= 65535:
            raise ValueError(port)
        if _is_address(name) or prefix or text.startswith("["):
            return Exemption("", ipaddress.ip_network(name + prefix, strict=False), port)
        return Exemption(read_host(name), None, port)
    except (ValueError, EgressBlocked):
        raise StartupError(f"egress.allow: {text}: must be host, host:port, CIDR or CIDR:port") from None


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def matches_host(patterns: Sequence[str], host: str) -> bool:
    """Return whether one of the patterns equals the host, or is `*.domain` for a parent domain of the host."""
    host = host.lower().removesuffix(".")
    wanted = [pattern.lower().removesuffix(".") for pattern in patterns]
    return any(host == each or (each.startswith("*.") and host.endswith(each[1:])) for each in wanted)
