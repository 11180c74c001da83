"""`/ws`. The numbers are those of "Done when" of the page on realtime.

Waiting: 1 with the local model (plugin `llama`); IP rules (plugin `security`).
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from typing import Any

import pytest
from tests.plugins.realtime.conftest import Ear, listening, serving
from websockets.exceptions import ConnectionClosed, InvalidStatus

from corral.testing.kit import Kit


async def test_realtime_1_the_frame_comes_within_250_ms_of_the_commit(kit: Kit, port: int) -> None:
    member = await kit.as_user()
    async with listening(port, member) as ear:
        await ear.say(type="subscribe", event="emitter.happened")
        assert (await ear.hear())["type"] == "subscribed"
        for number in range(10):
            began = time.monotonic()
            await member.post("/emitter", {"first": number})
            found = await ear.hear()
            assert time.monotonic() - began < 0.25
            assert (found["type"], found["event"], found["data"]["number"]) == ("event", "emitter.happened", number)
            assert found["actor"] == {"type": "user", "id": member.user["id"]}


async def test_ways_to_sign_in(kit: Kit, port: int) -> None:
    member = await kit.as_user()
    async with listening(port, member) as ear:
        await ear.say(type="ping")
        assert (await ear.hear())["type"] == "pong"
    async with listening(port, None, additional_headers={"Authorization": f"Bearer {member.token}"}) as ear:
        await ear.say(type="ping")
        assert (await ear.hear())["type"] == "pong"
    async with listening(port, None) as ear:
        await ear.say(type="auth", token=member.token)
        answer = await ear.hear()
        assert (answer["type"], answer["user_id"]) == ("auth_ok", member.user["id"])
    ticket = (await member.post("/auth/ws-ticket")).json()["ticket"]
    async with listening(port, None, query=f"?ticket={ticket}") as ear:
        await ear.say(type="ping")
        assert (await ear.hear())["type"] == "pong"
    async with listening(port, None, query=f"?ticket={ticket}") as ear:
        assert await ear.closed_with() == 4401


async def test_bad_sign_ins_are_closed(kit: Kit, port: int) -> None:
    async with listening(port, None, query="?token=nonsense") as ear:
        assert await ear.closed_with() == 4401
    async with listening(port, None) as ear:
        await ear.say(type="subscribe", event="*")
        assert await ear.closed_with() == 4401
    auditor = await kit.as_user("auditor")
    async with listening(port, auditor) as ear:
        assert await ear.closed_with() == 4403


async def test_a_foreign_page_cannot_open_a_socket(kit: Kit, port: int) -> None:
    member = await kit.as_user()
    with pytest.raises(InvalidStatus) as refused:
        async with listening(port, member, origin="https://evil.example"):  # type: ignore[arg-type]  # an origin is a str
            pass
    assert refused.value.response.status_code == 403
    async with listening(port, member, origin=f"http://127.0.0.1:{port}") as ear:  # type: ignore[arg-type]  # an origin is a str
        await ear.say(type="ping")
        assert (await ear.hear())["type"] == "pong"


async def test_realtime_7_bad_messages_get_their_code(kit: Kit, port: int) -> None:
    member = await kit.as_user()
    async with listening(port, member) as ear:
        for message, code in (
            ('{"type": "subscribe", "event": "no.such"}', "unknown_event"),
            ("{", "malformed_json"),
            ("[]", "validation_error"),
            ('{"type": "dance"}', "validation_error"),
            ('{"type": "subscribe", "event": "*", "filter": {"colour": 1}}', "validation_error"),
        ):
            await ear.socket.send(message)
            answer = await ear.hear()
            assert (answer["type"], answer["code"]) == ("error", code), message
        for _ in range(5):
            await ear.socket.send("{")
        assert await ear.closed_with() == 4400
    async with listening(port, member) as ear:
        await ear.socket.send("x" * 70_000)
        assert await ear.closed_with() == 1009
    async with listening(port, member) as ear:
        with pytest.raises(ConnectionClosed):
            await ear.ping(200)
        assert await ear.closed_with() == 4429
    assert (await kit.client.get("/health")).status == 200


async def test_limits_of_subscriptions_and_sockets(kit: Kit, port: int) -> None:
    member = await kit.as_user()
    async with listening(port, member) as ear:
        for number in range(51):
            await ear.say(type="subscribe", event="*", filter={"task_id": str(number)})
            answer = await ear.hear()
            if number % 15 == 14:
                await asyncio.sleep(1.1)
        assert (answer["type"], answer["code"]) == ("error", "subscription_limit")
    async with asyncio.TaskGroup() as group:
        held = asyncio.Event()

        async def hold() -> None:
            async with listening(port, member) as ear:
                await ear.say(type="ping")
                await ear.hear()
                await held.wait()

        for _ in range(10):
            group.create_task(hold())
        await asyncio.sleep(1)
        async with listening(port, member) as eleventh:
            assert await eleventh.closed_with() == 4429
        held.set()


async def test_filters_patterns_and_unsubscribe(kit: Kit, port: int) -> None:
    member = await kit.as_user()
    async with listening(port, member) as ear:
        await ear.say(type="subscribe", event="emitter.*", filter={"status": "done"})
        await ear.hear()
        await member.post("/emitter", {"first": 1})
        await member.post("/emitter", {"first": 2, "status": "done"})
        assert (await ear.hear())["data"]["number"] == 2
        await ear.say(type="unsubscribe", event="emitter.*")
        assert (await ear.hear())["type"] == "unsubscribed"
        await member.post("/emitter", {"first": 3, "status": "done"})
        with pytest.raises(TimeoutError):
            await ear.hear(0.5)


async def test_realtime_3_nobody_sees_what_a_read_would_refuse(kit: Kit, port: int) -> None:
    alice, bob = await kit.as_user(), await kit.as_user()
    async with listening(port, alice) as hers, listening(port, bob) as his:
        for ear in (hers, his):
            await ear.say(type="subscribe", event="*")
            await ear.hear()
        await alice.post("/emitter", {"first": 1, "private": True})
        await alice.post("/emitter", {"first": 2})
        assert (await hers.hear())["data"]["number"] == 1
        assert (await hers.hear())["data"]["number"] == 2
        assert (await his.hear())["data"]["number"] == 2
        await his.say(type="resume", last_event_id="0")
        replayed = []
        while (found := await his.hear())["type"] != "resumed":
            replayed.append(found)
        assert "emitter.whispered" not in {found["event"] for found in replayed}


async def test_realtime_6_a_signed_out_socket_closes_within_two_seconds(kit: Kit, port: int) -> None:
    member = await kit.as_user()
    async with listening(port, member) as ear:
        await ear.say(type="ping")
        await ear.hear()
        began = time.monotonic()
        assert (await member.post("/auth/logout")).status == 204
        assert await ear.closed_with() == 4401
        assert time.monotonic() - began < 2


async def collect(ear: Ear, numbers: list[int], place: list[int]) -> None:
    while True:
        found = await ear.hear(10)
        if found["type"] == "event":
            numbers.append(found["data"]["number"])
            place[0] = found["seq"]


async def test_realtime_2_cut_clients_resume_without_gap_or_double(kit: Kit, port: int, long_form: bool) -> None:
    member = await kit.as_user()
    total, cuts = (4000, 100) if long_form else (600, 20)
    numbers: list[int] = []
    place = [0]
    place[0] = (await kit.events())[-1].seq

    async def write() -> None:
        for first in range(0, total, 10):
            await member.post("/emitter", {"first": first, "count": 10})
            await asyncio.sleep(0.02)

    writing = asyncio.ensure_future(write())
    for cut in range(cuts + 1):
        async with listening(port, member) as ear:
            await ear.say(type="subscribe", event="emitter.happened", since=place[0])
            try:
                async with asyncio.timeout(5 if cut == cuts else 0.08):
                    await collect(ear, numbers, place)
            except (TimeoutError, ConnectionClosed):
                pass
            ear.socket.transport.abort()
    await writing
    assert numbers == list(range(total))


async def test_realtime_4_a_reader_that_stops_is_closed_and_disturbs_nobody(kit: Kit, port: int) -> None:
    member, other = await kit.as_user(), await kit.as_user()
    async with (
        listening(port, other, compression=None) as quick,
        listening(port, member, max_queue=1, compression=None) as slow,
    ):
        for ear in (quick, slow):
            await ear.say(type="subscribe", event="*")
            await ear.hear()
        slow.socket.transport.pause_reading()
        body: dict[str, Any] = {"count": 200, "status": secrets.token_hex(3000)}  # compression must not help
        heard = 0
        for first in range(0, 20_000, 200):
            await member.post("/emitter", {**body, "status": secrets.token_hex(3000), "first": first})
            for _ in range(200):
                assert (await quick.hear())["type"] == "event"
                heard += 1
            if kit.kernel.container.get(_hub()).count < 2:
                break
        assert kit.kernel.container.get(_hub()).dropped >= 1, (heard, kit.kernel.container.get(_hub()).count)
        slow.socket.transport.resume_reading()
        with pytest.raises(ConnectionClosed):
            await slow.hear_all()
        assert await slow.closed_with(10) in (4408, 1006)


def _hub() -> Any:
    from corral_plugins.realtime.service.hub import Hub

    return Hub


async def test_realtime_5_a_restart_misses_nothing(kit: Kit) -> None:
    member = await kit.as_user()
    async with serving(kit) as port, listening(port, member) as ear:
        await ear.say(type="subscribe", event="emitter.happened")
        await ear.hear()
        await member.post("/emitter", {"first": 1})
        seen = await ear.hear()
        await kit.kernel.drain(2)
        assert (await ear.hear())["type"] == "reload"
        assert await ear.closed_with() == 1012
    await member.post("/emitter", {"first": 2})
    kit.kernel.container.get(_hub()).start()
    async with serving(kit) as port, listening(port, member) as ear:
        await ear.say(type="subscribe", event="emitter.happened", since=seen["id"])
        assert (await ear.hear())["type"] == "subscribed"
        assert (await ear.hear())["data"]["number"] == 2


async def test_a_gap_is_told(kit: Kit, port: int) -> None:
    from corral_plugins.realtime.service.replay import Replay

    member = await kit.as_user()
    await member.post("/emitter", {"count": 50})
    await asyncio.sleep(1)  # they are handed on: what comes now is a replay
    original, Replay.__init__ = Replay.__init__, lambda self, work, limit, encode: original(self, work, 10, encode)  # type: ignore[method-assign]  # a small limit
    try:
        async with listening(port, member) as ear:
            await ear.say(type="subscribe", event="emitter.happened", since="0")
            await ear.hear()
            assert (await ear.hear())["type"] == "gap"
            assert [(await ear.hear())["data"]["number"] for _ in range(10)] == list(range(40, 50))
    finally:
        Replay.__init__ = original  # type: ignore[method-assign]  # as it was


async def test_sse(kit: Kit, port: int) -> None:
    import httpx2

    member = await kit.as_user()
    await member.post("/emitter", {"first": 1})
    first = (await kit.events())[-1]
    await member.post("/emitter", {"first": 2})
    headers = {"Authorization": f"Bearer {member.token}", "Last-Event-ID": str(first.seq)}
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}/api/v1", trust_env=False, timeout=10) as http:
        async with http.stream("GET", "/events/stream?types=emitter.happened", headers=headers) as stream:
            assert stream.status_code == 200
            assert stream.headers["content-type"] == "text/event-stream"
            lines: list[str] = []
            async for line in stream.aiter_lines():
                lines.append(line)
                if line.startswith("data:") and '"number":2' in line:
                    await member.post("/emitter", {"first": 3})
                if line.startswith("data:") and '"number":3' in line:
                    break
        assert lines[0] == "retry: 2000"
        numbers = [json.loads(line[6:])["data"]["number"] for line in lines if line.startswith("data: ")]
        assert numbers == [2, 3]
        refused = await http.get("/events/stream?types=no.such", headers=headers)
        assert refused.json()["code"] == "unknown_event"


async def test_realtime_8_the_catalogue_has_every_event_with_its_schema(kit: Kit) -> None:
    member = await kit.as_user()
    items = (await member.get("/events/types")).json()["items"]
    found = {item["event"]: item for item in items}
    assert found["emitter.happened"]["plugin"] == "emitter"
    assert found["emitter.happened"]["schema"]
