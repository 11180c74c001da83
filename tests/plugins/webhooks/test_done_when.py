"""What the page on webhooks promises. The forms with processes and kills are in test_processes.py and in R3."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from tests.limits import Stopwatch, within
from tests.plugins.webhooks.conftest import ALLOWED, PLUGINS, Hooks
from tests.plugins.webhooks.receivers import Receiver

from corral import clock
from corral.testing.server import free_port
from corral_plugins.webhooks.api import connection_error_text


def things(prefix: str, count: int) -> list[str]:
    return [f"{prefix} {number}" for number in range(count)]


async def test_webhooks_1_an_independent_library_verifies_every_delivery(
    hooks: Hooks, receiver: Receiver, long_form: bool
) -> None:
    """Before, during and after a rotation. Short form: 60 deliveries. Long form: 1,000."""
    part = 334 if long_form else 20
    made = await hooks.create(receiver)
    old = made["secret"]
    await hooks.emit(*things("before", part))
    await hooks.run_all()
    rotated = await hooks.ok(hooks.member.post(f"/webhooks/{made['id']}/rotate-secret", {"overlap_seconds": 600}))
    new = rotated["secret"]
    await hooks.emit(*things("during", part))
    await hooks.run_all()
    clock.travel(601)
    await hooks.emit(*things("after", part))
    await hooks.run_all()
    assert len(receiver.messages) == len(receiver.ids) == 3 * part
    for message in receiver.messages:
        phase = message.content["data"]["thing_id"].partition(" ")[0]
        valid = [message.verify_signature(secret) for secret in (old, new)]
        assert valid == {"before": [True, False], "during": [True, True], "after": [False, True]}[phase]
    for message in receiver.messages[:part]:
        assert message.verify(old)["type"] == "things.happened"


async def test_webhooks_3_dead_receivers_do_not_delay_a_live_one(make_kit: Callable[..., Any], long_form: bool) -> None:
    """Ten receivers that do not answer, and one that does: its deliveries start at most 1 s after the commit, p95."""
    events = 100 if long_form else 25
    hooks = await Hooks().build(await make_kit(plugins=PLUGINS, config=ALLOWED, jobs=True))
    async with AsyncExitStack() as stack:
        watch = stack.enter_context(Stopwatch())
        for number in range(2, 12):
            dead = await stack.enter_async_context(Receiver(f"127.0.0.{number}", hangs=True))
            await hooks.create(dead)
        live = await stack.enter_async_context(Receiver("127.0.0.12", now=lambda: watch.seconds))
        await hooks.create(live)
        committed: dict[str, float] = {}
        for name in things("event", events):
            await hooks.emit(name)
            committed[name] = watch.seconds
            await asyncio.sleep(0.05)
        messages = await live.wait_for(events, seconds=120)
    delays = sorted(message.at - committed[message.content["data"]["thing_id"]] for message in messages)
    assert len(delays) == events
    p95 = delays[int(len(delays) * 0.95) - 1]
    print(f"start after commit: p50 {delays[len(delays) // 2] * 1000:.0f} ms, p95 {p95 * 1000:.0f} ms")
    assert p95 <= 1.0


async def test_webhooks_4_what_the_owner_may_not_read_is_never_sent(hooks: Hooks, receiver: Receiver) -> None:
    made = await hooks.create(receiver, "*", "things.happened")
    await hooks.emit("private to another", visibility="private", owner=hooks.stranger.user["id"])
    await hooks.emit("admins only", visibility="admin")
    await hooks.emit("my own", visibility="private", owner=hooks.member.user["id"])
    await hooks.run_all()
    sent = [message.content["data"].get("thing_id") for message in receiver.messages]
    assert [each for each in sent if each] == ["my own"]
    rows = await hooks.deliveries(made["id"])
    assert len(rows) == len(receiver.messages)


async def test_webhooks_5_gone_disables_at_once_and_recover_sends_what_was_missed(
    hooks: Hooks, receiver: Receiver
) -> None:
    made = await hooks.create(receiver)
    path, since = f"/webhooks/{made['id']}", clock.now()
    receiver.status = 410
    await hooks.emit("one")
    await hooks.run()
    found = await hooks.get(made["id"])
    assert (found["is_active"], found["disabled_reason"], found["last_status_code"]) == (False, "gone", 410)
    events = [event for event in await hooks.kit.events() if event.type == "webhook.disabled"]
    assert [event.payload()["reason"] for event in events] == ["gone"]
    await hooks.emit("two")
    await hooks.run()
    receiver.status = 200
    refused = await hooks.member.post(f"{path}/recover", {"since": since})
    assert (refused.status, refused.json()["current_status"]) == (409, "disabled")
    enabled = await hooks.ok(hooks.member.post(f"{path}/enable"))
    assert (enabled["is_active"], enabled["disabled_reason"]) == (True, None)
    assert (await hooks.ok(hooks.member.post(f"{path}/recover", {"since": since}), 202))["queued"] == 2
    await hooks.run_all()
    assert [message.content["data"]["thing_id"] for message in receiver.messages] == ["one", "one", "two"]


async def test_webhooks_6_the_secret_is_shown_once(hooks: Hooks, receiver: Receiver) -> None:
    made = await hooks.create(receiver, headers={"X-Token": "a value of mine"})
    path = f"/webhooks/{made['id']}"
    await hooks.emit("one")
    await hooks.run()
    shown = [
        await hooks.ok(hooks.member.get(each))
        for each in ("/webhooks", path, f"{path}/deliveries", "/events?types=webhook.*")
    ]
    shown += [await hooks.delivery(made["id"]), await hooks.ok(hooks.member.put(path, {"description": "mine"}))]
    assert made["secret"] not in json.dumps(shown)
    assert "a value of mine" not in json.dumps(shown)
    found = await hooks.get(made["id"])
    assert found["has_secret"]
    assert found["headers"] == {"X-Token": "********"}
    assert "secret" not in found
    for body in ({"secret": "*" * 20}, {"headers": found["headers"]}):
        answer = await hooks.member.put(path, body)
        assert (answer.status, answer.code) == (422, "masked_value_submitted")
    form = {name: found[name] for name in ("url", "events", "description", "filter", "is_active")}
    await hooks.ok(hooks.member.put(path, form))
    await hooks.emit("two")
    await hooks.run()
    assert receiver.messages[-1].verify(made["secret"])


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (
            "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate (_ssl.c:1006)",
            "the TLS certificate was refused: self-signed certificate",
        ),
        (
            "[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006)",
            "the TLS handshake failed (wrong version number); check whether the server speaks TLS on this port",
        ),
        (
            "illegal status line: bytearray(b'hello')",
            "the server sent no valid HTTP response (illegal status line)",
        ),
        ("Server disconnected without sending a response.", "Server disconnected without sending a response"),
        ("", "the connection was closed"),
    ],
)
def test_errors_of_connections_are_told_in_words(told: str, words: str) -> None:
    assert connection_error_text(OSError(told)) == words


@pytest.mark.one_engine
async def test_webhooks_7_a_test_against_a_closed_port(hooks: Hooks) -> None:
    port = free_port()
    made = await hooks.create(f"http://127.0.0.1:{port}/hook")
    async with within(6):
        found = await hooks.ok(hooks.member.post(f"/webhooks/{made['id']}/test"))
    assert (found["delivered"], found["error"], found["status_code"]) == (False, "connect", None)
    assert found["response"] == f"Not sent: 127.0.0.1:{port}: Connection refused"
    assert await hooks.deliveries(made["id"]) == []
    assert (await hooks.get(made["id"]))["failing_since"] is None
