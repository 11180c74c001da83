"""The life of a task, step by step, as clients see it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from corral.errors import Unauthorized
from corral.testing.kit import Client
from corral_core.accounts.api import Tickets
from corral_plugins.tasks.service.statistics import TaskMetrics


async def test_created_claimed_started_and_completed(world: Any) -> None:
    task_id = await world.task("sum", input={"a": 1}, priority="high")
    lease = await world.worker.claim()
    assert lease.task_id == task_id
    assert lease.claim["task"]["input"] == {"a": 1}
    assert lease.claim["agent"]["id"] == world.agent_id
    assert lease.claim["attempt"] == 1
    assert lease.claim["resume"] is None
    assert lease.claim["agent_token"].startswith("cra_a")
    assert (await world.read(task_id))["status"] == "assigned"
    started = await lease.ok("start")
    assert (started["status"], started["attempt"]) == ("running", 1)
    assert (await lease.ok("start"))["attempt"] == 1
    told = await lease.ok(
        "progress", {"percent": 50, "message": "half", "usage": {"input_tokens": 7, "cost_usd": 0.25}}
    )
    assert told["state"] == "ok"
    logs = await lease.ok("logs", {"entries": [{"seq": 0, "ts": "2026-01-01T00:00:00Z", "message": "hello"}]})
    assert logs == {"accepted": 1, "next_seq": 1}
    again = await lease.ok("logs", {"entries": [{"seq": 0, "ts": "2026-01-01T00:00:00Z", "message": "hello"}]})
    assert again == {"accepted": 0, "next_seq": 1}
    assert await lease.ok("checkpoint", {"step": 3, "state": {"messages": []}}) == {"step": 3}
    assert await lease.ok("checkpoint", {"step": 2, "state": {}}) == {"step": 3}
    done = await lease.ok(
        "complete", {"result": {"text": "three"}, "artifacts": [{"name": "log", "type": "text", "content": "x"}]}
    )
    assert done["status"] == "completed"
    assert (await lease.ok("complete", {"result": {"text": "three"}}))["status"] == "completed"
    contradiction = await lease.call("fail", {"error": {"type": "oops", "message": ""}})
    assert (contradiction.status, contradiction.code) == (409, "task_terminal")
    task = await world.read(task_id)
    assert task["result"] == {"text": "three"}
    assert task["cost"] == {"cost_usd": 0.25, "unpriced_tokens": 0, "input_tokens": 7, "output_tokens": 0, "calls": 0}
    assert (await world.member.get(f"/tasks/{task_id}/artifacts")).json()["items"][0]["name"] == "log"
    assert (await world.member.get(f"/tasks/{task_id}/logs")).json()["items"][0]["message"] == "hello"
    attempts = (await world.member.get(f"/tasks/{task_id}/attempts")).json()["items"]
    assert [(each["status"], each["counted"], each["cost_usd"]) for each in attempts] == [("completed", True, 0.25)]
    assert await world.kinds(task_id) == [
        "task.created",
        "task.assigned",
        "task.started",
        "task.progress",
        "task.completed",
    ]


@pytest.mark.one_engine
async def test_an_attempt_token_carries_its_lease_and_dies_with_it(world: Any) -> None:
    task_id = await world.task()
    lease = await world.worker.claim()
    agent = Client(world.kit.application.app, lease.claim["agent_token"])
    assert (await agent.post(f"/tasks/{task_id}/start")).status == 200
    assert (await agent.get(f"/tasks/{task_id}")).status == 200
    other = await world.task("other")
    refused = await agent.post(f"/tasks/{other}/start")
    assert (refused.status, refused.code) == (409, "lease_lost")
    assert (await agent.patch(f"/tasks/{other}", {"title": "mine"})).status == 403
    child = await agent.post("/tasks", {"title": "child"})
    assert child.status == 201
    assert (child.json()["parent_task_id"], child.json()["depth"]) == (task_id, 1)
    assert child.json()["cause_chain"] == [task_id]
    assert (await agent.post(f"/tasks/{task_id}/complete", {"result": 1})).status == 200
    assert (await agent.get(f"/tasks/{task_id}")).status == 401


@pytest.mark.one_engine
async def test_a_ticket_of_an_attempt_dies_with_its_lease_too(world: Any) -> None:
    tickets, work = world.kit.kernel.container.get(Tickets), world.kit.kernel.database.work
    task_id = await world.task()
    agent = Client(world.kit.application.app, (await world.worker.run()).claim["agent_token"])
    opened, late = [(await agent.post("/auth/ws-ticket")).json()["ticket"] for _ in range(2)]
    caller = await work(lambda: tickets.redeem(opened))
    assert (caller.kind, caller.task_id) == ("agent", task_id)
    assert await work(lambda: tickets.reread(caller), read=True) == caller
    assert (await agent.post(f"/tasks/{task_id}/complete", {"result": 1})).status == 200
    for dead in (lambda: tickets.reread(caller), lambda: tickets.redeem(late)):
        with pytest.raises(Unauthorized):
            await work(dead)


@pytest.mark.one_engine
async def test_release_uses_no_attempt(world: Any) -> None:
    task_id = await world.task()
    lease = await world.worker.run()
    assert (await lease.ok("release", {"reason": "going down"}))["status"] == "pending"
    task = await world.read(task_id)
    assert (task["attempt"], task["fence"]) == (0, 1)
    second = await world.worker.run()
    assert second.claim["fence"] == 2
    assert (await world.read(task_id))["attempt"] == 1
    assert (await lease.call("progress", {"percent": 1})).code == "lease_lost"


@pytest.mark.one_engine
async def test_a_task_that_is_not_started_in_time_goes_back(world: Any) -> None:
    task_id = await world.task()
    lease = await world.worker.claim()
    await world.pass_time(31)
    assert (await world.read(task_id))["status"] == "pending"
    assert (await lease.call("start")).code == "lease_lost"
    told = (await world.heartbeat(lease))["leases"][0]
    assert (told["state"], told["reason"]) == ("lost", None)
    again = await world.worker.run()
    await again.ok("complete", {"result": None})
    told = (await world.heartbeat(again))["leases"][0]
    assert (told["state"], told["reason"]) == ("lost", "complete")


@pytest.mark.one_engine
async def test_retry_policy_and_backoff(world: Any) -> None:
    task_id = await world.task(retry_policy={"max_attempts": 2, "jitter": 0})
    lease = await world.worker.run()
    failed = await lease.ok("fail", {"error": {"type": "boom", "message": "it broke"}})
    assert (failed["status"], failed["error"]["kind"], failed["error"]["type"]) == ("pending", "error", "boom")
    assert await world.worker.claim_all() == []
    await world.pass_time(10.1)
    lease = await world.worker.run()
    assert (await lease.ok("fail", {"error": {"type": "boom", "message": "again"}}))["status"] == "failed"
    assert (await world.read(task_id))["attempt"] == 2
    final = await world.worker.claim_all()
    assert final == []


@pytest.mark.one_engine
async def test_a_failure_that_is_not_retryable_is_final(world: Any) -> None:
    await world.task()
    lease = await world.worker.run()
    failed = await lease.ok("fail", {"error": {"type": "max_steps", "message": ""}, "retryable": False})
    assert failed["status"] == "failed"


@pytest.mark.one_engine
async def test_timeout_runs_through_cancelling(world: Any) -> None:
    task_id = await world.task(timeout_seconds=100)
    lease = await world.worker.run()
    for _ in range(2):
        await world.pass_time(40)
        await world.heartbeat(lease)
    assert (await world.read(task_id))["status"] == "running"
    await world.pass_time(30)
    task = await world.read(task_id)
    assert (task["status"], task["cancel_kind"]) == ("cancelling", "timeout")
    assert (await world.heartbeat(lease))["leases"][0]["state"] == "cancel_requested"
    signals = (await world.worker.client.get(f"/workers/{world.worker.id}/signals")).json()["signals"]
    assert [(each["task_id"], each["state"]) for each in signals] == [(task_id, "cancel_requested")]
    acknowledged = await lease.ok("cancelled")
    assert (acknowledged["status"], acknowledged["error"]["kind"]) == ("pending", "timeout")


@pytest.mark.one_engine
async def test_deadline_fails_for_good(world: Any) -> None:
    from corral import clock

    task_id = await world.task(deadline=clock.now(100))
    running = await world.task("runs", deadline=clock.now(100), priority="critical")
    lease = await world.worker.run()
    assert lease.task_id == running
    await world.heartbeat(lease)
    await world.pass_time(50)
    await world.heartbeat(lease)
    await world.pass_time(51)
    assert (await world.read(task_id))["error"]["kind"] == "deadline"
    assert (await world.read(running))["status"] == "cancelling"
    await lease.ok("cancelled")
    assert (await world.read(running))["error"]["kind"] == "deadline"
    past = await world.member.post("/tasks", {"title": "late", "deadline": "2020-01-01T00:00:00Z"})
    assert past.json()["errors"][0]["code"] == "in_the_past"


async def test_queue_timeout(world: Any) -> None:
    task_id = await world.task(queue_timeout_seconds=60, agent_role="nobody")
    await world.pass_time(61)
    assert (await world.read(task_id))["error"]["kind"] == "queue_timeout"


@pytest.mark.one_engine
async def test_a_crash_loop_ends_the_task(world: Any) -> None:
    task_id = await world.task(retry_policy={"max_attempts": 50})
    for _ in range(3):
        await world.worker.run()
        await world.pass_time(61)
    task = await world.read(task_id)
    assert (task["status"], task["error"]["type"]) == ("failed", "crash_loop")


async def test_cancel_waits_for_the_worker_and_is_the_same_again(world: Any) -> None:
    task_id = await world.task()
    lease = await world.worker.run()
    first = await world.member.post(f"/tasks/{task_id}/cancel", {"reason": "enough"})
    assert (first.status, first.json()["status"]) == (202, "cancelling")
    assert (await world.member.post(f"/tasks/{task_id}/cancel")).status == 202
    assert (await lease.ok("progress", {"percent": 1}))["state"] == "cancel_requested"
    late = await lease.ok("complete", {"result": "too late"})
    assert (late["status"], late["result"]) == ("cancelled", None)
    assert (await world.member.post(f"/tasks/{task_id}/cancel")).status == 200


async def test_cancel_ends_after_the_grace(world: Any) -> None:
    task_id = await world.task()
    lease = await world.worker.run()
    await world.member.post(f"/tasks/{task_id}/cancel")
    await world.pass_time(30)
    await world.heartbeat(lease)
    await world.pass_time(31)
    assert (await world.read(task_id))["status"] == "cancelled"


async def test_waiting_for_input_stops_the_clock(world: Any) -> None:
    task_id = await world.task(timeout_seconds=100)
    lease = await world.worker.run()
    await world.heartbeat(lease)
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    waiting = await lease.ok(
        "wait", {"input": {"prompt": "How many?", "schema": schema}, "checkpoint": {"step": 4, "state": [1]}}
    )
    assert (waiting["status"], waiting["waiting_for"]["kind"]) == ("waiting", "input")
    assert (await lease.ok("wait", {"input": {"prompt": "How many?"}}))["status"] == "waiting"
    await world.pass_time(500)
    assert (await world.read(task_id))["status"] == "waiting"
    wrong = await world.member.post(f"/tasks/{task_id}/input", {"input": {"n": "x"}})
    assert (wrong.status, wrong.code) == (422, "schema_mismatch")
    assert (await world.member.post(f"/tasks/{task_id}/input", {"input": {"n": 3}})).json()["status"] == "pending"
    second = await world.worker.run()
    assert second.claim["resume"] == {"checkpoint": {"step": 4, "state": [1]}, "tool_results": [], "input": {"n": 3}}
    task = await world.read(task_id)
    assert (task["attempt"], task["status"]) == (1, "running")
    assert (await second.ok("complete", {"result": 3}))["attempt"] == 1


@pytest.mark.one_engine
async def test_waiting_for_an_approval_needs_the_plugin(world: Any) -> None:
    await world.task()
    lease = await world.worker.run()
    answer = await lease.call("wait", {"approval": {"title": "may I?"}})
    assert (answer.status, answer.code) == (503, "plugin_disabled")


@pytest.mark.one_engine
async def test_output_schema_is_checked(world: Any) -> None:
    await world.task(output_schema={"type": "object", "required": ["n"]})
    lease = await world.worker.run()
    answer = await lease.ok("complete", {"result": {"text": "no"}})
    assert (answer["status"], answer["error"]["type"]) == ("pending", "schema_mismatch")


async def test_dependencies_block_and_fail(world: Any) -> None:
    first = await world.task("first")
    second = await world.task("second", depends_on=[first])
    third = await world.task("third", depends_on=[second])
    assert (await world.read(second))["status"] == "blocked"
    lease = await world.worker.run()
    await lease.ok("complete", {"result": None})
    assert (await world.read(second))["status"] == "pending"
    cycle = await world.member.patch(f"/tasks/{second}", {"depends_on": [third]})
    assert (cycle.status, cycle.code) == (422, "cycle")
    assert (await world.member.post(f"/tasks/{second}/cancel")).json()["status"] == "cancelled"
    failed = await world.read(third)
    assert (failed["status"], failed["error"]["kind"]) == ("failed", "dependency_failed")
    dead = await world.member.post("/tasks", {"title": "x", "depends_on": [third]})
    assert dead.status == 422
    assert (await world.member.post(f"/tasks/{second}/retry")).json()["status"] == "pending"
    assert (await world.read(third))["status"] == "blocked"


@pytest.mark.one_engine
async def test_reopen_starts_the_count_again(world: Any) -> None:
    task_id = await world.task(retry_policy={"max_attempts": 1})
    lease = await world.worker.run()
    await lease.ok("checkpoint", {"step": 1, "state": "kept"})
    await lease.ok("fail", {"error": {"type": "x", "message": ""}})
    retried = (await world.member.post(f"/tasks/{task_id}/retry", {"from_checkpoint": False})).json()
    assert (retried["status"], retried["attempt"], retried["reopened_count"], retried["error"]) == (
        "pending",
        0,
        1,
        None,
    )
    assert (await world.worker.run()).claim["resume"] is None
    assert (await world.member.post(f"/tasks/{task_id}/retry")).code == "invalid_state"


@pytest.mark.one_engine
async def test_owner_ends_a_task_and_its_lease(world: Any) -> None:
    task_id = await world.task()
    lease = await world.worker.run()
    done = await world.member.post(f"/tasks/{task_id}/complete", {"result": "by hand"})
    assert (done.status, done.json()["result"]) == (200, "by hand")
    assert (await lease.call("complete", {"result": 1})).code == "lease_lost"
    assert (
        await world.member.post(f"/tasks/{task_id}/fail", {"error": {"type": "x", "message": ""}})
    ).code == "task_terminal"


@pytest.mark.one_engine
async def test_stale_calls_count_their_usage_only(world: Any) -> None:
    task_id = await world.task()
    lease = await world.worker.run()
    await world.pass_time(61)
    stale = await lease.call("complete", {"result": 1, "usage": {"input_tokens": 10, "cost_usd": 1.5}})
    assert (stale.status, stale.code) == (409, "lease_lost")
    task = await world.read(task_id)
    assert (task["status"], task["cost"]["cost_usd"]) == ("pending", 1.5)
    assert (await lease.call("logs", {"entries": []})).code == "lease_lost"
    metrics = world.kit.kernel.container.get(TaskMetrics).stale_calls()
    assert metrics == {("complete",): 1, ("logs",): 1}


async def test_stalls(world: Any) -> None:
    idle = await world.task("idle", stall_policy={"stall_seconds": 50, "action": "retry"})
    lease = await world.worker.run()
    await world.pass_time(30)
    await world.heartbeat(lease)
    await world.pass_time(30)
    assert (await world.read(idle))["cancel_kind"] == "stalled"
    assert "task.stalled" in await world.kinds(idle)
    await lease.ok("cancelled")
    assert (await world.read(idle))["status"] == "pending"
    await world.member.post(f"/tasks/{idle}/cancel")
    looping = await world.task("loop", stall_policy={"loop_repeats": 3, "action": "cancel"})
    lease = await world.worker.run()
    states = [(await lease.ok("progress", {"signature": "same"}))["state"] for _ in range(3)]
    assert states == ["ok", "ok", "cancel_requested"]
    await lease.ok("cancelled")
    assert (await world.read(looping))["error"]["kind"] == "stalled"


@pytest.mark.one_engine
async def test_tools_narrow_who_may_claim(world: Any) -> None:
    task_id = await world.task(required_tools=["web.fetch"])
    assert await world.worker.claim_all() == []
    able = await world.agent("able", enabled_tools=["web.*"])
    lease = await world.worker.claim()
    assert (lease.task_id, lease.claim["agent"]["id"]) == (task_id, able)


@pytest.mark.one_engine
async def test_deactivated_requesters_wait(world: Any) -> None:
    other = await world.kit.as_user("member")
    theirs = await world.task("theirs", by=other, priority="critical")
    mine = await world.task("mine")
    gone = await world.admin.patch(f"/admin/users/{other.user['id']}", {"is_active": False})
    assert gone.status == 200, gone
    lease = await world.worker.claim()
    assert lease.task_id == mine
    assert await world.worker.claim_all() == []
    assert (await world.read(theirs))["status"] == "pending"


async def test_comments_reach_the_next_claim(world: Any) -> None:
    task_id = await world.task()
    assert (await world.member.post(f"/tasks/{task_id}/comments", {"body": "mind the gap"})).status == 201
    lease = await world.worker.claim()
    assert [each["body"] for each in lease.claim["context"]["comments"]] == ["mind the gap"]
    assert (await lease.call("comments", {"body": "on it"})).status == 201
    listed = (await world.member.get(f"/tasks/{task_id}/comments")).json()
    assert [each["body"] for each in listed["items"]] == ["mind the gap", "on it"]


async def test_delete(world: Any) -> None:
    task_id = await world.task()
    assert (await world.member.delete(f"/tasks/{task_id}")).code == "invalid_state"
    await world.member.post(f"/tasks/{task_id}/cancel")
    assert (await world.member.delete(f"/tasks/{task_id}")).status == 204
    assert (await world.member.get(f"/tasks/{task_id}")).status == 404
    await world.kit.run_jobs()
    assert (await world.member.get("/tasks/stats")).json()["total"] == 0


@pytest.mark.one_engine
async def test_agent_stop_takes_the_work_back(world: Any) -> None:
    task_id = await world.task()
    lease = await world.worker.run()
    await world.member.post(f"/agents/{world.agent_id}/stop")
    task = await world.read(task_id)
    assert (task["status"], task["attempt"]) == ("pending", 0)
    assert (await lease.call("complete", {"result": 1})).code == "lease_lost"


@pytest.mark.one_engine
async def test_a_worker_reads_the_tasks_that_it_holds_and_no_others(world: Any) -> None:
    task_id = await world.task()
    other = await world.machine("other")
    for path in (f"/tasks/{task_id}", f"/tasks/{task_id}?wait=1"):
        assert (await world.worker.client.get(path)).status == 404
    lease = await world.worker.run()
    assert (await world.worker.client.get(f"/tasks/{task_id}")).json()["status"] == "running"
    assert (await other.client.get(f"/tasks/{task_id}")).status == 404
    await lease.ok("complete", {"result": None})
    assert (await world.worker.client.get(f"/tasks/{task_id}")).status == 404


async def test_the_highest_number_of_a_line(world: Any) -> None:
    await world.task()
    lease = await world.worker.run()
    line = {"ts": "2026-01-01T00:00:00Z", "message": "hello"}
    beyond = await lease.call("logs", {"entries": [{"seq": 2**63 - 1, **line}]})
    assert (beyond.status, beyond.code) == (422, "validation_error"), beyond
    assert await lease.ok("logs", {"entries": [{"seq": 2**63 - 2, **line}]}) == {"accepted": 1, "next_seq": 2**63 - 1}


async def test_the_tasks_of_a_deleted_agent_reach_a_claim_that_waits(world: Any) -> None:
    gone = await world.agent("gone", start=False)
    task_id = await world.task(agent_id=gone)
    waiting = asyncio.create_task(world.worker.claim_all(wait_seconds=20))
    await asyncio.sleep(0.3)
    assert (await world.member.delete(f"/agents/{gone}")).status == 204
    assert [lease.task_id for lease in await asyncio.wait_for(waiting, 60)] == [task_id]
    assert "task.updated" in await world.kinds(task_id)
