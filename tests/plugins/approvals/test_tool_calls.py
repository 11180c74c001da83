"""Tool calls that people approve, reject or leave alone; the criteria of the contract of tools that need approvals."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.plugins.approvals.conftest import Desk
from tests.plugins.tools.conftest import World

from corral import clock
from corral.errors import Conflict
from corral_plugins.approvals.api import Approvals
from corral_plugins.tools.models import ToolCallRow

pytestmark = pytest.mark.one_engine


async def approve(desk: Desk, approval_id: str, **body: Any) -> None:
    """The owner of the task approves, and the job runs."""
    answer = await desk.member.post(f"/approvals/{approval_id}/approve", body)
    assert (answer.status, answer.json()["status"]) == (200, "approved"), answer
    await desk.kit.run_jobs()


async def end_of(desk: Desk, task_id: str) -> Any:
    """The call of the task after its `async def` tool has run."""
    for _ in range(5000):
        (call,) = (await desk.member.get(f"/tasks/{task_id}/tool-calls")).json()["items"]
        if call["status"] not in ("pending_approval", "running"):
            return call
        await asyncio.sleep(0.01)
    raise AssertionError(call)


async def test_tools_2_after_a_web_page_external_tools_ask(desk: Desk) -> None:
    run = await desk.run("test.*")
    desk.bench.gate.set()
    assert (await run.say("test.slow")).status == 200
    assert (await run.say("test.page")).status == 200
    asked = await run.say("test.slow", "after the page")
    assert (asked.status, asked.json()["status"], asked.json()["decision"]) == (202, "pending_approval", "asked")
    approval_id = asked.json()["approval_id"]
    assert dict(asked.headers)["location"] == f"/api/v1/approvals/{approval_id}"
    held = (await desk.read(approval_id))["tool_call"]
    assert (held["tool"], held["tainted"], held["taint_sources"]) == ("test.slow", True, ["test.page"])
    for allowed in (await run.say("test.read"), await run.say("test.write")):
        assert allowed.status == 200
    assert {"text": "after the page"} not in desk.bench.runs
    assert [row["object"]["id"] for row in await desk.audited("tools.call.hold")] == ["test.slow"]
    checked = await desk.member.post("/tools/test.slow/check", await check_of(run, "after the page"))
    assert checked.json()["decision"] == "asked"


async def check_of(run: Any, text: str) -> dict[str, Any]:
    return {"agent_id": run.claim["agent"]["id"], "task_id": run.task_id, "arguments": {"text": text}}


async def test_tools_3_an_async_tool_runs_at_once_and_the_task_gets_the_real_output(desk: Desk) -> None:
    desk.bench.gate.set()
    run, approval = await desk.held("test.slow", "now", tool_policy={"test.slow": "ask"})
    await approve(desk, approval)
    call = await end_of(desk, run.task_id)
    assert (call["status"], call["result"], desk.bench.runs) == ("succeeded", {"done": "now"}, [{"text": "now"}])
    resume = await desk.resumed(run.task_id)
    assert resume["tool_results"][0]["result"] == {"done": "now"}
    assert resume["decision"]["status"] == "approved"
    assert (await desk.task(run.task_id))["attempt"] == 1


@pytest.mark.parametrize("outcome", ["reject", "request-revision", "cancel", "expire"])
async def test_tools_3_every_refusal_reaches_the_model(desk: Desk, outcome: str) -> None:
    run, approval = await desk.held()
    if outcome == "expire":
        clock.travel(86_401)
        await desk.kit.run_schedule("approvals.sweep")
        row = await desk.kit.work(lambda: ToolCallRow.get(ToolCallRow.approval_id == approval), read=True)
        assert (row.status, row.error["type"]) == ("expired", "expired")
        return
    body = {"reason": "too much"} if outcome == "cancel" else {"note": "too much"}
    assert (await desk.member.post(f"/approvals/{approval}/{outcome}", body)).status == 200
    resume = await desk.resumed(run.task_id)
    (told,) = resume["tool_results"]
    assert (told["call_id"], told["status"]) == ("call-1", "denied")
    assert told["error"]["message"].endswith("They wrote: too much")
    assert (desk.bench.runs, resume["decision"]["note"]) == ([], "too much")


async def test_a_decision_before_the_task_waits_is_not_lost(desk: Desk) -> None:
    run = await desk.run("test.danger")
    asked = (await run.say("test.danger")).json()
    await approve(desk, asked["approval_id"])
    assert desk.bench.runs == [{"text": "hello"}]
    assert (await run.say("test.danger", call_id="call-1")).json()["status"] == "succeeded"
    waits = await run.agent.post(f"/tasks/{run.task_id}/wait", {"approval_id": asked["approval_id"]})
    assert waits.json()["status"] == "pending"
    resume = await desk.resumed(run.task_id)
    assert resume["tool_results"][0]["result"] == {"said": "hello"}


async def test_an_interrupted_call_that_needs_an_approval_now_does_not_run_again(desk: Desk) -> None:
    desk.bench.gate.set()
    run = await desk.run("test.*")
    assert (await run.say("test.again", call_id="c")).status == 200
    changed = await desk.member.patch(f"/agents/{run.claim['agent']['id']}", {"tool_policy": {"test.again": "ask"}})
    assert changed.status == 200, changed
    dead = {"status": "running", "result": None, "finished_at": None, "alive_until": clock.now(-60)}
    await desk.kit.work(lambda: ToolCallRow.update(dead).where(ToolCallRow.task_id == run.task_id).execute())
    again = await run.say("test.again", call_id="c")
    assert (again.status, again.json()["reason"]) == (403, "policy")
    assert len(desk.bench.runs) == 1


async def test_the_decision_is_taken_again_before_the_call_runs(desk: Desk) -> None:
    run, approval = await desk.held()
    demoted = await desk.admin.patch(f"/admin/users/{desk.member.user['id']}", {"role": "viewer"})
    assert demoted.status == 200
    assert (await desk.admin.post(f"/approvals/{approval}/approve")).status == 200
    await desk.kit.run_jobs()
    (call,) = (await desk.admin.get(f"/tasks/{run.task_id}/tool-calls")).json()["items"]
    assert (call["status"], call["reason"]) == ("denied", "requester_lacks_permission")
    assert desk.bench.runs == []
    assert (await desk.admin.get(f"/tasks/{run.task_id}")).json()["status"] == "pending"
    assert (await desk.read(approval))["execution"]["status"] == "denied"


async def test_tools_8_an_approved_call_waits_for_the_kill_switch(desk: Desk) -> None:
    run, approval = await desk.held()
    engaged = await desk.admin.post("/admin/kill-switch", {"engaged": True, "reason": "test"})
    assert engaged.status == 200, engaged
    await approve(desk, approval)
    assert desk.bench.runs == []
    assert (await desk.admin.post("/admin/kill-switch", {"engaged": False, "reason": "over"})).status == 200
    await desk.kit.run_schedule("tools.reap")
    assert desk.bench.runs == [{"text": "hello"}]
    assert (await desk.task(run.task_id))["status"] == "pending"


async def test_one_approval_is_one_execution(desk: Desk) -> None:
    _, approval = await desk.held()
    await approve(desk, approval)
    approvals = desk.kit.service(Approvals)
    facts = await desk.kit.work(lambda: approvals.find(approval), read=True)
    assert facts is not None
    with pytest.raises(Conflict, match="already_decided"):
        await desk.kit.work(lambda: approvals.consume(approval, payload_sha256=facts.payload_sha256))
    for _ in range(3):
        await desk.kit.run_schedule("tools.reap")
    assert len(desk.bench.runs) == 1


async def test_other_content_than_approved_is_never_consumed(desk: Desk) -> None:
    asked = await desk.ask(payload={"amount": 1})
    assert (await desk.other.post(f"/approvals/{asked['id']}/approve")).status == 200
    approvals = desk.kit.service(Approvals)
    with pytest.raises(Conflict):
        await desk.kit.work(lambda: approvals.consume(asked["id"], payload_sha256="0" * 64))
    payload = await desk.kit.work(lambda: approvals.consume(asked["id"], payload_sha256=asked["payload_sha256"]))
    assert payload == {"amount": 1}


async def test_a_worker_tool_gets_its_permit_when_the_worker_calls_again(desk: Desk) -> None:
    offered = [{"name": "robot.move", "risk": "dangerous", "schema": {"type": "object"}}]
    desk.worker, desk.worker_id = await desk.machine("robot", tools=offered)
    run = await desk.run("robot.move", by=desk.admin)
    asked = await run.tool("robot.move", {"to": 1}, call_id="c")
    assert asked.status == 202, asked
    approval = asked.json()["approval_id"]
    await run.agent.post(f"/tasks/{run.task_id}/wait", {"approval_id": approval})
    await desk.admin.post(f"/approvals/{approval}/approve", {"edited_payload": {"to": 2}})
    again = await desk.claim(run.claim["agent"]["id"])
    assert again.claim["resume"]["tool_results"] == []
    assert again.claim["resume"]["decision"]["edited_payload"] == {"to": 2}
    permitted = (await again.tool("robot.move", {"to": 1}, call_id="c")).json()
    assert (permitted["status"], permitted["approved_arguments"]) == ("permitted", {"to": 2})
    assert (await again.tool("robot.move", {"to": 1}, call_id="c")).json()["permit"] == permitted["permit"]
    report = {"permit": permitted["permit"], "result": "moved"}
    assert (await again.agent.post(f"/tasks/{run.task_id}/tools/calls/c/result", report)).status == 200
    view = await desk.read(approval)
    assert (view["execution"]["status"], view["consumed_at"] is not None) == ("succeeded", True)


async def test_the_same_call_is_asked_once_and_a_rejection_stays_for_a_while(desk: Desk) -> None:
    run = await desk.run("test.danger")
    first, second = await run.say("test.danger"), await run.say("test.danger")
    assert first.json()["approval_id"] == second.json()["approval_id"]
    assert [call["status"] for call in await run.calls()] == ["denied", "pending_approval"]
    approval = first.json()["approval_id"]
    assert (await desk.member.post(f"/approvals/{approval}/reject", {"note": "never"})).status == 200
    again = await run.say("test.danger")
    assert (again.status, again.code, again.json()["reason"]) == (403, "tools.denied", "rejected")
    assert again.json()["detail"].endswith("They wrote: never")
    clock.travel(601)
    assert (await desk.admin.get("/approvals")).json()["total"] == 0


async def test_without_the_plugin_what_asks_is_denied(make_kit: Any) -> None:
    world = await World().build(make_kit)
    run = await world.run("test.danger")
    answer = await run.say("test.danger")
    assert (answer.status, answer.json()["reason"]) == (403, "policy")


async def test_what_people_cannot_see_they_cannot_edit(desk: Desk) -> None:
    secret = "sk-ant-api03-" + "Ab3" * 31 + "-AA"
    run, approval = await desk.held("test.danger", f"key {secret}")
    view = await desk.read(approval)
    assert secret not in str(view)
    assert view["editable"] is False
    refused = await desk.member.post(f"/approvals/{approval}/approve", {"edited_payload": {"text": "x"}})
    assert refused.status == 422
    row = await desk.kit.work(lambda: ToolCallRow.get(ToolCallRow.approval_id == approval), read=True)
    assert secret not in str(row.held_arguments)
    await approve(desk, approval)
    assert desk.bench.runs == [{"text": f"key {secret}"}]
    (call,) = await run.calls()
    assert secret not in str(call)


async def test_approvers_need_the_permission_that_the_tool_demands(desk: Desk) -> None:
    agent_id = await desk.agent("locked.write", by=desk.admin, tool_policy={"locked.write": "ask"})
    made = await desk.admin.post("/tasks", {"title": "work", "agent_id": agent_id})
    assert made.status == 201, made
    run = await desk.claim(agent_id)
    approval_id = (await run.say("locked.write", "hello")).json()["approval_id"]
    waits = await run.agent.post(f"/tasks/{run.task_id}/wait", {"approval_id": approval_id})
    assert waits.status == 200, waits
    view = await desk.read(approval_id)
    assert view["risk"] == "low"
    assert view["tool_call"]["required_permissions"] == ["tools.manage"]
    assert view["approvers"] == {"users": [desk.admin.user["id"]], "roles": ["admin"]}
    edited = {"edited_payload": {"text": "something else"}}
    refused = await desk.member.post(f"/approvals/{approval_id}/approve", edited)
    assert (refused.status, refused.code) == (403, "forbidden")
    assert (await desk.member.get("/approvals?assigned_to=me")).json()["total"] == 0
    assert (await desk.admin.post(f"/approvals/{approval_id}/approve", edited)).status == 200
    await desk.kit.run_jobs()
    assert desk.bench.runs == [{"text": "something else"}]
