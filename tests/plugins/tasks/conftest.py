"""A small world to run tasks in: people, a started agent, an approved worker, all by HTTP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from corral import clock
from corral.testing.kit import Answer, Client, Kit
from corral_plugins.tasks import jobs
from corral_plugins.tasks.service.timers import TaskTimers


class Lease:
    """A claimed task, as its worker sees it."""

    def __init__(self, world: World, worker: Machine, claim: dict[str, Any]) -> None:
        self.world, self.worker, self.claim = world, worker, claim
        self.task_id: str = claim["task"]["id"]
        self.lease_id: str = claim["lease_id"]

    async def call(self, name: str, body: dict[str, Any] | None = None) -> Answer:
        """A call on the lease with the worker's token."""
        return await self.worker.client.post(
            f"/tasks/{self.task_id}/{name}", {"lease_id": self.lease_id, **(body or {})}
        )

    async def ok(self, name: str, body: dict[str, Any] | None = None) -> Any:
        """The same, expecting success."""
        answer = await self.call(name, body)
        assert answer.status == 200, answer
        return answer.json()


class Machine:
    """An approved worker."""

    def __init__(self, world: World, worker_id: str, token: str) -> None:
        self.world, self.id = world, worker_id
        self.client = Client(world.kit.application.app, token)

    async def claim_all(self, **body: Any) -> list[Lease]:
        """Claim; the leases."""
        answer = await self.client.post(f"/workers/{self.id}/claim", body)
        assert answer.status == 200, answer
        return [Lease(self.world, self, claim) for claim in answer.json()["tasks"]]

    async def claim(self, **body: Any) -> Lease:
        """Claim exactly one task."""
        leases = await self.claim_all(**body)
        assert len(leases) == 1
        return leases[0]

    async def run(self, **body: Any) -> Lease:
        """Claim and start."""
        lease = await self.claim(**body)
        await lease.ok("start")
        return lease


class World:
    """`member` owns an agent that is started; `worker` may take four tasks at a time."""

    kit: Kit
    admin: Client
    member: Client
    worker: Machine
    agent_id: str

    async def build(self, kit: Kit) -> World:
        self.kit = kit
        self.admin, self.member = await kit.as_user("admin"), await kit.as_user("member")
        self.agent_id = await self.agent("runner", max_concurrent_tasks=100)
        self.worker = await self.machine("worker", max_agents=100)
        return self

    async def agent(self, name: str, *, start: bool = True, **fields: Any) -> str:
        """A new agent of the member."""
        answer = await self.member.post("/agents", {"name": name, **fields})
        assert answer.status == 201, answer
        agent_id: str = answer.json()["id"]
        if start:
            assert (await self.member.post(f"/agents/{agent_id}/start")).status == 200
        return agent_id

    async def machine(self, name: str, *, approve: bool = True, **fields: Any) -> Machine:
        """A new worker, online."""
        answer = await self.admin.post("/workers/register", {"name": name, **fields})
        assert answer.status == 201, answer
        machine = Machine(self, answer.json()["id"], answer.json()["token"])
        if approve:
            approved = await self.admin.patch(f"/admin/workers/{machine.id}/approve", {"is_approved": True})
            assert approved.status == 200, approved
            assert (await machine.client.post(f"/workers/{machine.id}/heartbeat", {})).status == 200
        return machine

    async def task(self, title: str = "a task", *, by: Client | None = None, **fields: Any) -> str:
        """A new task of the member; its id."""
        answer = await (by or self.member).post("/tasks", {"title": title, **fields})
        assert answer.status == 201, answer
        task_id: str = answer.json()["id"]
        return task_id

    async def read(self, task_id: str) -> Any:
        """The task now."""
        answer = await self.member.get(f"/tasks/{task_id}")
        assert answer.status == 200, answer
        return answer.json()

    async def pass_time(self, seconds: float) -> None:
        """Let time pass, and do what is due then."""
        clock.travel(seconds)
        await self.tick()

    async def tick(self) -> None:
        """Run the schedules of tasks once."""
        database, timers = self.kit.kernel.database, self.kit.kernel.container.get(TaskTimers)
        for run in (jobs.queue_due_tasks, jobs.end_overdue_tasks, jobs.report_idle_runs):
            await run(database, timers)

    async def heartbeat(self, *leases: Lease) -> Any:
        """The worker says that it lives; the answer."""
        named = [{"task_id": lease.task_id, "lease_id": lease.lease_id} for lease in leases]
        answer = await self.worker.client.post(f"/workers/{self.worker.id}/heartbeat", {"leases": named})
        assert answer.status == 200, answer
        return answer.json()

    async def kinds(self, task_id: str) -> list[str]:
        """The names of the task's events, in order."""
        return [event.type for event in await self.kit.events() if event.object_id == task_id]


@pytest.fixture
async def world(make_kit: Callable[..., Any]) -> World:
    """A world on each engine."""
    return await World().build(await make_kit(plugins=("admin", "agents", "workers", "tasks")))
