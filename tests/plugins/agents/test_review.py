"""A claim that commits between the end of an agent's leases and its new state must not outlive it."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from tests.engines import POSTGRES

from corral.testing.kit import Client, Kit
from corral_plugins.tasks.api import Tasks


async def _world(kit: Kit) -> tuple[Client, str, str]:
    """A member with a started agent, a worker and a task: the member, and the ids of agent and worker."""
    admin, member = await kit.as_user("admin"), await kit.as_user("member")
    agent: str = (await member.post("/agents", {"name": "runner"})).json()["id"]
    assert (await member.post(f"/agents/{agent}/start")).status == 200
    worker = (await admin.post("/workers/register", {"name": "worker"})).json()
    approved = await admin.patch(f"/admin/workers/{worker['id']}/approve", {"is_approved": True})
    assert approved.status == 200
    assert (await Client(kit.application.app, worker["token"]).post(f"/workers/{worker['id']}/heartbeat")).status == 200
    assert (await member.post("/tasks", {"title": "a task"})).status == 201
    return member, agent, worker["id"]


@POSTGRES  # SQLite has one writer: no claim can commit inside another unit
@pytest.mark.parametrize("how", ["stop", "delete"])
async def test_no_lease_survives_the_end_of_its_agent(
    make_kit: Callable[..., Awaitable[Kit]], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    kit = await make_kit(plugins=["admin", "agents", "workers", "tasks"])
    database = kit.kernel.database
    member, agent, worker = await _world(kit)
    tasks: Any = kit.kernel.container.get(Tasks)
    method = "release_leases_of_agent" if how == "stop" else "detach_agent"
    before = getattr(type(tasks), method)
    claimed: list[Any] = []

    def then_claim(*args: Any, **named: Any) -> Any:
        value = before(*args, **named)
        if not claimed:
            claimed.append(None)
            claim = threading.Thread(
                target=lambda: claimed.append(database.run(lambda: tasks.claim(worker, max_tasks=1, agent_ids=None)))
            )
            claim.start()
            claim.join(10)
        return value

    monkeypatch.setattr(type(tasks), method, then_claim)
    if how == "stop":
        assert (await member.post(f"/agents/{agent}/stop", {"mode": "immediate"})).status == 200
        assert (await member.get(f"/agents/{agent}")).json()["active_tasks"] == 0
    else:
        assert (await member.delete(f"/agents/{agent}?force=true")).status == 204
    assert len(claimed[1].tasks) == 1
    seen = (await member.get(f"/workers/{worker}")).json()
    assert (seen["leases"], seen["active_leases"]) == ([], 0)
