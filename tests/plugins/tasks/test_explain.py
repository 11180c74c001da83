"""Why a task does not run: the condition that is false, and no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.tasks.conftest import World

from corral import clock
from corral_plugins.workers.service.liveness import WorkerSweeps


async def false(world: Any, task_id: str) -> list[str]:
    told = (await world.member.get(f"/tasks/{task_id}/explain")).json()
    codes = [each["code"] for each in told["conditions"] if not each["ok"]]
    assert told["claimable"] == (not codes)
    return codes


async def test_an_agent_without_a_free_slot_is_started(world: Any) -> None:
    await world.member.patch(f"/agents/{world.agent_id}", {"max_concurrent_tasks": 1})
    await world.task()
    await world.worker.run()
    anybody, of_role = await world.task(), await world.task(agent_role="general")
    for task_id in (anybody, of_role):
        assert await false(world, task_id) == ["agent_capacity"]
    idle = await world.agent("idle")
    for task_id in (anybody, of_role):
        assert await false(world, task_id) == []
    await world.member.patch(f"/agents/{idle}", {"worker_selector": {"group": "nowhere"}})
    assert await false(world, anybody) == ["agent_capacity"]
    for agent_id in (world.agent_id, idle):
        await world.member.post(f"/agents/{agent_id}/stop", {})
    assert await false(world, anybody) == ["agent_started"]


@pytest.mark.one_engine
async def test_an_agent_whose_selector_matches_no_worker_is_started(world: Any) -> None:
    await world.member.patch(f"/agents/{world.agent_id}", {"worker_selector": {"group": "nowhere"}})
    task_id = await world.task()
    assert await false(world, task_id) == ["worker_selector"]
    told = (await world.member.get(f"/tasks/{task_id}/explain")).json()
    (wrong,) = [each for each in told["conditions"] if not each["ok"]]
    name = (await world.member.get(f"/agents/{world.agent_id}")).json()["name"]
    assert wrong["detail"] == f"No online worker matches the selector of the agent {name}."
    assert wrong["unblock"] == f"Change it: corral agents edit {name} -f worker_selector:=JSON"


@pytest.mark.one_engine
@pytest.mark.parametrize("selector", [{"labels": {"site": "lab"}}, {}])
async def test_a_draining_worker_that_the_agent_needs_is_named(
    make_kit: Callable[..., Any], selector: dict[str, Any]
) -> None:
    """With a selector, another worker is online that it does not match. Without, no other worker is online."""
    world = await World().build(await make_kit(plugins=("agents", "workers", "tasks")))
    lab = await world.machine("lab-1", labels={"site": "lab"})
    if not selector:
        await world.admin.delete(f"/admin/workers/{world.worker.id}")
    await world.member.patch(f"/agents/{world.agent_id}", {"worker_selector": selector})
    answer = await world.admin.post(f"/admin/workers/{lab.id}/drain")
    assert answer.status == 200, answer
    task_id = await world.task(agent_id=world.agent_id)
    told = (await world.member.get(f"/tasks/{task_id}/explain")).json()
    (wrong,) = [each for each in told["conditions"] if not each["ok"]]
    others = "no online worker matches the agent's selector" if selector else "no other worker is online"
    assert wrong["code"] == ("worker_selector" if selector else "worker_online")
    assert wrong["detail"] == f"The worker lab-1 is draining, and {others}."
    assert wrong["unblock"] == "Resume it: corral workers drain --resume lab-1"
    assert (await world.admin.post(f"/admin/workers/{lab.id}/resume")).status == 200
    assert await false(world, task_id) == []


@pytest.mark.one_engine
async def test_a_stranger_does_not_hide_that_the_approved_worker_is_offline(make_kit: Callable[..., Any]) -> None:
    world = await World().build(await make_kit(plugins=("agents", "workers", "tasks")))
    await world.machine("stranger", approve=False)
    clock.travel(100)
    await world.kit.kernel.container.get(WorkerSweeps).sweep_silent_workers()
    assert await false(world, await world.task(agent_id=world.agent_id)) == ["worker_online"]


@pytest.mark.one_engine
async def test_a_role_that_no_agent_has(world: Any) -> None:
    assert await false(world, await world.task(agent_role="nobody")) == ["agent_exists"]


@pytest.mark.one_engine
async def test_the_end_counts_the_claims_that_are_listed(world: Any) -> None:
    """A retry by hand begins the attempts anew, but not the claims, whose numbers the logs have."""
    task_id = await world.task()
    lease = await world.worker.run()
    await world.member.post(f"/tasks/{task_id}/cancel", {})
    await lease.ok("cancelled")
    await world.member.post(f"/tasks/{task_id}/retry", {})
    await (await world.worker.run()).ok("complete", {"result": None})
    told = (await world.member.get(f"/tasks/{task_id}/explain")).json()
    assert told["summary"] == "Completed after 2 claims by workers."
    found = [(each["fence"], each["n"], each["status"]) for each in told["attempts"]]
    assert found == [(1, 1, "cancelled"), (2, 1, "completed")]


@pytest.mark.one_engine
async def test_the_command_that_enables_a_tool_quotes_patterns(world: Any) -> None:
    agent_id = await world.agent("bare", enabled_tools=["mcp.*"])
    task_id = await world.task(agent_id=agent_id, required_tools=["http.fetch"])
    told = (await world.member.get(f"/tasks/{task_id}/explain")).json()
    (wrong,) = [each for each in told["conditions"] if each["code"] == "tools_enabled"]
    assert wrong["unblock"].endswith("corral agents edit bare --tool 'mcp.*' --tool http.fetch")
