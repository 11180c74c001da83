"""Requests of people and machines: who may ask for what, lists and counts, comments, escalation and reminders."""

from __future__ import annotations

from typing import Any

import pytest
from tests.plugins.approvals.conftest import Desk

from corral import clock
from corral_plugins.approvals.models import Approval
from corral_plugins.approvals.service.listing import visible_text


async def test_lists_are_sorted_by_urgency_and_say_who_may_decide(desk: Desk) -> None:
    for risk, seconds in (("low", 900), ("critical", 4000), ("medium", 900), ("critical", 900), ("high", 900)):
        await desk.ask(title=f"{risk} {seconds}", risk=risk, expires_in_seconds=seconds)
    page = (await desk.other.get("/approvals")).json()
    titles = [item["title"] for item in page["items"]]
    assert titles == ["critical 900", "critical 4000", "high 900", "medium 900", "low 900"]
    assert [item["can_decide"] for item in page["items"]] == [False, False, False, True, True]
    mine = (await desk.other.get("/approvals?assigned_to=me")).json()
    assert [item["title"] for item in mine["items"]] == ["medium 900", "low 900"]
    assert (await desk.member.get("/approvals?assigned_to=me")).json()["total"] == 0
    assert (await desk.admin.get("/approvals?assigned_to=me")).json()["total"] == 5
    walked, cursor = [], ""
    while cursor is not None:
        part = (await desk.other.get(f"/approvals?limit=2{f'&cursor={cursor}' if cursor else ''}")).json()
        walked += [item["title"] for item in part["items"]]
        cursor = part["next"]
    assert walked == titles
    count = (await desk.other.get("/approvals/count")).json()
    assert (count["pending"], count["assigned_to_me"], count["expiring_1h"]) == (5, 2, 4)
    assert count["by_risk"] == {"low": 1, "medium": 1, "high": 1, "critical": 2}
    high = (await desk.other.get("/approvals?risk=high&risk=low&type=custom")).json()
    assert [item["title"] for item in high["items"]] == ["high 900", "low 900"]


@pytest.mark.one_engine
async def test_named_approvers_decide_and_others_do_not(desk: Desk) -> None:
    viewer = await desk.kit.as_user("viewer")
    asked = await desk.ask(risk="critical", approvers={"users": [desk.other.user["id"]]})
    third = await desk.kit.as_user("member")
    assert (await third.post(f"/approvals/{asked['id']}/approve")).code == "forbidden"
    assert (await viewer.post(f"/approvals/{asked['id']}/approve")).status == 403
    assert (await desk.other.post(f"/approvals/{asked['id']}/approve")).status == 200
    for approvers in ({"users": [viewer.user["id"]]}, {"users": [asked["id"]]}, {"roles": ["viewer"]}):
        answer = await desk.member.post("/approvals", {"title": "x", "approvers": approvers})
        assert answer.status == 422, (approvers, answer)


REFUSED: list[tuple[dict[str, Any], int]] = [
    ({"title": ""}, 422),
    ({"type": "tool_call"}, 422),
    ({"type": "workflow_step"}, 422),
    ({"conversation_id": "01890a5d-ac96-774b-bcce-b302099a8057"}, 422),
    ({"task_id": "01890a5d-ac96-774b-bcce-b302099a8057"}, 422),
    ({"agent_id": "01890a5d-ac96-774b-bcce-b302099a8057"}, 422),
    ({"run_id": "01890a5d-ac96-774b-bcce-b302099a8057"}, 422),
    ({"step": "send"}, 422),
    ({"allow_self": True}, 403),
    ({"on_timeout": "escalate"}, 422),
    ({"escalate_to": {"roles": ["admin"]}}, 422),
    ({"on_timeout": "approve", "risk": "high"}, 422),
    ({"expires_at": "2020-01-01T00:00:00Z"}, 422),
    ({"expires_in_seconds": 10}, 422),
    ({"expires_in_seconds": 900, "expires_at": "2999-01-01T00:00:00Z"}, 422),
    ({"payload": "x" * 262_144}, 422),
    ({"rubric": {"x": "x" * 16_384}}, 422),
    ({"required_approvals": 4}, 422),
]


@pytest.mark.one_engine
async def test_what_cannot_be_asked_is_refused(desk: Desk) -> None:
    for fields, status in REFUSED:
        answer = await desk.member.post("/approvals", {"title": "x", **fields})
        assert answer.status == status, (fields, answer)


async def test_any_json_value_can_be_asked_for(desk: Desk) -> None:
    payloads: list[Any] = [None, False, 0, "", [], {"amount": None}]
    for payload in payloads:
        made = await desk.ask(payload=payload)
        assert made["payload"] == payload
        assert (await desk.read(made["id"]))["payload"] == payload
        revised = await desk.member.post(f"/approvals/{made['id']}/revise", {"payload": None})
        assert (revised.status, revised.json()["payload"]) == (200, None), revised


@pytest.mark.one_engine
async def test_a_person_asks_only_for_agents_that_they_own(desk: Desk) -> None:
    agent_id = await desk.agent()
    assert (await desk.other.post("/approvals", {"title": "x", "agent_id": agent_id})).status == 403
    assert (await desk.ask(agent_id=agent_id))["agent_id"] == agent_id


async def test_agents_and_workers_see_what_they_asked_for(desk: Desk) -> None:
    await desk.ask()
    run, other = await desk.run(), await desk.run()
    made = await run.agent.post("/approvals", {"title": "by the agent", "task_id": run.task_id})
    assert (made.status, made.json()["requested_by"]["type"]) == (201, "agent")
    again = await run.agent.post("/approvals", {"title": "by the agent", "task_id": run.task_id})
    assert (again.status, again.json()["id"]) == (200, made.json()["id"])
    for client, total in ((run.agent, 1), (other.agent, 0), (desk.worker, 0)):
        assert (await client.get("/approvals")).json()["total"] == total
    assert (await other.agent.get(f"/approvals/{made.json()['id']}")).status == 404
    of_worker = await desk.worker.post("/approvals", {"title": "by the worker", "task_id": run.task_id, "payload": 1})
    assert of_worker.json()["requested_by"] == {
        "type": "worker",
        "id": desk.worker_id,
        "on_behalf_of": desk.member.user["id"],
    }
    assert (await desk.worker.post("/approvals", {"title": "x", "agent_id": run.claim["agent"]["id"]})).status == 403
    # The requester learns what became of it when it waits, even if people were faster.
    assert (await desk.member.post(f"/approvals/{made.json()['id']}/reject", {"note": "no"})).status == 200
    waits = await run.agent.post(f"/tasks/{run.task_id}/wait", {"approval_id": made.json()["id"]})
    assert (waits.status, waits.json()["status"]) == (200, "pending")
    assert (await desk.resumed(run.task_id))["decision"]["note"] == "no"


@pytest.mark.one_engine
async def test_a_task_cannot_wait_for_what_is_not_its_own(desk: Desk) -> None:
    foreign = await desk.ask()
    run = await desk.run()
    for body, pointer in (
        ({"approval_id": foreign["id"]}, "/approval_id"),
        ({"approval": {"payload": 1}}, "/approval/title"),
        ({"approval": {"title": "x", "colour": "red"}}, "/approval/colour"),
        ({"approval": {"title": "x"}, "approval_id": foreign["id"]}, "/approval"),
    ):
        answer = await run.agent.post(f"/tasks/{run.task_id}/wait", body)
        assert (answer.status, answer.json()["errors"][0]["pointer"]) == (422, pointer), answer


async def test_tasks_4_a_waiting_task_outlives_its_timeout(desk: Desk) -> None:
    agent_id = await desk.agent()
    made = await desk.member.post("/tasks", {"title": "t", "agent_id": agent_id, "timeout_seconds": 10})
    assert made.status == 201
    run = await desk.claim(agent_id)
    waits = await run.agent.post(f"/tasks/{run.task_id}/wait", {"approval": {"title": "Go on?"}})
    approval = waits.json()["waiting_for"]["id"]
    clock.travel(25)
    for name in ("tasks.timers", "tasks.reap", "tasks.sweep"):
        if name in desk.kit.kernel.runner.schedules:
            await desk.kit.run_schedule(name)
    assert (await desk.task(run.task_id))["status"] == "waiting"
    assert (await desk.member.post(f"/approvals/{approval}/approve", {})).status == 200
    again = await desk.claim(agent_id)
    done = await again.agent.post(f"/tasks/{run.task_id}/complete", {"result": {"text": "done"}})
    assert (done.status, done.json()["status"], done.json()["attempt"]) == (200, "completed", 1)


async def test_an_escalation_asks_more_people_once(desk: Desk) -> None:
    more = {"users": [desk.other.user["id"]]}
    fields = {"risk": "high", "on_timeout": "escalate", "escalate_to": more, "expires_in_seconds": 900}
    asked = await desk.ask(desk.admin, **fields)
    assert (await desk.other.post(f"/approvals/{asked['id']}/reject")).code == "forbidden"
    clock.travel(880)  # the sessions of the test end soon after the approval
    await desk.kit.work(lambda: Approval.update(expires_at=clock.now(-1)).where(Approval.id == asked["id"]).execute())
    await desk.kit.run_schedule("approvals.sweep")
    view = (await desk.other.get(f"/approvals/{asked['id']}")).json()
    assert (view["status"], view["escalated"], view["can_decide"]) == ("pending", True, True)
    await desk.kit.work(lambda: Approval.update(expires_at=clock.now(-1)).where(Approval.id == asked["id"]).execute())
    await desk.kit.run_schedule("approvals.sweep")
    assert (await desk.other.get(f"/approvals/{asked['id']}")).json()["status"] == "expired"
    changes = await desk.changes()
    assert changes == ["escalation"]


async def test_silence_can_mean_consent(desk: Desk) -> None:
    asked = await desk.ask(on_timeout="approve")
    await desk.kit.work(lambda: Approval.update(expires_at=clock.now(-1)).execute())
    assert (await desk.other.post(f"/approvals/{asked['id']}/reject")).code == "approval_expired"
    await desk.kit.run_schedule("approvals.sweep")
    view = await desk.read(asked["id"])
    assert (view["status"], [each["user_id"] for each in view["decisions"]]) == ("approved", ["timeout"])


async def test_open_approvals_are_recalled_from_time_to_time(desk: Desk) -> None:
    await desk.ask(risk="low")
    for _ in range(2):
        await desk.kit.work(lambda: Approval.update(reminded_at=clock.now(-3601)).execute())
        for _ in range(2):
            await desk.kit.run_schedule("approvals.remind")
    changes = await desk.changes()
    assert changes == ["reminder", "reminder"]


async def test_many_are_decided_at_once_each_on_its_own(desk: Desk) -> None:
    fine, own = await desk.ask(), await desk.ask(desk.other)
    high = await desk.ask(risk="high")
    body = {"ids": [fine["id"], own["id"], high["id"], high["id"]], "decision": "approve", "note": "all"}
    answer = await desk.other.post("/approvals/bulk", body)
    assert answer.json()["items"] == [
        {"id": fine["id"], "status": "approved", "code": None},
        {"id": own["id"], "status": "failed", "code": "self_approval"},
        {"id": high["id"], "status": "skipped", "code": "approvals.risk_too_high"},
    ]
    assert (await desk.read(fine["id"]))["outcome_note"] == "all"


@pytest.mark.one_engine
async def test_comments_are_kept_and_told(desk: Desk) -> None:
    asked = await desk.ask()
    for n in range(3):
        assert (await desk.other.post(f"/approvals/{asked['id']}/comments", {"body": f"word {n}"})).status == 201
    listed = (await desk.member.get(f"/approvals/{asked['id']}/comments")).json()
    assert [each["body"] for each in listed["items"]] == ["word 0", "word 1", "word 2"]
    assert [each["body"] for each in (await desk.read(asked["id"]))["comments"]] == ["word 0", "word 1", "word 2"]
    viewer = await desk.kit.as_user("viewer")
    assert (await viewer.post(f"/approvals/{asked['id']}/comments", {"body": "x"})).status == 403


@pytest.mark.one_engine
async def test_a_task_has_so_many_open_approvals(desk: Desk) -> None:
    run = await desk.run()
    for n in range(10):
        assert (await run.agent.post("/approvals", {"title": "x", "task_id": run.task_id, "payload": n})).status == 201
    more = await run.agent.post("/approvals", {"title": "x", "task_id": run.task_id, "payload": 10})
    assert (more.status, more.code) == (429, "quota_exceeded")
    assert (await run.agent.post(f"/tasks/{run.task_id}/complete", {"result": 1})).status == 200
    assert (await desk.admin.get("/approvals")).json()["total"] == 0
    ended = await desk.member.post("/approvals", {"title": "x", "task_id": run.task_id})
    assert ended.status == 422


@pytest.mark.one_engine
async def test_hidden_characters_are_shown(desk: Desk) -> None:
    asked = await desk.ask(title="pay\u202eyob", payload={"to\u200b": "a\u2066b", "n": 1, "text": "two\nlines"})
    view = (await desk.other.get(f"/approvals/{asked['id']}")).json()
    assert view["title"] == "pay<U+202E>yob"
    assert view["payload"] == {"to<U+200B>": "a<U+2066>b", "n": 1, "text": "two\nlines"}
    assert visible_text(["é", "漢", None, 1.5]) == ["é", "漢", None, 1.5]
