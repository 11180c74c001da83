"""Whom the one client-IP function names."""

from __future__ import annotations

import pytest

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
    headers = [(b"host", b"localhost"), *((b"x-forwarded-for", line.encode()) for line in lines)]
    scope = {"client": ("10.0.0.1", 40000), "headers": headers}
    assert ClientAddress(["10.0.0.0/8"])(scope) == named
    assert ClientAddress([])(scope) == ClientAddress(["192.0.2.0/24", "2001:db8::/32"])(scope) == "10.0.0.1"


def test_a_peer_without_an_address_is_nobody_whatever_it_says() -> None:
    scope = {"client": None, "headers": [(b"x-forwarded-for", b"6.6.6.6")]}
    assert ClientAddress(["0.0.0.0/0"])(scope) == ""
