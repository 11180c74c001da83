"""Checks whether the egress guard allows connections to an address, without connecting to it."""

from __future__ import annotations

from typing import NamedTuple

from corral.egress.client import UNRESOLVED, Egress
from corral.egress.guard import EgressBlocked, Policy, Profile, read_host, read_url
from corral.egress.resolver import Unresolved


class Verdict(NamedTuple):
    """The result of checking an address. `reason` is None if the address is allowed.

    Otherwise, `reason` is `unresolved_host` or a code of the form `egress.*`. Show `addresses` only to admins.
    """

    allowed: bool
    reason: str | None
    addresses: tuple[str, ...]


async def judge(
    egress: Egress, url: str | None = None, *, host: str = "", port: int = 0, profile: Profile = "public"
) -> Verdict:
    """Check whether connecting to a URL, or to a host and port, is allowed.

    Resolve the host name, but do not connect.
    """
    try:
        if url is not None:
            _, host, port = read_url(url)
        return Verdict(True, None, tuple(await egress.addresses(host, port, Policy(profile))))
    except EgressBlocked as blocked:
        return Verdict(False, blocked.code, await _resolve_unguarded(egress, host, port))
    except Unresolved:
        return Verdict(False, UNRESOLVED, ())


async def _resolve_unguarded(egress: Egress, host: str, port: int) -> tuple[str, ...]:
    """Return all addresses of a host, including addresses that the guard refuses."""
    try:
        return tuple(await egress.resolve(read_host(host), port)) if host else ()
    except (Unresolved, EgressBlocked):
        return ()
