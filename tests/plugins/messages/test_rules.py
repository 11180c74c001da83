"""The rules of messages beside the numbered promises: recipients, replies, taint, inboxes, channels and deletion."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.plugins.messages.conftest import Post, attempt, received

from corral import clock
from corral.auth.principal import SYSTEM_PRINCIPAL
from corral.ids import new_id
from corral_plugins.messages.api import Messages, NewMessage
from corral_plugins.messages.service import listing


@pytest.mark.one_engine
async def test_a_message_has_one_recipient_that_exists_and_is_not_its_sender(post: Post) -> None:
    agent, me = post.agent_id, post.member.user["id"]
    for fields, code in (
        ({}, "validation_error"),
        ({"recipient_agent_id": agent, "channel": "news"}, "validation_error"),
        ({"recipient_agent_id": new_id()}, "unknown_reference"),
        ({"recipient_user_id": new_id()}, "unknown_reference"),
        ({"recipient_user_id": me}, "unknown_reference"),
        ({"recipient_agent_id": agent, "sender_agent_id": agent}, "unknown_reference"),
        ({"recipient_agent_id": agent, "in_reply_to": new_id()}, "unknown_reference"),
        ({"recipient_agent_id": agent, "correlation": {"task_id": new_id()}}, "unknown_reference"),
        ({"recipient_agent_id": agent, "correlation": {"session_id": new_id()}}, "validation_error"),
        ({"recipient_agent_id": agent, "expires_at": clock.now(30)}, "validation_error"),
        ({"recipient_agent_id": agent, "expires_at": clock.now(91 * 86_400)}, "validation_error"),
        ({"recipient_agent_id": agent, "body": "\u202e\u0007"}, "validation_error"),
        ({"recipient_agent_id": agent, "body": "é" * 40_000}, "validation_error"),
        ({"channel": "No Such"}, "validation_error"),
    ):
        answer = await post.member.post("/messages/send", {"body": "x", **fields})
        assert (answer.status, answer.code) == (422, code), (fields, answer)
    assert (await post.send(recipient_user_id=post.other.user["id"], body="a\u202e\tb\n"))["body"] == "a\tb\n"


@pytest.mark.one_engine
async def test_warnings_say_that_nobody_receives_it_now(post: Post) -> None:
    idle = await post.agent("idle", start=False)
    assert (await post.send(idle))["warnings"] == ["recipient_offline"]
    assert (await post.send(channel="nobody"))["warnings"] == ["no_subscribers"]
    assert (await post.member.post(f"/agents/{idle}/start")).status == 200
    assert len(received(await post.lease_of(idle))) == 1


@pytest.mark.one_engine
async def test_requests_come_first_and_the_oldest_first_up_to_the_limit(post: Post) -> None:
    infos = [(await post.send(post.agent_id))["id"] for _ in range(9)]
    requests = [(await post.send(post.agent_id, type="request"))["id"] for _ in range(2)]
    assert received(await post.lease_of(post.agent_id)) == [*requests, *infos[:8]]
    assert received(await post.lease_of(post.agent_id)) == infos[8:]


async def test_a_reply_acknowledges_the_request(post: Post) -> None:
    asked = await post.send(post.agent_id, type="request")
    agent = await post.token(post.agent_id)
    await post.send(by=agent, recipient_user_id=post.member.user["id"], in_reply_to=asked["id"])
    (receipt,) = (await post.message(asked["id"]))["receipts"]
    assert (receipt["status"], receipt["result"]) == ("acked", "done")
    thread = (await post.member.get(f"/messages/threads/{asked['id']}")).json()["items"]
    assert [each["type"] for each in thread] == ["request", "reply"]


@pytest.mark.one_engine
async def test_a_reply_of_the_system_acknowledges_nothing(post: Post) -> None:
    asked, messages = await post.send(post.agent_id, type="request"), post.kit.service(Messages)
    reply = NewMessage(channel="news", body="Noted.", in_reply_to=asked["id"])
    await post.kit.work(lambda: messages.send(reply, by=SYSTEM_PRINCIPAL))
    assert await post.status(asked["id"]) == "sent"


@pytest.mark.one_engine
async def test_only_messages_of_the_requester_leave_a_run_untainted(post: Post) -> None:
    own = await post.send(post.agent_id)
    lease = await post.lease_of(post.agent_id)
    assert received(lease) == [own["id"]]
    assert lease.claim["task"]["tainted"] is False
    await lease.ok("complete", {"result": {}})
    foreign = await post.send(post.agent_id, by=post.other)
    lease = await post.lease_of(post.agent_id)
    assert received(lease) == [foreign["id"]]
    assert lease.claim["task"]["tainted"] is True
    attempts = (await post.member.get(f"/tasks/{lease.task_id}/attempts")).json()["items"]
    assert [each["tainted"] for each in attempts] == [True]


@pytest.mark.one_engine
async def test_foreign_messages_in_the_inbox_taint_the_run_that_reads_them(post: Post) -> None:
    lease = await post.lease_of(post.agent_id)
    agent, inbox = attempt(post, lease), f"/agents/{post.agent_id}/inbox"
    await post.send(post.agent_id)
    assert len((await agent.get(inbox)).json()["items"]) == 1
    assert (await post.read(lease.task_id))["tainted"] is False
    foreign = await post.send(post.agent_id, by=post.other)
    assert (await post.other.get(inbox)).status == 200  # a person looks
    assert (await post.read(lease.task_id))["tainted"] is False
    assert len((await agent.get(inbox)).json()["items"]) == 2
    (tried,) = (await post.member.get(f"/tasks/{lease.task_id}/attempts")).json()["items"]
    assert (tried["tainted"], (await post.read(lease.task_id))["tainted"]) == (True, True)
    assert f"message:{foreign['id']}" in str(tried)


@pytest.mark.one_engine
async def test_a_run_that_peeks_at_foreign_messages_is_tainted(post: Post) -> None:
    lease = await post.lease_of(post.agent_id)
    foreign = await post.send(post.agent_id, by=post.other)
    shown = await attempt(post, lease).get(f"/agents/{post.agent_id}/inbox?peek=true")
    assert [each["id"] for each in shown.json()["items"]] == [foreign["id"]]
    assert await post.status(foreign["id"]) == "sent"
    assert (await post.read(lease.task_id))["tainted"] is True


async def test_parallel_claims_deliver_a_message_once(post: Post) -> None:
    sent = [(await post.send(post.agent_id))["id"] for _ in range(6)]
    for _ in range(6):
        await post.task(agent_id=post.agent_id)
    leases = await asyncio.gather(*(post.worker.claim(max_tasks=1) for _ in range(6)))
    assert sorted(each for lease in leases for each in received(lease)) == sorted(sent)


@pytest.mark.one_engine
@pytest.mark.parametrize("end", ["fail", "release", "cancelled", "wait"])
async def test_an_attempt_that_does_not_complete_puts_its_messages_back(post: Post, end: str) -> None:
    sent = await post.send(post.agent_id)
    lease = await post.lease_of(post.agent_id)
    body: Any = {
        "fail": {"error": {"type": "x", "message": "x"}, "retryable": False},
        "wait": {"input": {"prompt": "Which?"}},
    }.get(end, {})
    if end == "cancelled":
        assert (await post.member.post(f"/tasks/{lease.task_id}/cancel", {})).status == 202
    await lease.ok(end, body)
    assert await post.status(sent["id"]) == "sent"


@pytest.mark.one_engine
async def test_the_inbox_delivers_to_the_agent_only(post: Post) -> None:
    sent = await post.send(post.agent_id, type="request")
    path = f"/agents/{post.agent_id}/inbox"
    agent, stranger = await post.token(post.agent_id), await post.token(await post.agent("stranger"))
    for client, query in ((post.member, ""), (post.admin, ""), (agent, "?peek=true"), (stranger, "?peek=true")):
        listed = (await client.get(path + query)).json()
        assert ([each["id"] for each in listed["items"]], listed["items"][0]["status"]) == ([sent["id"]], "sent")
    assert (await stranger.get(path)).code == "forbidden"
    assert [each["status"] for each in (await agent.get(path)).json()["items"]] == ["delivered"]
    assert received(await post.lease_of(post.agent_id)) == []
    assert (await agent.patch(f"/messages/{sent['id']}/read")).status == 200
    assert (await agent.get(path)).json()["items"] == []
    assert len((await agent.get(f"{path}?unread=false")).json()["items"]) == 1


@pytest.mark.one_engine
async def test_the_inbox_delivers_exactly_the_messages_of_its_page(post: Post) -> None:
    """A message that no reply contained is still undelivered, and the next claim carries it."""
    agent, path = await post.token(post.agent_id), f"/agents/{post.agent_id}/inbox"
    old, new, urgent = [(await post.send(post.agent_id, type=each))["id"] for each in ("info", "info", "request")]
    (shown,) = (await agent.get(f"{path}?limit=1")).json()["items"]
    assert (shown["id"], shown["status"]) == (old, "delivered")
    assert [await post.status(each) for each in (old, new, urgent)] == ["delivered", "sent", "sent"]
    second = (await agent.get(f"{path}?limit=1&offset=1")).json()["items"]
    assert [(each["id"], each["status"]) for each in second] == [(new, "delivered")]
    assert received(await post.lease_of(post.agent_id)) == [urgent]


async def test_the_reply_of_a_person_acknowledges_the_request(post: Post) -> None:
    """A recipient who replies has answered, so that the sender does not hear later that nobody did."""
    asked = await post.send(recipient_user_id=post.other.user["id"], sender_agent_id=post.agent_id, type="request")
    await post.send(post.agent_id, in_reply_to=asked["id"])  # by somebody else
    assert await post.status(asked["id"]) == "sent"
    await post.send(post.agent_id, by=post.other, in_reply_to=asked["id"])
    (receipt,) = (await post.message(asked["id"]))["receipts"]
    assert (receipt["status"], receipt["result"]) == ("acked", "done")


@pytest.mark.one_engine
async def test_recipients_owners_and_admins_act_on_a_message(post: Post) -> None:
    sent = await post.send(post.agent_id)
    path = f"/messages/{sent['id']}/read"
    assert (await post.other.patch(path)).code == "forbidden"
    assert (await (await post.token(await post.agent("stranger"))).patch(path)).code == "forbidden"
    assert (await post.member.patch(path, {"agent_id": new_id()})).code == "unknown_reference"
    assert (await post.admin.patch(path)).json()["status"] == "read"
    pair = [await post.agent("one"), await post.agent("two")]
    for agent in pair:
        await post.member.put(f"/agents/{agent}/channels", {"channels": ["pair"]})
    both = await post.send(channel="pair")
    assert (await post.member.patch(f"/messages/{both['id']}/read")).status == 422
    first = await post.member.patch(f"/messages/{both['id']}/read", {"agent_id": pair[0]})
    assert first.json()["status"] == "sent"
    second = await post.member.patch(f"/messages/{both['id']}/read", {"agent_id": pair[1]})
    assert second.json()["status"] == "read"


async def test_the_list_filters(post: Post) -> None:
    other = await post.agent("another")
    await post.member.put(f"/agents/{other}/channels", {"channels": ["news"]})
    direct = await post.send(post.agent_id, subject="First", type="alert")
    channel = await post.send(channel="news", sender_agent_id=post.agent_id, body="Something new")
    mine = await post.send(recipient_user_id=post.member.user["id"], by=post.other)
    for query, wanted in (
        (f"agent_id={post.agent_id}", [channel, direct]),
        (f"agent_id={other}", [channel]),
        ("channel=news", [channel]),
        ("type=alert", [direct]),
        ("search=new", [channel]),
        ("unread=true", [mine]),
        (f"unread=true&agent_id={other}", [channel]),
        ("unread=false", []),
        (f"thread_id={direct['id']}", [direct]),
        ("status=sent", [mine, channel, direct]),
        ("status=read", []),
    ):
        items = (await post.member.get(f"/messages?{query}")).json()["items"]
        assert [each["id"] for each in items] == [each["id"] for each in wanted], query


async def test_channels_tell_their_subscribers_and_deleted_agents_leave(post: Post) -> None:
    agents = [await post.agent("one"), await post.agent("two")]
    for agent in agents:
        await post.member.put(f"/agents/{agent}/channels", {"channels": ["news"]})
    assert (await post.other.put(f"/agents/{agents[0]}/channels", {"channels": []})).code == "forbidden"
    sent = await post.send(channel="news")
    (shown,) = (await post.member.get("/messages/channels")).json()["items"]
    assert (shown["channel"], shown["messages_24h"]) == ("news", 1)
    assert shown["subscribers"] == sorted(agents)
    assert shown["last_message_at"] == sent["created_at"]
    assert (await post.member.delete(f"/agents/{agents[0]}")).status == 204
    await post.kit.run_consumers()
    assert (await post.member.get("/messages/channels")).json()["items"][0]["subscribers"] == [agents[1]]
    assert [each["agent_id"] for each in (await post.send(channel="news"))["receipts"]] == [agents[1]]
    assert await post.status(sent["id"]) == "sent"


async def test_the_first_channels_are_listed_by_name(post: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "MAX_CHANNELS", 2)
    for name in ("d", "b", "c"):
        await post.send(channel=name)
    await post.member.put(f"/agents/{post.agent_id}/channels", {"channels": ["a"]})
    shown = (await post.member.get("/messages/channels")).json()["items"]
    assert [each["channel"] for each in shown] == ["a", "b"]


async def test_a_message_can_be_deleted_until_somebody_reads_it(post: Post) -> None:
    sent, kept = await post.send(post.agent_id), await post.send(post.agent_id)
    assert (await post.other.delete(f"/messages/{sent['id']}")).code == "forbidden"
    assert (await post.member.delete(f"/messages/{sent['id']}")).status == 204
    assert (await post.member.get(f"/messages/{sent['id']}")).status == 404
    assert (await post.member.patch(f"/messages/{kept['id']}/read")).status == 200
    assert (await post.member.delete(f"/messages/{kept['id']}")).code == "invalid_state"
    assert [each["message_id"] for each in await post.payloads("message.deleted")] == [sent["id"]]


@pytest.mark.one_engine
async def test_a_run_sends_messages_about_its_task(post: Post) -> None:
    caller = await post.agent("caller")
    lease = await post.lease_of(caller)
    sent = await post.send(post.agent_id, by=attempt(post, lease))
    assert (sent["sender_agent_id"], sent["correlation"]["task_id"]) == (caller, lease.task_id)


async def test_old_messages_are_deleted(post: Post) -> None:
    old = await post.send(channel="old")
    await post.later(366 * 86_400)
    await post.kit.run_schedule("messages.prune")
    assert (await post.member.get(f"/messages/{old['id']}")).status == 404
    assert (await post.member.get("/messages/channels")).json()["items"] == []
