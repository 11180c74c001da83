"""Keys on sockets, limits of sign-in, and the series of metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from tests.limits import stop_refilling
from tests.plugins.realtime.conftest import ear
from tests.plugins.security.conftest import AWAY, HOME, PLUGINS, TRUSTING, From, make_key

from corral import clock
from corral.testing.kit import PASSWORD, Kit
from corral.testing.server import serving

pytestmark = pytest.mark.one_engine

FORBIDDEN, UNAUTHENTICATED, INVALID = 4403, 4401, 4400


@pytest.fixture
async def port(kit: Kit) -> AsyncIterator[int]:
    async with serving(kit) as number:
        yield number


def at(address: str) -> dict[str, Any]:
    """Come from there."""
    return {"additional_headers": {"X-Forwarded-For": address}}


async def test_a_key_opens_a_socket_and_its_end_closes_it(kit: Kit, port: int) -> None:
    alice = await kit.as_user("member")
    key, shown = await make_key(alice)
    ticket = (await (await make_key(alice, scopes=["*"]))[0].post("/auth/ws-ticket")).json()["ticket"]
    async with (
        ear(port, None, f"?token={shown['key']}") as by_key,
        ear(port, None, f"?ticket={ticket}") as by_ticket,
    ):
        assert (await by_key.ask("ping"))["type"] == (await by_ticket.ask("ping"))["type"] == "pong"
        for item in (await alice.get("/security/api-keys")).json()["items"]:
            assert (await alice.delete(f"/security/api-keys/{item['id']}")).status == 204
        assert await by_key.closed(10) == UNAUTHENTICATED
        assert await by_ticket.closed(10) == UNAUTHENTICATED
    assert (await key.get("/tasks")).status == 401


async def test_the_rotation_of_a_key_ends_what_its_former_text_opened(kit: Kit, port: int) -> None:
    """However it was opened: whoever had the text may have taken tickets too."""
    alice = await kit.as_user("member")
    key, shown = await make_key(alice, scopes=["*"])
    used, kept = [(await key.post("/auth/ws-ticket")).json()["ticket"] for _ in range(2)]
    async with ear(port, None, f"?ticket={used}") as by_former:
        assert (await by_former.ask("ping"))["type"] == "pong"
        rotated = (await alice.post(f"/security/api-keys/{shown['id']}/rotate")).json()
        assert await by_former.closed(10) == UNAUTHENTICATED
    async with ear(port, None, f"?ticket={kept}") as too_late:
        assert await too_late.closed() == UNAUTHENTICATED
    ticket = (await From(alice, key=rotated["key"]).post("/auth/ws-ticket")).json()["ticket"]
    async with ear(port, None, f"?ticket={ticket}") as by_present:
        assert (await by_present.ask("ping"))["type"] == "pong"
        overlap = {"overlap_seconds": 60}
        assert (await alice.post(f"/security/api-keys/{shown['id']}/rotate", overlap)).status == 200
        assert (await by_present.hear(10))["type"] == "token_expiring"
        clock.travel(61)
        assert await by_present.closed(10) == UNAUTHENTICATED


async def test_a_key_that_does_not_read_events_opens_none(kit: Kit, port: int) -> None:
    alice = await kit.as_user("member")
    _, shown = await make_key(alice, scopes=["tasks.*"])
    async with ear(port, None, f"?token={shown['key']}") as socket:
        assert await socket.closed() == FORBIDDEN


async def test_a_key_opens_sockets_only_from_its_networks(kit: Kit, port: int) -> None:
    alice = await kit.as_user("member")
    _, shown = await make_key(alice, allowed_cidrs=[f"{HOME}/32"])
    async with ear(port, None, f"?token={shown['key']}", **at(HOME)) as socket:
        assert (await socket.ask("ping"))["type"] == "pong"
    async with ear(port, None, f"?token={shown['key']}", **at(AWAY)) as socket:
        assert await socket.closed() == FORBIDDEN
    async with ear(port, None, "?", **at(AWAY)) as socket:
        await socket.say("auth", token=shown["key"])
        assert await socket.closed() == FORBIDDEN


async def test_a_demoted_owner_closes_the_sockets_of_keys(kit: Kit, port: int) -> None:
    admin, alice = await kit.as_user("admin"), await kit.as_user("member")
    _, shown = await make_key(alice)
    async with ear(port, None, f"?token={shown['key']}") as socket:
        assert (await socket.ask("ping"))["type"] == "pong"
        assert (await admin.patch(f"/admin/users/{alice.user['id']}", {"role": "auditor"})).status == 200
        assert await socket.closed(10) == FORBIDDEN


async def test_handshakes_without_a_credential_are_limited_like_requests(make_kit: Callable[..., Any]) -> None:
    kit: Kit = await make_kit(plugins=PLUGINS, config={**TRUSTING, "rate_limits": True})
    stop_refilling(kit)
    for _ in range(120):
        await From(kit.client, AWAY).get("/auth/config")
    async with serving(kit) as port:
        with pytest.raises(Exception, match="429"):
            async with ear(port, None, "?", **at(AWAY)):
                raise AssertionError("it was let in")


async def test_what_opens_no_socket_counts_for_the_address(make_kit: Callable[..., Any]) -> None:
    kit: Kit = await make_kit(plugins=PLUGINS, config={**TRUSTING, "rate_limits": True})
    _, shown = await make_key(await kit.as_user("member"), allowed_cidrs=[HOME])
    _, deaf = await make_key(await kit.as_user("member"), scopes=["tasks.*"])
    stop_refilling(kit)
    queries = {
        "?token=nobody": UNAUTHENTICATED,
        f"?token={shown['key']}": FORBIDDEN,
        f"?token={deaf['key']}": FORBIDDEN,
        f"?token={shown['key']}&ticket=x": INVALID,
    }
    async with serving(kit) as port:
        for query, code in queries.items():
            async with ear(port, None, query, **at(AWAY)) as socket:
                assert await socket.closed() == code
    answer = await From(kit.client, AWAY).get("/auth/config")
    assert answer.headers["ratelimit-remaining"] == str(120 - len(queries) - 1)


async def test_a_session_refreshes_thirty_times_a_minute(make_kit: Callable[..., Any]) -> None:
    kit: Kit = await make_kit(plugins=PLUGINS, config={**TRUSTING, "rate_limits": True})
    await kit.as_user("member", "alice@example.org")
    body = {"email": "alice@example.org", "password": PASSWORD}
    first, second = [(await From(kit.client, HOME).post("/auth/login", body)).json() for _ in range(2)]
    token = first["refresh_token"]
    passed, began = 0, time.monotonic()
    while True:
        answer = await From(kit.client, f"198.51.100.{passed}").post("/auth/refresh", {"refresh_token": token})
        if answer.status != 200:
            break
        token = answer.json()["refresh_token"]
        passed += 1
    assert 30 <= passed <= 31 + (time.monotonic() - began) / 2, answer  # every two seconds give one back
    assert (answer.status, answer.code) == (429, "rate_limited")
    assert int(answer.headers["retry-after"]) <= 2
    other = await From(kit.client, HOME).post("/auth/refresh", {"refresh_token": second["refresh_token"]})
    assert other.status == 200
    await asyncio.sleep(2.1)
    assert (await From(kit.client, HOME).post("/auth/refresh", {"refresh_token": token})).status == 200


async def test_series_tell_of_keys_limits_and_refusals(make_kit: Callable[..., Any]) -> None:
    kit: Kit = await make_kit(plugins=PLUGINS, config={**TRUSTING, "rate_limits": True})
    stop_refilling(kit)
    admin = From(await kit.as_user("admin"), HOME)
    key, shown = await make_key(admin)
    await key.get("/tasks")
    await From(admin, key=shown["key"][:-1] + "?").get("/tasks")
    for _ in range(130):
        await From(kit.client, AWAY).get("/auth/config")
    rules = {"mode": "blocklist", "rules": [{"cidr": f"{AWAY}/32", "action": "block"}]}
    await admin.put("/security/ip-rules", rules)
    async with asyncio.timeout(60):
        while (await From(kit.client, AWAY).get("/auth/config")).status != 403:  # noqa: ASYNC110  (nothing tells)
            await asyncio.sleep(0.1)
    async with asyncio.timeout(60):
        while float((series := await _series(kit)).get("corral_ip_blocked_total", 0)) < 1:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    assert float(series['corral_api_keys{status="active"}']) == 1
    assert float(series['corral_api_keys{status="revoked"}']) == 0
    assert float(series['corral_api_key_requests_total{result="ok"}']) >= 1
    assert float(series['corral_api_key_requests_total{result="malformed"}']) == 1
    assert float(series['corral_rate_limited_total{bucket="anonymous"}']) >= 10


async def _series(kit: Kit) -> dict[str, str]:
    text = (await From(kit.client, HOME).get("/metrics", root=True)).body.decode()
    return dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("corral_"))
