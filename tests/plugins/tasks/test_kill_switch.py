"""The kill switch: nothing is claimed while it is engaged; `cancel` ends what runs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from corral.testing.kit import Answer


async def switch(world: Any, engaged: bool, **fields: Any) -> None:
    answer = await world.admin.post("/admin/kill-switch", {"engaged": engaged, "reason": "a drill", **fields})
    assert answer.status == 200, answer


async def claim(world: Any, **body: Any) -> Answer:
    answer: Answer = await world.worker.client.post(f"/workers/{world.worker.id}/claim", body)
    return answer


async def test_admin_4_claims_stop_and_go_on_by_themselves(world: Any) -> None:
    task_id = await world.task()
    await switch(world, True)
    assert (await claim(world)).json() == {"tasks": [], "reason": "kill_switch"}
    assert (await world.worker.client.get(f"/workers/{world.worker.id}/tasks")).json()["items"] == []
    told = (await world.member.get(f"/tasks/{task_id}/explain")).json()
    assert told["claimable"] is False
    assert [each["code"] for each in told["conditions"] if not each["ok"]] == ["kill_switch"]
    assert told["summary"] == "The kill switch is engaged (a drill)."
    waiting = asyncio.ensure_future(claim(world, wait_seconds=20))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    await switch(world, False)
    answer = (await asyncio.wait_for(waiting, 60)).json()
    assert [each["task"]["id"] for each in answer["tasks"]] == [task_id]
    assert answer["tasks"][0]["attempt"] == 1


@pytest.mark.one_engine
async def test_pause_leaves_what_runs(world: Any) -> None:
    task_id = await world.task()
    lease = await world.worker.run()
    await switch(world, True)
    assert (await world.heartbeat(lease))["leases"][0]["state"] == "ok"
    await lease.ok("complete", {"result": 1})
    assert (await world.read(task_id))["status"] == "completed"


async def test_cancel_asks_every_run_to_end(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corral_plugins.tasks.service.leases.CANCEL_BATCH_SIZE", 2)
    ids = [await world.task() for _ in range(5)]
    queued = await world.task(queue_timeout_seconds=600)
    leases = [await world.worker.run() for _ in range(5)]
    await switch(world, True, mode="cancel")
    while await world.kit.run_jobs():
        continue
    assert {(await world.read(task_id))["status"] for task_id in ids} == {"cancelling"}
    for lease in leases:
        await lease.ok("cancelled")
        task = await world.read(lease.task_id)
        assert (task["status"], task["cancel_kind"]) == ("cancelled", "user")
    assert (await world.read(queued))["status"] == "pending"
