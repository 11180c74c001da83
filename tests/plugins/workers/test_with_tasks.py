"""The promises of the protocol with the real plugins tasks and agents."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from tests.limits import within

from corral.testing.kit import Client, Kit


class Shop:
    """A kernel with an admin, a started agent and a worker that runs it."""

    def __init__(self, kit: Kit, admin: Client) -> None:
        self.kit, self.admin = kit, admin
        self.worker = Client(None)

    async def open(self, *, max_agents: int = 10, slots: int = 50) -> None:
        agent = await self.admin.post("/agents", {"name": "writer", "max_concurrent_tasks": slots})
        assert agent.status == 201, agent
        started = await self.admin.post(f"/agents/{agent.json()['id']}/start")
        assert started.status == 200, started
        made = await self.admin.post("/workers/register", {"name": "w1", "fingerprint": "f", "max_agents": max_agents})
        self.worker = Client(self.kit.application.app, made.json()["token"], made.json())
        approved = await self.admin.patch(f"/admin/workers/{made.json()['id']}/approve", {"is_approved": True})
        assert approved.status == 200

    async def task(self) -> str:
        answer = await self.admin.post("/tasks", {"title": "write"})
        assert answer.status == 201, answer
        task_id: str = answer.json()["id"]
        return task_id

    async def claim(self, **body: Any) -> dict[str, Any]:
        answer = await self.worker.post(f"/workers/{self.worker.user['id']}/claim", body)
        assert answer.status == 200, answer
        found: dict[str, Any] = answer.json()
        return found

    async def status(self, task_id: str) -> str:
        found: str = (await self.admin.get(f"/tasks/{task_id}")).json()["status"]
        return found

    async def leases(self) -> list[str]:
        detail = (await self.admin.get(f"/workers/{self.worker.user['id']}")).json()
        assert detail["active_leases"] == len(detail["leases"])
        return [lease["lease_id"] for lease in detail["leases"]]


@pytest.fixture
async def make_shop(make_kit: Callable[..., Any]) -> Callable[..., Awaitable[Shop]]:
    async def make(**options: Any) -> Shop:
        kit: Kit = await make_kit(plugins=["workers", "tasks", "agents", "cost", "llm"])
        shop = Shop(kit, await kit.as_user("admin"))
        await shop.open(**options)
        return shop

    return make


async def test_workers_3_capacity_is_never_exceeded(make_shop: Any) -> None:
    shop = await make_shop(max_agents=3)
    for _ in range(10):
        await shop.task()
    answers = await asyncio.gather(*[shop.claim(max_tasks=2) for _ in range(5)])
    assert sum(len(answer["tasks"]) for answer in answers) == 3
    assert len(await shop.leases()) == 3
    assert (await shop.claim())["reason"] == "at_capacity"


async def test_workers_4_withdrawal_frees_leases_at_once(make_shop: Any) -> None:
    shop = await make_shop()
    task_id = await shop.task()
    assert (await shop.claim())["reason"] == "ok"
    path = f"/admin/workers/{shop.worker.user['id']}/approve"
    assert (await shop.admin.patch(path, {"is_approved": False})).status == 200
    assert await shop.status(task_id) == "pending"
    assert await shop.leases() == []


async def test_workers_6_a_restart_releases_what_it_held(make_shop: Any) -> None:
    shop = await make_shop()
    task_id = await shop.task()
    await shop.claim()
    again = await shop.admin.post("/workers/register", {"name": "w1", "fingerprint": "f"})
    assert (again.status, again.json()["id"], again.json()["active_leases"]) == (200, shop.worker.user["id"], 0)
    assert await shop.status(task_id) == "pending"


async def test_workers_7_a_new_task_reaches_a_waiting_claim(make_shop: Any) -> None:
    shop = await make_shop()
    waiting = asyncio.create_task(shop.claim(wait_seconds=30))
    await asyncio.sleep(0.5)
    assert not waiting.done()
    async with within(1):
        task_id = await shop.task()
        assert [claim["task"]["id"] for claim in (await waiting)["tasks"]] == [task_id]


async def test_workers_9_looking_changes_nothing(make_shop: Any) -> None:
    shop = await make_shop()
    task_ids = [await shop.task() for _ in range(3)]
    before = [(await shop.admin.get(f"/tasks/{task_id}")).body for task_id in task_ids]
    for _ in range(100):
        answer = await shop.worker.get(f"/workers/{shop.worker.user['id']}/tasks")
        assert {item["id"] for item in answer.json()["items"]} == set(task_ids)
    assert [(await shop.admin.get(f"/tasks/{task_id}")).body for task_id in task_ids] == before
    assert await shop.leases() == []


async def test_a_cancellation_reaches_a_listening_worker_at_once(make_shop: Any) -> None:
    shop = await make_shop()
    listening = asyncio.create_task(shop.worker.get(f"/workers/{shop.worker.user['id']}/signals?wait=20"))
    await asyncio.sleep(0.3)
    task_id = await shop.task()
    claim = (await shop.claim())["tasks"][0]
    started = await shop.worker.post(f"/tasks/{task_id}/start", {"lease_id": claim["lease_id"]})
    assert started.status == 200, started
    await asyncio.sleep(0.5)
    assert (await shop.admin.post(f"/tasks/{task_id}/cancel")).status in (200, 202)
    async with within(1):
        answer = (await listening).json()
    assert [(each["task_id"], each["state"]) for each in answer["signals"]] == [(task_id, "cancel_requested")]
    lease = {"task_id": task_id, "lease_id": claim["lease_id"]}
    beat = await shop.worker.post(f"/workers/{shop.worker.user['id']}/heartbeat", {"leases": [lease]})
    assert [each["state"] for each in beat.json()["leases"]] == ["cancel_requested"]


@pytest.mark.one_engine
async def test_the_overview_tells_what_waits(make_shop: Any) -> None:
    shop = await make_shop()
    await shop.task()
    overview = (await shop.admin.get("/workers/overview")).json()
    assert overview["queue_depth"] == 1
    assert overview["oldest_pending_ms"] >= 0
    beat = await shop.worker.post(f"/workers/{shop.worker.user['id']}/heartbeat")
    assert beat.json()["pending_tasks"] == 1


@pytest.mark.one_engine
async def test_the_document_describes_every_call(make_shop: Any) -> None:
    shop = await make_shop()
    document = (await shop.kit.client.get("/openapi.json")).json()
    for path, method in (
        ("/workers/register", "post"),
        ("/workers/{id}/heartbeat", "post"),
        ("/workers/{id}/tasks", "get"),
        ("/workers/overview", "get"),
        ("/admin/workers", "get"),
        ("/admin/workers/{id}/approve", "patch"),
        ("/workers/{id}/claim", "post"),
        ("/workers/{id}/signals", "get"),
    ):
        assert method in document["paths"][f"/api/v1{path}"]
    assert "304" not in document["paths"]["/api/v1/workers/{id}"]["get"]["responses"]
