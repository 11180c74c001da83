"""Sockets and streams that are refused before they begin."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from tests.limits import stop_refilling
from tests.plugins.realtime.conftest import ear, sse
from websockets.exceptions import InvalidStatus
from websockets.http11 import Response

from corral.plugin import hookimpl
from corral.testing.kit import Client, Kit
from corral.testing.server import serving
from corral_plugins.realtime.plugin import RealtimePlugin
from corral_plugins.realtime.service import hub

pytestmark = pytest.mark.one_engine


async def refusal(port: int, who: Client | None, query: str = "", path: str = "/ws", **headers: str) -> Response:
    """The answer to a handshake that is refused."""
    with pytest.raises(InvalidStatus) as refused:
        async with ear(port, who, query, path, additional_headers=headers):
            pass
    return refused.value.response


async def test_refusals_are_answers_like_all_others(kit: Kit, port: int) -> None:
    member = await kit.as_user()
    many = "&".join(f"p{number}=1" for number in range(101))
    answer = await refusal(port, member, f"?token={member.token}&{many}", **{"X-Request-ID": "mine"})
    assert answer.status_code == 400
    assert answer.headers["x-request-id"] == "mine"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert json.loads(answer.body)["code"] == "malformed_request"
    foreign = await refusal(port, member, Origin="https://evil.example")
    assert json.loads(foreign.body)["request_id"] == foreign.headers["x-request-id"]
    async with ear(port, member, f"?token={member.token}&{many.rpartition('&p99=')[0]}") as one:
        assert (await one.ask("ping"))["type"] == "pong"


@pytest.mark.parametrize("how", ["disabled", "failed"])
async def test_without_the_plugin_its_socket_is_503(
    make_kit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    def broken(self: RealtimePlugin) -> None:
        raise RuntimeError("no hub")

    if how == "failed":
        monkeypatch.setattr(RealtimePlugin, "corral_services", hookimpl(broken))
    kit: Kit = await make_kit(config={"plugins.disabled": ["realtime"] if how == "disabled" else []})
    member = await kit.as_user()
    async with serving(kit) as port:
        for path in ("/ws", "/api/v1/ws", "/api/v1/ws/"):
            answer = await refusal(port, member, f"?token={member.token}", path=path)
            assert (answer.status_code, json.loads(answer.body)["code"]) == (503, f"plugin_{how}")
            assert int(answer.headers["retry-after"]) > 0
        assert (await refusal(port, member, path="/api/v1/no-socket")).status_code == 404
    assert (await member.get("/events/stream")).code == f"plugin_{how}"
    assert (await member.get("/ws")).status == 404  # to a request that opens no socket


async def test_a_stream_of_what_only_admins_see_is_refused(kit: Kit, port: int) -> None:
    member, admin = await kit.as_user(), await kit.as_user("admin")
    for types in ("emitter.guarded", "emitter.happened,emitter.guarded", "system.alert"):
        answer = await member.get(f"/events/stream?types={types}")
        assert (answer.status, answer.code) == (403, "forbidden")
    async with sse(port, admin, "types=emitter.guarded") as stream:
        await stream.begin()
        await admin.post("/emitter", {"first": 5, "kind": "guarded"})
        assert (await stream.event())[2]["data"]["number"] == 5


async def test_sockets_before_sign_in_are_few_and_take_no_place_of_others(
    kit: Kit, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address has 20 of them, and all addresses together 200: an empty credential is one of them, too."""
    member = await kit.as_user()
    monkeypatch.setattr(hub, "MAX_CLIENTS", 3)
    async with contextlib.AsyncExitStack() as waiting:
        for number in range(hub.MAX_PENDING_OF_ADDRESS):
            query = "?token=" if number % 2 else ""
            await waiting.enter_async_context(ear(port, None, query))
        answer = await refusal(port, None)
        assert (answer.status_code, json.loads(answer.body)["code"]) == (429, "concurrency_limit")
        async with ear(port, member) as one, ear(port, member), ear(port, member):
            assert (await one.ask("ping"))["type"] == "pong"
        monkeypatch.setattr(hub, "MAX_PENDING_OF_ADDRESS", 1000)
        monkeypatch.setattr(hub, "MAX_PENDING", 20)
        answer = await refusal(port, None)
        assert (answer.status_code, json.loads(answer.body)["code"]) == (503, "overloaded")
    async with ear(port, None) as one:  # the places are free again
        assert (await one.ask("auth", token=member.token))["type"] == "auth_ok"


async def test_an_empty_credential_is_an_anonymous_request(make_kit: Callable[..., Any]) -> None:
    limits = {"rate_limits": True, "settings.http.anonymous_rate_per_minute": 10}
    kit: Kit = await make_kit(plugins=("realtime", "security"), config=limits)
    stop_refilling(kit)
    async with serving(kit) as port:
        codes = []
        for _ in range(5):
            async with ear(port, None, additional_headers={"X-API-Key": ""}) as one:
                codes.append(await one.closed())
        assert codes == [4401] * 5  # each counts as a handshake, and as a credential that is not valid
        answer = await refusal(port, None, **{"X-API-Key": ""})
        assert (answer.status_code, json.loads(answer.body)["code"]) == (429, "rate_limited")


async def test_a_header_that_decides_comes_once(kit: Kit, port: int) -> None:
    member = await kit.as_user()
    bearer = f"Bearer {member.token}"
    own = f"http://127.0.0.1:{port}"
    for name, values in (
        ("Authorization", (bearer, bearer)),
        ("Origin", (own, "https://evil.example")),
        ("Origin", ("https://evil.example", own)),
    ):
        with pytest.raises(InvalidStatus) as refused:
            async with ear(port, member, additional_headers=[(name, value) for value in values]):
                pass
        assert (refused.value.response.status_code, json.loads(refused.value.response.body)["code"]) == (
            400,
            "malformed_request",
        )


async def test_the_ticket_of_a_worker_opens_nothing(make_kit: Callable[..., Any]) -> None:
    kit: Kit = await make_kit(plugins=("realtime", "workers"))
    admin = await kit.as_user("admin")
    made = (await admin.post("/workers/register", {"name": "node"})).json()
    await admin.patch(f"/admin/workers/{made['id']}/approve", {"is_approved": True})
    ticket = await Client(kit.application.app, made["token"]).post("/auth/ws-ticket")
    async with serving(kit) as port:
        for query in (f"?ticket={ticket.json()['ticket']}", f"?token={made['token']}"):
            async with ear(port, None, query) as one:
                assert await one.closed() == 4403
