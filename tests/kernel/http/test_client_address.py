"""Whom the one client-IP function names."""

from __future__ import annotations

from unittest.mock import AsyncMock

import pytest

from corral.asgi.request import IncomingRequest
from corral.http.client_address import ClientAddress


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (["203.0.113.9"], "203.0.113.9"),
        (["6.6.6.6, 203.0.113.9"], "203.0.113.9"),
        (["203.0.113.9 , 10.0.0.2"], "203.0.113.9"),
        (["6.6.6.6", "203.0.113.9", "10.0.0.2"], "203.0.113.9"),  # two proxies that each add a line of their own
        (["6.6.6.6, 203.0.113.9:40123"], "203.0.113.9"),
        (["6.6.6.6", "[2001:db8::9]:443"], "2001:db8::9"),
        (["[2001:db8::9]"], "2001:db8::9"),
        (["2001:db8::9"], "2001:db8::9"),
        (["6.6.6.6, ::ffff:203.0.113.9"], "203.0.113.9"),
        (["6.6.6.6, unknown"], "10.0.0.1"),  # nothing to the left of what a proxy could not tell is believed
        (["6.6.6.6, :80"], "10.0.0.1"),
        (["6.6.6.6,"], "10.0.0.1"),
        ([], "10.0.0.1"),
    ],
)
def test_the_client_is_whom_the_nearest_proxies_name(lines: list[str], named: str) -> None:
    forwarded_for = ",".join(lines).encode()
    assert ClientAddress(["10.0.0.0/8"])("10.0.0.1", forwarded_for) == named
    for untrusted in ([], ["192.0.2.0/24", "2001:db8::/32"]):
        assert ClientAddress(untrusted)("10.0.0.1", forwarded_for) == "10.0.0.1"


def test_a_peer_without_an_address_is_nobody_whatever_it_says() -> None:
    assert ClientAddress(["0.0.0.0/0"])("", b"6.6.6.6") == ""


def test_every_line_of_the_header_counts_and_a_unix_socket_has_no_address() -> None:
    lines = [(b"x-forwarded-for", b"6.6.6.6"), (b"host", b"localhost"), (b"x-forwarded-for", b"203.0.113.9")]
    scope = {"path": "/", "query_string": b"", "http_version": "1.1", "headers": lines}
    request = IncomingRequest({**scope, "client": ("10.0.0.1", 1)}, AsyncMock(), 1.0)
    assert (request.peer, request.forwarded_for) == ("10.0.0.1", b"6.6.6.6,203.0.113.9")
    assert IncomingRequest({**scope, "client": None}, AsyncMock(), 1.0).peer == ""
