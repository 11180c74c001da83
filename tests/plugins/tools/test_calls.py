"""Calls of server tools: results, failures, repeats, limits, and interrupted calls."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.plugins.tools.conftest import Run, World

from corral import clock
from corral_plugins.tools import jobs
from corral_plugins.tools.models import ToolCallRow
from corral_plugins.tools.service.calls import CallHistory
from corral_plugins.tools.service.executions import ToolExecutions


async def reap(world: World) -> None:
    """Run the schedule."""
    container = world.kit.kernel.container
    await jobs.end_abandoned_calls(world.kit.kernel.database, container.get(CallHistory))


async def as_if_its_process_had_died(world: World, run: Run, **values: Any) -> None:
    """Make the row of the only call say that it runs in a process without recent contact."""

    def change() -> None:
        dead = {"status": "running", "result": None, "finished_at": None, "alive_until": clock.now(-60), **values}
        ToolCallRow.update(**dead).where(ToolCallRow.task_id == run.task_id).execute()

    await world.kit.kernel.database.work(change)


@pytest.mark.one_engine
async def test_a_server_tool_answers_with_its_result(world: World) -> None:
    run = await world.run("test.*")
    answer = await run.say("test.write")
    assert answer.status == 200, answer
    call = answer.json()
    assert (call["status"], call["decision"], call["result"]) == ("succeeded", "allowed", {"said": "hello"})
    assert (await run.calls()) == [call]
    context = world.bench.contexts[0]
    assert (context.caller.kind, context.caller.user_id) == ("agent", world.member.user["id"])
    (event,) = [each for each in await world.kit.events() if each.type == "tool.called"]
    assert event.object_id == run.task_id


@pytest.mark.one_engine
async def test_a_worker_calls_with_its_own_token_and_names_the_lease(world: World) -> None:
    run = await world.run("test.*")
    path = f"/tasks/{run.task_id}/tools/test.write"
    body = {"call_id": "w1", "arguments": {"text": "x"}}
    assert (await world.worker.post(path, body)).code == "lease_lost"
    assert (await world.worker.post(path, {**body, "lease_id": run.lease_id})).status == 200
    other, _ = await world.machine("other")
    assert (await other.post(path, {**body, "lease_id": run.lease_id})).status == 403
    assert (await world.member.post(path, body)).status == 403
    assert len(world.bench.runs) == 1


@pytest.mark.one_engine
async def test_a_task_must_be_started(world: World) -> None:
    agent_id = await world.agent("test.*")
    await world.member.post("/tasks", {"title": "t", "agent_id": agent_id})
    answer = await world.worker.post(f"/workers/{world.worker_id}/claim", {"agent_ids": [agent_id]})
    run = Run(world, answer.json()["tasks"][0])
    assert (await run.say("test.write")).code == "invalid_state"


@pytest.mark.one_engine
@pytest.mark.parametrize(
    ("tool", "error"),
    [
        ("test.fail", {"type": "no_luck", "message": "not hello"}),
        (
            "test.broken",
            {"type": "internal", "message": "test.broken failed with an internal error; see the server's log."},
        ),
    ],
)
async def test_what_fails_is_told_once(world: World, tool: str, error: dict[str, str]) -> None:
    run = await world.run("test.*")
    answer = await run.say(tool, call_id="one")
    assert (answer.status, answer.json()["status"], answer.json()["error"]) == (200, "failed", error)
    assert (await run.say(tool, call_id="one")).json() == answer.json()
    assert len(world.bench.runs) == 1


@pytest.mark.one_engine
async def test_a_repeat_with_other_arguments_is_refused(world: World) -> None:
    run = await world.run("test.*")
    await run.say("test.write", "one", call_id="c")
    for repeat in (run.say("test.write", "two", call_id="c"), run.say("test.read", "one", call_id="c")):
        answer = await repeat
        assert (answer.status, answer.json()["errors"][0]["pointer"]) == (422, "/call_id")
    assert len(world.bench.runs) == 1


@pytest.mark.one_engine
async def test_a_denied_call_stays_denied(world: World) -> None:
    run = await world.run("test.read")
    first = await run.say("test.write", call_id="c")
    assert (first.status, first.code, first.json()["reason"]) == (403, "tools.denied", "not_enabled")
    again = await run.say("test.write", call_id="c")
    assert (again.status, again.json()["reason"]) == (403, "not_enabled")
    assert [call["status"] for call in await run.calls()] == ["denied"]


@pytest.mark.one_engine
async def test_a_tool_that_takes_too_long_fails(world: World) -> None:
    await world.admin.patch("/tools/test.slow", {"timeout_seconds": 1})
    run = await world.run("test.*")
    answer = await run.say("test.slow")
    assert (answer.json()["status"], answer.json()["error"]["type"]) == ("failed", "timeout")


@pytest.mark.one_engine
async def test_five_run_at_a_time(world: World) -> None:
    run = await world.run("test.*")
    slow = [asyncio.ensure_future(run.say("test.slow", f"{n}")) for n in range(5)]
    await world.until_running(5)
    sixth = asyncio.ensure_future(run.say("test.write"))
    await asyncio.sleep(0.3)
    assert (len(world.bench.runs), sixth.done()) == (5, False)
    world.bench.gate.set()
    assert {answer.json()["status"] for answer in await asyncio.gather(*slow, sixth)} == {"succeeded"}


@pytest.mark.one_engine
async def test_who_waits_in_vain_is_denied(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corral_plugins.tools.service.calls.WAIT_SECONDS", 0.2)
    monkeypatch.setattr("corral_plugins.tools.service.calls.POLL_SECONDS", 0.05)
    run = await world.run("test.*")
    slow = [asyncio.ensure_future(run.say("test.slow", f"{n}")) for n in range(5)]
    await world.until_running(5)
    sixth = await run.say("test.write")
    assert sixth.code == "tools.denied", sixth
    assert sixth.json()["reason"] == "caps"
    world.bench.gate.set()
    await asyncio.gather(*slow)


@pytest.mark.one_engine
async def test_an_attempt_has_so_many_calls(make_kit: Any) -> None:
    world = await World().build(make_kit, config={"settings.tools.max_calls": 2})
    run = await world.run("test.*")
    assert [(await run.say("test.write")).status for _ in range(3)] == [200, 200, 403]


@pytest.mark.one_engine
async def test_twenty_denials_fail_the_attempt(world: World) -> None:
    run = await world.run("test.read", task={"retry_policy": {"max_attempts": 1}})
    for n in range(19):
        assert (await run.say("test.write", f"{n}")).status == 403
    assert (await run.tool("test.write", {})).status == 403
    task = (await world.member.get(f"/tasks/{run.task_id}")).json()
    assert (task["status"], task["error"]["type"]) == ("failed", "too_many_denials")
    assert (await run.say("test.read")).status in (401, 409)


@pytest.mark.one_engine
async def test_arguments_to_mend_do_not_fail_the_attempt(world: World) -> None:
    run = await world.run("test.*")
    for n in range(25):
        assert (await run.tool("test.write", {"n": n})).status == 422
    assert (await run.say("test.write")).status == 200


async def test_a_call_ends_with_the_lease(world: World) -> None:
    run = await world.run("test.*")
    slow = asyncio.ensure_future(run.say("test.slow"))
    await world.until_running()
    assert (await world.member.post(f"/tasks/{run.task_id}/fail", {"error": {"type": "x"}})).status == 200
    answer = await asyncio.wait_for(slow, 60)
    assert (answer.status, answer.code) == (409, "lease_lost")
    (call,) = await run.calls()
    assert (call["status"], call["error"]["type"], call["result"]) == ("failed", "outcome_unknown", None)


@pytest.mark.one_engine
async def test_the_next_attempt_repeats_only_what_does_no_harm(world: World) -> None:
    run = await world.run("test.*")
    cut = [asyncio.ensure_future(run.say(tool, call_id=tool)) for tool in ("test.slow", "test.again")]
    await world.until_running(2)
    released = await world.worker.post(f"/tasks/{run.task_id}/release", {"lease_id": run.lease_id})
    assert released.status == 200, released
    assert {answer.code for answer in await asyncio.gather(*cut)} == {"lease_lost"}
    world.bench.gate.set()
    again = await world.claim(run.claim["agent"]["id"])
    unknown = (await again.say("test.slow", call_id="test.slow")).json()
    assert (unknown["status"], unknown["error"]["type"]) == ("failed", "outcome_unknown")
    assert (await again.say("test.again", call_id="test.again")).json()["status"] == "succeeded"
    assert len(world.bench.runs) == 3


@pytest.mark.one_engine
async def test_the_result_of_an_earlier_attempt_is_kept(world: World) -> None:
    run = await world.run("test.*")
    first = (await run.say("test.write", call_id="c")).json()
    await world.worker.post(f"/tasks/{run.task_id}/release", {"lease_id": run.lease_id})
    again = await world.claim(run.claim["agent"]["id"])
    assert (await again.say("test.write", call_id="c")).json() == first
    assert len(world.bench.runs) == 1


@pytest.mark.parametrize(
    ("tool", "reaped", "repeated"),
    [
        ("test.again", "interrupted", "succeeded"),
        ("test.write", "interrupted", "succeeded"),
        ("test.slow", "outcome_unknown", "failed"),
    ],
)
async def test_a_dead_process_leaves_no_call_running(world: World, tool: str, reaped: str, repeated: str) -> None:
    world.bench.gate.set()
    run = await world.run("test.*")
    await run.say(tool, call_id="c")
    await as_if_its_process_had_died(world, run)
    await reap(world)
    (call,) = await run.calls()
    assert (call["status"], call["error"]["type"]) == ("failed", reaped)
    assert (await run.say(tool, call_id="c")).json()["status"] == repeated
    assert len(world.bench.runs) == (2 if repeated == "succeeded" else 1)


@pytest.mark.one_engine
async def test_a_repeat_need_not_wait_for_the_reaper(world: World) -> None:
    world.bench.gate.set()
    run = await world.run("test.*")
    for tool, status in (("test.again", "succeeded"), ("test.slow", "failed")):
        await run.say(tool, call_id=tool)
        await as_if_its_process_had_died(world, run)
        assert (await run.say(tool, call_id=tool)).json()["status"] == status
    assert len(world.bench.runs) == 3


async def test_a_process_that_lost_its_call_writes_nothing(world: World) -> None:
    run = await world.run("test.*")
    slow = asyncio.ensure_future(run.say("test.slow", call_id="c"))
    await world.until_running()
    await as_if_its_process_had_died(world, run, executions=7, result={"by": "another process"}, status="succeeded")
    world.bench.gate.set()
    assert (await slow).json()["result"] == {"by": "another process"}


@pytest.mark.one_engine
async def test_stopping_gives_calls_a_moment(world: World) -> None:
    run = await world.run("test.*")
    slow = asyncio.ensure_future(run.say("test.slow"))
    await world.until_running()
    stopping = asyncio.ensure_future(world.kit.kernel.container.get(ToolExecutions).stop_running())
    await asyncio.sleep(0.05)
    world.bench.gate.set()
    await stopping
    assert (await slow).json()["status"] == "succeeded"


@pytest.mark.one_engine
async def test_a_call_can_be_waited_for(world: World) -> None:
    run = await world.run("test.*")
    slow = asyncio.ensure_future(run.say("test.slow", call_id="c"))
    await world.until_running()
    path = f"/tasks/{run.task_id}/tools/calls/c"
    assert (await world.member.get(path)).json()["status"] == "running"
    waiting = [asyncio.ensure_future(who.get(f"{path}?wait=20")) for who in (world.member, world.worker, run.agent)]
    await asyncio.sleep(0.05)
    world.bench.gate.set()
    assert {answer.json()["status"] for answer in await asyncio.gather(*waiting)} == {"succeeded"}
    assert (await slow).status == 200
    assert (await world.member.get(f"/tasks/{run.task_id}/tools/calls/other")).status == 404


@pytest.mark.one_engine
async def test_secrets_are_kept_out_of_the_record(world: World) -> None:
    run = await world.run("test.*")
    key = "crl_" + "aB3" * 14 + "x"
    call = (await run.say("test.write", f"key {key}")).json()
    assert key not in str(call)
    assert call["result"] == {"said": "key [redacted]"}
    assert world.bench.runs == [{"text": f"key {key}"}]


@pytest.mark.one_engine
async def test_long_results_are_cut_with_a_note(world: World) -> None:
    run = await world.run("test.*")
    said = (await run.say("test.write", "word " * 30_000)).json()["result"]["said"]
    assert len(said) < 64 * 1024
    assert said.endswith("are omitted]")


async def test_the_record_is_listed_and_filtered(world: World) -> None:
    run, other = await world.run("test.*"), await world.run("test.read")
    await run.say("test.write")
    await run.say("test.fail")
    await other.say("test.write")
    reader = await world.kit.as_user("viewer")

    async def tools(query: str) -> list[str]:
        answer = await reader.get(f"/tool-calls{query}")
        assert answer.status == 200, answer
        return [call["tool"] for call in answer.json()["items"]]

    assert await tools("") == ["test.write", "test.fail", "test.write"]
    assert await tools("?decision=denied") == ["test.write"]
    assert await tools("?status=failed") == ["test.fail"]
    assert await tools("?tool=test.fail") == ["test.fail"]
    assert await tools(f"?agent_id={other.claim['agent']['id']}") == ["test.write"]
    assert await tools("?since=2100-01-01T00:00:00Z") == []
    auditor = await world.kit.as_user("auditor")
    assert (await auditor.get("/tool-calls")).status == 403
    assert (await reader.get(f"/tasks/{world.worker_id}/tool-calls")).status == 404


async def test_old_calls_are_pruned_and_those_of_deleted_tasks_too(world: World) -> None:
    run, other = await world.run("test.*"), await world.run("test.*")
    for each in (run, other):
        await each.say("test.write")
    work, kernel = world.kit.kernel.database.work, world.kit.kernel
    await world.worker.post(f"/tasks/{run.task_id}/complete", {"lease_id": run.lease_id})
    assert (await world.member.delete(f"/tasks/{run.task_id}")).status == 204
    (event,) = [each for each in await world.kit.events() if each.type == "task.deleted"]
    await work(lambda: jobs.on_task_deleted(event))
    assert [call["task_id"] for call in (await world.member.get("/tool-calls")).json()["items"]] == [other.task_id]
    clock.travel(91 * 86_400)
    await jobs.delete_old_calls(work, kernel.settings)
    assert await work(lambda: ToolCallRow.select().count(), read=True) == 0
