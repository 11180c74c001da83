"""A trigger never fires again because of what it started itself, whichever way the work takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.triggers.conftest import PLUGINS, TASK, Alarm

from corral.testing.kit import Client
from corral_plugins.notifications.service.dispatcher import NotificationDispatcher

pytestmark = pytest.mark.one_engine
MORE = ("approvals", "code_reviews", "expressions", "messages", "notifications", "secrets", "settings", "tools")
FAILURE = {"error": {"type": "x", "message": "x"}, "retryable": False}
PATCH = "--- a/a\n+++ b/a\n@@ -1 +1 @@\n-a\n+b\n"


@pytest.fixture
async def alarm(make_kit: Callable[..., Any]) -> Alarm:
    """A world in which the work of a trigger can come back in many ways."""
    world = Alarm()
    await world.build(await make_kit(plugins=(*PLUGINS, *MORE, "files", "workflows")))
    return world


async def settled(alarm: Alarm, trigger: Any) -> list[str]:
    """Do everything that is due; the statuses of the trigger's history."""
    for _ in range(6):
        await alarm.run()
        await alarm.kit.service(NotificationDispatcher).run_once()
        await alarm.kit.run_consumers()
    return await alarm.statuses(trigger["id"])


async def agent_of_first_task(alarm: Alarm) -> tuple[Any, Client]:
    """The run of the first task of the trigger, and its agent."""
    lease = await alarm.worker.run(max_tasks=1)
    return lease, Client(alarm.kit.application.app, lease.claim["agent_token"])


@pytest.mark.parametrize(
    ("event", "step_type", "config", "path", "body"),
    [
        ("message.new", "message", {"channel": "news", "body": "x"}, "messages/send", {"channel": "news", "body": "x"}),
        ("approval.created", "approval", {"title": "May I?"}, "approvals", {"title": "May I?"}),
    ],
)
async def test_the_steps_of_its_runs(
    alarm: Alarm, event: str, step_type: str, config: Any, path: str, body: Any
) -> None:
    steps = [{"name": "step", "step_type": step_type, "config": config}]
    workflow = await alarm.member.post("/workflows", {"name": "flow", "steps": steps})
    assert workflow.status == 201, workflow
    action = {"type": "run_workflow", "workflow_id": workflow.json()["id"]}
    made = await alarm.create("event", {"event": event}, action=action)
    assert (await alarm.member.post(f"/{path}", body)).status == 201
    assert await settled(alarm, made) == ["fired", "loop"]


async def test_the_review_of_its_diffs_by_an_agent(alarm: Alarm) -> None:
    reviewer = await alarm.agent("reviewer")
    policy = {"mode": "agent", "reviewer_agent_id": reviewer}
    author = await alarm.agent("author", review_policy=policy)
    made = await alarm.create("event", {"event": "task.completed"}, action={**TASK, "agent_id": author})
    task_id = await alarm.task(agent_id=alarm.agent_id)
    await alarm.finish(task_id)
    assert await settled(alarm, made) == ["fired"]
    lease = await alarm.worker.run(max_tasks=1)
    await lease.ok("complete", {"result": {}, "artifacts": [{"name": "d", "type": "diff", "patch": PATCH}]})
    review = await alarm.worker.run(max_tasks=1)
    assert review.claim["task"]["cause_chain"] == [made["id"], lease.task_id]
    await review.ok("complete", {"result": {}})
    assert await settled(alarm, made) == ["fired", "loop"]


async def test_the_comments_of_its_tasks_on_an_approval_of_another_task(alarm: Alarm) -> None:
    action = {**TASK, "agent_id": alarm.agent_id}
    made = await alarm.create("event", {"event": "approval.updated"}, action=action)
    task_id = await alarm.task(agent_id=alarm.agent_id)
    _, agent = await agent_of_first_task(alarm)
    asked = (await agent.post("/approvals", {"title": "May I?", "task_id": task_id})).json()
    comments = f"/approvals/{asked['id']}/comments"
    assert (await alarm.admin.post(comments, {"body": "Why?"})).status == 201
    assert await settled(alarm, made) == ["fired"]
    _, agent = await agent_of_first_task(alarm)
    commented = await agent.post(comments, {"body": "Because."})
    assert commented.status == 201, commented
    assert await settled(alarm, made) == ["fired", "loop"]


@pytest.mark.parametrize("outcome", ["approved", "cancelled"])
async def test_the_end_of_the_approvals_that_its_tasks_ask_for(alarm: Alarm, outcome: str) -> None:
    action = {**TASK, "agent_id": alarm.agent_id}
    made = await alarm.create("event", {"event": "approval.resolved"}, action=action)
    asked = await alarm.member.post("/approvals", {"title": "May I?"})
    assert (await alarm.admin.post(f"/approvals/{asked.json()['id']}/approve")).status == 200
    assert await settled(alarm, made) == ["fired"]
    if outcome == "approved":
        rules = {"value": [{"id": "all", "max_risk": "medium"}]}
        assert (await alarm.admin.put("/settings/approvals/auto_approve", rules)).status == 200
    lease, agent = await agent_of_first_task(alarm)
    asked = await agent.post("/approvals", {"title": "May I?", "task_id": lease.task_id})
    assert asked.status == 201, asked
    if outcome == "cancelled":
        await lease.ok("complete", {"result": {}})
    assert await settled(alarm, made) == ["fired", "loop"]
    assert (await alarm.member.get(f"/approvals/{asked.json()['id']}")).json()["status"] == outcome


async def test_the_reviews_that_its_tasks_replace_and_cancel(alarm: Alarm) -> None:
    body = {"title": "t", "agent_id": alarm.agent_id, "patch": PATCH}
    names = ("code_review.superseded", "code_review.cancelled")
    action = {**TASK, "agent_id": alarm.agent_id}
    made = {each: await alarm.create("event", {"event": each}, action=action, name=each) for each in names}
    opened = await alarm.member.post("/code-reviews", body)
    assert (await alarm.member.post(f"/code-reviews/{opened.json()['id']}/cancel")).status == 200
    assert await settled(alarm, made["code_review.cancelled"]) == ["fired"]
    lease, agent = await agent_of_first_task(alarm)
    for _ in range(2):
        answer = await agent.post("/code-reviews", {**body, "task_id": lease.task_id})
        assert answer.status == 201, answer
    assert (await alarm.member.post(f"/tasks/{lease.task_id}/cancel", {})).status == 202
    await lease.ok("cancelled")
    assert await settled(alarm, made["code_review.cancelled"]) == ["fired", "loop"]
    assert await alarm.statuses(made["code_review.superseded"]["id"]) == ["fired"]
    chain = [made[each]["id"] for each in reversed(names)]
    (second,) = [each for each in await alarm.tasks() if each["source"]["id"] == made["code_review.superseded"]["id"]]
    assert (await alarm.read(second["id"]))["cause_chain"] == chain


async def test_the_calls_of_tools_in_its_tasks(alarm: Alarm) -> None:
    agent_id = await alarm.agent("caller", enabled_tools=["tasks.list"], max_concurrent_tasks=9)
    made = await alarm.create("event", {"event": "tool.called"}, action={**TASK, "agent_id": agent_id})
    await alarm.task(agent_id=agent_id)
    calls = [("tasks.list", 200, ["fired"]), ("tasks.list", 200, ["fired", "loop"])]
    for tool, status, statuses in [*calls, ("tasks.create", 403, ["fired", "loop", "loop"])]:
        if status == 200:
            lease, agent = await agent_of_first_task(alarm)
        body = {"lease_id": lease.lease_id, "call_id": tool, "arguments": {}}
        answer = await agent.post(f"/tasks/{lease.task_id}/tools/{tool}", body)
        assert answer.status == status, answer
        assert await settled(alarm, made) == statuses


@pytest.mark.parametrize("end", ["input", "cancel"])
async def test_the_questions_of_its_tasks(alarm: Alarm, end: str) -> None:
    agent_id = await alarm.agent("asks", enabled_tools=["human.ask"], max_concurrent_tasks=9)
    made = await alarm.create("event", {"event": "tool.called"}, action={**TASK, "agent_id": agent_id})
    await alarm.task(agent_id=agent_id)
    for statuses in (["fired"], ["fired", "loop"]):
        lease, agent = await agent_of_first_task(alarm)
        body = {"lease_id": lease.lease_id, "call_id": "q", "arguments": {"prompt": "Which colour?"}}
        answer = await agent.post(f"/tasks/{lease.task_id}/tools/human.ask", body)
        assert answer.status == 200, answer
        ended = await alarm.member.post(f"/tasks/{lease.task_id}/{end}", {"input": "blue"} if end == "input" else {})
        assert ended.status == 200, ended
        assert await settled(alarm, made) == statuses
        if end == "input":
            await (await alarm.worker.run(max_tasks=1)).ok("complete", {"result": {}})


async def test_the_rejected_tool_calls_of_its_tasks(alarm: Alarm) -> None:
    policy = {"tasks.list": "ask"}
    agent_id = await alarm.agent("asks", enabled_tools=["tasks.list"], tool_policy=policy, max_concurrent_tasks=9)
    made = await alarm.create("event", {"event": "tool.called"}, action={**TASK, "agent_id": agent_id})
    await alarm.task(agent_id=agent_id)
    for statuses in (["fired"], ["fired", "loop"]):
        lease, agent = await agent_of_first_task(alarm)
        body = {"lease_id": lease.lease_id, "call_id": "c", "arguments": {}}
        held = await agent.post(f"/tasks/{lease.task_id}/tools/tasks.list", body)
        assert held.status == 202, held
        (asked,) = (await alarm.admin.get("/approvals?status=pending")).json()["items"]
        assert (await alarm.admin.post(f"/approvals/{asked['id']}/reject", {})).status == 200
        assert await settled(alarm, made) == statuses
        await lease.ok("complete", {"result": {}})


async def test_the_answers_of_its_tasks_to_messages(alarm: Alarm) -> None:
    agent_id = await alarm.agent("answers")
    request = {"recipient_agent_id": agent_id, "body": "Please.", "type": "request"}
    action = {**TASK, "agent_id": agent_id}
    made = await alarm.create("event", {"event": "message.acked"}, action=action)
    first, second, third = [(await alarm.member.post("/messages/send", request)).json() for _ in range(3)]
    acked = await alarm.member.post(f"/messages/{first['id']}/ack", {"result": "done", "agent_id": agent_id})
    assert acked.status == 200, acked
    assert await settled(alarm, made) == ["fired"]
    _, agent = await agent_of_first_task(alarm)
    reply = {"recipient_user_id": alarm.member.user["id"], "body": "Done.", "in_reply_to": second["id"]}
    assert (await agent.post("/messages/send", reply)).status == 201
    assert (await agent.post(f"/messages/{third['id']}/ack", {"result": "done"})).status == 200
    assert await settled(alarm, made) == ["fired", "loop", "loop"]


async def test_the_notifications_about_its_tasks(alarm: Alarm) -> None:
    made = await alarm.create("event", {"event": "notification"}, action={**TASK, "agent_id": alarm.agent_id})
    await alarm.task(agent_id=alarm.agent_id)
    await (await alarm.worker.run(max_tasks=1)).ok("fail", FAILURE)
    assert await settled(alarm, made) == ["fired"]
    await (await alarm.worker.run(max_tasks=1)).ok("fail", FAILURE)
    assert (await settled(alarm, made))[1:] == ["loop"]


async def test_the_state_of_the_agent_that_works_on_its_tasks(alarm: Alarm) -> None:
    made = await alarm.create("event", {"event": "agent.status"}, action={**TASK, "agent_id": alarm.agent_id})
    await alarm.finish(await alarm.task(agent_id=alarm.agent_id))
    assert await settled(alarm, made) == ["fired", "fired"]  # it became busy, and idle
    lease = await alarm.worker.run(max_tasks=1)
    await lease.ok("complete", {"result": {}})
    assert await settled(alarm, made) == ["fired", "fired", "loop", "loop"]


@pytest.mark.parametrize(("setting", "state"), [("error_after_failures", "error"), ("pause_after_stalls", "paused")])
async def test_the_failures_of_the_agents_that_work_on_its_tasks(alarm: Alarm, setting: str, state: str) -> None:
    answer = await alarm.admin.put(f"/settings/agents/{setting}", {"value": 1})
    assert answer.status == 200, answer
    stalls = {"stall_seconds": 5, "action": "notify"}
    ops: dict[str, Any] = {"role": "ops", "max_concurrent_tasks": 9, "stall_policy": stalls}
    agents = [await alarm.agent(f"ops {n}", **ops) for n in range(2)]
    config = {"event": "agent.status", "filter": f"payload.to == '{state}'"}
    made = await alarm.create("event", config, action={**TASK, "agent_role": "ops"})
    await alarm.task(agent_id=agents[0])
    for last in ("fired", "loop"):
        lease = await alarm.worker.run(max_tasks=1)
        if state == "paused":
            await alarm.pass_time(6)
        error = {"type": "provider_error", "message": "x"}
        await lease.ok("fail", {"error": error, "retryable": False})
        statuses = [each for each in await settled(alarm, made) if each != "filtered"]
        assert (statuses.count("fired"), statuses[-1]) == (1, last)
