"""Calls at the same time: each engine lets exactly one of them win."""

from __future__ import annotations

import asyncio
from typing import Any


async def test_capacity_is_never_exceeded(world: Any) -> None:
    small = await world.machine("small", max_agents=3)
    for n in range(10):
        await world.task(f"task {n}")
    found = await asyncio.gather(*[small.claim_all() for _ in range(5)])
    assert sum(len(leases) for leases in found) == 3
    full = await small.client.post(f"/workers/{small.id}/claim", {})
    assert full.json()["reason"] == "at_capacity"


async def test_an_agent_never_has_more_leases_than_slots(world: Any) -> None:
    await world.member.patch(f"/agents/{world.agent_id}", {"max_concurrent_tasks": 2})
    machines = [await world.machine(f"m{n}", max_agents=5) for n in range(4)]
    for n in range(12):
        await world.task(f"task {n}")
    found = await asyncio.gather(*[machine.claim_all(max_tasks=5) for machine in machines])
    assert sum(len(leases) for leases in found) == 2
    stats = (await world.member.get("/tasks/stats")).json()
    assert stats["by_status"]["assigned"] == 2
    assert stats["by_status"]["pending"] == 10


async def test_parallel_claims_share_the_queue_without_overlap(world: Any) -> None:
    ids = {await world.task(f"task {n}") for n in range(40)}
    other = await world.machine("second", max_agents=100)
    found = await asyncio.gather(
        *[machine.claim_all(max_tasks=4) for machine in (world.worker, other) for _ in range(6)]
    )
    taken = [lease.task_id for leases in found for lease in leases]
    assert len(taken) == len(set(taken))
    assert set(taken) <= ids
    rest = await world.worker.claim_all(max_tasks=50)
    assert {*taken, *(lease.task_id for lease in rest)} == ids


async def test_two_needed_tasks_completed_at_once_unblock_their_dependent(world: Any) -> None:
    for _ in range(8):
        first, second = await world.task("first"), await world.task("second")
        third = await world.task("third", depends_on=[first, second])
        leases = await world.worker.claim_all(max_tasks=2)
        assert {lease.task_id for lease in leases} == {first, second}
        await asyncio.gather(*[lease.ok("start") for lease in leases])
        await asyncio.gather(*[lease.ok("complete", {"result": None}) for lease in leases])
        assert (await world.read(third))["status"] == "pending"
        await (await world.worker.run()).ok("complete", {"result": None})


async def test_reports_of_one_lease_at_once(world: Any) -> None:
    task_id = await world.task()
    lease = await world.worker.run()
    calls = [
        *[lease.call("complete", {"result": n}) for n in range(5)],
        *[lease.call("fail", {"error": {"type": "x", "message": ""}}) for _ in range(5)],
        *[lease.call("release", {"reason": ""}) for _ in range(5)],
        *[lease.call("progress", {"percent": n}) for n in range(5)],
        *[
            lease.call("logs", {"entries": [{"seq": n, "ts": "2026-01-01T00:00:00Z", "message": "x"}]})
            for n in range(5)
        ],
    ]
    answers = await asyncio.gather(*calls)
    assert all(answer.status in (200, 409) for answer in answers), answers
    kinds = await world.kinds(task_id)
    assert sum(kind in ("task.completed", "task.retried", "task.updated") for kind in kinds) == 1


async def test_stop_and_complete_at_once_leave_no_slot_behind(world: Any) -> None:
    for _ in range(6):
        await world.task()
        lease = await world.worker.run()
        stop, complete = await asyncio.gather(
            world.member.post(f"/agents/{world.agent_id}/stop"), lease.call("complete", {"result": None})
        )
        assert stop.status == 200
        assert complete.status in (200, 409)
        worker = (await world.member.get(f"/workers/{world.worker.id}")).json()
        assert worker["active_leases"] == 0
        assert (await world.member.post(f"/agents/{world.agent_id}/start")).json()["active_tasks"] == 0
        if complete.status == 409:
            await (await world.worker.run()).ok("complete", {"result": None})
