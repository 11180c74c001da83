"""Who is told in the app, and what of."""

from __future__ import annotations

from typing import Any

import pytest
from tests.plugins.notifications.conftest import Notified

from corral import clock
from corral.events.event import emit
from corral_plugins.cost.api import BudgetExceeded
from corral_plugins.dead_letter.api import TaskDeadLettered
from corral_plugins.notifications import jobs
from corral_plugins.notifications.service import inbox
from corral_plugins.webhooks.api import WebhookDisabled
from corral_plugins.workers.api import WorkerOffline, WorkerRegistered
from corral_plugins.workflows.api import RunFailed


async def titles(world: Notified, client: Any) -> list[str]:
    await world.run()
    return [row["title"] for row in reversed(await world.inbox(client))]


@pytest.mark.one_engine
async def test_a_person_of_a_task_an_alert_and_a_webhook(world: Notified) -> None:
    mine = world.member.user["id"]

    def unit() -> None:
        emit(WebhookDisabled(webhook_id="hook", reason="gone"), object=("webhook", "hook"), owner=mine)
        emit(
            RunFailed(
                run_id="run",
                workflow_id="flow",
                workflow_version=1,
                status="failed",
                trigger={},
                name="Refund",
                error={"type": "broken", "message": "No."},
            ),
            object=("workflow_run", "run"),
            owner=mine,
        )

    await world.kit.work(unit)
    await world.alert("Something is wrong", "critical")
    assert await titles(world, world.member) == ["A webhook was disabled (gone)", "The workflow Refund failed"]
    assert await titles(world, world.admin) == ["Something is wrong"]
    [row] = await world.inbox(world.admin)
    assert (row["severity"], row["type"]) == ("critical", "system.alert")
    assert await titles(world, world.stranger) == []


@pytest.mark.one_engine
async def test_one_failure_is_told_once(world: Notified) -> None:
    """A task that fails for good gets its dead letter at the same moment. Of a later one its owner is told."""

    async def fail(task: str, previous: str) -> None:
        event = TaskDeadLettered(
            task_id=task,
            title=task,
            status="failed",
            previous=previous,
            priority="medium",
            agent_id=None,
            worker_id=None,
            attempt=3,
            dead_letter_id=task,
            reason="max_attempts",
            error_type="broken",
        )
        await world.fail_task(task, title=task)
        await world.kit.work(lambda: emit(event, object=("task", task), owner=world.member.user["id"]))

    await fail("one", "running")
    assert await titles(world, world.member) == ["Task failed: one"]
    await fail("two", "failed")
    assert {"Task given up: two", "Task failed: two"} <= set(await titles(world, world.member))
    await world.ok(world.member.put("/notifications/preferences", {"mute": ["task.failed"]}))
    before = await titles(world, world.member)
    await fail("three", "running")
    assert await titles(world, world.member) == before


@pytest.mark.one_engine
async def test_the_embedded_worker_comes_and_goes_with_its_server(world: Notified) -> None:
    def unit() -> None:
        for name in ("embedded", "laptop"):
            worker: dict[str, Any] = {"worker_id": name, "name": name, "group": None}
            emit(WorkerRegistered(status="online", **worker), object=("worker", name))
            gone = WorkerOffline(status="offline", last_heartbeat_at=None, leases=0, **worker)
            emit(gone, object=("worker", name))

    await world.kit.work(unit)
    assert await titles(world, world.admin) == ["The worker laptop registered", "The worker laptop is offline"]


@pytest.mark.one_engine
async def test_approvers_are_asked_and_the_requester_learns_the_end(world: Notified) -> None:
    body = {"title": "May I?", "payload": {"a": 1}, "risk": "low"}
    made = await world.ok(world.member.post("/approvals", body), 201)
    assert await titles(world, world.stranger) == ["Approval needed: May I?"]
    assert await titles(world, world.admin) == ["Approval needed: May I?"]
    assert await titles(world, world.member) == []
    await world.ok(world.admin.post(f"/approvals/{made['id']}/approve", {"payload_sha256": made["payload_sha256"]}))
    assert await titles(world, world.member) == ["Approval approved: May I?"]
    await world.kit.run_consumers()  # who has decided has read the request; the others learn of it later
    for person, unread in ((world.admin, 0), (world.stranger, 1), (world.member, 1)):
        assert (await world.ok(person.get("/notifications/unread-count")))["unread"] == unread
    assert len(await world.inbox(world.stranger)) == 1


@pytest.mark.one_engine
async def test_a_message_to_a_person_tells_that_person(world: Notified) -> None:
    body = {"recipient_user_id": world.stranger.user["id"], "subject": "Hello", "body": "Read this."}
    await world.ok(world.member.post("/messages/send", body), 201)
    assert await titles(world, world.stranger) == ["New message: Hello"]
    assert await titles(world, world.member) == []


@pytest.mark.one_engine
async def test_people_may_mute_events(world: Notified) -> None:
    assert await world.ok(world.member.get("/notifications/preferences")) == {
        "mute": [],
        "email": "all",
        "quiet_hours": None,
    }
    await world.ok(world.member.put("/notifications/preferences", {"mute": ["task.failed"]}))
    await world.fail_task("one")
    assert await titles(world, world.member) == []
    refused = await world.member.put("/notifications/preferences", {"mute": ["no.event"]})
    assert (refused.status, refused.code) == (422, "unknown_event")


@pytest.mark.one_engine
async def test_admins_choose_what_is_told_without_rules(world: Notified) -> None:
    await world.ok(world.admin.put("/settings/notifications/defaults", {"value": {"task.failed": False}}))
    await world.fail_task("one")
    assert await titles(world, world.member) == []
    refused = await world.admin.put("/settings/notifications/defaults", {"value": {"no.event": False}})
    assert refused.status == 422


@pytest.mark.one_engine
async def test_a_rule_tells_further_people_once(world: Notified) -> None:
    await world.rule(
        events=("task.*", "things.happened"),
        in_app=True,
        recipients={"users": [world.stranger.user["id"]], "roles": ["admin"], "owner": True},
        name="more people",
    )
    await world.rule(events=("*",), in_app=True, recipients={"owner": True}, name="owners")
    await world.fail_task("one")
    await world.happen("x", title="a <b>thing</b>")
    assert await titles(world, world.member) == ["Task failed: task one"]
    assert await titles(world, world.stranger) == ["Task failed: task one", "Something happened: a <b>thing</b>"]
    assert await titles(world, world.admin) == ["Task failed: task one", "Something happened: a <b>thing</b>"]


@pytest.mark.one_engine
async def test_nobody_is_told_of_what_they_may_not_read(world: Notified) -> None:
    await world.rule(events=("*",), in_app=True, recipients={"roles": ["member", "admin"]}, name="all")
    await world.alert("for admins only")
    budget = BudgetExceeded(scope="month", agent_id=None, spent_usd=1.0, limit_usd=1.0)
    hook = WebhookDisabled(webhook_id="x", reason="gone")

    def unit() -> None:
        emit(budget, object=("budget", "month"))
        emit(hook, object=("webhook", "x"), owner=world.stranger.user["id"])

    await world.kit.work(unit)
    assert await titles(world, world.member) == []
    assert await titles(world, world.stranger) == ["A webhook was disabled (gone)"]
    assert await titles(world, world.admin) == ["for admins only", "The budget is used up (month)"]


@pytest.mark.one_engine
async def test_the_same_object_counts_up_for_five_minutes(world: Notified) -> None:
    for seconds in (0, 200, 200):
        clock.travel(seconds)
        await world.fail_task("one", message=f"after {seconds}")
        await world.run()
    rows = await world.inbox(world.member)
    assert [row["count"] for row in rows] == [1, 2]
    await world.ok(world.member.put(f"/notifications/{rows[0]['id']}/read", {}))
    await world.fail_task("one")
    await world.run()
    assert [row["count"] for row in await world.inbox(world.member)] == [1, 1, 2]


async def test_notifications_are_private(world: Notified) -> None:
    await world.fail_task("one")
    await world.run()
    [row] = await world.inbox(world.member)
    path = f"/notifications/{row['id']}"
    for client in (world.stranger, world.admin):
        assert (await client.put(f"{path}/read", {})).status == 404
        assert (await client.delete(path)).status == 404
    for is_read in (True, True, False):
        changed = await world.ok(world.member.put(f"{path}/read", {"read": is_read}))
        assert (changed["read_at"] is not None) == is_read
    assert len(await world.inbox(world.member, "&unread=true&severity=error&type=task.failed")) == 1
    assert await world.inbox(world.member, "&unread=false") == []
    await world.ok(world.member.delete(path), 204)
    assert await world.inbox(world.member) == []


@pytest.mark.one_engine
async def test_old_notifications_are_deleted(world: Notified) -> None:
    await world.fail_task("read", "unread")
    await world.run()
    rows = {row["object"]["id"]: row for row in await world.inbox(world.member)}
    await world.ok(world.member.put(f"/notifications/{rows['read']['id']}/read", {}))
    await world.later(91 * 86_400)
    await world.kit.run_schedule("notifications.purge")
    assert [row["object"]["id"] for row in await world.inbox(world.member)] == ["unread"]
    await world.later(275 * 86_400)
    await world.kit.run_schedule("notifications.purge")
    assert await world.inbox(world.member) == []


async def test_what_stays_is_looked_at_once_when_old_notifications_are_deleted(
    world: Notified, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each batch begins where the one before ended, so no unit of work passes over all that are unread."""
    monkeypatch.setattr(inbox, "AT_ONCE", 3)
    await world.fail_task(*(f"task {n}" for n in range(10)))
    await world.run()
    for row in (await world.inbox(world.member))[::3]:
        await world.ok(world.member.put(f"/notifications/{row['id']}/read", {}))
    await world.later(91 * 86_400)
    units: list[int] = []

    def delete_old(*args: Any) -> Any:
        units.append(0)
        return inbox.delete_old(*args)

    monkeypatch.setattr(jobs, "delete_old", delete_old)
    await world.kit.run_schedule("notifications.purge")
    assert (len(await world.inbox(world.member)), len(units)) == (6, 4)
