"""The protocol of `/ws`: signing in, every message, every limit and its close code."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.realtime.conftest import ear, hub_of, settle
from websockets.exceptions import ConnectionClosed, InvalidStatus

from corral import clock
from corral.testing.kit import Kit
from corral.testing.server import serving

pytestmark = pytest.mark.one_engine


async def test_every_way_to_sign_in(kit: Kit, port: int) -> None:
    member = await kit.as_user()
    async with ear(port, member) as one:
        assert (await one.ask("ping"))["type"] == "pong"
    async with ear(port, None, additional_headers={"Authorization": f"Bearer {member.token}"}) as one:
        assert (await one.ask("ping"))["type"] == "pong"
    async with ear(port, None) as one:
        answer = await one.ask("auth", token=member.token)
        assert (answer["type"], answer["user_id"]) == ("auth_ok", member.user["id"])
        assert clock.parse_instant(answer["expires_at"]) > clock.time_s()
        assert (await one.ask("auth", token=(await kit.sign_in(member.user["email"])).token))["type"] == "auth_ok"
    ticket = (await member.post("/auth/ws-ticket")).json()["ticket"]
    async with ear(port, None, f"?ticket={ticket}") as one:
        assert (await one.ask("ping"))["type"] == "pong"
        await asyncio.sleep(1.2)  # the rights of a ticket's caller are read again, too
        assert (await one.ask("ping"))["type"] == "pong"
        await member.post("/auth/logout")
        assert await one.closed(2) == 4401
    async with ear(port, None, f"?ticket={ticket}") as one:
        assert await one.closed() == 4401


async def test_who_may_not_sign_in(kit: Kit, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    member = await kit.as_user()
    async with ear(port, None, "?token=nonsense") as one:
        assert await one.closed() == 4401
    for first in ("subscribe", "auth"):
        async with ear(port, None) as one:
            await one.say(first, event="*")
            assert await one.closed() == 4401
    async with ear(port, None) as one:
        await one.socket.send("{")
        assert await one.closed() == 4401
    async with ear(port, await kit.as_user("auditor")) as one:
        assert await one.closed() == 4403
    async with ear(port, None, f"?token={member.token}&ticket=x") as one:
        assert await one.closed() == 4400
    async with ear(port, member) as one:
        await one.say("auth", token=(await kit.as_user()).token)  # another user's
        assert await one.closed() == 4401
    monkeypatch.setattr("corral_plugins.realtime.service.socket.SIGN_IN_SECONDS", 0.2)
    async with ear(port, None) as one:
        assert await one.closed(2) == 4401
    assert not hub_of(kit).viewers


@pytest.mark.parametrize("by_message", [False, True])
async def test_false_credentials_count_as_none(make_kit: Callable[..., Any], by_message: bool) -> None:
    kit: Kit = await make_kit(plugins=["realtime", "security"], config={"rate_limits": True})
    member = await kit.as_user()
    closed: list[int | None] = []
    limited = 429 if by_message else 4429
    async with serving(kit) as port:
        while limited not in closed and len(closed) < 600:  # what is allowed grows by two a second meanwhile
            try:
                async with ear(port, None, "" if by_message else "?token=nonsense") as one:
                    if by_message:
                        await one.say("auth", token="nonsense")
                    closed.append(await one.closed())
            except InvalidStatus as refused:
                closed.append(refused.response.status_code)
        async with ear(port, member) as one:  # who has a good one is no concern of theirs
            assert (await one.ask("ping"))["type"] == "pong"
    assert set(closed[:60]) == {4401}
    assert closed[-1] == limited


async def test_other_pages_open_no_socket(kit: Kit, port: int) -> None:
    member = await kit.as_user()
    for foreign in ("https://evil.example", f"http://127.0.0.1:{port + 1}", "null"):
        with pytest.raises(InvalidStatus) as refused:
            async with ear(port, member, additional_headers={"Origin": foreign}):
                pass
        assert refused.value.response.status_code == 403
    async with ear(port, member, additional_headers={"Origin": f"http://127.0.0.1:{port}"}) as one:
        assert (await one.ask("ping"))["type"] == "pong"


async def test_realtime_7_bad_messages_get_their_code(kit: Kit, port: int) -> None:
    member = await kit.as_user()
    async with ear(port, member) as one:
        for message, code in (
            ('{"type": "subscribe", "event": "no.such"}', "unknown_event"),
            ('{"type": "subscribe", "event": "emitter.guarded"}', "forbidden"),
            ("{", "malformed_json"),
            ('{"type": "ping", "type": "ping"}', "malformed_json"),
            (b"\x00\x01", "malformed_json"),
            ("[]", "validation_error"),
            ('{"type": "dance"}', "validation_error"),
            ('{"type": "subscribe", "event": "*", "filter": {"colour": "red"}}', "validation_error"),
            ('{"type": "subscribe", "event": "*", "since": "yesterday"}', "validation_error"),
        ):
            await one.socket.send(message)
            answer = await one.hear()
            assert (answer["type"], answer["code"]) == ("error", code), message
        assert (await one.ask("resume", last_event_id="x"))["code"] == "validation_error"  # the tenth
        assert await one.closed() == 4400
    async with ear(port, member) as one:
        await one.socket.send("x" * 70_000)
        assert await one.closed() == 1009
    async with ear(port, member) as one:
        with contextlib.suppress(ConnectionClosed):
            for _ in range(60):
                await one.say("ping")
        heard = [frame async for frame in one.rest()]
        assert await one.closed() == 4429
        assert [frame["code"] for frame in heard if frame["type"] == "error"] == ["rate_limited"]
    assert (await kit.client.get("/health")).status == 200
    assert not hub_of(kit).viewers


async def test_limits_of_subscriptions_sockets_and_the_process(
    kit: Kit, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    member, other = await kit.as_user(), await kit.as_user()
    monkeypatch.setattr("corral_plugins.realtime.service.socket.MESSAGES_PER_SECOND", 1000)
    async with ear(port, member) as one:
        for number in range(50):
            assert (await one.ask("subscribe", event="*", filter={"task_id": str(number)}))["type"] == "subscribed"
        assert (await one.ask("subscribe", event="*", filter={"task_id": "7"}))[
            "type"
        ] == "subscribed"  # the same again
        assert (await one.ask("subscribe", event="*"))["code"] == "subscription_limit"
        await one.ask("unsubscribe", event="*")
        assert (await one.ask("subscribe", event="*"))["type"] == "subscribed"

    async with asyncio.TaskGroup() as group:
        done, ready = asyncio.Event(), asyncio.Semaphore(0)

        async def hold() -> None:
            async with ear(port, member) as mine:
                await mine.ask("ping")
                ready.release()
                await done.wait()

        for _ in range(10):
            group.create_task(hold())
        for _ in range(10):
            await ready.acquire()
        async with ear(port, member) as eleventh:
            assert await eleventh.closed() == 4429
        assert (await member.get("/events/stream")).code == "concurrency_limit"  # streams count as sockets
        async with ear(port, other) as one:
            assert (await one.ask("ping"))["type"] == "pong"
        monkeypatch.setattr("corral_plugins.realtime.service.hub.MAX_CLIENTS", 10)
        with pytest.raises(InvalidStatus) as refused:
            async with ear(port, other):
                pass
        assert refused.value.response.status_code == 503
        done.set()


async def test_filters_patterns_and_unsubscribe(kit: Kit, port: int) -> None:
    member = await kit.as_user()
    async with ear(port, member) as one:
        await one.ask("subscribe", event="emitter.*", filter={"status": "done"})
        await one.ask("subscribe", event="*", filter={"status": "done"})  # twice the same event: sent once
        await member.post("/emitter", {"first": 1})
        await member.post("/emitter", {"first": 2, "status": "done"})
        assert await one.numbers(1) == [2]
        assert (await one.ask("unsubscribe", event="emitter.*"))["type"] == "unsubscribed"
        await member.post("/emitter", {"first": 3, "status": "done"})
        assert await one.numbers(1) == [3]
        await one.ask("unsubscribe", event="*")
        await member.post("/emitter", {"first": 4, "status": "done"})
        await one.silence()


async def test_replay_sends_each_event_once_whatever_overlaps(kit: Kit, port: int) -> None:
    member = await kit.as_user()
    start = await settle(kit)
    await member.post("/emitter", {"count": 5})
    await settle(kit)
    async with ear(port, member) as one:
        assert (await one.ask("subscribe", event="emitter.happened"))["type"] == "subscribed"
        await member.post("/emitter", {"first": 5})
        assert await one.numbers(1) == [5]
        await one.say("subscribe", event="emitter.*", since=start)  # 5 came already, by the other subscription
        assert (await one.hear())["type"] == "subscribed"
        assert await one.numbers(5) == [0, 1, 2, 3, 4]
        resumed = await one.ask("resume", last_event_id=start)
        assert resumed["type"] == "resumed"
        await member.post("/emitter", {"first": 6})
        assert await one.numbers(1) == [6]
    async with ear(port, member) as one:
        third = (await kit.events())[-5]
        await one.ask("subscribe", event="emitter.happened", filter={"status": "new"}, since=third.id)
        assert await one.numbers(4) == [3, 4, 5, 6]


async def test_a_gap_is_told_and_the_newest_part_comes(kit: Kit, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from corral_plugins.realtime.service.replay import ReplayFactory

    monkeypatch.setattr(ReplayFactory, "max_events", 10)
    monkeypatch.setattr("corral_plugins.realtime.service.replay.WINDOW", 7)
    monkeypatch.setattr("corral_plugins.realtime.service.replay.BATCH_SIZE", 3)
    member = await kit.as_user()
    for first in range(0, 40, 10):
        await member.post("/emitter", {"count": 10, "first": first})
        await member.post("/emitter", {"count": 10, "first": first, "kind": "whispered"})
    await settle(kit)
    seqs = {
        record.payload()["number"]: record.seq for record in await kit.events() if record.type == "emitter.happened"
    }
    for event in ("emitter.happened", "*"):
        async with ear(port, member) as one:
            await one.ask("subscribe", event=event, since=0)
            gap = await one.hear()
            expected = seqs[29] if event == "emitter.happened" else seqs[39]
            assert (gap["type"], gap["from"], gap["to"]) == ("gap", 1, expected)
            assert await one.numbers(10) == list(range(30, 40))
    clock.travel(31 * 86_400)
    fresh = await kit.sign_in(member.user["email"])
    monkeypatch.setattr(ReplayFactory, "max_events", 1000)
    await fresh.post("/emitter", {"first": 77})
    await settle(kit)
    async with ear(port, fresh) as one:
        await one.ask("subscribe", event="emitter.happened", since=0)
        assert (await one.hear())["type"] == "gap"
        assert await one.numbers(1) == [77]
        unknown = await one.ask("resume", last_event_id="01890000-0000-7000-8000-000000000000")
        assert unknown["type"] == "gap"
        assert unknown["from"] is None
        assert (await one.hear())["type"] == "resumed"


async def test_the_end_of_a_token_is_announced_and_ends_the_socket(kit: Kit, port: int) -> None:
    member = await kit.as_user()
    async with ear(port, member) as one, ear(port, member) as renewed:
        await one.ask("ping")
        clock.travel(900 - 30)
        frame = await one.hear(3)
        assert frame["type"] == "token_expiring"
        assert (await renewed.hear(3))["type"] == "token_expiring"
        fresh = await kit.sign_in(member.user["email"])
        assert (await renewed.ask("auth", token=fresh.token))["type"] == "auth_ok"
        clock.travel(60)
        assert await one.closed(3) == 4401
        assert (await renewed.ask("ping"))["type"] == "pong"


async def test_metrics_count_clients(kit: Kit, port: int) -> None:
    member = await kit.as_user()
    async with ear(port, member) as one:
        await one.ask("ping")
        body = b""
        async with asyncio.timeout(60):  # series that wait for a busy machine's database are absent for a moment
            while b"corral_ws_clients" not in body:
                body = (await kit.client.get("/metrics", root=True)).body
        assert b"corral_ws_clients 1.0" in body
        assert b"corral_ws_dropped_total 0.0" in body


async def test_out_of_service_means_no_sockets(make_kit: Callable[..., Any]) -> None:
    kit: Kit = await make_kit()
    admin = await kit.as_user("admin")
    async with serving(kit) as port:
        async with ear(port, admin) as one:
            await one.ask("ping")
            assert (await admin.post("/plugins/realtime/disable", {})).status == 200
            assert (await one.hear())["type"] == "reload"
            assert await one.closed() == 1012
        assert (await admin.get("/events/stream")).code == "plugin_disabled"
        with pytest.raises(InvalidStatus) as refused:
            async with ear(port, admin):
                pass
        assert refused.value.response.status_code == 503
        assert (await admin.post("/plugins/realtime/enable")).status == 200
        async with ear(port, admin) as one:
            assert (await one.ask("ping"))["type"] == "pong"
