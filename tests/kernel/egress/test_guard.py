"""The guard's judgement, without a network."""

from __future__ import annotations

import asyncio
import ipaddress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.config.reader import load
from corral.egress.client import Egress
from corral.egress.guard import (
    DENIED,
    EgressBlocked,
    EgressGuard,
    Exemption,
    Policy,
    canonical_address,
    is_denied,
    read_exempt,
    read_host,
    read_url,
)
from corral.egress.resolver import is_local, resolve
from corral.errors import StartupError


def _bytes(number: int) -> tuple[int, ...]:
    return tuple(number.to_bytes(4, "big"))


SPELLINGS = (
    str,
    hex,
    lambda number: f"0{number:o}",
    lambda number: ".".join(map(str, _bytes(number))),
    lambda number: ".".join(map(hex, _bytes(number))),
    lambda number: ".".join(f"0{part:o}" for part in _bytes(number)),
    lambda number: f"{number >> 24}.{number & 0xFFFFFF}",
    lambda number: f"{number >> 24:#x}.{number >> 16 & 0xFF}.{number & 0xFFFF:#o}".replace("0o", "0"),
)


def judge(guard: EgressGuard, host: str, port: int, *addresses: str, **policy: Any) -> str | None:
    """The code of the refusal, None when it is allowed."""
    rules = Policy(**policy)
    try:
        if not guard.check_destination(host, port, rules):
            guard.check_addresses(host, port, addresses or [host], rules)
    except EgressBlocked as blocked:
        return blocked.code
    return None


@pytest.mark.parametrize("network", DENIED, ids=str)
def test_both_ends_of_every_denied_network_are_refused(network: Any) -> None:
    assert is_denied(network.network_address, "public")
    assert is_denied(network.broadcast_address, "public")


@pytest.mark.parametrize(
    "text", ["1.1.1.1", "93.184.216.34", "11.0.0.1", "172.32.0.1", "2606:4700::1111", "2a00:1450::1"]
)
def test_public_addresses_are_allowed(text: str) -> None:
    assert not is_denied(ipaddress.ip_address(text), "public")
    assert not is_denied(ipaddress.ip_address(text), "internal")


@pytest.mark.parametrize("text", ["10.1.2.3", "100.64.0.1", "172.16.9.9", "192.168.1.1", "fd12:3456::1"])
def test_the_internal_profile_opens_private_ranges(text: str) -> None:
    assert is_denied(canonical_address(text), "public")
    assert not is_denied(canonical_address(text), "internal")


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1",
        "::1",
        "169.254.169.254",
        "fe80::1%eth0",
        "100.100.100.200",
        "fd00:ec2::254",
        "fd20:ce::254",
        "168.63.129.16",
        "224.0.0.1",
        "0.0.0.0",
        "::",
        "::ffff:127.0.0.1",
        "64:ff9b::a00:1",
        "2002:7f00:1::",
        "::ffff:0:127.0.0.1",
        "::ffff:0:a00:1",
        "1fff::1",
        "4000::1",
        "5f00::1",
        "7fff::1",
        "8000::1",
        "fec0::1",
    ],
)
def test_the_internal_profile_refuses_what_is_no_neighbour(text: str) -> None:
    assert is_denied(canonical_address(text), "internal")


def test_one_refused_address_refuses_all() -> None:
    assert judge(EgressGuard(), "mixed.example", 443, "93.184.216.34", "10.0.0.1") == "egress.address"
    assert judge(EgressGuard(), "mixed.example", 443, "93.184.216.34", "2606:4700::1111") is None


@pytest.mark.parametrize("port", [0, 1, 21, 22, 25, 53, 81, 110, 442, 444, 1023, 65536, -1])
def test_ports_of_system_services_are_refused(port: int) -> None:
    assert judge(EgressGuard(), "1.1.1.1", port) == "egress.port"


@pytest.mark.parametrize("port", [22, 25, 465, 587])
def test_ports_of_mail_and_ssh_are_open_to_their_profile_only(port: int) -> None:
    assert judge(EgressGuard(), "10.0.0.1", port, profile="internal") is None
    assert judge(EgressGuard(), "127.0.0.1", port, profile="internal") == "egress.address"
    assert judge(EgressGuard(), "1.1.1.1", port) == "egress.port"
    assert judge(EgressGuard(), "10.0.0.1", 23, profile="internal") == "egress.port"


@pytest.mark.parametrize("port", [80, 443, 1024, 8080, 65535])
def test_ports_of_web_servers_are_open(port: int) -> None:
    assert judge(EgressGuard(), "1.1.1.1", port) is None


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("ftp://example.com/", "egress.scheme"),
        ("//example.com/", "egress.scheme"),
        ("example.com", "egress.scheme"),
        ("https://user:pw@example.com/", "egress.userinfo"),
        ("https://@example.com/", "egress.userinfo"),
        ("https://example.com\\@127.0.0.1/", "egress.userinfo"),
        ("https:///path", "egress.address"),
        ("https://exa mple.com/", "egress.address"),
        ("https://example.com\n/", "egress.address"),
        ("https://127%2e0.0.1/", "egress.address"),
        ("https://[fe80::1%25eth0]/", "egress.address"),
        ("https://example.com:port/", "egress.address"),
        ("https://example.com:443 /", "egress.address"),
        ("https://example.com:+443/", "egress.address"),
        ("https://example.com/" + "a" * 8192, "egress.address"),
    ],
)
def test_urls_that_no_sink_may_ask_for(url: str, code: str) -> None:
    with pytest.raises(EgressBlocked) as refusal:
        read_url(url)
    assert refusal.value.code == code


def test_one_form_of_a_url_is_judged_and_sent() -> None:
    target = read_url("HTTPS://Bücher.EXAMPLE.:8443/a b?c=d#e")
    assert (target.host, target.port) == ("xn--bcher-kva.example", 8443)
    assert str(target.url) == "https://xn--bcher-kva.example:8443/a%20b?c=d"
    assert read_url("http://[2606:4700::1111]/").host == "2606:4700::1111"


@pytest.mark.parametrize(
    "text", ["", ".", "a..", "-a", "a/b", "a@b", "a b", "*", "a" * 254, "[::1]", "::1%lo", "ä.example"]
)
def test_no_hosts(text: str) -> None:
    with pytest.raises(EgressBlocked):
        read_host(text)


V4, V6 = ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8")


@pytest.mark.parametrize(
    ("text", "exempt"),
    [
        ("Intern.Example.", Exemption("intern.example", None, None)),
        ("intern.example:8443", Exemption("intern.example", None, 8443)),
        ("127.0.0.1", Exemption("", ipaddress.ip_network("127.0.0.1/32"), None)),
        ("127.0.0.1:11434", Exemption("", ipaddress.ip_network("127.0.0.1/32"), 11434)),
        ("10.0.0.0/8", Exemption("", V4, None)),
        ("10.1.2.3/8:443", Exemption("", V4, 443)),
        ("::1", Exemption("", ipaddress.ip_network("::1/128"), None)),
        ("[::1]:9000", Exemption("", ipaddress.ip_network("::1/128"), 9000)),
        ("fd00::/8", Exemption("", V6, None)),
        ("fd00::/8:443", Exemption("", V6, 443)),
        ("[fd00::]/8:443", Exemption("", V6, 443)),
    ],
)
def test_exceptions_are_read(text: str, exempt: Exemption) -> None:
    assert read_exempt(text) == exempt


@pytest.mark.parametrize(
    "text", ["*", "*.example", "a:0", "a:70000", "a:b", "10.0.0.0/33", "a.example/8", "[a]:80", "-"]
)
def test_other_exceptions_stop_the_start_with_one_line(text: str) -> None:
    with pytest.raises(StartupError) as refusal:
        EgressGuard([text])
    assert len(refusal.value.faults) == 1
    assert text in refusal.value.faults[0]


@pytest.mark.parametrize("variable", ["CORRAL_EGRESS_ALLOW", "CORRAL_EGRESS_PROXY"])
@pytest.mark.parametrize("value", ["http://x/y?z", "socks5://proxy", "a b"])
def test_a_bad_configuration_stops_the_start_with_one_line(variable: str, value: str, tmp_path: Any) -> None:
    with pytest.raises(StartupError) as refusal:
        Egress(load({variable: value}, path=tmp_path.joinpath("none")))
    assert [line for line in refusal.value.faults if "egress." in line or variable in line]


def test_an_exception_opens_its_port_and_no_other() -> None:
    guard = EgressGuard(["127.0.0.1:9000", "10.0.0.0/8:25", "intern.example:22"])
    assert judge(guard, "127.0.0.1", 9000) is None
    assert judge(guard, "127.0.0.1", 9001) == "egress.address"
    assert judge(guard, "any.example", 9000, "127.0.0.1") is None  # the address counts, whatever names it
    assert judge(guard, "10.9.9.9", 25) is None
    assert judge(guard, "1.1.1.1", 25) == "egress.port"
    assert judge(guard, "intern.example", 22, "10.0.0.1") is None
    assert judge(guard, "other.example", 22, "1.1.1.1") == "egress.port"


def test_what_the_operator_configured_may_be_private() -> None:
    operator = frozenset({("10.0.0.7", 11434)})
    assert judge(EgressGuard(), "10.0.0.7", 11434, operator=operator) is None
    assert judge(EgressGuard(), "10.0.0.7", 11435, operator=operator) == "egress.address"
    assert judge(EgressGuard(), "10.0.0.8", 11434, operator=operator) == "egress.address"


def test_a_childs_client_reaches_the_child_while_it_lives_and_nothing_else() -> None:
    guard, child = EgressGuard(), ("127.0.0.1", 40123)
    assert judge(guard, *child, child=child) == "egress.address"
    guard.children.add(child)
    assert judge(guard, *child, child=child) is None
    assert judge(guard, *child) == "egress.address"
    assert judge(guard, "1.1.1.1", 443, child=child) == "egress.address"


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([each for each in DENIED if each.version == 4]), st.data(), st.sampled_from(SPELLINGS))
def test_every_spelling_of_a_denied_address_is_refused(network: Any, data: Any, spelling: Any) -> None:
    number = data.draw(st.integers(int(network.network_address), int(network.broadcast_address)))
    host = read_host(spelling(number))
    assert judge(EgressGuard(), host, 80, *asyncio.run(resolve(host, 80))) == "egress.address"


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_mapped_addresses_are_judged_as_what_they_stand_for(number: int) -> None:
    plain, mapped = ipaddress.IPv4Address(number), ipaddress.IPv6Address((0xFFFF << 32) + number)
    assert is_denied(plain, "public") == is_denied(canonical_address(str(mapped)), "public")


def test_corrals_own_listeners_are_refused_under_every_address_of_the_machine() -> None:
    guard = EgressGuard()
    guard.listeners.update({("0.0.0.0", 8000), ("127.0.0.1", 8001)})
    for port, address in ((8000, "127.0.0.1"), (8000, "127.0.0.9"), (8000, "::ffff:127.0.0.1"), (8001, "127.0.0.1")):
        with pytest.raises(EgressBlocked) as refusal:
            guard.check_listeners(port, [address], is_local)
        assert refusal.value.code == "egress.own_listener"
    guard.check_listeners(8000, ["1.1.1.1"], is_local)
    guard.check_listeners(8001, ["127.0.0.9"], is_local)
    guard.check_listeners(9000, ["127.0.0.1"], is_local)
