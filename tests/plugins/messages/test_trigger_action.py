"""The trigger action `send_message`, and triggers on `message.new`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.plugins.triggers.conftest import PLUGINS, Alarm

from corral.ids import new_id


async def test_a_trigger_sends_a_message_as_its_owner(make_kit: Callable[..., Any]) -> None:
    alarm = Alarm()
    await alarm.build(await make_kit(plugins=(*PLUGINS, "messages")))
    action = {"type": "send_message", "recipient_agent_id": alarm.agent_id, "subject": "Alarm", "body": "Wake up."}
    trigger = await alarm.create(action=action)
    assert (await alarm.member.post(f"/triggers/{trigger['id']}/fire", {})).status in (200, 202)
    await alarm.run()
    (sent,) = (await alarm.member.get("/messages")).json()["items"]
    (fired,) = await alarm.history(trigger["id"])
    assert fired["result"] == {"message_id": sent["id"]}
    assert (sent["sender_user_id"], sent["body"], sent["trust"]) == (alarm.member.user["id"], "Wake up.", "trusted")
    other = await alarm.kit.as_user("member", "other@example.org")
    for fields, code in (
        ({"recipient_agent_id": new_id()}, "unknown_reference"),
        ({"recipient_agent_id": alarm.agent_id, "sender_agent_id": alarm.agent_id}, "forbidden"),
        ({"recipient_agent_id": alarm.agent_id, "channel": "news"}, "validation_error"),
    ):
        body = {"name": "x", "type": "manual", "config": {}, "action": {"type": "send_message", "body": "x", **fields}}
        answer = await other.post("/triggers", body)
        assert answer.code == code, (fields, answer)


async def test_a_trigger_on_messages_does_not_answer_itself(make_kit: Callable[..., Any]) -> None:
    alarm = Alarm()
    await alarm.build(await make_kit(plugins=(*PLUGINS, "messages")))
    action = {"type": "send_message", "channel": "echo", "body": "again"}
    trigger = await alarm.create("event", {"event": "message.new"}, action=action)
    sent = await alarm.member.post("/messages/send", {"body": "once", "channel": "echo"})
    assert sent.status == 201, sent
    for _ in range(4):
        await alarm.run()
    assert len((await alarm.member.get("/messages")).json()["items"]) == 2
    assert "fired" in await alarm.statuses(trigger["id"])
