"""The promises of tasks.

Waiting for parts that come later: 4 (approvals; waiting for input is tested in `test_life.py`), the dead letter of 6
(dead_letter), the codes `circuit`, `budget_*` and `kill_switch` of 7 (circuit_breakers, cost, admin), 8 (redis).
"""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

import pytest

from corral import clock


async def test_tasks_1_completed_with_nothing_configured(world: Any) -> None:
    task_id = await world.task("hello")
    lease = await world.worker.run()
    await lease.ok("logs", {"entries": [{"seq": 0, "ts": clock.now(), "message": "working"}]})
    await lease.ok(
        "complete", {"result": {"text": "done"}, "usage": {"input_tokens": 3, "output_tokens": 4, "calls": 1}}
    )
    task = await world.read(task_id)
    assert (task["status"], task["attempt"], task["result"]) == ("completed", 1, {"text": "done"})
    assert task["cost"]["calls"] == 1
    assert len((await world.member.get(f"/tasks/{task_id}/logs")).json()["items"]) == 1


async def test_tasks_2_two_workers_race(world: Any, long_form: bool) -> None:
    rounds = 1000 if long_form else 60
    other = await world.machine("second", max_agents=100)
    winners = 0
    for _ in range(rounds):
        task_id = await world.task()
        found = await asyncio.gather(world.worker.claim_all(), other.claim_all())
        leases = [lease for each in found for lease in each]
        assert [lease.task_id for lease in leases] == [task_id]
        await leases[0].ok("start")
        await leases[0].ok("complete", {"result": None})
        winners += 1
        task = await world.read(task_id)
        assert (task["fence"], task["attempt"]) == (1, 1)
    assert winners == rounds


async def test_tasks_3_a_killed_worker_is_replaced_from_the_checkpoint(world: Any) -> None:
    task_id = await world.task()
    dead = await world.worker.run()
    await dead.ok("checkpoint", {"step": 7, "state": {"messages": ["so far"]}})
    await world.pass_time(60 + 5)
    other = await world.machine("second")
    heir = await other.run()
    assert heir.claim["resume"]["checkpoint"] == {"step": 7, "state": {"messages": ["so far"]}}
    assert heir.claim["attempt"] == 2
    stale = await dead.call("complete", {"result": "from the grave"})
    assert (stale.status, stale.code) == (409, "lease_lost")
    await heir.ok("complete", {"result": "alive"})
    assert (await world.read(task_id))["result"] == "alive"


async def test_tasks_5_cancel_survives_a_restart(make_kit: Any) -> None:
    from tests.plugins.tasks.conftest import Lease, Machine, World

    plugins = ("agents", "workers", "tasks")
    world = await World().build(await make_kit(plugins=plugins))
    task_id = await world.task()
    lease = await world.worker.run()
    assert (await world.member.post(f"/tasks/{task_id}/cancel")).status == 202
    token = world.worker.client.token
    again = World()
    again.kit = await make_kit(plugins=plugins)  # another process on the same database: nothing was kept in memory
    again.worker = Machine(again, world.worker.id, token)
    again.worker.client.app = again.kit.application.app
    again.member = await again.kit.as_user("member", email="other@example.org")
    told = await again.heartbeat(Lease(again, again.worker, lease.claim))
    assert told["leases"][0]["state"] == "cancel_requested"
    await again.pass_time(60 + 5)
    assert (await again.read(task_id))["status"] == "cancelled"


async def test_tasks_6_three_attempts_with_growing_delays(world: Any) -> None:
    task_id = await world.task()
    delays = []
    for attempt in (1, 2, 3):
        lease = await world.worker.run()
        failed_at = clock.time_s()
        answer = await lease.ok("fail", {"error": {"type": "boom", "message": "no"}})
        assert answer["attempt"] == attempt
        if answer["status"] == "pending":
            delays.append(clock.parse_instant(answer["available_at"]) - failed_at)
            await world.pass_time(delays[-1] + 0.1)
    assert (await world.read(task_id))["status"] == "failed"
    assert delays[0] == pytest.approx(10, rel=0.11)
    assert delays[1] == pytest.approx(20, rel=0.11)


async def _false(world: Any, task_id: str) -> list[str]:
    answer = await world.member.get(f"/tasks/{task_id}/explain")
    assert answer.status == 200, answer
    told = answer.json()
    codes = [each["code"] for each in told["conditions"] if not each["ok"]]
    assert told["claimable"] == (not codes)
    return codes


async def test_tasks_7_explain_names_the_false_condition(make_kit: Any) -> None:
    from tests.plugins.tasks.conftest import World

    world = World()
    world.kit = await make_kit(plugins=("agents", "workers", "tasks"))
    world.admin, world.member = await world.kit.as_user("admin"), await world.kit.as_user("member")
    agent_id = await world.agent("runner", start=False)
    task_id = await world.task(agent_id=agent_id)
    await world.member.post(f"/agents/{agent_id}/start")
    assert await _false(world, task_id) == ["worker_online"]
    unapproved = await world.machine("worker", approve=False)
    assert await _false(world, task_id) == ["worker_approved"]
    await world.admin.patch(f"/admin/workers/{unapproved.id}/approve", {"is_approved": True})
    await unapproved.client.post(f"/workers/{unapproved.id}/heartbeat", {})
    assert await _false(world, task_id) == []
    await world.member.post(f"/agents/{agent_id}/stop")
    assert await _false(world, task_id) == ["agent_started"]
    await world.member.post(f"/agents/{agent_id}/start")
    needs_tool = await world.task(agent_id=agent_id, required_tools=["web.fetch"])
    assert await _false(world, needs_tool) == ["tools_enabled"]
    dependent = await world.task(agent_id=agent_id, depends_on=[task_id])
    assert await _false(world, dependent) == ["dependencies"]
    later = await world.task(agent_id=agent_id, available_at=clock.now(60))
    assert await _false(world, later) == ["available_at"]
    lease = await unapproved.claim()
    assert lease.task_id == task_id
    full = await world.task(agent_id=agent_id)
    assert "agent_capacity" in await _false(world, full)
    await world.member.patch(f"/agents/{agent_id}", {"max_concurrent_tasks": 5})
    assert await _false(world, full) == ["worker_capacity"]
    await lease.ok("start")
    await lease.ok("complete", {"result": None})
    ended = (await world.member.get(f"/tasks/{task_id}/explain")).json()
    assert (ended["summary"], len(ended["attempts"])) == ("Completed after 1 attempt.", 1)
    assert await _false(world, full) == []
    assert (await unapproved.claim()).task_id in (full, dependent)


async def test_tasks_7_a_claim_that_waits_gets_a_task_within_a_second_of_its_time(world: Any) -> None:
    task_id = await world.task(available_at=clock.now(1))
    waiting = asyncio.create_task(world.worker.claim_all(wait_seconds=10))
    began = time.monotonic()
    leases = await waiting
    assert [lease.task_id for lease in leases] == [task_id]
    assert time.monotonic() - began < 2.5


async def test_tasks_9_low_is_not_starved(world: Any) -> None:
    low = await world.task("low", priority="low")
    for minute in range(31):
        high = await world.task("high", priority="high")
        lease = await world.worker.run()
        await lease.ok("complete", {"result": None})
        if lease.task_id == low:
            assert minute <= 30
            return
        assert lease.task_id == high or minute > 0
        await world.pass_time(60)
        world.member = await world.kit.sign_in(world.member.user["email"])  # its access token lasts 15 minutes
    pytest.fail("the low task waited more than 30 minutes")


async def test_tasks_10_one_transition_wins(world: Any) -> None:
    task_id = await world.task()
    refused = await world.member.patch(f"/tasks/{task_id}", {"status": "completed"})
    assert (refused.status, refused.code) == (422, "use_action")
    await world.member.post(f"/tasks/{task_id}/cancel")
    for _ in range(5):
        task_id = await world.task()
        lease = await world.worker.run()
        calls = [
            lease.call("complete", {"result": n}) if n % 2 else world.member.post(f"/tasks/{task_id}/cancel")
            for n in range(50)
        ]
        answers = await asyncio.gather(*calls)
        assert all(answer.status in (200, 202, 409) for answer in answers)
        ends = [kind for kind in await world.kinds(task_id) if kind in ("task.completed", "task.cancelled")]
        assert len(ends) == 1
        attempts = (await world.member.get(f"/tasks/{task_id}/attempts")).json()["items"]
        assert len(attempts) == 1
        assert attempts[0]["finished_at"] is not None
    stats = (await world.member.get("/tasks/stats")).json()
    assert stats["total"] == 6
    assert sum(stats["by_status"].values()) == 6


@pytest.mark.sqlite
async def test_tasks_11_a_large_table_stays_fast(tmp_path: Any, long_form: bool) -> None:
    from tests.plugins.tasks.conftest import World

    from corral.auth.principal import Principal
    from corral.testing.kit import make_kernel
    from corral_plugins.tasks.api import NewTask, Tasks

    size = 100_000 if long_form else 2_000
    async with make_kernel(tmp_path, plugins=("agents", "workers", "tasks")) as kit:
        world = await World().build(kit)
        tasks = kit.kernel.container.get(Tasks)
        by = Principal(kind="user", id=world.admin.user["id"], user_id=world.admin.user["id"], role="admin")
        new = NewTask(title="one of many", description="to fill the table")
        for _ in range(size // 250):
            await kit.kernel.database.work(lambda: [tasks.create(new, by=by) for _ in range(250)])
        lists, stats, claims = [], [], []
        for n in range(60):
            lists.append(await _timed(world.member.get(f"/tasks?limit=50&offset={n * size // 70}")))
            stats.append(await _timed(world.member.get("/tasks/stats")))
            claims.append(await _timed(world.worker.client.post(f"/workers/{world.worker.id}/claim", {})))
        slack = 1 if long_form else 5  # beside other tests only an order of magnitude can be told
        assert _p95(lists) <= 0.050 * slack
        assert _p95(stats) <= 0.050 * slack
        assert _p95(claims) <= 0.020 * slack


async def _timed(call: Any) -> float:
    began = time.perf_counter()
    assert (await call).status == 200
    return time.perf_counter() - began


def _p95(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=20)[-1]
