"""Webhooks together with other plugins: triggers that call them, circuit breakers, the audit log, and the signer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from standardwebhooks import Webhook as StandardWebhook
from tests.plugins.webhooks.conftest import ALLOWED, PLUGINS, Hooks
from tests.plugins.webhooks.receivers import Receiver

from corral import clock
from corral.database.unit import current
from corral.testing.server import free_port
from corral_plugins.circuit_breakers.api import Breakers
from corral_plugins.webhooks.api import Signer
from corral_plugins.webhooks.service.fan_out import ENTRY, WebhookFanOut

pytestmark = pytest.mark.one_engine


async def test_a_trigger_calls_a_webhook(make_kit: Callable[..., Any], receiver: Receiver) -> None:
    hooks = await Hooks().build(await make_kit(plugins=(*PLUGINS, "triggers"), config=ALLOWED))
    made = await hooks.create(receiver, "webhook.deleted")
    action = {"type": "call_webhook", "webhook_id": made["id"], "data": {"said": "{{ payload.word }}"}}
    body = {"name": "caller", "type": "manual", "config": {}, "action": action}
    refused = await hooks.stranger.post("/triggers", body)
    assert (refused.status, refused.code) == (422, "unknown_reference")
    assert refused.json()["errors"][0]["pointer"] == "/action/webhook_id"
    trigger = await hooks.ok(hooks.member.post("/triggers", body), 201)
    fired = await hooks.ok(hooks.member.post(f"/triggers/{trigger['id']}/fire", {"payload": {"word": "hello"}}), 202)
    await hooks.kit.run_jobs()
    await hooks.run()
    (message,) = receiver.messages
    content = message.verify(made["secret"])
    assert (content["type"], content["id"]) == ("trigger.call_webhook", fired["id"])
    assert content["data"] == {"said": "hello"}
    (row,) = (await hooks.ok(hooks.member.get(f"/triggers/{trigger['id']}/history")))["items"]
    assert row["result"] == {"delivery_id": message.id}

    assert (
        await hooks.member.put(
            f"/triggers/{trigger['id']}", {"action": {**action, "data": {"large": "word " * 14_000}}}
        )
    ).status == 200
    await hooks.ok(hooks.member.post(f"/triggers/{trigger['id']}/fire", {"payload": {}}), 202)
    await hooks.kit.run_jobs()
    await hooks.run()
    shown = {"id": trigger["id"], "href": f"/api/v1/triggers/{trigger['id']}", "truncated": True}
    assert receiver.messages[-1].verify(made["secret"])["data"] == shown
    assert (await hooks.member.get(shown["href"].removeprefix("/api/v1"))).status == 200


async def test_an_open_breaker_holds_deliveries_and_uses_up_no_attempt(make_kit: Callable[..., Any]) -> None:
    kit = await make_kit(plugins=(*PLUGINS, "circuit_breakers"), config=ALLOWED)
    hooks = await Hooks().build(kit)
    await hooks.set("webhooks.probe_seconds", 0)
    breakers: Any = kit.service(Breakers)
    receiver = Receiver("127.0.0.7")
    receiver.port = free_port()
    made = await hooks.create(receiver)
    await hooks.emit(*[f"thing {number}" for number in range(15)])
    for _ in range(20):
        await hooks.run()
        await breakers.sync()
    rows = await hooks.deliveries(made["id"])
    assert breakers.state("webhook:127.0.0.7") == "open"
    attempted = sum(row["attempt"] for row in rows)
    assert 10 <= attempted < 15
    tried = await hooks.ok(hooks.member.post(f"/webhooks/{made['id']}/test"))
    assert tried["error"] == "circuit_open"
    async with receiver:
        await hooks.run()
        assert receiver.messages == []
        clock.travel(31)
        for _ in range(20):
            await breakers.sync()
            await hooks.run()
    assert len(receiver.ids) == len(receiver.messages) == 15
    assert {row["status"] for row in await hooks.deliveries(made["id"])} == {"succeeded"}
    assert breakers.state("webhook:127.0.0.7") == "closed"


async def test_changes_are_audited_without_secrets(make_kit: Callable[..., Any], receiver: Receiver) -> None:
    hooks = await Hooks().build(await make_kit(plugins=(*PLUGINS, "audit"), config=ALLOWED))
    made = await hooks.create(receiver)
    secret = "a secret that nobody reads"
    path = f"/webhooks/{made['id']}"
    await hooks.ok(hooks.member.put(path, {"secret": secret, "description": "mine"}))
    await hooks.ok(hooks.admin.post(f"{path}/disable"))
    await hooks.ok(hooks.member.delete(path), 204)
    found = await hooks.admin.get("/admin/audit?action=webhooks.*")
    actions = [row["action"].rpartition(".")[2] for row in reversed(found.json()["items"])]
    assert actions == ["create", "update", "disable", "delete"]
    assert secret not in found.body.decode()


async def test_the_signer_for_other_plugins(hooks: Hooks) -> None:
    signer: Any = hooks.kit.service(Signer)
    now, body = int(clock.system_time_s()), b'{"a":1}'
    first, second = "whsec_" + "AAAA" * 8, "whsec_" + "BBBB" * 8
    headers = signer.sign(first, second, message_id="msg_1", timestamp=now, body=body)
    for secret in (first, second):
        assert StandardWebhook(secret).verify(body, headers) == {"a": 1}


async def test_a_process_that_stops_gives_its_deliveries_back(hooks: Hooks) -> None:
    async with Receiver(hangs=True) as receiver:
        made = await hooks.create(receiver)
        await hooks.emit("one")
        await hooks.kit.events()
        await hooks.dispatcher.run_once()
        await receiver.wait_for(1)
        await hooks.dispatcher.stop()
    (row,) = await hooks.deliveries(made["id"])
    assert (row["status"], row["attempt"]) == ("pending", 0)
    assert row["next_attempt_at"] <= clock.now()


async def test_fan_out_asks_once_for_all_webhooks_and_events(hooks: Hooks, receiver: Receiver) -> None:
    """The number of queries does not grow with the number of events and webhooks."""
    engine: Any = hooks.kit.kernel.database.engine
    counted: list[str] = []
    plain = engine.execute_sql

    def execute_sql(sql: str, *arguments: Any, **options: Any) -> Any:
        if current().entry == ENTRY:  # what runs in the background does not count
            counted.append(sql)
        return plain(sql, *arguments, **options)

    async def read() -> int:
        await hooks.kit.events()
        counted.clear()
        engine.execute_sql = execute_sql
        try:
            await hooks.kit.service(WebhookFanOut).handle_new_events()
        finally:
            del engine.execute_sql
        return len(counted)

    await hooks.create(receiver)
    await hooks.emit("one")
    few = await read()
    for _ in range(9):
        await hooks.create(receiver, by=hooks.stranger)
    await hooks.emit(*[f"thing {number}" for number in range(20)])
    assert await read() == few > 0
