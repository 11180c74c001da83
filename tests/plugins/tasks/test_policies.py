"""What a task, its agent and the settings say together: retries, stalls, the schema of the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.tasks.conftest import World

from corral import clock
from corral_plugins.tasks.models import Attempt

pytestmark = pytest.mark.one_engine

SETTINGS = {
    "settings.tasks.max_attempts": 5,
    "settings.tasks.backoff_initial_seconds": 40,
    "settings.tasks.backoff_jitter": 0,
    "settings.tasks.stall_seconds": 100,
    "settings.tasks.loop_repeats": 4,
}
BOOM = {"error": {"type": "boom", "message": ""}}


@pytest.fixture
async def world(make_kit: Callable[..., Any]) -> World:
    return await World().build(await make_kit(plugins=("agents", "workers", "tasks"), config=SETTINGS))


async def test_each_member_of_a_retry_policy_comes_from_the_nearest_that_sets_it(world: World) -> None:
    agent_id = await world.agent("patient", retry_policy={"initial_seconds": 20, "backoff": "fixed"})
    plain = await world.task(agent_id=agent_id)
    assert (await world.read(plain))["max_attempts"] == 5
    own = await world.task(agent_id=agent_id, retry_policy={"max_attempts": 2})
    shown = await world.read(own)
    assert (shown["max_attempts"], shown["retry_policy"]) == (2, {"max_attempts": 2})
    for task_id, left in ((plain, True), (own, True), (own, False)):
        lease = await world.worker.run(agent_ids=[agent_id])
        assert lease.task_id == task_id
        failed = await lease.ok("fail", BOOM)
        assert failed["status"] == ("pending" if left else "failed")
        if left:  # the delay is the agent's, without the jitter that the settings switch off
            assert clock.elapsed_ms(failed["updated_at"], failed["available_at"]) == pytest.approx(20_000, abs=5)
            await world.pass_time(20.1 if task_id == own else 0)
        if task_id == plain:
            await world.member.post(f"/tasks/{plain}/cancel")


async def test_a_change_of_agent_or_policy_changes_the_number_of_attempts(world: World) -> None:
    agent = await world.agent("once", retry_policy={"max_attempts": 1})
    task_id = await world.task(retry_policy={"max_attempts": 7})
    for change, attempts in (({"retry_policy": {"jitter": 1}}, 5), ({"agent_id": agent}, 1), ({"agent_id": None}, 5)):
        changed = await world.member.patch(f"/tasks/{task_id}", change)
        assert (changed.status, changed.json()["max_attempts"]) == (200, attempts)


async def test_each_member_of_a_stall_policy_comes_from_the_nearest_that_sets_it(world: World) -> None:
    agent = await world.agent("quiet", stall_policy={"action": "cancel"}, max_concurrent_tasks=5)
    cases: list[tuple[dict[str, Any], tuple[Any, ...]]] = [
        ({"agent_id": world.agent_id}, (100, 4, "notify")),
        ({"agent_id": agent}, (100, 4, "cancel")),
        ({"agent_id": agent, "stall_policy": {"loop_repeats": 3}}, (100, 3, "cancel")),
        ({"agent_id": agent, "stall_policy": {"stall_seconds": 0, "action": "retry"}}, (0, 4, "retry")),
    ]
    for fields, applied in cases:
        task_id = await world.task(**fields)
        await world.worker.run()
        columns = (Attempt.stall_seconds, Attempt.loop_repeats, Attempt.stall_action)
        query = Attempt.select(*columns).where(Attempt.task_id == task_id).tuples()
        assert await world.kit.kernel.database.work(query.first, read=True) == applied


async def test_the_schema_of_the_agent_holds_unless_the_task_has_its_own(world: World) -> None:
    schema = {"type": "object", "required": ["n"]}
    agent = await world.agent("strict", config={"output_schema": schema}, max_concurrent_tasks=5)
    task_id = await world.task(agent_id=agent)
    lease = await world.worker.run()
    assert lease.claim["agent"]["config"]["output_schema"] == schema
    # A running attempt keeps the version that it was claimed with.
    assert (await world.member.patch(f"/agents/{agent}", {"config": {"output_schema": None}})).status == 200
    by_hand = await world.member.post(f"/tasks/{task_id}/complete", {"result": {"m": 1}})
    assert (by_hand.status, by_hand.code) == (422, "schema_mismatch")
    refused = await lease.ok("complete", {"result": {"m": 1}})
    assert (refused["status"], refused["error"]["type"]) == ("pending", "schema_mismatch")
    await world.pass_time(41)
    assert (await (await world.worker.run()).ok("complete", {"result": {"m": 1}}))["status"] == "completed"
    await world.member.patch(f"/agents/{agent}", {"config": {"output_schema": schema}})
    for fields, result in (({}, {"n": 1}), ({"output_schema": {}}, "any"), ({"output_schema": {"type": "array"}}, [])):
        await world.task(agent_id=agent, **fields)
        lease = await world.worker.run()
        assert (await lease.ok("complete", {"result": result}))["status"] == "completed"


async def test_a_result_that_comes_too_late_is_kept_with_its_attempt(world: World) -> None:
    task_id = await world.task(output_schema={"type": "object"})
    lease = await world.worker.run()
    assert (await world.member.post(f"/tasks/{task_id}/cancel")).status == 202
    assert (await lease.ok("complete", {"result": "too late"}))["status"] == "cancelled"
    assert (await world.read(task_id))["result"] is None
    (listed,) = (await world.member.get(f"/tasks/{task_id}/attempts")).json()["items"]
    assert (listed["status"], listed["result"]) == ("cancelled", "too late")
    assert (await world.member.get(f"/tasks/{task_id}/attempts/1")).json() == listed
    await world.task()
    await (await world.worker.run()).ok("complete", {"result": "in time"})
    last = (await world.member.get("/tasks")).json()["items"][0]["id"]
    assert (await world.member.get(f"/tasks/{last}/attempts/1")).json()["result"] is None


async def test_an_agent_whose_tasks_stall_in_a_row_is_paused(world: World) -> None:
    agent = await world.agent("stuck", max_concurrent_tasks=2)

    async def run(*, stalls: bool) -> None:
        await world.task(agent_id=agent, stall_policy={"loop_repeats": 2})
        lease = await world.worker.run()
        for _ in range(4 if stalls else 1):  # it stalls once, however often it repeats itself
            await lease.ok("progress", {"signature": "same"})
        await lease.ok("complete", {"result": None})

    for stalls in (True, True, False, True, True):
        await run(stalls=stalls)
    assert (await world.member.get(f"/agents/{agent}")).json()["status"] == "idle"
    await run(stalls=True)
    view = (await world.member.get(f"/agents/{agent}")).json()
    assert (view["status"], view["status_reason"]) == ("paused", "stalled")
    changes = [event.payload() for event in await world.kit.events() if event.type == "agent.status"]
    assert {"to": "paused", "reason": "stalled"}.items() <= changes[-1].items()
    waiting = await world.task(agent_id=agent)
    assert await world.worker.claim_all() == []
    explained = (await world.member.get(f"/tasks/{waiting}/explain")).json()["conditions"]
    assert [each["code"] for each in explained if not each["ok"]] == ["agent_paused"]
    for action in ("start", "resume"):
        assert (await world.member.post(f"/agents/{agent}/{action}")).json()["status"] == "idle"
        assert [lease.task_id for lease in await world.worker.claim_all()] == ([waiting] if action == "start" else [])
        if action == "start":
            await world.member.post(f"/tasks/{waiting}/complete", {"result": None})
            for _ in range(3):
                assert (await world.member.get(f"/agents/{agent}")).json()["status"] == "idle"
                await run(stalls=True)
            assert (await world.member.get(f"/agents/{agent}")).json()["status_reason"] == "stalled"


async def test_budgets_and_reviews_that_nobody_enforces_are_refused(world: World) -> None:
    reviewer = {"mode": "none", "reviewer_agent_id": world.agent_id}
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("/tasks", {"max_cost_usd": 0}, "/max_cost_usd"),
        ("/tasks", {"max_cost_usd": 1.5}, "/max_cost_usd"),
        ("/tasks", {"review_policy": {"mode": "human"}}, "/review_policy/mode"),
        ("/tasks", {"review_policy": reviewer}, "/review_policy/reviewer_agent_id"),
        ("/agents", {"monthly_budget_usd": 0}, "/monthly_budget_usd"),
        ("/agents", {"max_cost_per_task_usd": 3}, "/max_cost_per_task_usd"),
        ("/agents", {"review_policy": {"mode": "agent", "reviewer_agent_id": world.agent_id}}, "/review_policy/mode"),
    ]
    existing = {"/tasks": await world.task(), "/agents": world.agent_id}
    for path, fields, pointer in cases:
        named = {"title": "x"} if path == "/tasks" else {"name": "x"}
        for answer in (
            await world.member.post(path, {**named, **fields}),
            await world.member.patch(f"{path}/{existing[path]}", fields),
        ):
            assert (answer.status, answer.code) == (422, "validation_error"), (path, fields, answer)
            assert [(each["pointer"], each["code"]) for each in answer.json()["errors"]] == [(pointer, "not_allowed")]
        nothing = {name: {"mode": "none"} if name == "review_policy" else None for name in fields}
        assert (await world.member.patch(f"{path}/{existing[path]}", nothing)).status == 200
    many = await world.member.post("/agents", {"name": "x", "monthly_budget_usd": 1, "max_cost_per_task_usd": 1})
    assert len(many.json()["errors"]) == 2
