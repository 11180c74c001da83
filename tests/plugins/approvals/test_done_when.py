"""The criteria of the contract of approvals, each as a test named after its number."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.limits import within
from tests.plugins.approvals.conftest import Desk

from corral import clock
from corral.testing.kit import Client
from corral_plugins.approvals import jobs
from corral_plugins.approvals.service.timers import ApprovalTimers


async def sweep(desk: Desk) -> None:
    """What the schedule does every 15 s."""
    await jobs.end_overdue_approvals(desk.kit.kernel.database, desk.kit.service(ApprovalTimers))


async def test_approvals_1_nobody_decides_their_own_request_but_the_one_of_their_agent(desk: Desk) -> None:
    own = await desk.ask()
    refused = await desk.member.post(f"/approvals/{own['id']}/approve")
    assert (refused.status, refused.code) == (403, "self_approval")
    decided = await desk.other.post(f"/approvals/{own['id']}/approve", {"note": "fine"})
    assert (decided.status, decided.json()["status"]) == (200, "approved")
    of_admin = await desk.ask(desk.admin)
    assert (await desk.admin.post(f"/approvals/{of_admin['id']}/reject")).code == "self_approval"
    run, of_agent = await desk.waiting()
    assert (await desk.read(of_agent))["requested_by"]["on_behalf_of"] == desk.member.user["id"]
    answer = await desk.member.post(f"/approvals/{of_agent}/approve")
    assert (answer.status, answer.json()["status"]) == (200, "approved")
    assert (await desk.task(run.task_id))["status"] == "pending"


async def test_approvals_1_a_second_person_can_be_required(desk: Desk) -> None:
    changed = await desk.admin.put("/settings/approvals/require_second_person", {"value": True})
    assert changed.status == 200, changed
    _, approval = await desk.waiting()
    assert (await desk.member.post(f"/approvals/{approval}/approve")).code == "self_approval"
    assert (await desk.other.post(f"/approvals/{approval}/approve")).status == 200


async def test_approvals_2_of_fifty_decisions_one_counts(desk: Desk) -> None:
    _, approval = await desk.waiting()
    people = [desk.member, desk.other, desk.admin]
    calls = [
        people[n % 3].post(f"/approvals/{approval}/{'approve' if n % 2 else 'reject'}", {"note": str(n)})
        for n in range(50)
    ]
    answers = await asyncio.gather(*calls)
    assert sorted(answer.status for answer in answers) == [200] + [409] * 49
    assert {answer.code for answer in answers if answer.status == 409} == {"already_decided"}
    assert {answer.json()["current_status"] for answer in answers if answer.status == 409} <= {"approved", "rejected"}
    rows = await desk.audited("approvals.approval.approve") + await desk.audited("approvals.approval.reject")
    assert [row["object"]["id"] for row in rows] == [approval]
    assert len((await desk.read(approval))["decisions"]) == 1


@pytest.mark.parametrize("outcome", ["approve", "reject", "request-revision", "comment", "expire", "cancel"])
async def test_approvals_3_every_outcome_wakes_the_task_with_the_note(desk: Desk, outcome: str) -> None:
    run, approval = await desk.waiting(expires_in_seconds=900)
    by: Client = desk.other
    if outcome == "expire":
        clock.travel(901)
        await sweep(desk)
        note, status = "Nobody decided in time.", "expired"
    elif outcome == "comment":
        note, status = "Which one?", "pending"
        assert (await by.post(f"/approvals/{approval}/comments", {"body": note})).status == 201
    elif outcome == "cancel":
        note, status = "not needed", "cancelled"
        assert (await desk.admin.post(f"/approvals/{approval}/cancel", {"reason": note})).status == 200
    else:
        note = "because"
        status = {"approve": "approved", "reject": "rejected"}.get(outcome, "revision_requested")
        answer = await by.post(f"/approvals/{approval}/{outcome}", {"note": note})
        assert (answer.status, answer.json()["status"]) == (200, status), answer
    if outcome == "expire":  # the worker has been silent for a quarter of an hour
        await desk.worker.post(f"/workers/{desk.worker_id}/heartbeat", {})
    resume = await desk.resumed(run.task_id)
    assert (resume["decision"]["status"], resume["decision"]["note"]) == (status, note)


async def test_approvals_4_a_decision_is_bound_to_the_content_that_was_read(desk: Desk) -> None:
    asked = await desk.ask(payload={"amount": 1})
    read = (await desk.other.get(f"/approvals/{asked['id']}")).json()["payload_sha256"]
    revised = await desk.member.post(f"/approvals/{asked['id']}/revise", {"payload": {"amount": 1000}})
    assert (revised.status, revised.json()["status"]) == (200, "pending")
    stale = await desk.other.post(f"/approvals/{asked['id']}/approve", {"payload_sha256": read})
    assert (stale.status, stale.code) == (412, "precondition_failed")
    assert (await desk.read(asked["id"]))["status"] == "pending"
    fresh = revised.json()["payload_sha256"]
    assert (await desk.other.post(f"/approvals/{asked['id']}/approve", {"payload_sha256": fresh})).status == 200


async def test_approvals_4_an_approved_call_runs_once_with_the_edited_arguments(desk: Desk) -> None:
    run, approval = await desk.held()
    stale = await desk.member.post(f"/approvals/{approval}/approve", {"payload_sha256": "0" * 64})
    assert (stale.status, desk.bench.runs) == (412, [])
    wrong = await desk.member.post(f"/approvals/{approval}/approve", {"edited_payload": {"words": 1}})
    assert wrong.status == 422
    read = (await desk.read(approval))["payload_sha256"]
    edited = {"text": "edited"}
    answer = await desk.member.post(
        f"/approvals/{approval}/approve", {"payload_sha256": read, "edited_payload": edited}
    )
    assert answer.status == 200, answer
    await desk.kit.run_jobs()
    await desk.kit.run_schedule("tools.reap")
    assert desk.bench.runs == [edited]
    resume = await desk.resumed(run.task_id)
    assert resume["tool_results"] == [
        {"call_id": "call-1", "status": "succeeded", "result": {"said": "edited"}, "error": None}
    ]
    assert resume["decision"]["edited_payload"] == edited
    view = await desk.read(approval)
    assert (view["payload"], view["edited_payload"]) == ({"text": "hello"}, edited)
    assert view["execution"]["status"] == "succeeded"
    assert view["consumed_at"] is not None


async def test_approvals_5_a_late_decision_is_refused_before_the_sweep(desk: Desk) -> None:
    asked = await desk.ask(expires_in_seconds=900)
    clock.travel(901)
    for verb in ("approve", "reject"):
        late = await desk.other.post(f"/approvals/{asked['id']}/{verb}")
        assert (late.status, late.code) == (410, "approval_expired")
    assert (await desk.read(asked["id"]))["status"] == "expired"
    assert (await desk.admin.get("/approvals")).json()["total"] == 0
    assert (await desk.admin.get("/approvals?status=expired")).json()["total"] == 1
    await sweep(desk)
    assert (await desk.other.post(f"/approvals/{asked['id']}/approve")).code == "approval_expired"
    assert (await desk.admin.get("/approvals?status=expired")).json()["total"] == 1


async def test_approvals_6_a_quorum_collects_approvals(desk: Desk) -> None:
    asked = await desk.ask(required_approvals=2)
    first = (await desk.other.post(f"/approvals/{asked['id']}/approve")).json()
    assert (first["status"], first["approvals"], first["required"]) == ("pending", 1, 2)
    again = await desk.other.post(f"/approvals/{asked['id']}/approve")
    assert (again.status, again.code, again.json()["current_status"]) == (409, "already_decided", "pending")
    assert (await desk.admin.post(f"/approvals/{asked['id']}/approve")).json()["status"] == "approved"
    too_many = await desk.member.post("/approvals", {"title": "all", "required_approvals": 10})
    assert too_many.status == 422


async def test_approvals_6_who_lost_the_right_does_not_count(desk: Desk) -> None:
    third = await desk.kit.as_user("member")
    asked = await desk.ask(required_approvals=2)
    assert (await third.post(f"/approvals/{asked['id']}/approve")).status == 200
    demoted = await desk.admin.patch(f"/admin/users/{third.user['id']}", {"role": "viewer"})
    assert demoted.status == 200, demoted
    second = (await desk.other.post(f"/approvals/{asked['id']}/approve")).json()
    assert (second["status"], second["approvals"]) == ("pending", 1)
    assert (await desk.admin.post(f"/approvals/{asked['id']}/approve")).json()["status"] == "approved"


async def test_approvals_7_machines_and_keys_never_decide(make_kit: Any) -> None:
    desk = await Desk().set_up(make_kit, also=["security"])
    key = await desk.other.post("/security/api-keys", {"name": "all", "scopes": ["*"]})
    assert key.status == 201, key
    script = Client(desk.kit.application.app, key.json()["key"])
    assert (await script.get("/approvals")).status == 200
    run, approval = await desk.waiting()
    live = await desk.run()
    for verb, body in (("approve", {}), ("reject", {}), ("request-revision", {"note": "x"})):
        for machine in (script, live.agent, desk.worker):
            answer = await machine.post(f"/approvals/{approval}/{verb}", body)
            assert answer.status == 403, (verb, answer)
    bulk = {"ids": [approval], "decision": "approve"}
    assert [(await machine.post("/approvals/bulk", bulk)).status for machine in (script, live.agent)] == [403, 403]
    assert (await desk.task(run.task_id))["status"] == "waiting"


async def test_approvals_8_a_cancelled_task_cancels_its_approvals(desk: Desk) -> None:
    run, approval = await desk.waiting()
    held, of_call = await desk.held()
    for task_id in (run.task_id, held.task_id):
        assert (await desk.member.post(f"/tasks/{task_id}/cancel", {})).status == 200
    for each in (approval, of_call):
        assert (await desk.read(each))["status"] == "cancelled"
        late = await desk.other.post(f"/approvals/{each}/approve")
        late = await desk.admin.post(f"/approvals/{each}/approve") if late.status == 403 else late
        assert (late.status, late.code, late.json()["current_status"]) == (409, "already_decided", "cancelled")
    assert [call["status"] for call in await held.calls()] == ["denied"]
    assert desk.bench.runs == []


async def test_approvals_9_a_waiting_reader_learns_the_decision_at_once(desk: Desk) -> None:
    asked = await desk.ask()
    reader = asyncio.create_task(desk.member.get(f"/approvals/{asked['id']}?wait=55"))
    await asyncio.sleep(0.1)
    assert not reader.done()
    assert (await desk.other.post(f"/approvals/{asked['id']}/reject", {"note": "no"})).status == 200
    async with within(1):
        answer = await reader
    assert (answer.json()["status"], answer.json()["outcome_note"]) == ("rejected", "no")
    assert (await desk.member.get(f"/approvals/{asked['id']}?wait=55")).json()["status"] == "rejected"
