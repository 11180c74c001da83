"""The clock of the machine is set back by an hour while tasks run: what is due stays due."""

from __future__ import annotations

from typing import Any

import pytest
from tests.kernel.test_clock import HOUR, SystemClock

from corral import clock
from corral_plugins.workers.service.liveness import WorkerSweeps


async def test_a_clock_that_is_set_back_stops_nothing(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    retry = {"max_attempts": 3, "initial_seconds": 2, "jitter": 0}
    failing, silent = await world.task(retry_policy=retry), await world.task()
    lease = await world.worker.run()
    await lease.ok("fail", {"error": {"type": "broken", "message": "no luck"}})
    lost = await world.worker.run()
    assert (lease.task_id, lost.task_id) == (failing, silent)
    system_clock = SystemClock()
    monkeypatch.setattr(clock, "time", system_clock)
    system_clock.changed -= HOUR
    assert (await world.member.get("/tasks")).status == 200  # the access token is older than the step
    await world.pass_time(3)
    assert [claim["id"] for claim in await claimable(world)] == [failing]
    await world.pass_time(60)
    assert (await world.read(silent))["status"] == "pending"
    await world.kit.kernel.container.get(WorkerSweeps).sweep_silent_workers()
    worker = (await world.member.get(f"/workers/{world.worker.id}")).json()
    assert worker["status"] == "offline"
    assert (await lost.call("complete", {"result": {}})).code == "lease_lost"


async def claimable(world: Any) -> list[Any]:
    answer = await world.admin.get(f"/workers/{world.worker.id}/tasks")
    assert answer.status == 200, answer
    items: list[Any] = answer.json()["items"]
    return items
