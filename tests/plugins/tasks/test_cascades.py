"""What the end of one task does to others that are about to end in the same transaction."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from corral.jobs.job import enqueue
from corral.testing.kit import Client
from corral_core.accounts.api import Accounts
from corral_plugins.tasks.service import outcomes

LATER = "2090-01-01T00:00:00Z"


async def family(world: Any) -> tuple[str, Any, list[str]]:
    """A running parent and two children of it, of which the second needs the first."""
    parent = await world.task("parent")
    lease = await world.worker.run()
    run = Client(world.kit.application.app, lease.claim["agent_token"])
    first = await world.task("first", by=run, available_at=LATER)
    second = await world.task("second", by=run, depends_on=[first])
    return parent, lease, [first, second]


async def states(world: Any, ids: list[str]) -> list[str]:
    return [(await world.read(task_id))["status"] for task_id in ids]


async def purged(world: Any) -> None:
    """The account of the member is removed."""
    me = (await world.member.get("/auth/me")).json()["id"]
    assert (await world.admin.patch(f"/admin/users/{me}", {"is_active": False})).status == 200
    accounts = world.kit.kernel.container.get(Accounts)
    await world.kit.kernel.database.work(lambda: accounts.purge(me))
    await world.kit.kernel.database.work(lambda: enqueue("tasks.cancel_of", user_id=me))
    while await world.kit.run_jobs():
        continue
    world.member = world.admin


@pytest.mark.one_engine
async def test_a_parent_is_cancelled_with_children_that_depend_on_each_other(world: Any) -> None:
    parent, lease, children = await family(world)
    answer = await world.member.post(f"/tasks/{parent}/cancel", {})
    assert (answer.status, answer.json()["status"]) == (202, "cancelling"), answer
    assert (await states(world, children))[0] == "cancelled"
    await lease.ok("cancelled")
    assert await states(world, [parent, *children]) == ["cancelled", "cancelled", "failed"]


async def test_the_kill_switch_ends_a_parent_with_children_that_depend_on_each_other(world: Any) -> None:
    parent, lease, children = await family(world)
    answer = await world.admin.post("/admin/kill-switch", {"engaged": True, "mode": "cancel", "reason": "a drill"})
    assert answer.status == 200, answer
    await lease.ok("cancelled")
    assert await states(world, [parent, *children]) == ["cancelled", "cancelled", "failed"]
    assert (await world.member.get(f"/agents/{world.agent_id}")).json()["active_tasks"] == 0


@pytest.mark.one_engine
@pytest.mark.parametrize("how", ["stop", "delete"])
async def test_an_agent_with_a_parent_and_its_child_in_hand_ends_both(world: Any, how: str) -> None:
    parent = await world.task("parent")
    lease = await world.worker.run()
    child = await world.task("child", by=Client(world.kit.application.app, lease.claim["agent_token"]))
    assert (await world.worker.run()).task_id == child
    if how == "stop":
        answer = await world.member.post(f"/agents/{world.agent_id}/stop", {"cancel_tasks": True})
    else:
        answer = await world.member.delete(f"/agents/{world.agent_id}?force=true")
    assert answer.status == {"stop": 200, "delete": 204}[how], answer
    assert await states(world, [parent, child]) == ["cancelled", "cancelled"]


@pytest.mark.one_engine
async def test_stop_cancels_what_is_ending_for_another_reason(world: Any) -> None:
    task_id = await world.task(timeout_seconds=10)
    await world.worker.run()
    await world.pass_time(11)
    assert (await world.read(task_id))["cancel_kind"] == "timeout"
    await world.member.post(f"/agents/{world.agent_id}/stop", {"cancel_tasks": True})
    assert (await world.read(task_id))["status"] == "cancelled"


@pytest.mark.one_engine
async def test_what_a_purged_person_asked_for_ends_though_it_depends_on_each_other(world: Any) -> None:
    first = await world.task("first", available_at=LATER)
    ids = [first, await world.task("second", depends_on=[first])]
    await purged(world)
    assert await states(world, ids) == ["cancelled", "failed"]


async def test_what_a_purged_person_asked_for_does_not_go_on_after_a_timeout(world: Any) -> None:
    task_id = await world.task(timeout_seconds=10)
    lease = await world.worker.run()
    await world.pass_time(11)
    await purged(world)
    await lease.ok("cancelled")
    assert (await world.read(task_id))["status"] == "cancelled"


@pytest.mark.one_engine
async def test_a_child_that_is_ending_for_a_timeout_is_cancelled_with_its_parent(world: Any) -> None:
    parent = await world.task("parent")
    lease = await world.worker.run()
    run = Client(world.kit.application.app, lease.claim["agent_token"])
    child = await world.task("child", by=run, timeout_seconds=10)
    running = await world.worker.run()
    await world.pass_time(11)
    assert (await world.read(child))["cancel_kind"] == "timeout"
    await lease.ok("wait", {"input": {"prompt": "?"}})
    assert (await world.member.post(f"/tasks/{parent}/cancel", {})).json()["status"] == "cancelled"
    assert (await world.read(child))["cancel_kind"] == "parent"
    await running.ok("cancelled")
    assert (await world.read(child))["status"] == "cancelled"


@pytest.mark.one_engine
async def test_dependents_that_still_wait_for_another_task_do_not_hold_up_the_rest(world: Any) -> None:
    needed, other = await world.task("needed", available_at=LATER), await world.task("other", available_at=LATER)
    waiting = [await world.task(f"both {n}", depends_on=[needed, other]) for n in range(outcomes.BATCH_SIZE)]
    free = [await world.task(f"one {n}", depends_on=[needed]) for n in range(3)]
    assert (await world.member.post(f"/tasks/{needed}/complete", {"result": None})).status == 200
    await asyncio.wait_for(world.kit.run_jobs(), 30)
    assert set(await states(world, free)) == {"pending"}
    assert set(await states(world, waiting[-3:])) == {"blocked"}
