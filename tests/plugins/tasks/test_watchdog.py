"""The watchdog: runs that are idle or in a loop, and the three actions of a stall policy."""

from __future__ import annotations

from typing import Any

import pytest
from tests.plugins.tasks.conftest import Lease, World

from corral import clock

pytestmark = pytest.mark.one_engine


async def stalls(world: World, task_id: str) -> list[str]:
    """The kinds of the stalls that were reported about a task."""
    events = [event for event in await world.kit.events() if event.object_id == task_id]
    return [event.payload()["kind"] for event in events if event.type == "task.stalled"]


async def run_until_it_stalls(world: World, kind: str, action: str) -> tuple[str, Lease, str]:
    """Run a task until the watchdog reports it. Return its id, its lease, and the state of the lease."""
    policy = {"stall_seconds": 50, "loop_repeats": 3, "action": action}
    agent_id = await world.agent(f"{kind}-{action}")  # an agent whose tasks stall in a row is paused
    retry = {"max_attempts": 2, "initial_seconds": 0}
    task_id = await world.task(agent_id=agent_id, stall_policy=policy, retry_policy=retry)
    lease = await world.worker.run()
    if kind == "idle":
        await world.pass_time(40)
        await world.heartbeat(lease)  # a live lease is no progress
        await world.pass_time(11)
        state = (await world.heartbeat(lease))["leases"][0]["state"]
    else:
        for _ in range(3):
            state = (await lease.ok("progress", {"signature": "the same step"}))["state"]
    assert await stalls(world, task_id) == [kind]
    return task_id, lease, str(state)


@pytest.mark.parametrize("kind", ["idle", "loop"])
async def test_each_action_of_a_stall_policy(world: World, kind: str) -> None:
    task_id, lease, state = await run_until_it_stalls(world, kind, "notify")
    assert (state, (await world.read(task_id))["status"]) == ("ok", "running")
    await lease.ok("complete", {"result": {}})

    task_id, lease, state = await run_until_it_stalls(world, kind, "cancel")
    assert (state, (await world.read(task_id))["cancel_kind"]) == ("cancel_requested", "stalled")
    await lease.ok("cancelled")
    ended = await world.read(task_id)
    assert (ended["status"], ended["error"]["kind"], ended["attempt"]) == ("failed", "stalled", 1)

    task_id, lease, state = await run_until_it_stalls(world, kind, "retry")
    assert state == "cancel_requested"
    await lease.ok("cancelled")
    assert (await world.read(task_id))["status"] == "pending"
    again = await world.worker.run()
    assert (again.task_id, (await world.read(task_id))["attempt"]) == (task_id, 2)


async def test_a_worker_that_does_not_stop_is_left_after_the_grace_period(world: World) -> None:
    task_id, _, _ = await run_until_it_stalls(world, "loop", "retry")
    await world.pass_time(61)
    assert (await world.read(task_id))["status"] == "pending"


async def test_every_sign_of_progress_keeps_a_run_from_stalling(world: World) -> None:
    task_id = await world.task(stall_policy={"stall_seconds": 50, "action": "cancel"})
    lease = await world.worker.run()
    signs: list[tuple[str, dict[str, Any]]] = [
        ("progress", {"message": "on it"}),
        ("logs", {"entries": [{"seq": 1, "ts": "2030-01-01T00:00:00Z", "message": "on it"}]}),
        ("checkpoint", {"step": 1, "state": {}}),
    ]
    for name, body in signs:
        await world.pass_time(40)
        await lease.ok(name, body)
    await world.pass_time(40)
    assert await stalls(world, task_id) == []
    await world.pass_time(11)
    assert await stalls(world, task_id) == ["idle"]


async def test_an_idle_run_is_reported_once_until_it_moves_again(world: World) -> None:
    task_id = await world.task(stall_policy={"stall_seconds": 50})
    lease = await world.worker.run()
    for _ in range(3):
        await world.pass_time(51)
        await world.heartbeat(lease)
    assert await stalls(world, task_id) == ["idle"]
    await lease.ok("progress", {})
    await world.pass_time(51)
    assert await stalls(world, task_id) == ["idle", "idle"]


async def test_a_waiting_task_never_stalls(world: World) -> None:
    task_id = await world.task(stall_policy={"stall_seconds": 50, "action": "cancel"})
    lease = await world.worker.run()
    await lease.ok("wait", {"input": {"prompt": "Which colour?"}})
    await world.pass_time(500)
    assert (await stalls(world, task_id), (await world.read(task_id))["status"]) == ([], "waiting")


async def test_detection_can_be_switched_off(world: World) -> None:
    task_id = await world.task(stall_policy={"stall_seconds": 0, "action": "cancel"})
    lease = await world.worker.run()
    for _ in range(20):
        clock.travel(60)
        await world.heartbeat(lease)
    await world.tick()
    assert await stalls(world, task_id) == []
