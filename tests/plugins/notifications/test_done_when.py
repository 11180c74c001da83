"""What the page on notifications promises."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.kernel.mail.conftest import MailServer
from tests.limits import within
from tests.plugins.notifications.conftest import ALLOWED, PLUGINS, Notified
from tests.plugins.notifications.services import Service
from tests.plugins.webhooks.receivers import Receiver

from corral import clock

TOKEN = "123456:" + "abcdefghij" * 3


def ids(prefix: str, count: int) -> list[str]:
    return [f"{prefix} {number}" for number in range(count)]


async def test_notifications_1_the_owner_of_a_failing_task_learns_it_at_once(make_kit: Callable[..., Any]) -> None:
    world = await Notified().build(await make_kit(plugins=PLUGINS, config=ALLOWED, jobs=True))
    began = time.monotonic()
    async with within(1):
        await world.fail_task("one")
        while not (found := await world.inbox(world.member)):  # noqa: ASYNC110  (nothing tells)
            await asyncio.sleep(0.02)
    print(f"told after {(time.monotonic() - began) * 1000:.0f} ms")
    [row] = found
    assert (row["type"], row["severity"], row["title"]) == ("task.failed", "error", "Task failed: task one")
    assert row["body"] == "It broke.\nSee it: corral tasks show one"
    assert (row["object"], row["count"]) == ({"type": "task", "id": "one"}, 1)
    assert await world.ok(world.member.get(f"/notifications/{row['id']}")) == row
    assert (await world.stranger.get(f"/notifications/{row['id']}")).status == 404
    count = await world.ok(world.member.get("/notifications/unread-count"))
    assert count == {"unread": 1, "by_severity": {"error": 1}}
    [event] = [each for each in await world.kit.events() if each.type == "notification"]
    assert (event.visibility, event.owner_id) == ("private", world.member.user["id"])
    assert event.payload()["unread"] == 1
    assert event.payload()["notification"]["id"] == row["id"]
    assert await world.inbox(world.stranger) == await world.inbox(world.admin) == []


async def test_notifications_2_a_storm_is_one_mail_that_says_500(mailing: Notified, smtp: MailServer) -> None:
    channel = await mailing.channel("email", {"to": ["ops@example.org"]})
    await mailing.rule(channel, group_by=["agent_id"], group_wait_seconds=300, in_app=True)
    await mailing.fail_task(*ids("task", 500), agent_id="one")
    await mailing.run()
    assert smtp.box.mails == []
    await mailing.run(seconds=300)
    [mail] = smtp.box.mails
    assert "500 × task.failed" in mail["Subject"]
    text: Any = mail.get_body(("plain",))
    assert "and 490 more" in text.get_content()
    rows = await mailing.inbox(mailing.member)
    assert sum(row["count"] for row in rows) == 500
    assert [row["count"] for row in rows] == [500]
    assert rows[0]["titles"] == [f"Task failed: task {each}" for each in ids("task", 10)]
    [delivery] = await mailing.deliveries()
    assert (delivery["status"], delivery["count"], len(delivery["events"])) == ("succeeded", 500, 10)


async def test_notifications_3_smtp_down_for_an_hour_loses_nothing(mailing: Notified, smtp: MailServer) -> None:
    channel = await mailing.channel("email", {"to": ["ops@example.org", "more@example.org"]})
    await mailing.rule(channel, events=("*",), in_app=False)
    smtp.stop()
    for number in range(6):
        await mailing.fail_task(f"task {number}")
        for _ in range(5):
            await mailing.run(seconds=120)
    await mailing.later(0)
    assert {row["status"] for row in await mailing.deliveries()} <= {"pending", "retrying"}
    smtp.start()
    for _ in range(30):
        await mailing.run(seconds=120)
    await mailing.later(0)
    told = sorted(str(mail["Subject"]) for mail in smtp.box.to("ops@example.org"))
    assert [subject for subject in told if "Task failed" in subject] == [
        f"Corral: Task failed: task task {number}" for number in range(6)
    ]
    assert [subject for subject in told if "is failing" in subject or "smtp" in subject] == []
    assert len(told) == len(smtp.box.to("more@example.org"))
    assert {row["status"] for row in await mailing.deliveries()} == {"succeeded"}
    alerts = [row for row in await mailing.inbox(mailing.admin) if row["type"] == "system.alert"]
    failing = [row for row in alerts if "is failing" in row["title"]]
    assert 1 <= sum(row["count"] for row in failing) <= 2


async def test_notifications_4_read_all_leaves_what_came_after_the_call(world: Notified) -> None:
    await world.fail_task(*ids("before", 50))
    await world.run()

    async def arrive() -> None:
        for name in ids("during", 50):
            await world.fail_task(name)
            await world.run()

    async def mark() -> str:
        await asyncio.sleep(0.05)
        called = clock.now()
        await world.ok(world.member.put("/notifications/read-all", {}))
        return called

    _, called = await asyncio.gather(arrive(), mark())
    rows = await world.inbox(world.member)
    assert len(rows) == 100
    read = [row for row in rows if row["read_at"] is not None]
    assert len(read) >= 50
    assert all(row["created_at"] <= row["read_at"] for row in read)
    assert {row["title"] for row in rows if row["created_at"] < called} <= {row["title"] for row in read}
    unread = (await world.ok(world.member.get("/notifications/unread-count")))["unread"]
    assert unread == 100 - len(read)


async def test_notifications_4_an_event_after_the_call_keeps_its_notification_unread(world: Notified) -> None:
    await world.fail_task("one")
    await world.run()
    called = clock.now(0.001)
    clock.travel(1)
    await world.fail_task("one")  # counts up the same notification
    await world.run()
    [row] = await world.inbox(world.member)
    assert row["count"] == 2
    assert await world.ok(world.member.put("/notifications/read-all", {"before": called})) == {"updated": 0}


@pytest.mark.one_engine
async def test_notifications_5_what_was_read_can_be_put_back(world: Notified, telegram: Service) -> None:
    made = await world.channel("telegram", {"bot_token": TOKEN, "chat_id": "-100"})
    path = f"/notifications/channels/{made['id']}"
    found = await world.ok(world.admin.get(path))
    assert found["config"] == {"bot_token": "********", "chat_id": "-100"}
    fields = {name: found[name] for name in ("name", "type", "config", "is_enabled")}
    refused = await world.admin.put(path, fields)
    assert (refused.status, refused.code) == (422, "masked_value_submitted")
    del fields["config"]["bot_token"]
    changed = await world.ok(world.admin.put(path, fields))
    assert changed["config"] == {"bot_token": "********", "chat_id": "-100"}
    assert (await world.ok(world.admin.post(f"{path}/test")))["delivered"]
    assert telegram.requests[0][0] == f"/bot{TOKEN}/sendMessage"


@pytest.mark.one_engine
async def test_notifications_6_no_channel_reaches_an_inner_address(make_kit: Callable[..., Any]) -> None:
    world = await Notified().build(await make_kit(plugins=PLUGINS, config={"egress.allow": []}))
    async with Receiver() as receiver:
        urls = ("http://127.0.0.1/", receiver.url, "http://169.254.169.254/", "http://0x7f.1/", "http://[::1]:8000/")
        for url in urls:
            body = {"name": "inner", "type": "webhook", "config": {"url": url}}
            answer = await world.admin.post("/notifications/channels", body)
            assert (answer.status, answer.code) == (422, "url_blocked"), url
        made = await world.channel("webhook", {"url": "https://example.org/hook"})
        path = f"/notifications/channels/{made['id']}"
        for url in urls:
            answer = await world.admin.put(path, {"config": {"url": url}})
            assert (answer.status, answer.code) == (422, "url_blocked"), url
        from corral_plugins.notifications.models import Channel

        inner = Channel.update(config={"url": receiver.url}).where(Channel.id == made["id"])
        await world.kit.work(inner.execute)  # as if the name had pointed elsewhere when it was saved
        tested = await world.ok(world.admin.post(f"{path}/test"))
        assert (tested["delivered"], tested["error"]) == (False, "blocked")
        await world.rule(made)
        await world.fail_task("one")
        await world.run()
        [delivery] = await world.deliveries()
        assert (delivery["status"], delivery["last_error"]) == ("retrying", "blocked")
        assert receiver.messages == []


HOSTILE = "<!channel> <@U123> @here <https://evil.example|click> [me](https://evil.example) *loud* `code` @someone " + (
    "x" * 10_000
)


async def test_notifications_7_hostile_text_arrives_as_harmless_text(
    world: Notified, slack: Service, telegram: Service
) -> None:
    first = await world.channel("slack", {"webhook_url": slack.url + "services/T/B/x"})
    second = await world.channel("telegram", {"bot_token": TOKEN, "chat_id": "-100"})
    await world.rule(first, second)
    await world.fail_task("one", title=HOSTILE[:190], message=HOSTILE)
    await world.run()
    [slack_text], [telegram_text] = slack.texts, telegram.texts
    assert len(slack_text) <= 35_000
    assert len(telegram_text.encode("utf-16-le")) // 2 <= 4096
    for text in (slack_text, telegram_text):
        for mark in ("<", "@", "*", "`", "evil.example"):
            assert mark not in text, mark
        assert text.endswith("\nhttps://corral.example/api/v1/tasks/one")
        assert "Task failed" in text
    assert slack.requests[0][2]["unfurl_links"] is False
    assert "parse_mode" not in telegram.requests[0][2]


@pytest.mark.one_engine
async def test_notifications_8_a_channel_in_use_is_not_deleted(world: Notified) -> None:
    made = await world.channel("webhook", {"url": "https://example.org/hook"})
    rule = await world.rule(made, name="my rule")
    path = f"/notifications/channels/{made['id']}"
    answer = await world.admin.delete(path)
    assert (answer.status, answer.code) == (409, "in_use")
    assert answer.json()["used_by"] == [{"id": rule["id"], "name": "my rule"}]
    assert "my rule" in answer.json()["detail"]
    await world.ok(world.admin.delete(f"/notifications/rules/{rule['id']}"), 204)
    await world.ok(world.admin.delete(path), 204)
