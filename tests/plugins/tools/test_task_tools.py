"""The tools of tasks: reading a task, delegating one, and asking a person."""

from __future__ import annotations

from typing import Any

import pytest
from tests.plugins.tools.conftest import Run, World

from corral import clock
from corral.testing.kit import Client
from corral_plugins.tasks import jobs as task_jobs
from corral_plugins.tasks.service.timers import TaskTimers

pytestmark = pytest.mark.one_engine

QUESTION = {"prompt": "Which colour?", "schema": {"enum": ["red", "blue"]}}


async def read(world: World, task_id: str) -> dict[str, Any]:
    answer = await world.member.get(f"/tasks/{task_id}")
    assert answer.status == 200, answer
    task: dict[str, Any] = answer.json()
    return task


async def test_tasks_get(world: World) -> None:
    run, other = await world.run("tasks.*"), await world.run("test.*")
    told = {"lease_id": other.lease_id, "result": {"text": "done"}}
    await world.worker.post(f"/tasks/{other.task_id}/complete", told)
    call = (await run.tool("tasks.get", {"task_id": other.task_id.upper()})).json()
    assert (call["result"]["status"], call["result"]["result"]) == ("completed", {"text": "done"})
    assert (await read(world, run.task_id))["tainted"] is False
    unseen = await run.tool("tasks.get", {"task_id": world.worker_id})
    assert (unseen.status, unseen.json()["reason"]) == (403, "requester_lacks_permission")
    assert (await run.tool("tasks.get", {"task_id": "x"})).status == 422


async def test_tasks_list(world: World) -> None:
    run, other = await world.run("tasks.*"), await world.run("test.*")
    told = {"lease_id": other.lease_id, "result": {"text": "done"}}
    await world.worker.post(f"/tasks/{other.task_id}/complete", told)
    listed = (await run.tool("tasks.list", {"status": "completed", "hours": 1})).json()["result"]
    assert [(each["id"], each["status"], each["cost_usd"]) for each in listed["items"]] == [
        (other.task_id, "completed", 0.0)
    ]
    everything = (await run.tool("tasks.list", {})).json()["result"]
    assert {each["id"] for each in everything["items"]} == {run.task_id, other.task_id}
    assert (await run.tool("tasks.list", {"status": "pending"})).status == 422


async def test_what_a_tainted_task_says_taints(world: World) -> None:
    run, other = await world.run("tasks.*"), await world.run("test.*")
    await other.say("test.page")
    assert (await run.tool("tasks.get", {"task_id": other.task_id})).json()["tainted"] is True
    attempts = (await world.member.get(f"/tasks/{run.task_id}/attempts")).json()["items"]
    assert attempts[0]["taint_sources"] == [f"task:{other.task_id}"]


async def test_tasks_create_delegates_within_the_parent(world: World) -> None:
    helper = await world.agent("test.*")
    limits = {"allowed_tools": ["tasks.create", "test.read"]}
    run = await world.run("tasks.*", task=limits)
    wanted = {
        "title": "part",
        "agent_id": helper,
        "allowed_tools": ["test.read", "test.write"],
        "input": {"n": 1},
        "priority": "high",
    }
    call = (await run.tool("tasks.create", wanted)).json()
    assert call["status"] == "succeeded", call
    child = await read(world, call["result"]["task_id"])
    assert (child["parent_task_id"], child["depth"], child["created_by"]) == (
        run.task_id,
        1,
        world.member.user["id"],
    )
    assert (child["allowed_tools"], child["input"]) == (["test.read"], {"n": 1})
    assert child["source"] == {"type": "agent", "id": run.claim["agent"]["id"]}
    heir = (await run.tool("tasks.create", {"title": "another"})).json()["result"]["task_id"]
    assert (await read(world, heir))["allowed_tools"] == ["tasks.create", "test.read"]


async def test_an_attempt_token_delegates_within_the_parent_too(world: World) -> None:
    run = await world.run("tasks.*", task={"allowed_tools": ["tasks.get"]})
    agent = Client(world.kit.application.app, run.claim["agent_token"])
    for wanted in ({}, {"allowed_tools": ["tasks.get", "test.write"]}):
        answer = await agent.post("/tasks", {"title": "part", **wanted})
        assert answer.status == 201, answer
        child = answer.json()
        assert (child["parent_task_id"], child["allowed_tools"]) == (run.task_id, ["tasks.get"])


async def test_tasks_create_is_refused_where_the_api_would(world: World) -> None:
    run = await world.run("tasks.*")
    call = (await run.tool("tasks.create", {"title": "x", "agent_id": world.worker_id})).json()
    assert (call["status"], call["error"]["type"]) == ("failed", "unknown_reference")
    call = (await run.tool("tasks.create", {"title": "x", "agent_role": "NO"})).json()
    assert (call["status"], call["error"]["type"]) == ("failed", "validation_error")
    assert "/agent_role" in call["error"]["message"]


async def test_tasks_create_for_listed_agents_only(world: World) -> None:
    helper = await world.agent("test.*")
    assert (await world.admin.patch("/tools/tasks.create", {"config": {"agent_ids": [helper]}})).status == 200
    run = await world.run("tasks.*")
    assert (await run.tool("tasks.create", {"title": "x", "agent_id": helper})).status == 200
    for arguments in ({"title": "x"}, {"title": "x", "agent_id": run.claim["agent"]["id"]}):
        assert (await run.tool("tasks.create", arguments)).json()["reason"] == "config"


async def ask(world: World, **question: Any) -> Run:
    """A run that has asked a person and released its lease."""
    run = await world.run("human.ask")
    state = {"messages": ["…"], "open_calls": ["q"]}
    await world.worker.post(f"/tasks/{run.task_id}/checkpoint", {"lease_id": run.lease_id, "step": 1, "state": state})
    answer = await run.tool("human.ask", QUESTION | question, call_id="q")
    assert (answer.status, answer.json()["status"]) == (200, "running"), answer
    return run


async def test_human_ask_waits_and_the_answer_is_its_result(world: World) -> None:
    run = await ask(world)
    task = await read(world, run.task_id)
    assert (task["status"], task["waiting_for"]["kind"], task["waiting_for"]["prompt"]) == (
        "waiting",
        "input",
        "Which colour?",
    )
    assert (await run.tool("human.ask", QUESTION, call_id="q2")).status in (401, 409)
    assert (await world.member.post(f"/tasks/{run.task_id}/input", {"input": "green"})).code == "schema_mismatch"
    assert (await world.member.post(f"/tasks/{run.task_id}/input", {"input": "blue"})).status == 200
    (call,) = await run.calls()
    assert (call["status"], call["result"]) == ("succeeded", "blue")
    again = await world.claim(run.claim["agent"]["id"])
    resume = again.claim["resume"]
    assert resume["tool_results"] == [{"call_id": "q", "status": "succeeded", "result": "blue", "error": None}]
    assert resume["checkpoint"]["state"]["open_calls"] == ["q"]
    assert "input" not in resume
    assert (await again.tool("human.ask", QUESTION, call_id="q")).json()["result"] == "blue"
    assert again.claim["attempt"] == 1


async def test_human_ask_refuses_a_schema_that_nobody_may_store(world: World) -> None:
    run = await world.run("human.ask")
    answer = await run.tool("human.ask", {"prompt": "?", "schema": {"type": "string", "pattern": "(a+)+$"}})
    assert (answer.json()["status"], answer.json()["error"]["type"]) == ("failed", "validation_error")
    assert (await read(world, run.task_id))["status"] == "running"


@pytest.mark.parametrize("end", ["cancel", "fail"])
async def test_a_question_of_an_ended_task_is_not_open(world: World, end: str) -> None:
    run = await ask(world)
    body = {"error": {"type": "x", "message": "y"}} if end == "fail" else {}
    assert (await world.member.post(f"/tasks/{run.task_id}/{end}", body)).status == 200
    (call,) = await run.calls()
    assert (call["status"], call["error"]["type"]) == ("failed", "expired")


async def test_a_question_with_a_deadline_fails_with_it(world: World) -> None:
    deadline = clock.now(3600)
    run = await world.run("human.ask", task={"deadline": deadline})
    await run.tool("human.ask", QUESTION, call_id="q")
    clock.travel(3700)
    database, timers = world.kit.kernel.database, world.kit.kernel.container.get(TaskTimers)
    await task_jobs.end_overdue_tasks(database, timers)
    world.member = await world.kit.sign_in(world.member.user["email"])
    assert (await read(world, run.task_id))["status"] == "failed"
    assert (await run.calls())[0]["error"]["type"] == "expired"
