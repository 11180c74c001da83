"""What messages promise, by the numbers of the page."""

from __future__ import annotations

import asyncio

from tests.plugins.messages.conftest import Post, attempt, received

from corral import clock


async def test_messages_1_the_next_claim_carries_it_and_it_is_read_and_acknowledged_once(post: Post) -> None:
    sent = await post.send(post.agent_id, type="request", subject="A question")
    assert sent["status"] == "sent"
    assert sent["warnings"] == []
    lease = await post.lease_of(post.agent_id)
    (quoted,) = lease.claim["context"]["messages"]
    assert (quoted["id"], quoted["body"], quoted["trust"]) == (sent["id"], "Hello", "trusted")
    assert quoted["sender"]["id"] == post.member.user["id"]
    assert await post.status(sent["id"]) == "delivered"
    agent = attempt(post, lease)
    first = await agent.patch(f"/messages/{sent['id']}/read")
    assert first.status == 200
    await asyncio.sleep(0.002)
    again = await agent.patch(f"/messages/{sent['id']}/read", {})
    (one,), (other,) = first.json()["receipts"], again.json()["receipts"]
    assert again.status == 200
    assert one["read_at"] is not None
    assert one["read_at"] == other["read_at"]
    done = await agent.post(f"/messages/{sent['id']}/ack", {"result": "done", "note": "It is so."})
    assert done.status == 200
    assert done.json()["status"] == "acked"
    assert (await agent.post(f"/messages/{sent['id']}/ack", {"result": "done"})).status == 200
    assert (await agent.post(f"/messages/{sent['id']}/ack", {"result": "rejected"})).code == "already_decided"
    assert [each["by"]["id"] for each in await post.payloads("message.read")] == [post.agent_id]
    assert [each["result"] for each in await post.payloads("message.acked")] == ["done"]


async def test_messages_2_a_channel_has_a_receipt_a_subscriber_and_parallel_acks_count_once(post: Post) -> None:
    agents = [await post.agent(f"agent-{n}") for n in range(5)]
    for agent in agents:
        assert (await post.member.put(f"/agents/{agent}/channels", {"channels": ["news", "other"]})).status == 200
    sent = await post.send(channel="news", sender_agent_id=agents[0], type="request")
    assert {each["agent_id"] for each in sent["receipts"]} == {*agents[1:]}
    path = f"/messages/{sent['id']}/ack"
    bodies = [{"result": "done", "agent_id": agent} for agent in agents[1:] for _ in range(5)]
    answers = await asyncio.gather(*(post.member.post(path, body) for body in bodies))
    assert {answer.status for answer in answers} == {200}
    assert len(await post.payloads("message.acked")) == 4
    assert await post.status(sent["id"]) == "acked"


async def test_messages_3_two_agents_stop_at_the_hop_limit(post: Post) -> None:
    pair = [await post.agent("ping"), await post.agent("pong")]
    parent = (await post.send(pair[1], sender_agent_id=pair[0]))["id"]
    for hop in range(1, 21):
        sender, recipient = pair[hop % 2], pair[(hop + 1) % 2]
        reply = await post.send(recipient, sender_agent_id=sender, in_reply_to=parent)
        assert (reply["hops"], reply["type"]) == (hop, "reply")
        parent = reply["id"]
    body = {"body": "x", "recipient_agent_id": pair[0], "sender_agent_id": pair[1], "in_reply_to": parent}
    assert (await post.member.post("/messages/send", body)).code == "hop_limit"


async def test_messages_3_an_ordered_pair_sends_at_most_30_a_minute(post: Post) -> None:
    pair = [await post.agent("ping"), await post.agent("pong")]
    body = {"body": "x", "recipient_agent_id": pair[1], "sender_agent_id": pair[0]}
    answers = await asyncio.gather(*(post.member.post("/messages/send", body) for _ in range(32)))
    refused = [answer for answer in answers if answer.status != 201]
    assert [answer.code for answer in refused] == ["rate_limited"] * 2
    assert 0 < int(refused[0].headers["retry-after"]) <= 60
    await post.send(pair[0], sender_agent_id=pair[1])  # the other direction has a limit of its own
    clock.travel(61)
    await post.send(pair[1], sender_agent_id=pair[0])


async def test_messages_4_an_expired_message_is_in_no_claim_and_no_inbox_before_any_sweep(post: Post) -> None:
    soon = clock.format_instant(clock.time_s() + 65)
    sent = await post.send(post.agent_id, expires_at=soon)
    clock.travel(70)
    assert received(await post.lease_of(post.agent_id)) == []
    agent = await post.token(post.agent_id)
    assert (await agent.get(f"/agents/{post.agent_id}/inbox")).json()["items"] == []
    assert await post.status(sent["id"]) == "expired"
    listed = (await post.member.get("/messages?status=expired")).json()["items"]
    assert [each["id"] for each in listed] == [sent["id"]]
    assert (await agent.patch(f"/messages/{sent['id']}/read")).code == "invalid_state"


async def test_messages_5_the_next_attempt_has_the_message_of_a_worker_that_was_killed(post: Post) -> None:
    sent = await post.send(post.agent_id)
    first = await post.lease_of(post.agent_id)
    assert received(first) == [sent["id"]]
    await post.pass_time(61)  # nobody renews the lease
    assert await post.status(sent["id"]) == "sent"
    second = await post.worker.run()
    assert second.task_id == first.task_id
    assert received(second) == [sent["id"]]
    await second.ok("complete", {"result": {}})
    assert received(await post.lease_of(post.agent_id)) == []


async def test_messages_6_nobody_speaks_for_an_agent_that_is_not_theirs(post: Post) -> None:
    other = await post.agent("another")
    agent = await post.token(post.agent_id)
    body = {"body": "x", "recipient_agent_id": post.agent_id, "sender_agent_id": other}
    assert (await agent.post("/messages/send", body)).code == "forbidden"
    assert (await post.other.post("/messages/send", body)).code == "forbidden"
    assert (await post.admin.post("/messages/send", body)).status == 201
    own = await agent.post("/messages/send", {"body": "x", "recipient_agent_id": other})
    assert (own.json()["sender_agent_id"], own.json()["trust"]) == (post.agent_id, "untrusted")


async def test_messages_7_a_vault_value_in_the_body_is_masked_everywhere(post: Post) -> None:
    value = "correct-horse/battery_staple-42"
    assert post.kit.kernel.redactor.set_values("vault", {"KEY": value}) == []
    sent = await post.send(post.agent_id, body=f"The key is {value}.", subject=f"key {value}")
    assert sent["body"] == "The key is [redacted]."
    assert (await post.member.post(f"/messages/{sent['id']}/ack", {"result": "done", "note": value})).status == 200
    caller = await post.agent("caller", enabled_tools=["messages.send"])
    lease = await post.lease_of(caller)
    arguments = {"recipient_agent_id": post.agent_id, "body": f"My key is {value}."}
    call = await attempt(post, lease).post(
        f"/tasks/{lease.task_id}/tools/messages.send", {"call_id": "1", "arguments": arguments}
    )
    assert call.json()["status"] == "succeeded", call
    claim = (await post.lease_of(post.agent_id)).claim
    assert [each["body"] for each in claim["context"]["messages"]] == ["My key is [redacted]."]
    texts = [call.body.decode(), str(claim), str(await post.payloads("message.new")), await post.stored()]
    for path in ("/messages", f"/messages/{sent['id']}", f"/messages/threads/{sent['thread_id']}"):
        texts.append((await post.member.get(path)).body.decode())
    assert not [text for text in texts if value in text]


async def test_messages_8_an_unacknowledged_request_is_delivered_1_and_5_times_and_then_expires(post: Post) -> None:
    sent = await post.send(post.agent_id, type="request")
    delivered = 0
    for _ in range(8):
        lease = await post.lease_of(post.agent_id)
        delivered += len(received(lease))
        await lease.ok("complete", {"result": {}})
        await post.later(590)
        early = await post.lease_of(post.agent_id)
        assert received(early) == []
        await early.ok("complete", {"result": {}})
        await post.sweep()
        await post.later(11)
    assert delivered == 6
    await post.sweep()
    assert await post.status(sent["id"]) == "expired"
    (told,) = await post.payloads("message.acked")
    assert (told["message_id"], told["result"], told["by"]["id"]) == (sent["id"], "expired", post.agent_id)
    assert (await post.message(sent["id"]))["receipts"][0]["redeliveries"] == 5
