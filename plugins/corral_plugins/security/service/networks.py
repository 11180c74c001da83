"""Parses networks and compiles IP rules for fast lookup."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import NamedTuple

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")


def parse_network(text: str) -> str:
    """Return the canonical form of an address or network. Raises `ValueError`.

    IPv4-mapped IPv6 addresses become IPv4 addresses.
    """
    if "%" in text:
        raise ValueError(f"{text} contains a zone, but client addresses are compared without zones")
    network: Network = ipaddress.ip_network(text.strip())
    if isinstance(network, ipaddress.IPv6Network) and network.subnet_of(MAPPED):
        base = ipaddress.IPv4Address(int(network.network_address) & 0xFFFFFFFF)
        network = ipaddress.IPv4Network((base, network.prefixlen - 96))
    return str(network)


class Rule(NamedTuple):
    """An IP rule that has not expired."""

    id: str
    cidr: str
    action: str


class Ruleset:
    """A mode and its rules.

    The most specific matching network decides. For the same network, `block` takes precedence over `allow`.
    """

    def __init__(self, mode: str, rules: Iterable[Rule]) -> None:
        self.mode = mode
        found: dict[tuple[int, int], dict[int, Rule]] = {}
        for rule in rules:
            network = ipaddress.ip_network(rule.cidr)
            same = found.setdefault((network.version, network.prefixlen), {})
            key = int(network.network_address)
            if key not in same or rule.action == "block":
                same[key] = rule
        self._tables: dict[int, list[tuple[int, dict[int, Rule]]]] = {4: [], 6: []}
        for (version, length), table in sorted(found.items(), reverse=True):
            self._tables[version].append(((32 if version == 4 else 128) - length, table))

    def judge(self, address: str) -> tuple[bool, Rule | None]:
        """Return whether an address is allowed, and the matching rule if any.

        Performs one lookup per prefix length in use.
        """
        rule = self._find(address)
        if self.mode == "off":
            return True, rule
        if rule is None:
            return self.mode == "blocklist", None
        return rule.action == "allow", rule

    def _find(self, address: str) -> Rule | None:
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:  # a peer without an IP address (a Unix socket) is in no network
            return None
        number = int(parsed)
        for shift, table in self._tables[parsed.version]:
            rule = table.get(number >> shift << shift)
            if rule is not None:
                return rule
        return None
