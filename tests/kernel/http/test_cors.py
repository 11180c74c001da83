"""Which origins may call, and what the access log says; both are settings that rule at once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from corral.testing.kit import Answer, Client

pytestmark = pytest.mark.one_engine

ORIGIN = "https://app.example.org"


@pytest.fixture
async def admin(make_kit: Callable[..., Any]) -> Client:
    kit = await make_kit(plugins=["settings"])
    client: Client = await kit.as_user("admin")
    return client


async def allow(admin: Client, *origins: str) -> Answer:
    return await admin.put("/settings/http/cors_origins", {"value": list(origins)})


async def test_no_origin_is_allowed_until_one_is_listed(admin: Client) -> None:
    for origin in (ORIGIN, "null", "*"):
        answer = await admin.get("/auth/me", headers={"Origin": origin})
        assert answer.status == 200
        assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_a_listed_origin_is_named_back_and_no_other(admin: Client) -> None:
    assert (await allow(admin, ORIGIN)).status == 200
    answer = await admin.get("/auth/me", headers={"Origin": ORIGIN})
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert answer.headers["access-control-allow-credentials"] == "true"
    assert "ETag" in answer.headers["access-control-expose-headers"]
    assert answer.headers["vary"] == "Origin"
    for origin in ("https://app.example.org.evil.example", "http://app.example.org", "https://APP.example.org", "null"):
        other = await admin.get("/auth/me", headers={"Origin": origin})
        assert "access-control-allow-origin" not in other.headers
        assert other.headers["vary"] == "Origin"
    refused = await admin.get("/nowhere", headers={"Origin": ORIGIN})
    assert (refused.status, refused.headers["access-control-allow-origin"]) == (404, ORIGIN)
    await allow(admin)
    assert "access-control-allow-origin" not in (await admin.get("/auth/me", headers={"Origin": ORIGIN})).headers


async def test_a_preflight_learns_methods_and_headers(admin: Client) -> None:
    await allow(admin, ORIGIN)
    asking = {"Origin": ORIGIN, "Access-Control-Request-Method": "PUT"}
    answer = await Client(admin.app).request("OPTIONS", "/auth/me", headers=asking)
    assert answer.status == 204
    assert "PUT" in answer.headers["access-control-allow-methods"].split(", ")
    assert "If-Match" in answer.headers["access-control-allow-headers"].split(", ")
    other = await Client(admin.app).request("OPTIONS", "/auth/me", headers={**asking, "Origin": "https://evil.example"})
    assert "access-control-allow-methods" not in other.headers


@pytest.mark.parametrize("origin", ["*", "null", "app.example.org", "https://a.example/path", "ftp://a.example", ""])
async def test_only_origins_can_be_listed(admin: Client, origin: str) -> None:
    answer = await allow(admin, ORIGIN, origin)
    assert (answer.status, answer.json()["errors"][0]["code"]) == (422, "bad_format")


def lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, int]]:
    return [(r.__dict__["route"], r.__dict__["status"]) for r in caplog.records if r.name == "corral.access"]


async def test_the_access_log_is_a_setting(admin: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "corral.access")
    await admin.get("/auth/me")
    await admin.get("/nowhere")
    assert lines(caplog) == []
    assert (await admin.put("/settings/http/access_log", {"value": "all"})).status == 200
    await admin.get("/auth/me")
    await admin.get("/nowhere?token=hush")
    assert lines(caplog) == [("/settings/{category}/{key}", 200), ("/auth/me", 200), ("unmatched", 404)]
    assert "hush" not in caplog.text
    assert caplog.records[-1].__dict__["request_id"]
    await admin.put("/settings/http/access_log", {"value": "off"})
    caplog.clear()
    await admin.get("/auth/me")
    assert lines(caplog) == []
