"""Kernels with workers and a small fake of `tasks`, which keeps its rows in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import pytest

from corral.database.unit import after_commit
from corral.events.event import Event, emit
from corral.events.log import EventRow
from corral.ids import new_id
from corral.plugin import Plugin, Provide, hookimpl
from corral.testing.kit import Answer, Client, Kit
from corral_plugins.tasks.api import ClaimResponse, LeaseRef, LeaseSignal, LeaseState, LeaseView, QueueStatistics, Tasks
from corral_plugins.workers.api import Workers

LATER = "2999-01-01T00:00:00.000Z"


class TaskCreated(Event, kw_only=True):
    """A task was created."""

    event = "task.created"

    task_id: str


class TaskChanged(Event, kw_only=True):
    """A task was changed."""

    event = "task.updated"

    task_id: str


class TaskFailed(Event, kw_only=True):
    """A task failed."""

    event = "task.failed"

    worker_id: str
    error: dict[str, Any]


class StandIn:
    """The calls that `workers` makes to tasks. Claims change memory at once, since no unit of the tests runs again."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self.waiting: list[str] = []
        self.leases: dict[str, tuple[str, str]] = {}  # lease -> (worker, task)
        self.told: list[tuple[str, LeaseSignal]] = []
        self.oldest_ms: int | None = None

    def add(self) -> str:
        task_id = new_id()
        after_commit(lambda: self.waiting.append(task_id))
        emit(TaskCreated(task_id=task_id), object=("task", task_id))
        return task_id

    def signal(self, lease_id: str, state: str) -> None:
        worker_id, task_id = self.leases[lease_id]
        self.told.append(
            (worker_id, LeaseSignal(seq=len(self.told) + 1, task_id=task_id, lease_id=lease_id, state=state))
        )
        emit(TaskChanged(task_id=task_id), object=("task", task_id))

    def claim(self, worker_id: str, *, max_tasks: int, agent_ids: Sequence[str] | None) -> ClaimResponse:
        facts = self.workers.find(worker_id)
        assert facts is not None
        if facts.status == "draining":
            return ClaimResponse(tasks=[], reason="draining")
        claimed: list[Any] = []
        while self.waiting and len(claimed) < max_tasks:
            if not self.workers.take_slot(worker_id):
                return ClaimResponse(tasks=claimed, reason="ok" if claimed else "at_capacity")
            task_id, lease_id = self.waiting.pop(0), new_id()
            self.leases[lease_id] = (worker_id, task_id)
            emit(TaskChanged(task_id=task_id), object=("task", task_id))
            claimed.append({"task": {"id": task_id}, "lease_id": lease_id})
        return ClaimResponse(tasks=claimed, reason="ok" if claimed else "none")

    def end(self, lease_id: str) -> None:
        worker_id, task_id = self.leases.pop(lease_id)
        self.workers.release_slot(worker_id)
        self.waiting.append(task_id)

    def claimable(self, worker_id: str, *, limit: int) -> list[Any]:
        return [{"id": task_id} for task_id in self.waiting[:limit]]

    def renew_leases(self, worker_id: str, leases: Sequence[LeaseRef]) -> list[LeaseState]:
        live = {lease_id for lease_id, (owner, _) in self.leases.items() if owner == worker_id}
        return [
            LeaseState(
                task_id=each.task_id,
                lease_id=each.lease_id,
                state="ok" if each.lease_id in live else "lost",
                expires_at=LATER if each.lease_id in live else None,
            )
            for each in leases
        ]

    def leases_of_worker(self, worker_id: str) -> list[LeaseView]:
        return [
            LeaseView(task_id=task_id, lease_id=lease_id, agent_id=new_id(), since=LATER, expires_at=LATER)
            for lease_id, (owner, task_id) in self.leases.items()
            if owner == worker_id
        ]

    def read_signals(self, worker_id: str, *, after: int) -> list[LeaseSignal]:
        return [signal for owner, signal in self.told if owner == worker_id and signal.seq > after]

    def release_leases_of_worker(self, worker_id: str, *, reason: str) -> int:
        mine = [lease_id for lease_id, (owner, _) in self.leases.items() if owner == worker_id]
        for lease_id in mine:
            self.end(lease_id)
        return len(mine)

    def queue_statistics(self) -> QueueStatistics:
        oldest = self.waiting[0] if self.waiting else None
        return QueueStatistics(depth=len(self.waiting), oldest_pending_ms=self.oldest_ms, oldest_pending_id=oldest)


class StandInPlugin(Plugin):
    """Tasks, in memory."""

    name = "tasks"
    requires = ("workers",)

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [Provide(Tasks, StandIn)]

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return [TaskCreated, TaskChanged, TaskFailed]


class Fleet:
    """A kernel with its admin, and shortcuts for common steps."""

    def __init__(self, kit: Kit, admin: Client) -> None:
        self.kit, self.admin = kit, admin

    @property
    def tasks(self) -> StandIn:
        kind: Any = Tasks
        found = self.kit.kernel.container.get(kind)
        assert isinstance(found, StandIn)
        return found

    async def work(self, fn: Callable[[], Any]) -> Any:
        return await self.kit.kernel.database.work(fn)

    def client(self, token: str) -> Client:
        return Client(self.kit.application.app, token)

    async def key(self, **fields: Any) -> Client:
        """A client with a new registration key."""
        made = await self.admin.post("/admin/registration-keys", {"name": "site", **fields})
        assert made.status == 201, made
        return self.client(made.json()["key"])

    async def worker(
        self, name: str = "w1", *, by: Client | None = None, approve: bool = True, **fields: Any
    ) -> Client:
        """A client with the token of a new worker; `user` is the worker."""
        answer = await (by or self.admin).post("/workers/register", {"name": name, **fields})
        assert answer.status == 201, answer
        worker = answer.json()
        if approve and not worker["is_approved"]:
            assert (await self.approve(worker["id"])).status == 200
        return Client(self.kit.application.app, worker["token"], worker)

    async def approve(self, worker_id: str, is_approved: bool = True, **fields: Any) -> Answer:
        return await self.admin.patch(f"/admin/workers/{worker_id}/approve", {"is_approved": is_approved, **fields})

    async def told(self, kind: str) -> list[dict[str, Any]]:
        """The payloads of the events of one type. On PostgreSQL events are numbered a little later."""
        async with asyncio.timeout(60):
            while await self.work(lambda: EventRow.select().where(EventRow.seq.is_null()).exists()):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return [record.payload() for record in await self.kit.events() if record.type == kind]


@pytest.fixture
async def make_fleet(make_kit: Callable[..., Any]) -> Callable[..., Awaitable[Fleet]]:
    """`fleet = await make_fleet(config=…)`."""

    async def make(*, tasks: bool = True, **options: Any) -> Fleet:
        kit: Kit = await make_kit(plugins=["workers", *([StandInPlugin] if tasks else [])], **options)
        failed = {item.name: item.reason for item in kit.kernel.plugins if item.state in ("failed", "blocked")}
        assert failed == {}
        return Fleet(kit, await kit.as_user("admin"))

    return make


@pytest.fixture
async def fleet(make_fleet: Callable[..., Awaitable[Fleet]]) -> Fleet:
    """Workers and the fake of tasks, on each engine."""
    return await make_fleet()
