"""How rules choose, group, hold and preview."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.kernel.mail.conftest import MailServer
from tests.plugins.notifications.conftest import Notified
from tests.plugins.notifications.services import Service

from corral import clock
from corral.errors import Conflict
from corral.events import log as event_log
from corral.events.consumers import ConsumerRow
from corral_core.event_log.api import PositionMoved
from corral_plugins.notifications.service.fan_out import CONSUMER
from corral_plugins.notifications.service.inbox import Inbox
from corral_plugins.notifications.service.quiet_hours import end_of_quiet_hours


async def slack_channel(world: Notified, slack: Service) -> Any:
    return await world.channel("slack", {"webhook_url": slack.url + "services/x"})


def hours(begin: int, end: int, **more: Any) -> dict[str, Any]:
    """Quiet hours from and to so many minutes from now."""

    def at(minutes: int) -> str:
        moment = datetime.fromtimestamp(clock.time_s(), UTC) + timedelta(minutes=minutes)
        return f"{moment:%H:%M}"

    return {"from": at(begin), "to": at(end), **more}


@pytest.mark.one_engine
async def test_conditions_and_severity_choose(world: Notified, slack: Service) -> None:
    made = await slack_channel(world, slack)
    await world.rule(made, events=("things.*",), conditions="data.agent_id == 'two' && severity == 'info'")
    await world.rule(made, name="worse", events=("system.alert",), min_severity="critical")
    await world.happen("one")
    await world.happen("two", agent_id="two")
    await world.alert("a small one", "warning")
    await world.alert("a big one", "critical")
    for _ in range(3):
        await world.run(seconds=2)
    assert sorted(text.partition("\n")[0] for text in slack.texts) == ["Something happened: a thing", "a big one"]


@pytest.mark.one_engine
async def test_conditions_that_fail_do_not_match(world: Notified, slack: Service) -> None:
    made = await slack_channel(world, slack)
    await world.rule(made, events=("things.*",), conditions="data.absent.member == 1")
    await world.happen("one")
    await world.run()
    assert slack.requests == []


@pytest.mark.one_engine
async def test_wrong_rules_are_422(world: Notified) -> None:
    for fields, code in (
        ({"events": ["no.event"]}, "unknown_event"),
        ({"events": ["notification"]}, "unknown_event"),
        ({"channel_ids": ["01890a5d-ac96-774b-bcce-b302099a8057"]}, "unknown_reference"),
        ({"recipients": {"users": ["01890a5d-ac96-774b-bcce-b302099a8057"]}}, "unknown_reference"),
        ({"conditions": "data.x =="}, "validation_error"),
        ({"conditions": "payload.x == 1"}, "validation_error"),
        ({"repeat_interval_seconds": 10}, "validation_error"),
        ({"quiet_hours": {"from": "22:00", "to": "07:00", "timezone": "Mars/Base"}}, "validation_error"),
        ({"quiet_hours": {"from": "24:00", "to": "07:00"}}, "validation_error"),
    ):
        answer = await world.admin.post("/notifications/rules", {"name": "x", "events": ["task.failed"], **fields})
        assert (answer.status, answer.code) == (422, code), fields
    await world.rule(name="mine")
    answer = await world.admin.post("/notifications/rules", {"name": "mine", "events": ["task.failed"]})
    assert (answer.status, answer.code) == (409, "duplicate")


@pytest.mark.one_engine
async def test_errors_about_quiet_hours_name_what_is_accepted(world: Notified) -> None:
    for hours, pointer, detail in (
        ({"from": "24:00"}, "/quiet_hours/from", "a time of day from 00:00 to 23:59, such as 22:00 or 06:30"),
        (
            {"timezone": "Mars/Base"},
            "/quiet_hours/timezone",
            "There is no time zone of this name; use one such as Europe/Berlin.",
        ),
    ):
        body = {"name": "x", "events": ["task.failed"], "quiet_hours": {"from": "22:00", "to": "07:00", **hours}}
        (fault,) = (await world.admin.post("/notifications/rules", body)).json()["errors"]
        assert (fault["pointer"], fault["detail"]) == (pointer, detail)


@pytest.mark.one_engine
async def test_a_group_waits_for_its_interval_and_is_not_repeated(world: Notified, slack: Service) -> None:
    made = await slack_channel(world, slack)
    times = {"group_wait_seconds": 30, "group_interval_seconds": 300, "repeat_interval_seconds": 3600}
    await world.rule(made, events=("things.*",), group_by=["agent_id"], **times)
    await world.happen("one")
    await world.run()
    await world.run(seconds=31)
    assert len(slack.texts) == 1
    await world.happen("two", "three")  # more for the same group
    await world.run()
    await world.run(seconds=60)
    assert len(slack.texts) == 1
    await world.run(seconds=240)
    assert len(slack.texts) == 2
    assert slack.texts[1].startswith("2 × things.happened")
    await world.happen("two")  # an unchanged group
    await world.run()
    await world.run(seconds=600)
    assert len(slack.texts) == 2
    await world.later(3600)
    assert (await world.deliveries())[-1]["status"] == "suppressed"
    await world.happen("three")
    await world.run()
    await world.run(seconds=60)
    assert len(slack.texts) == 3


@pytest.mark.one_engine
async def test_what_changed_is_told_within_the_repeat_interval(world: Notified, slack: Service) -> None:
    """A check fails, recovers and fails again, and then gets worse: each is news. The same once more is not."""
    made = await slack_channel(world, slack)
    await world.rule(made, events=("system.alert",), group_interval_seconds=10)
    alert: dict[str, Any] = {"title": "the disk", "kind": "health", "check": "disk"}
    for severity, status in (
        ("warning", "down"),
        ("warning", "up"),
        ("warning", "down"),
        ("critical", "down"),
        ("critical", "down"),
    ):
        await world.alert(**alert, severity=severity, status=status)
        await world.run()
        await world.run(seconds=11)
    assert [row["status"] for row in await world.deliveries()] == ["succeeded"] * 4 + ["suppressed"]
    assert len(slack.texts) == 4


@pytest.mark.one_engine
async def test_quiet_hours_hold_all_but_critical_and_end_with_one_summary(world: Notified, slack: Service) -> None:
    made = await slack_channel(world, slack)
    await world.rule(made, events=("things.*", "system.alert"), quiet_hours=hours(2, 60), group_wait_seconds=300)
    await world.happen("before")  # is due within the quiet hours
    await world.run()
    await world.run(seconds=130)
    await world.happen("one", "two")
    await world.alert("it burns", "critical")
    await world.run()
    await world.run(seconds=301)
    assert [text.partition("\n")[0] for text in slack.texts] == ["it burns"]
    await world.run(seconds=3300)
    assert len(slack.texts) == 2
    assert slack.texts[1].startswith("3 × things.happened")


@pytest.mark.one_engine
def test_quiet_hours_belong_to_the_day_on_which_they_begin() -> None:
    night = {"from": "22:00", "to": "07:00", "timezone": "Europe/Berlin", "days": ["fri"]}

    def end(text: str) -> str | None:
        return end_of_quiet_hours(night, datetime.fromisoformat(text).timestamp())

    assert end("2026-01-30T21:30:00+01:00") is None  # a Friday
    assert end("2026-01-30T22:00:00+01:00") == "2026-01-31T06:00:00.000Z"
    assert end("2026-01-31T06:59:00+01:00") == "2026-01-31T06:00:00.000Z"
    assert end("2026-01-31T07:00:00+01:00") is None
    assert end("2026-01-31T23:00:00+01:00") is None
    assert end_of_quiet_hours(None, 0.0) is None


async def test_a_person_has_quiet_hours_too(mailing: Notified, smtp: MailServer) -> None:
    made = await mailing.channel("email", {"to_recipients": True})
    await mailing.rule(made)
    await mailing.ok(mailing.member.put("/notifications/preferences", {"quiet_hours": hours(-5, 30)}))
    await mailing.fail_task("one")
    await mailing.run(seconds=60)
    assert smtp.box.mails == []
    assert len(await mailing.inbox(mailing.member)) == 1
    await mailing.run(seconds=1800)
    assert len(smtp.box.mails) == 1


@pytest.mark.one_engine
async def test_a_preview_tells_what_would_have_been_sent(world: Notified, slack: Service) -> None:
    made = await slack_channel(world, slack)
    rule = await world.rule(made, events=("things.*",), enabled=False, conditions="data.agent_id == 'one'")
    await world.happen("one", "two")
    await world.happen("one")
    await world.happen("three", agent_id="two")
    await world.kit.events()
    found = await world.ok(world.admin.post(f"/notifications/rules/{rule['id']}/test", {"days": 1}))
    assert (found["events"], found["matched"], found["messages"], found["truncated"]) == (4, 3, 2, False)
    assert {item["channel_id"] for item in found["items"]} == {made["id"]}
    await world.run()
    assert slack.requests == []


async def test_a_rule_follows_events_from_its_creation_on(world: Notified, slack: Service) -> None:
    made = await slack_channel(world, slack)
    await world.happen("before")
    await world.kit.events()
    rule = await world.rule(made, events=("things.*",))
    await world.run()
    path = f"/notifications/rules/{rule['id']}"
    await world.ok(world.admin.put(path, {"enabled": False}))
    await world.happen("while disabled")
    await world.run()
    await world.ok(world.admin.put(path, {"enabled": True}))
    await world.run()
    assert slack.requests == []
    await world.happen("after")
    await world.run()
    assert len(slack.texts) == 1


@pytest.mark.one_engine
@pytest.mark.parametrize("poison", [RuntimeError("poison"), Conflict("poison")], ids=["fault", "problem"])
async def test_an_event_that_cannot_be_handled_is_skipped_after_five_tries(
    world: Notified, monkeypatch: pytest.MonkeyPatch, poison: Exception
) -> None:
    add = Inbox.add

    def break_on_poison(self: Inbox, new: Any) -> None:
        rows = list(new)
        if any(row.title == "Task failed: task poison" for row in rows):
            raise poison
        add(self, rows)

    monkeypatch.setattr(Inbox, "add", break_on_poison)
    await world.fail_task("one", "poison", "two")
    for _ in range(6):
        await world.run()
    titles = {row["title"] for row in await world.inbox(world.member)}
    assert titles == {"Task failed: task one", "Task failed: task two"}
    alerts = [each.payload() for each in await world.kit.events() if each.type == "system.alert"]
    assert [alert["kind"] for alert in alerts] == ["consumer_behind"]
    row = await world.kit.work(lambda: ConsumerRow.get_by_id(CONSUMER), read=True)
    assert row.failures == 0


async def test_two_processes_tell_each_event_once(world: Notified) -> None:
    """Both read the same events; the unit of the one that comes second is rolled back."""
    await world.fail_task("one")
    await world.kit.events()
    fan_out = world.dispatcher._fan_out
    first = await world.kit.work(lambda: fan_out._load(50), read=True)
    second = await world.kit.work(lambda: fan_out._load(50), read=True)
    await fan_out._handle(first)
    with pytest.raises(PositionMoved):
        await fan_out._handle(second)
    [row] = await world.inbox(world.member)
    assert row["count"] == 1


async def test_what_admins_may_not_read_goes_through_no_channel(world: Notified, slack: Service) -> None:
    made = await slack_channel(world, slack)
    rule = await world.rule(made, events=("webhook.*",), in_app=True)
    await world.ok(world.member.post("/webhooks", {"url": "https://example.org/x", "events": ["*"]}), 201)
    await world.run()
    assert slack.requests == []
    found = await world.ok(world.admin.post(f"/notifications/rules/{rule['id']}/test", {"days": 1}))
    assert found["events"] == 0


@pytest.mark.one_engine
async def test_every_default_names_an_event(world: Notified) -> None:
    from corral.events.event import EventTypes
    from corral_plugins.notifications.service.event_catalogue import _TITLES, DEFAULTS, SEVERITY_OF

    known = {each.event for each in world.kit.service(EventTypes).all()}
    absent = {name for name in {*DEFAULTS, *SEVERITY_OF, *_TITLES} if name not in known}
    assert absent <= {
        name for name in DEFAULTS if name.startswith(("budget.", "ssh.", "api_key.", "code_review.", "task.dead"))
    }


@pytest.mark.one_engine
async def test_the_position_passes_events_of_which_nobody_is_told(world: Notified) -> None:
    def behind() -> int:
        return event_log.last_seq() - int(ConsumerRow.get_by_id(CONSUMER).cursor)

    await world.happen("one", "two")
    await world.run()
    assert await world.kit.work(behind, read=True) >= 2
    await world.kit.run_schedule("notifications.purge")
    assert await world.kit.work(behind, read=True) == 0
