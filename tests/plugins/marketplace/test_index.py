"""The remote index, from a real HTTPS server through the egress guard."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.plugins.marketplace.conftest import PLUGINS, Market, manifest

from corral.testing.certificates import CertificateAuthority
from corral.testing.stub_servers import StubServer, http_response_bytes
from corral_plugins.marketplace.service.manifests import sha256_of
from corral_plugins.marketplace.service.remote_index import RemoteIndex


def _entry(**changes: Any) -> dict[str, Any]:
    made = manifest(**changes)
    return {"sha256": sha256_of(made), "manifest": made}


async def test_the_index_is_fetched_through_the_guard(
    make_kit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = CertificateAuthority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    good, stolen = _entry(slug="remote-one"), _entry(slug="hello-fleet", version="9.0.0")
    forged = {**_entry(slug="forged"), "sha256": "0" * 64}
    body = json.dumps({"templates": [good, stolen, forged, {"sha256": "1" * 64, "manifest": {}}]}).encode()
    async with StubServer(http_response_bytes(200, body), tls=authority.server("localhost")) as server:
        url = f"https://localhost:{server.port}/index.json"
        refused = await make_kit(plugins=(*PLUGINS, "settings"))
        await _refresh(await _market(refused), url)
        assert server.connections == 0
        allowed = await make_kit(plugins=(*PLUGINS, "settings"), config={"egress.allow": [f"localhost:{server.port}"]})
        market = await _market(allowed)
        await _refresh(market, url)
        assert server.connections == 1
    found = {each["slug"]: each for each in (await market.ok("GET", "/marketplace/templates?source=remote"))["items"]}
    assert {slug: each["installable"] for slug, each in found.items()} == {"remote-one": True, "forged": False}
    assert (await market.ok("GET", "/marketplace/templates/hello-fleet"))["source"] == "bundled"
    await market.install("remote-one")
    await _refresh(market, None)
    assert (await market.ok("GET", "/marketplace/templates?source=remote"))["items"] == []


async def _market(kit: Any) -> Market:
    number = len((await kit.client.get("/health")).body)
    return Market(
        kit,
        await kit.as_user("member", f"m{number}{id(kit)}@example.org"),
        await kit.as_user("admin", f"a{id(kit)}@example.org"),
    )


async def _refresh(market: Market, url: str | None) -> None:
    await market.ok("PUT", "/settings/marketplace/index_url", {"value": url}, by=market.admin)
    await market.kit.service(RemoteIndex).refresh()
