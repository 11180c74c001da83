"""What goes through channels, and when."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
import pytest_asyncio
from tests.kernel.mail.conftest import MailServer
from tests.plugins.notifications.conftest import ALLOWED, PLUGINS, Notified
from tests.plugins.notifications.services import Service
from tests.plugins.notifications.test_done_when import TOKEN
from tests.plugins.webhooks.receivers import Receiver
from tests.shared_kernels import on_the_loop_of_the_module

from corral import clock
from corral.errors import Conflict
from corral.http.answers import ANY_VERSION
from corral.redact.redactor import Redactor
from corral_plugins.circuit_breakers.service.breakers import BreakersService
from corral_plugins.notifications.service.channels import ChannelManagement
from corral_plugins.notifications.service.validation import ChannelChecks
from corral_plugins.notifications.shapes import ChannelPatch

SECRET = "a secret of the channel"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_world(make_shared_kit: Callable[..., Any]) -> Notified:
    """A world for the tests in which every request is refused."""
    return await Notified().build(await make_shared_kit(plugins=PLUGINS, config=ALLOWED))


@pytest.mark.one_engine
async def test_a_signed_webhook(world: Notified) -> None:
    async with Receiver() as receiver:
        made = await world.channel("webhook", {"url": receiver.url, "secret": SECRET, "headers": {"X-Mine": "yes"}})
        await world.rule(made, events=("things.happened",))
        await world.happen("one", title="hello")
        await world.run()
        [message] = receiver.messages
        assert message.verify_signature(SECRET)
        assert message.headers["x-mine"] == "yes"
        data = message.content["data"]
        assert message.content["type"] == "notification"
        assert (data["event"], data["title"], data["count"]) == ("things.happened", "Something happened: hello", 1)
        [row] = await world.deliveries()
        assert (row["status"], row["attempts"], message.id) == ("succeeded", 1, row["id"])
        shown = await world.ok(world.admin.get(f"/notifications/channels/{made['id']}"))
        assert (shown["status"], shown["config"]["secret"]) == ("ok", "********")
        assert SECRET not in json.dumps([shown, await world.deliveries()])


@pytest.mark.one_engine
async def test_a_mail_has_text_html_and_links(mailing: Notified, smtp: MailServer) -> None:
    made = await mailing.channel("email", {"to": ["ops@example.org"], "subject_prefix": "[corral]"})
    await mailing.rule(made)
    await mailing.fail_task("one", title="<b>bold</b>", message="a & b\r\nBcc: x@example.org")
    await mailing.run()
    [mail] = smtp.box.mails
    assert mail["Subject"] == "Corral: [corral] Task failed: <b>bold</b>"
    assert mail["X-Corral-Event"] == "task.failed"
    assert mail["Bcc"] is None
    text: Any = mail.get_body(("plain",))
    page: Any = mail.get_body(("html",))
    assert "https://corral.example/api/v1/tasks/one" in text.get_content()
    assert "https://corral.example/api/v1/notifications/preferences" in text.get_content()
    lines = text.get_content().splitlines()
    assert "See it: corral tasks show one" in lines
    assert "Change your preferences: corral notifications preferences" in lines
    assert "/console" not in text.get_content() + page.get_content()
    assert "<b>bold</b>" not in page.get_content()
    assert "&lt;b&gt;bold&lt;/b&gt;" in page.get_content()
    assert "a &amp; b" in page.get_content()


@pytest.mark.one_engine
@pytest.mark.parametrize(
    "config",
    [
        {"to": ["a@example.org\r\nBcc: b@example.org"]},
        {"to": ["a@example.org\n"]},
        {"to": ["a@example.org"], "subject_prefix": "x\r\ny"},
        {"to": []},
        {"to": ["a@example.org"], "to_recipients": True},
        {"to": ["a@example.org, b@example.org"]},
        {},
    ],
)
@on_the_loop_of_the_module
async def test_wrong_configs_of_mail_are_422(shared_world: Notified, config: Any) -> None:
    answer = await shared_world.admin.post("/notifications/channels", {"name": "x", "type": "email", "config": config})
    assert answer.status == 422


@pytest.mark.one_engine
@on_the_loop_of_the_module
async def test_wrong_channels_are_422(shared_world: Notified) -> None:
    for kind, config in (
        ("slack", {"webhook_url": "https://slack.example.org/services/x"}),
        ("slack", {"webhook_url": "https://hooks.slack.com.example.org/x"}),
        ("slack", {"bot_token": "xoxb-1"}),
        ("telegram", {"bot_token": "../x", "chat_id": "1"}),
        ("webhook", {"url": "https://example.org", "headers": {"Host": "x"}}),
        ("webhook", {"url": "https://example.org", "headers": {"X-A": "b\r\nc"}}),
        ("pigeon", {}),
    ):
        answer = await shared_world.admin.post("/notifications/channels", {"name": "x", "type": kind, "config": config})
        assert answer.status == 422, (kind, config)
    assert (await shared_world.member.get("/notifications/channels")).status == 403


@pytest.mark.one_engine
@on_the_loop_of_the_module
async def test_a_config_without_its_choice_is_told_all_choices(shared_world: Notified) -> None:
    slack, email = "webhook_url, or bot_token and channel", "to, or to_recipients"
    for kind, config, pointer, detail in (
        ("slack", {}, "/config", f"give either {slack}"),
        ("slack", {"bot_token": "xoxb-1"}, "/config", f"give either {slack}"),
        ("slack", {"webhook_url": "https://hooks.slack.com/x", "bot_token": "x", "channel": "x"}, "/config", slack),
        ("slack", {"channel": 1}, "/config/channel", "must be a string"),
        ("email", {}, "/config", f"give either {email}"),
        ("telegram", {"bot_token": "1:0123456789"}, "/config/chat_id", "this field is required"),
    ):
        answer = await shared_world.admin.post("/notifications/channels", {"name": "x", "type": kind, "config": config})
        problem = answer.json()
        assert (answer.status, problem["errors"][0]["pointer"]) == (422, pointer), problem
        assert problem["detail"] == problem["errors"][0]["detail"]  # without the pointer, which clients put before it
        assert problem["detail"].endswith(detail), problem


@pytest.mark.one_engine
async def test_each_recipient_gets_a_mail_of_their_own(mailing: Notified, smtp: MailServer) -> None:
    made = await mailing.channel("email", {"to_recipients": True})
    await mailing.rule(made, events=("task.failed", "task.completed"), recipients={"roles": ["member"]})
    await mailing.ok(mailing.stranger.put("/notifications/preferences", {"email": "off"}))
    await mailing.fail_task("one", owner=mailing.admin)
    await mailing.run()
    assert [str(mail["To"]) for mail in smtp.box.mails] == [mailing.member.user["email"]]
    [row] = await mailing.deliveries()
    assert row["user_id"] == mailing.member.user["id"]


@pytest.mark.one_engine
async def test_one_refused_address_keeps_no_other_from_its_mail(mailing: Notified, smtp: MailServer) -> None:
    accept = smtp.box.handle_RCPT

    async def refuse(server: Any, session: Any, envelope: Any, address: str, options: Any) -> str:
        return (
            "550 Nobody" if address == "gone@example.org" else await accept(server, session, envelope, address, options)
        )

    smtp.box.handle_RCPT = refuse  # type: ignore[method-assign]  # for this server only
    made = await mailing.channel("email", {"to": ["gone@example.org", "ops@example.org"]})
    await mailing.rule(made)
    await mailing.fail_task("one")
    await mailing.run()
    assert len(smtp.box.to("ops@example.org")) == 1
    [row] = await mailing.deliveries()
    assert row["status"] == "failed"
    assert "gone@example.org" in row["last_error"]
    found = await mailing.ok(mailing.admin.get(f"/notifications/channels/{made['id']}"))
    assert found["status"] == "untested"  # the server works


@pytest.mark.one_engine
async def test_429_waits_as_long_as_the_service_says_and_loses_nothing(
    world: Notified, slack: Service, telegram: Service
) -> None:
    first = await world.channel("slack", {"bot_token": "xoxb-1-2", "channel": "#ops"})
    second = await world.channel("telegram", {"bot_token": TOKEN, "chat_id": "-100"})
    await world.rule(first, second, events=("things.happened",))
    slack.answers, telegram.answers = [429, 429], [429]
    slack.retry_after = telegram.retry_after = 700
    await world.happen("one")
    await world.run()
    assert slack.texts == telegram.texts == []
    assert {(row["status"], row["attempts"]) for row in await world.deliveries()} == {("retrying", 0)}
    await world.run(seconds=600)
    assert len(slack.requests) == len(telegram.requests) == 1
    for _ in range(2):
        await world.run(seconds=701)
    assert len(slack.texts) == len(telegram.texts) == 1
    await world.later(0)
    assert {row["status"] for row in await world.deliveries()} == {"succeeded"}
    assert slack.requests[0][1]["authorization"] == "Bearer xoxb-1-2"


@pytest.mark.one_engine
async def test_a_channel_sends_one_message_a_second(world: Notified, telegram: Service) -> None:
    made = await world.channel("telegram", {"bot_token": TOKEN, "chat_id": "-100"})
    await world.rule(made, events=("things.happened",))
    await world.happen("one", "two", "three")
    began = clock.time_s()
    while len(telegram.texts) < 3:
        await world.dispatcher.run_once()
        await world.dispatcher.wait_until_idle()
        clock.travel(0.1)
    assert clock.time_s() - began >= 2.0


@pytest.mark.one_engine
async def test_other_4xx_are_permanent_and_can_be_repeated(world: Notified, slack: Service) -> None:
    made = await world.channel("slack", {"webhook_url": slack.url + "services/x"})
    await world.rule(made)
    slack.answers = [404]
    await world.fail_task("one")
    await world.run()
    [row] = await world.deliveries()
    assert (row["status"], row["attempts"]) == ("failed", 1)
    assert row["last_error"].startswith("status 404")
    found = await world.ok(world.admin.get(f"/notifications/channels/{made['id']}"))
    assert (found["status"], found["used_by"][0]["name"]) == ("failing", "rule 1")
    await world.ok(world.admin.post(f"/notifications/deliveries/{row['id']}/retry"), 202)
    await world.run(seconds=2)
    assert len(slack.texts) == 1
    again = await world.admin.post(f"/notifications/deliveries/{row['id']}/retry")
    assert (again.status, again.code) == (409, "invalid_state")


@pytest.mark.one_engine
async def test_5xx_follow_the_schedule_and_then_fail(world: Notified, slack: Service) -> None:
    made = await world.channel("slack", {"webhook_url": slack.url + "services/x"})
    await world.rule(made)
    slack.answers = [500] * 7
    await world.fail_task("one")
    await world.run()
    for number, seconds in enumerate((10, 60, 300, 1800, 7200, 21_600), 2):
        if seconds > 50:  # real time passes as well
            await world.run(seconds=seconds - 50)
            assert len(slack.requests) == number - 1
        await world.run(seconds=51)
        assert len(slack.requests) == number
    await world.later(0)
    [row] = await world.deliveries()
    assert (row["status"], row["attempts"]) == ("failed", 7)


@pytest.mark.one_engine
async def test_the_same_event_goes_through_a_channel_once(world: Notified, slack: Service) -> None:
    made = await world.channel("slack", {"webhook_url": slack.url + "services/x"})
    await world.kit.events()  # on PostgreSQL, until the creation of the channel is numbered: no rule follows it
    await world.rule(made, name="one")
    await world.rule(made, name="two", events=("*",))
    await world.fail_task("task")
    await world.run()
    await world.run(seconds=2)
    assert len(slack.texts) == 1


@pytest.mark.one_engine
async def test_a_failing_channel_tells_others_once_an_hour_and_never_itself(
    world: Notified, slack: Service, telegram: Service
) -> None:
    """Every event goes through both channels. The failure of one makes one message, and that through the other."""
    first = await world.channel("slack", {"webhook_url": slack.url + "services/x"})
    second = await world.channel("telegram", {"bot_token": TOKEN, "chat_id": "-100"})
    await world.rule(first, second, events=("*",))
    slack.answers = [500] * 1000
    await world.happen("one")
    for _ in range(40):
        await world.run(seconds=60)
    told = [text for text in telegram.texts if "is failing" in text]
    assert len(told) == 1
    assert not any("is failing" in body["text"] for _, _, body in slack.requests)
    events = [each for each in await world.kit.events() if each.type == "system.alert"]
    assert len([each for each in events if each.payload()["kind"] == "channel_failing"]) == 1


async def test_a_disabled_channel_delays_for_a_day_and_loses_nothing(world: Notified, slack: Service) -> None:
    made = await world.channel("slack", {"webhook_url": slack.url + "services/x"})
    path = f"/notifications/channels/{made['id']}"
    await world.rule(made)
    await world.ok(world.admin.put(path, {"is_enabled": False}))
    await world.fail_task("one")
    await world.run()
    await world.later(86_000)
    await world.kit.run_schedule("notifications.group")
    await world.run()
    assert slack.requests == []
    await world.ok(world.admin.put(path, {"is_enabled": True}))
    await world.run()
    assert len(slack.texts) == 1
    await world.ok(world.admin.put(path, {"is_enabled": False}))
    await world.fail_task("two")
    await world.run()
    await world.later(86_500)
    await world.kit.run_schedule("notifications.group")
    rows = await world.deliveries()
    assert [row["status"] for row in rows] == ["succeeded", "failed"]


@pytest.mark.one_engine
async def test_an_open_breaker_uses_up_no_attempt(world: Notified, slack: Service) -> None:
    made = await world.channel("slack", {"webhook_url": slack.url + "services/x"})
    await world.rule(made)
    path = f"/circuit-breakers/notify:{made['id']}"
    await world.ok(world.admin.post(f"{path}/force-open", {"reason": "a test"}))
    await world.kit.service(BreakersService).sync()
    await world.fail_task("one")
    await world.run()
    [row] = await world.deliveries()
    assert (row["status"], row["attempts"], slack.requests) == ("pending", 0, [])
    tested = await world.ok(world.admin.post(f"/notifications/channels/{made['id']}/test"))
    assert tested["error"] == "circuit_open"
    await world.ok(world.admin.post(f"{path}/reset"))
    await world.kit.service(BreakersService).sync()
    await world.run(seconds=61)
    assert len(slack.texts) == 1


@pytest.mark.one_engine
async def test_the_kill_switch_holds_what_goes_out_and_nothing_in_the_app(world: Notified, slack: Service) -> None:
    made = await world.channel("slack", {"webhook_url": slack.url + "services/x"})
    await world.rule(made)
    body = {"engaged": True, "mode": "pause", "hold_deliveries": True, "reason": "a test"}
    await world.ok(world.admin.post("/admin/kill-switch", body))
    await world.fail_task("one")
    await world.run()
    assert slack.requests == []
    assert len(await world.inbox(world.member)) == 1
    await world.ok(world.admin.post("/admin/kill-switch", {"engaged": False}))
    await world.run(seconds=2)
    assert len(slack.texts) == 1


async def test_a_process_that_dies_gives_its_delivery_back(world: Notified, slack: Service) -> None:
    """The lease ends, another process sends the delivery, and the late result of the first is discarded."""
    from corral_plugins.notifications.api import SendResult
    from corral_plugins.notifications.service.claims import DeliveryClaims
    from corral_plugins.notifications.service.outcomes import DeliveryOutcomes

    made = await world.channel("slack", {"webhook_url": slack.url + "services/x"})
    await world.rule(made)
    await world.fail_task("one")
    await world.kit.events()
    await world.dispatcher._fan_out.handle_new_events()
    claims = world.kit.service(DeliveryClaims)
    [claimed] = (await world.kit.work(claims.claim)).claimed
    assert (await world.kit.work(claims.claim)).claimed == []
    clock.travel(61)
    await world.kit.run_schedule("notifications.group")
    await world.run()
    assert len(slack.texts) == 1
    late = await world.kit.work(
        lambda: world.kit.service(DeliveryOutcomes).record(claimed, SendResult(error="late", permanent=True))
    )
    assert late is False
    [row] = await world.deliveries()
    assert row["status"] == "succeeded"


@pytest.mark.one_engine
async def test_changes_are_audited_without_secrets(make_kit: Callable[..., Any], telegram: Service) -> None:
    world = await Notified().build(await make_kit(plugins=(*PLUGINS, "audit"), config=ALLOWED))
    made = await world.channel("telegram", {"bot_token": TOKEN, "chat_id": "-100"})
    path = f"/notifications/channels/{made['id']}"
    await world.ok(world.admin.put(path, {"config": {"bot_token": TOKEN[:-1] + "k"}, "name": "other"}))
    rule = await world.rule(made)
    await world.ok(world.admin.delete(f"/notifications/rules/{rule['id']}"), 204)
    await world.ok(world.admin.delete(path), 204)
    found = await world.admin.get("/admin/audit?action=notifications.*")
    actions = [row["action"].partition(".")[2] for row in reversed(found.json()["items"])]
    assert actions == ["channel.create", "channel.update", "rule.create", "rule.delete", "channel.delete"]
    assert TOKEN[:-1] not in found.body.decode()


@pytest.mark.one_engine
async def test_a_test_tells_whether_a_channel_works(world: Notified, slack: Service) -> None:
    made = await world.channel("slack", {"webhook_url": slack.url + "services/x"})
    path = f"/notifications/channels/{made['id']}"
    assert made["status"] == "untested"
    slack.answers = [500]
    assert not (await world.ok(world.admin.post(f"{path}/test")))["delivered"]
    shown = await world.ok(world.admin.get(path))
    assert (shown["status"], shown["last_error"]) == ("failing", "status 500: rate_limited")
    assert (await world.ok(world.admin.post(f"{path}/test")))["delivered"]
    shown = await world.ok(world.admin.get(path))
    assert (shown["status"], shown["last_error"]) == ("ok", None)
    assert not [each for each in await world.kit.events() if each.type == "system.alert"]


async def test_of_two_changes_of_a_config_at_the_same_time_none_is_lost(world: Notified) -> None:
    made = await world.channel("webhook", {"url": "https://example.org/hook"})
    channels, checks = world.kit.service(ChannelManagement), world.kit.service(ChannelChecks)
    row = await world.kit.work(lambda: channels.row(made["id"]), read=True)
    patches = [ChannelPatch(config={"headers": {"X-A": "a"}}), ChannelPatch(config={"url": "https://example.org/b"})]
    first, second = [await checks.check_channel_patch(row, each) for each in patches]
    await world.kit.work(lambda: channels.update(made["id"], patches[0], first, ANY_VERSION))
    with pytest.raises(Conflict):
        await world.kit.work(lambda: channels.update(made["id"], patches[1], second, ANY_VERSION))
    shown = await world.ok(world.admin.get(f"/notifications/channels/{made['id']}"))
    assert shown["config"] == {"url": "https://example.org/hook", "headers": {"X-A": "a"}}


async def test_every_process_redacts_the_credentials_of_a_channel_after_its_event(
    make_kit: Callable[..., Any],
) -> None:
    world = await Notified().build(await make_kit(plugins=PLUGINS, config=ALLOWED))
    other = await make_kit(plugins=PLUGINS, config=ALLOWED)
    made = await world.channel("webhook", {"url": "https://example.org/x", "secret": SECRET})
    path, changed = f"/notifications/channels/{made['id']}", f"{SECRET}, changed"
    redactors = [kit.service(Redactor) for kit in (world.kit, other)]

    async def known(text: str, is_known: bool = True) -> None:
        async with asyncio.timeout(60):
            while any((text in each.redact(text)) is is_known for each in redactors):  # noqa: ASYNC110  (other tasks)
                await asyncio.sleep(0.02)

    await known(SECRET)
    await world.ok(world.admin.put(path, {"config": {"secret": changed}}))
    await known(changed)
    await world.ok(world.admin.delete(path), 204)
    await known(changed, False)
    events = [each for each in await world.kit.events() if each.type == "notification_channel.changed"]
    assert [each.payload()["change"] for each in events] == ["created", "updated", "deleted"]
