"""Overlap, limits, collected events, rights, references and the kill switch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import pytest_asyncio
from tests.plugins.files.conftest import form_headers, multipart
from tests.plugins.triggers.conftest import PLUGINS, TASK, Alarm
from tests.shared_kernels import on_the_loop_of_the_module

from corral import clock
from corral.database.unit import Unit
from corral.events.log import EventRow, write_events
from corral.testing.kit import PASSWORD, Client
from corral_plugins.triggers.models import Fire, Trigger
from corral_plugins.triggers.service import event_reader, firing, scheduler, timed_kinds
from corral_plugins.triggers.service.event_reader import LogReadProgress, TriggerLogReader
from corral_plugins.triggers.service.slots import TriggerSlots


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_alarm(make_shared_kit: Callable[..., Any]) -> Alarm:
    """A world for the tests in which no trigger fires."""
    world = Alarm()
    await world.build(await make_shared_kit(plugins=PLUGINS))
    return world


async def fire(alarm: Alarm, trigger_id: str, **payload: Any) -> None:
    answer = await alarm.member.post(f"/triggers/{trigger_id}/fire", {"payload": payload})
    assert answer.status == 202, answer
    await alarm.run()


async def test_work_that_overlaps(alarm: Alarm) -> None:
    found = {
        policy: (await alarm.create(overlap=policy, action={**TASK, "title": policy}))["id"]
        for policy in ("skip", "allow", "cancel_running", "queue_one")
    }
    for trigger_id in found.values():
        for _ in range(3):
            await fire(alarm, trigger_id)
    assert await alarm.statuses(found["skip"]) == ["fired", "skipped_overlap", "skipped_overlap"]
    assert await alarm.statuses(found["allow"]) == ["fired"] * 3
    assert await alarm.statuses(found["cancel_running"]) == ["fired"] * 3
    assert await alarm.statuses(found["queue_one"]) == ["fired", "coalesced", "pending"]
    by_title: dict[str, list[str]] = {}
    for task in await alarm.tasks():
        by_title.setdefault(task["title"], []).append(task["status"])
    assert by_title["cancel_running"] == ["cancelled", "cancelled", "pending"]
    waiting = next(task for task in await alarm.tasks() if task["title"] == "queue_one")
    assert (await alarm.member.post(f"/tasks/{waiting['id']}/cancel", {})).status in (200, 202)
    await alarm.run(seconds=3)
    assert await alarm.statuses(found["queue_one"]) == ["fired", "coalesced", "fired"]


@pytest.mark.one_engine
async def test_a_trigger_fires_at_most_so_often_in_an_hour(alarm: Alarm) -> None:
    made = await alarm.create(
        "event", {"event": "task.created"}, filter="payload.title == 'mine'", max_fires_per_hour=1
    )
    for title in ("mine", "other", "mine"):
        await alarm.task(title)
        await alarm.run()
    assert await alarm.statuses(made["id"]) == ["fired", "loop", "filtered", "rate_limited"]
    answer = await alarm.member.post(f"/triggers/{made['id']}/fire", {})
    assert (answer.status, answer.code) == (429, "rate_limited")


async def test_many_triggers_on_one_event_are_recorded_in_short_units(
    alarm: Alarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_reader, "FIRES_AT_ONCE", 3)
    made = [await alarm.create("event", {"event": "agent.created"}) for _ in range(4)]
    for name in ("one", "two", "three"):
        assert (await alarm.member.post("/agents", {"name": name})).status == 201
    await alarm.kit.events()
    reader = alarm.kit.service(TriggerLogReader)
    units = [await alarm.kit.work(lambda: reader._read_batch(LogReadProgress())) for _ in range(4)]
    assert [each.has_more for each in units] == [True, True, False, False]  # after each event; then nothing is new
    for trigger in made:
        assert len(await alarm.history(trigger["id"])) == 3


async def test_an_event_fires_all_its_triggers_in_units_of_bounded_size(
    alarm: Alarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_reader, "TRIGGERS_AT_ONCE", 2)
    made = [await alarm.create("event", {"event": "agent.created"}) for _ in range(5)]
    for name in ("one", "two"):
        assert (await alarm.member.post("/agents", {"name": name})).status == 201
    await alarm.kit.events()
    read, units = TriggerLogReader._read_batch, []

    def observe(self: TriggerLogReader, *args: Any) -> LogReadProgress:
        units.append(read(self, *args))
        return units[-1]

    monkeypatch.setattr(TriggerLogReader, "_read_batch", observe)
    await alarm.run()
    assert len(units) == 5  # two full ones for each event
    for trigger in made:
        assert await alarm.statuses(trigger["id"]) == ["fired"] * 2


@pytest.mark.parametrize("page", [200, 2])
async def test_an_event_that_cannot_be_handled_is_skipped_after_five_tries(
    alarm: Alarm, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    """Whatever it raises, even if it is an error of the database that comes back each time."""
    monkeypatch.setattr(event_reader, "TRIGGERS_AT_ONCE", page)
    made = [await alarm.create("event", {"event": "agent.created"}) for _ in range(3)]
    record = TriggerSlots.record

    def break_on_poison(self: TriggerSlots, trigger: Trigger, slot: str, **fields: Any) -> Any:
        if trigger.id == made[-1]["id"] and fields["payload"]["name"] == "poison":
            return Fire.insert(id=slot).execute()  # columns that must not be null are missing
        return record(self, trigger, slot, **fields)

    monkeypatch.setattr(TriggerSlots, "record", break_on_poison)
    for name in ("one", "poison", "two"):
        assert (await alarm.member.post("/agents", {"name": name})).status == 201
    for _ in range(5):
        await alarm.run()
    assert await alarm.statuses(made[-1]["id"]) == ["fired"] * 2
    alerts = [each.payload() for each in await alarm.kit.events() if each.type == "system.alert"]
    assert [(each["kind"], each["title"]) for each in alerts] == [
        ("consumer_behind", "triggers.consume could not handle an event")
    ]


async def test_a_unit_that_takes_long_leaves_its_other_slots_to_the_next_one(
    alarm: Alarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "UNIT_SECONDS", 0.0)
    monkeypatch.setattr(firing, "UNIT_SECONDS", 0.0)
    units: Counter[str] = Counter()
    finish = Unit.finish

    def count(unit: Unit) -> None:
        events = [row for write, row in unit.collected if write is write_events]
        units[unit.entry.label] += any(row["type"] == "trigger.fired" for row in events)
        units["recorded"] += any(row["name"] == "triggers.fire" for _, row in unit.jobs)
        finish(unit)

    monkeypatch.setattr(Unit, "finish", count)
    made = [await alarm.create("interval", {"seconds": 60}) for _ in range(4)]
    await alarm.run(seconds=61)
    for trigger in made:
        (row,) = await alarm.history(trigger["id"])
        assert (row["status"], row["attempt"]) == ("fired", 1)
    assert len(await alarm.tasks()) == 4
    assert (units["job triggers.fire"], units["recorded"]) == (4, 4)


async def test_events_are_collected(alarm: Alarm) -> None:
    quiet = await alarm.create("event", {"event": "agent.created", "debounce_seconds": 30})
    many = await alarm.create("event", {"event": "agent.created", "threshold": {"count": 3, "within_seconds": 60}})
    for number in range(3):
        await alarm.agent(f"agent {number}", start=False)
        await alarm.run(seconds=10)
    assert await alarm.statuses(quiet["id"]) == ["coalesced", "coalesced", "pending"]
    assert await alarm.statuses(many["id"]) == ["coalesced", "coalesced", "fired"]
    await alarm.agent("one more", start=False)
    await alarm.run()
    await alarm.run(seconds=31)
    assert await alarm.statuses(quiet["id"]) == ["coalesced"] * 3 + ["fired"]
    await alarm.run(seconds=40)
    assert (await alarm.statuses(many["id"]))[-1] == "filtered"


@pytest.mark.one_engine
async def test_a_deactivated_owner_disables_a_trigger(alarm: Alarm) -> None:
    made = await alarm.create("interval", {"seconds": 60})
    await alarm.admin.post("/auth/reauth", {"password": PASSWORD})
    answer = await alarm.admin.patch(f"/admin/users/{alarm.member.user['id']}", {"is_active": False})
    assert answer.status == 200, answer
    await alarm.run(seconds=61)
    found = (await alarm.admin.get(f"/triggers/{made['id']}")).json()
    assert (found["enabled"], found["disabled_reason"]) == (False, "owner_inactive")
    rows = (await alarm.admin.get(f"/triggers/{made['id']}/history")).json()["items"]
    assert [row["status"] for row in rows] == ["failed"]
    assert rows[0]["error"].startswith("forbidden")


@pytest.mark.one_engine
@on_the_loop_of_the_module
async def test_a_viewer_cannot_have_triggers_and_others_cannot_change_them(shared_alarm: Alarm) -> None:
    made = await shared_alarm.create()
    viewer, other = await shared_alarm.kit.as_user("viewer"), await shared_alarm.kit.as_user("member")
    body = {"name": "x", "type": "manual", "config": {}, "action": TASK}
    assert (await viewer.post("/triggers", body)).status == 403
    assert (await other.get(f"/triggers/{made['id']}")).status == 200
    for answer in (
        await other.put(f"/triggers/{made['id']}", {"name": "y"}),
        await other.post(f"/triggers/{made['id']}/fire", {}),
        await other.delete(f"/triggers/{made['id']}"),
    ):
        assert answer.status == 403


@pytest.mark.one_engine
async def test_the_kill_switch_holds_slots_until_it_is_released(alarm: Alarm) -> None:
    timed = await alarm.create("interval", {"seconds": 60})
    made = await alarm.create()
    await alarm.admin.post("/auth/reauth", {"password": PASSWORD})
    engaged = await alarm.admin.post("/admin/kill-switch", {"engaged": True, "reason": "test"})
    assert engaged.status == 200, engaged
    await fire(alarm, made["id"])
    await alarm.run(seconds=200)
    assert await alarm.statuses(made["id"]) == ["pending"]
    assert await alarm.statuses(timed["id"]) == []
    await alarm.admin.post("/admin/kill-switch", {"engaged": False})
    await alarm.run(seconds=11)
    assert await alarm.statuses(made["id"]) == ["fired"]
    assert sorted(await alarm.statuses(timed["id"])) == ["fired", "skipped_missed"]


@pytest.mark.parametrize(
    ("expression", "detail"),
    [
        ("61 * * * *", "The minute of the cron expression cannot be 61: write *, 0-59, a list"),
        (
            "0 0 * * fun",
            "The day of the week of the cron expression cannot be fun: write *, 0-7 (0 and 7 are Sunday), sun",
        ),
        ("0 0 30 2 *", "The day of the month of the cron expression cannot be 30: write *, 1-31 (a day that the month"),
        ("@every 5m", "There is no alias @every 5m; the aliases are @hourly, @daily, @weekly, @monthly."),
        (
            "0 5 * *",
            "A cron expression has five fields (minute, hour, day of the month, month, day of the week), such as "
            "30 7 * * mon-fri; this one has 4.",
        ),
    ],
)
def test_errors_of_cron_expressions_name_the_field_and_what_it_accepts(expression: str, detail: str) -> None:
    (fault,) = timed_kinds._check_cron({"expression": expression})
    assert (fault.pointer, fault.code) == ("/expression", "bad_format")
    assert fault.detail.startswith(detail)


@pytest.mark.one_engine
@pytest.mark.parametrize(
    ("change", "pointer", "code"),
    [
        ({"type": "nothing"}, "/type", "not_in_enum"),
        ({"type": "cron", "config": {"expression": "61 * * * *"}}, "/config/expression", "bad_format"),
        ({"type": "cron", "config": {"expression": "0 0 30 2 *"}}, "/config/expression", "bad_format"),
        ({"type": "cron", "config": {"expression": "* * * * * *"}}, "/config/expression", "bad_format"),
        ({"type": "cron", "config": {"expression": "@daily", "timezone": "Mars/X"}}, "/config/timezone", "bad_format"),
        ({"type": "interval", "config": {"seconds": 5}}, "/config/seconds", "too_small"),
        ({"type": "once", "config": {"at": "2020-01-01T00:00:00Z"}}, "/config/at", "in_the_past"),
        ({"type": "event", "config": {"event": "no.such"}}, "/config/event", "unknown_reference"),
        ({"type": "event", "config": {"event": "task.*", "filter": "payload.("}}, "/config/filter", "template_error"),
        ({"filter": "input.x"}, "/filter", "template_error"),
        ({"action": {"type": "notify", "title": "x"}}, "/action/type", "not_in_enum"),
        ({"action": {"type": "call_webhook"}}, "/action/type", "not_in_enum"),
        ({"action": {**TASK, "priority": "huge"}}, "/action/priority", "not_in_enum"),
        ({"action": {**TASK, "title": "{{ nothing.x }}"}}, "/action/title", "template_error"),
        ({"action": {**TASK, "title": "{{ secrets.KEY }}"}}, "/action/title", "template_error"),
        (
            {"action": {**TASK, "agent_id": "01890a5d-ac96-774b-bcce-b302099a8057"}},
            "/action/agent_id",
            "unknown_reference",
        ),
        ({"action": {**TASK, "depends_on": []}}, "/action/depends_on", "unknown_field"),
    ],
)
@on_the_loop_of_the_module
async def test_a_trigger_is_checked_when_it_is_saved(shared_alarm: Alarm, change: Any, pointer: str, code: str) -> None:
    body = {"name": "x", "type": "manual", "config": {}, "action": TASK, **change}
    answer = await shared_alarm.member.post("/triggers", body)
    assert answer.status == 422, answer
    assert [(each["pointer"], each["code"]) for each in answer.json()["errors"]] == [(pointer, code)]


@pytest.mark.one_engine
async def test_a_reference_that_vanishes_later_fails_the_slot(alarm: Alarm) -> None:
    agent = await alarm.agent("short-lived", start=False)
    made = await alarm.create(action={**TASK, "agent_id": agent, "title": "{{ payload.title }}"})
    await alarm.member.delete(f"/agents/{agent}")
    await fire(alarm, made["id"], title="x")
    (row,) = await alarm.history(made["id"])
    assert (row["status"], row["error"].partition(":")[0]) == ("failed", "unknown_reference")


async def test_a_slot_that_fails_does_not_affect_those_that_are_due_with_it(alarm: Alarm) -> None:
    agent = await alarm.agent("Short-lived", start=False)
    at = clock.now(60)
    wrong = {**TASK, "agent_id": agent}
    made = [
        (await alarm.create("once", {"at": at}, action=action, by=by))["id"]
        for action, by in ((TASK, alarm.member), (wrong, alarm.member), (TASK, alarm.admin), (TASK, alarm.member))
    ]
    missed = await alarm.create("interval", {"seconds": 20}, catch_up="run_all")
    assert (await alarm.member.delete(f"/agents/{agent}")).status == 204
    await alarm.run(seconds=62)
    assert [await alarm.statuses(each) for each in made] == [["fired"], ["failed"], ["fired"], ["fired"]]
    assert await alarm.statuses(missed["id"]) == ["fired", "skipped_overlap", "skipped_overlap"]
    assert len(await alarm.tasks()) == 4
    causes = await alarm.kit.work(
        lambda: {each.object_id: each.cause for each in EventRow.select().where(EventRow.type == "trigger.fired")}
    )
    assert causes == {each: f'["{each}"]' for each in (made[0], made[2], made[3], missed["id"])}


async def test_an_edit_does_not_shift_an_interval_and_a_deleted_trigger_keeps_its_history(alarm: Alarm) -> None:
    made = await alarm.create("interval", {"seconds": 60})
    await alarm.run(seconds=61)
    before = (await alarm.get(made["id"]))["next_fire_at"]
    await alarm.run(seconds=20)
    changed = await alarm.member.put(f"/triggers/{made['id']}", {"name": "renamed"}, headers={"If-Match": '"1"'})
    assert changed.status == 200, changed
    assert changed.json()["next_fire_at"] == before
    stale = await alarm.member.put(f"/triggers/{made['id']}", {"name": "again"}, headers={"If-Match": '"1"'})
    assert stale.status == 412
    assert (await alarm.member.delete(f"/triggers/{made['id']}")).status == 204
    assert (await alarm.member.get(f"/triggers/{made['id']}")).status == 404
    assert await alarm.statuses(made["id"]) == ["fired"]


async def test_a_slot_whose_job_was_lost_is_fired_by_the_sweep(alarm: Alarm) -> None:
    made = await alarm.create()
    await alarm.member.post(f"/triggers/{made['id']}/fire", {})
    await alarm.kit.work(lambda: Fire.update(attempt=0).execute())
    from corral.jobs.job import JobRow

    await alarm.kit.work(lambda: JobRow.delete().execute())
    await alarm.run()
    assert await alarm.statuses(made["id"]) == ["pending"]
    await alarm.run(seconds=6)
    assert await alarm.statuses(made["id"]) == ["fired"]


@pytest.mark.one_engine
async def test_a_test_starts_nothing(alarm: Alarm) -> None:
    made = await alarm.create(
        "cron", {"expression": "0 7 * * *"}, filter="payload.n > 1", action={**TASK, "title": "n={{ payload.n }}"}
    )
    path = f"/triggers/{made['id']}/test"
    fires = (await alarm.member.post(path, {"payload": {"n": 2}})).json()
    assert (fires["would"], fires["action"]) == ("fired", {"type": "create_task", "title": "n=2"})
    assert (await alarm.member.post(path, {"payload": {"n": 1}})).json()["would"] == "filtered"
    failed = (await alarm.member.post(path, {"payload": {}})).json()
    assert failed["would"] == "failed"
    assert "no key 'n'" in failed["error"]
    assert len((await alarm.member.post(path, {"next": 3})).json()["times"]) == 3
    assert (await alarm.member.post(path, {"days": 3})).status == 422
    assert (await alarm.member.post(path, {"next": 1, "payload": {}})).status == 422
    assert await alarm.tasks() == []
    assert await alarm.statuses(made["id"]) == []


async def test_a_deleted_trigger_is_kept_as_long_as_one_of_its_slots_waits(alarm: Alarm) -> None:
    made = await alarm.create()
    assert (await alarm.member.post(f"/triggers/{made['id']}/fire", {})).status == 202
    assert (await alarm.member.delete(f"/triggers/{made['id']}")).status == 204
    count = Trigger.select().count
    await alarm.later(400 * 86_400)
    await alarm.kit.run_schedule("triggers.prune")
    assert await alarm.kit.work(count, read=True) == 1
    await alarm.run()
    await alarm.kit.run_schedule("triggers.prune")
    assert await alarm.kit.work(count, read=True) == 0


@pytest.mark.one_engine
async def test_a_trigger_on_what_its_own_task_does_stops(make_kit: Callable[..., Any]) -> None:
    """Files, code reviews, approvals and runs that the task of a trigger makes carry the trigger in their causes."""
    alarm = Alarm()
    names = ("approvals", "code_reviews", "expressions", "files", "tools", "workflows")
    await alarm.build(await make_kit(plugins=(*PLUGINS, *names)))
    action = {**TASK, "agent_id": alarm.agent_id}
    events = ("file.uploaded", "code_review.created", "code_review.commented", "approval.created")
    made = {each: await alarm.create("event", {"event": each}, action=action, name=each) for each in events}
    upload = {"content": multipart(b"some text"), "headers": form_headers()}
    assert (await alarm.member.post("/files/upload", **upload)).status == 201
    await alarm.run()
    lease = await alarm.worker.run()
    agent, review = Client(alarm.kit.application.app, lease.claim["agent_token"]), {"agent_id": alarm.agent_id}
    assert (await agent.post(f"/files/upload?task_id={lease.task_id}", **upload)).status == 201
    patch = "--- a/a\n+++ b/a\n@@ -1 +1 @@\n-a\n+b\n"
    opened = await agent.post("/code-reviews", {**review, "title": "t", "task_id": lease.task_id, "patch": patch})
    assert opened.status == 201, opened
    commented = await agent.post(f"/code-reviews/{opened.json()['id']}/comment", {"body": "Look."})
    assert commented.status == 201, commented
    asked = await agent.post("/approvals", {"title": "May I?", "task_id": lease.task_id})
    assert asked.status == 201, asked
    found = [each for each in await alarm.kit.events() if each.type in events]
    chain = [made["file.uploaded"]["id"]]
    causes = {each.type: json.loads(each.cause) for each in found if each.actor_type == "agent"}
    assert causes == dict.fromkeys(events, chain)
    await alarm.run()
    assert await alarm.statuses(made["file.uploaded"]["id"]) == ["fired", "loop"]
