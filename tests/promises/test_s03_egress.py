"""S3: hostile addresses through every sink: all refused, and nothing that listens there sees a connection."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from corral.config.reader import load
from corral.egress.client import Egress
from corral.egress.guard import EgressBlocked, Policy
from corral.errors import Invalid
from corral.testing.stub_servers import PUBLIC, FakeResolver, StubServer, http_response_bytes
from corral_core.health.service.egress_audit import SINKS
from corral_core.health.service.egress_check import judge

# `loopback`, `internal` and `names` are hosts, `shapes` and `confusing` have the place of one that listens.
CORPUS: dict[str, Any] = json.loads((Path(__file__).parent / "hostile_urls.json").read_text("utf-8"))
LOOPBACK, GOOD, NAMES = CORPUS["loopback"], CORPUS["good"], CORPUS["names"]
CODES = {f"egress.{name}" for name in ("scheme", "userinfo", "port", "address", "own_listener")}


def corpus(port: int) -> list[str]:
    """Every hostile address, aimed at a port of this machine where that makes sense."""
    urls = [shape.format(at=f"{host}:{port}") for host in LOOPBACK for shape in CORPUS["shapes"]]
    urls += [f"http://{host}{ending}" for host in CORPUS["internal"] for ending in ("/", f":{port}/")]
    urls += [f"https://{name}:{port}/" for name in NAMES]
    urls += [each.replace("{at}", f"127.0.0.1:{port}").replace("{port}", str(port)) for each in CORPUS["confusing"]]
    return [*urls, f"http://127.0.0.1:{port}/" + "a" * 9000]


_connected: list[Any] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        _connected.append(arguments[1][:2])


@pytest.fixture
def connections() -> list[Any]:
    """Every connection that this process tries to open, whoever does."""
    if not getattr(sys, "_corral_watched", False):
        sys.addaudithook(_watch)
        sys._corral_watched = True  # type: ignore[attr-defined]  # a hook cannot be taken away
    _connected.clear()
    return _connected


@pytest.fixture
async def canary() -> AsyncIterator[StubServer]:
    async with StubServer() as receiver:
        yield receiver


def make_egress(names: Any = None, allow: str = "") -> Egress:
    config = load({"CORRAL_EGRESS_ALLOW": allow}, path=Path(os.devnull))
    return Egress(config, resolve=FakeResolver({**NAMES, "example.com": [[PUBLIC]], **(names or {})}))


async def test_s3_hostile_addresses_through_every_sink(canary: StubServer, connections: list[Any]) -> None:
    urls = corpus(canary.port)
    assert len({*urls}) >= 200
    egress, reached = make_egress(), []
    for sink in SINKS:
        async with egress.client(sink) as client:
            for url in urls:
                try:
                    await client.get(url)
                    reached.append((sink, url))
                except (EgressBlocked, httpx2.InvalidURL, httpx2.ConnectError):  # the last: the name does not resolve
                    pass
    assert reached == []
    assert canary.connections == 0
    assert connections == []


async def test_s3_hostile_addresses_are_refused_when_they_are_saved(canary: StubServer, connections: list[Any]) -> None:
    egress, saved = make_egress(), []
    codes: set[tuple[str, str]] = set()
    for url in corpus(canary.port):
        try:
            warnings = await egress.check_saved_url(url)
        except Invalid as refusal:
            codes.update((refusal.code, fault.code) for fault in refusal.errors)
        else:
            saved += [url] if warnings != ["unresolved_host"] else []
    assert codes <= {("url_blocked", code) for code in CODES}
    assert saved == []
    assert connections == []


async def test_s3_the_internal_profile_is_no_way_to_this_machine(canary: StubServer, connections: list[Any]) -> None:
    egress = make_egress()
    for host in LOOPBACK:
        assert not (await judge(egress, f"http://{host}:{canary.port}/", profile="internal")).allowed, host
    assert connections == []


async def test_s3_a_redirecting_server(canary: StubServer) -> None:
    for status in (301, 302, 303, 307, 308):
        async with StubServer(http_response_bytes(status, location=canary.url)) as receiver:
            egress = make_egress(allow=f"127.0.0.1:{receiver.port}")
            async with egress.client("webhook") as client:
                assert (await client.get(receiver.url)).status_code == status
                with pytest.raises(EgressBlocked):  # a sink that asks to be led on is judged again
                    await client.get(receiver.url, follow_redirects=True)
    assert canary.connections == 0


async def test_s3_a_rebinding_name(canary: StubServer, connections: list[Any]) -> None:
    for first in ([PUBLIC], [PUBLIC, "2606:4700::1111"]):
        names = {"rebind.example": [first, ["127.0.0.1"], ["::ffff:127.0.0.1"], [PUBLIC, "127.0.0.1"]]}
        egress = make_egress(names)
        url = f"http://rebind.example:{canary.port}/"
        assert await egress.check_saved_url(url) == []
        async with egress.client("webhook") as client:
            for _ in range(4):
                with pytest.raises(EgressBlocked):
                    await client.get(url)
    assert canary.connections == 0
    assert connections == []


async def test_s3_the_address_that_was_judged_is_the_one_connected_to(canary: StubServer) -> None:
    """The name answers well once and badly from then on: the connection asks nobody a second time."""
    async with StubServer() as good:
        names = {"once.example": [["127.0.0.1"], ["127.0.0.2"]]}
        egress = make_egress(names, allow=f"127.0.0.1:{good.port}")
        async with egress.client("webhook") as client:
            assert (await client.get(f"http://once.example:{good.port}/")).status_code == 200
            with pytest.raises(EgressBlocked):
                await client.get(f"http://once.example:{good.port}/")
        assert good.connections == 1


async def test_s3_good_addresses_are_allowed() -> None:
    hosts = {str(httpx2.URL(url).raw_host, "ascii").rstrip(".") for url in GOOD}
    names = {host: [[PUBLIC, "2606:4700::1111"]] for host in hosts if not host.replace(".", "").isdigit()}
    egress = make_egress({name: found for name, found in names.items() if ":" not in name and "0x" not in name})
    assert len(GOOD) >= 30
    refused = [(url, verdict) for url in GOOD if not (verdict := await judge(egress, url)).allowed]
    assert refused == []
    assert await egress.addresses("example.com", 443, Policy()) == [PUBLIC, "2606:4700::1111"]
