"""What the page on triggers promises. The forms with processes and kills are in test_processes.py."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Callable
from typing import Any

import pytest
from tests.limits import stop_clock
from tests.plugins.triggers.conftest import PLUGINS, TASK, Alarm

from corral import clock
from corral.testing.kit import Kit
from corral_plugins.triggers.api import TimeRule
from corral_plugins.triggers.service.previews import TriggerPreviews
from corral_plugins.triggers.service.scheduler import TriggerScheduler
from corral_plugins.triggers.service.timed_kinds import TIME_KINDS, next_times

HOUR = 3600.0


async def test_triggers_1_an_interval_fires_once_a_slot_on_three_kernels(
    alarm: Alarm, make_kit: Callable[..., Any]
) -> None:
    kits: list[Kit] = [alarm.kit, await make_kit(plugins=PLUGINS), await make_kit(plugins=PLUGINS)]
    began = clock.time_s()
    made = await alarm.create("interval", {"seconds": 10}, overlap="allow", max_fires_per_hour=1000)
    for step in range(300):
        clock.travel(2)
        await asyncio.gather(*(kit.service(TriggerScheduler).record_due_slots() for kit in kits))
        slots = (clock.time_s() - began) / 10  # real time passes, too
        if step % 50 == 49:
            for kit in kits:
                await kit.run_jobs()
    fired = await alarm.history(made["id"], "fired")
    assert slots - 2 <= len(fired) <= slots + 1
    assert len({row["scheduled_for"] for row in fired}) == len(fired)
    assert len(await alarm.tasks()) == len(fired)


async def test_triggers_2_a_day_of_downtime_is_one_fire_and_one_row(alarm: Alarm) -> None:
    made = await alarm.create("cron", {"expression": "@hourly"})
    await alarm.later(24 * HOUR)
    await alarm.run()
    rows = await alarm.history(made["id"])
    assert sorted(row["status"] for row in rows) == ["fired", "skipped_missed"]
    missed = next(row for row in rows if row["status"] == "skipped_missed")
    assert missed["reason"].startswith("23 slots")
    assert len(await alarm.tasks()) == 1


async def test_triggers_2_the_policies_for_missed_slots(alarm: Alarm) -> None:
    skip = await alarm.create("cron", {"expression": "@hourly"}, catch_up="skip")
    every = await alarm.create("cron", {"expression": "@hourly"}, catch_up="run_all", overlap="allow")
    narrow = await alarm.create("cron", {"expression": "0 0 * * *"}, catch_up_window_seconds=60)
    off = await alarm.create("cron", {"expression": "@hourly"}, enabled=False)
    now = clock.time_s()
    await alarm.later((now // HOUR + 24) * HOUR + 1800 - now)  # half an hour after the last slot
    assert (await alarm.member.post(f"/triggers/{off['id']}/toggle", {"enabled": True})).status == 200
    await alarm.run()
    assert await alarm.statuses(skip["id"]) == ["skipped_missed"]
    assert (await alarm.statuses(every["id"])).count("fired") == 10
    assert (await alarm.history(every["id"], "skipped_missed"))[0]["reason"].startswith("14 slots")
    assert await alarm.statuses(narrow["id"]) == ["skipped_missed"]
    assert await alarm.statuses(off["id"]) == []  # disabled by a person: nothing is caught up


def test_triggers_4_summer_time_in_berlin() -> None:
    cron = next(kind for kind in TIME_KINDS if kind.type == "cron")
    rule = TimeRule(config={"expression": "30 2 * * *", "timezone": "Europe/Berlin"}, since=0.0, zone="UTC")

    def times(day: str, count: int) -> list[str]:
        start = clock.parse_instant(f"{day}T12:00:00.000Z")
        return [clock.format_instant(at)[:16] for at in next_times(cron, rule, start, count)]

    # 29 March: 02:30 does not exist; it fires at 03:00 summer time. 25 October: 02:30 exists twice and fires once.
    assert times("2026-03-27", 3) == ["2026-03-28T01:30", "2026-03-29T01:00", "2026-03-30T00:30"]
    assert times("2026-10-23", 3) == ["2026-10-24T00:30", "2026-10-25T00:30", "2026-10-26T01:30"]


async def test_triggers_5_a_signed_delivery_counts_once(alarm: Alarm) -> None:
    made = await alarm.create("webhook", {"auth": "hmac_sha256"}, action={**TASK, "title": "{{ payload.name }}"})
    path = made["ingress_url"].partition("/api/v1")[2]

    def signed(body: bytes, **more: str) -> dict[str, str]:
        mac = hmac.new(made["secret"].encode(), body, hashlib.sha256).hexdigest()
        return {"X-Signature-256": f"sha256={mac}", "Idempotency-Key": "delivery-1", **more}

    body, other = json.dumps({"name": "Delivered"}).encode(), json.dumps({"name": "Changed"}).encode()
    answers = [await alarm.kit.client.post(path, content=body, headers=signed(body)) for _ in range(3)]
    assert [answer.status for answer in answers] == [202, 200, 200]
    assert [answer.json()["duplicate"] for answer in answers] == [False, True, True]
    assert len({answer.json()["execution_id"] for answer in answers}) == 1
    changed = await alarm.kit.client.post(path, content=other, headers=signed(other))
    assert (changed.status, changed.code) == (409, "duplicate")
    wrong = await alarm.kit.client.post(path, content=body, headers={"X-Signature-256": "sha256=" + "0" * 64})
    missing = await alarm.kit.client.post(path, content=body)
    assert wrong.status == missing.status == 401
    parts = [{k: v for k, v in each.json().items() if k != "request_id"} for each in (wrong, missing)]
    assert parts[0] == parts[1]
    assert parts[0]["code"] == "invalid_signature"
    await alarm.run()
    assert [task["title"] for task in await alarm.tasks()] == ["Delivered"]
    assert sorted(await alarm.statuses(made["id"])) == ["duplicate", "duplicate", "fired"]
    task = await alarm.read((await alarm.tasks())[0]["id"])
    assert task["tainted"]
    assert task["source"] == {"type": "trigger", "id": made["id"]}


async def test_triggers_6_a_trigger_on_its_own_effect_stops(alarm: Alarm) -> None:
    made = await alarm.create("event", {"event": "task.completed"})
    first = await alarm.task()
    await alarm.finish(first)
    await alarm.run()
    assert await alarm.statuses(made["id"]) == ["fired"]
    await alarm.finish((await alarm.tasks())[-1]["id"])
    await alarm.run()
    assert await alarm.statuses(made["id"]) == ["fired", "loop"]
    assert len(await alarm.tasks()) == 2


async def test_triggers_7_an_absence_fires_once_for_each_worker(alarm: Alarm, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_clock(monkeypatch)
    config = {"expect": "worker.online", "after": "worker.offline", "within_seconds": 60, "for_each": "worker_id"}
    action = {**TASK, "title": "{{ event.key }} is gone"}
    made = await alarm.create("absence", config, action=action, overlap="allow")
    second = await alarm.machine("second")
    await alarm.run()
    clock.travel(50)  # both fall silent
    await alarm.kit.run_schedule("workers.sweep")
    await alarm.run()
    await alarm.heartbeat()  # the first comes back
    await alarm.run(seconds=30)
    assert await alarm.statuses(made["id"]) == []
    await alarm.run(seconds=31)
    await alarm.run(seconds=120)
    assert [task["title"] for task in await alarm.tasks()] == [f"{second.id} is gone"]


async def test_triggers_7_an_event_that_came_in_time_but_was_not_read_yet_is_no_absence(alarm: Alarm) -> None:
    config = {"expect": "task.cancelled", "after": "task.created", "within_seconds": 600, "for_each": "task_id"}
    made = await alarm.create("absence", config)
    first, second = await alarm.task("in time"), await alarm.task("never")
    await alarm.run()
    assert (await alarm.member.post(f"/tasks/{first}/cancel", {})).status == 200  # while no process runs jobs
    await alarm.kit.events()
    clock.travel(601)
    await alarm.kit.service(TriggerScheduler).end_waits()  # before the log is read
    assert await alarm.statuses(made["id"]) == []
    await alarm.run()
    (row,) = await alarm.history(made["id"])
    assert (row["status"], second in str(row)) == ("fired", True)


async def test_triggers_8_the_back_test_lists_the_events_that_fire(
    alarm: Alarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    filter = "payload.title.startsWith('yes') && payload.priority != 'low'"
    made = await alarm.create("event", {"event": "task.*", "filter": filter}, filter="event.type == 'task.created'")
    for title, priority in (("yes one", "high"), ("no", "high"), ("yes two", "low"), ("yes three", "medium")):
        await alarm.task(title, priority=priority)
    await alarm.kit.events()
    answer = await alarm.member.post(f"/triggers/{made['id']}/test", {"days": 7})
    assert answer.status == 200, answer
    listed = [event["ts"] for event in answer.json()["events"]]
    previews, units = alarm.kit.service(TriggerPreviews), list[Any]()
    work = previews._work

    def count(fn: Any, **given: Any) -> Any:
        units.append(fn)
        return work(fn, **given)

    monkeypatch.setattr(previews, "_work", count)
    assert (await alarm.member.post(f"/triggers/{made['id']}/test", {"days": 7})).json() == answer.json()
    assert len(units) == 3  # for the trigger, for the position in the log, and for a batch of events
    await alarm.run()
    fired = [row["scheduled_for"] for row in await alarm.history(made["id"], "fired")]
    assert listed == fired
    assert len(listed) == 2


async def test_triggers_9_five_failures_disable_and_toggling_on_works_again(alarm: Alarm) -> None:
    made = await alarm.create(action={**TASK, "title": "{{ payload.absent }}"})
    for _ in range(5):
        assert (await alarm.member.post(f"/triggers/{made['id']}/fire", {})).status == 202
        await alarm.run()
    found = await alarm.get(made["id"])
    assert (found["enabled"], found["disabled_reason"], found["consecutive_failures"]) == (False, "max_failures", 5)
    assert await alarm.statuses(made["id"]) == ["failed"] * 5
    assert "template_error" in (await alarm.history(made["id"]))[0]["error"]
    events = [event for event in await alarm.kit.events() if event.type == "trigger.disabled"]
    assert [event.owner_id for event in events] == [alarm.member.user["id"]]
    toggled = await alarm.member.post(f"/triggers/{made['id']}/toggle")
    assert toggled.status == 200
    assert (toggled.json()["enabled"], toggled.json()["consecutive_failures"]) == (True, 0)
    await alarm.member.post(f"/triggers/{made['id']}/fire", {"payload": {"absent": "Now here"}})
    await alarm.run()
    assert (await alarm.get(made["id"]))["last_status"] == "fired"
