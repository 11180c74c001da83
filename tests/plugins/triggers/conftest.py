"""A world with triggers: the world of tasks, whose member owns the triggers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.tasks.conftest import World

from corral import clock
from corral.testing.kit import Client, Kit
from corral_plugins.triggers.service.event_reader import TriggerLogReader
from corral_plugins.triggers.service.scheduler import TriggerScheduler

PLUGINS = ("admin", "agents", "workers", "tasks", "triggers")
TASK = {"type": "create_task", "title": "Do it"}


class Alarm(World):
    """The world of tasks with triggers of `member`. Nothing happens by itself: `run` does what is due."""

    async def create(self, type: str = "manual", config: Any = None, *, by: Client | None = None, **fields: Any) -> Any:
        """A new trigger; the answer's body."""
        body = {"name": "alarm", "type": type, "config": config or {}, "action": TASK, **fields}
        answer = await (by or self.member).post("/triggers", body)
        assert answer.status == 201, answer
        return answer.json()

    async def get(self, trigger_id: str) -> Any:
        """The trigger now."""
        answer = await self.member.get(f"/triggers/{trigger_id}")
        assert answer.status == 200, answer
        return answer.json()

    async def history(self, trigger_id: str, status: str | None = None) -> list[Any]:
        """The history of the trigger, oldest first."""
        query = "?limit=200" + (f"&status={status}" if status else "")
        answer = await self.member.get(f"/triggers/{trigger_id}/history{query}")
        assert answer.status == 200, answer
        return list(reversed(answer.json()["items"]))

    async def statuses(self, trigger_id: str) -> list[str]:
        """The statuses of the history, oldest first."""
        return [row["status"] for row in await self.history(trigger_id)]

    async def tasks(self) -> list[Any]:
        """All tasks, oldest first."""
        return list(reversed((await self.member.get("/tasks?limit=200")).json()["items"]))

    async def run(self, *, seconds: float = 0.0, kit: Kit | None = None) -> None:
        """Let time pass, and do what is due then: schedules, events and jobs."""
        if seconds:
            clock.travel(seconds)
        kit = kit or self.kit
        scheduler = kit.service(TriggerScheduler)
        await scheduler.record_due_slots()
        await kit.events()  # on PostgreSQL, until all events are numbered
        await kit.service(TriggerLogReader).handle_new_events()
        await scheduler.end_waits()
        await kit.run_jobs()
        await scheduler.fire_waiting_slots()

    async def later(self, seconds: float) -> None:
        """Let time pass. The people sign in again, because access tokens expire."""
        clock.travel(seconds)
        self.member = await self.kit.sign_in(self.member.user["email"])
        self.admin = await self.kit.sign_in(self.admin.user["email"])

    async def finish(self, task_id: str) -> None:
        """A worker completes the task."""
        lease = await self.worker.run(max_tasks=1)
        assert lease.task_id == task_id
        await lease.ok("complete", {"result": {}})


@pytest.fixture
async def alarm(make_kit: Callable[..., Any]) -> Alarm:
    """A world with triggers, on each engine."""
    world = Alarm()
    await world.build(await make_kit(plugins=PLUGINS))
    return world
