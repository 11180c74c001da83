"""A world whose tasks die, and the admin who looks after them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.tasks.conftest import World

from corral import clock

PLUGINS = ("admin", "agents", "workers", "tasks", "dead_letter")


class Morgue(World):
    """The world of tasks with the dead letter queue."""

    async def dead(self, title: str = "a task", *, type: str = "Boom", **fields: Any) -> str:
        """A task that its worker fails for good; its id."""
        task_id = await self.task(title, **fields)
        lease = await self.worker.run()
        assert lease.task_id == task_id
        await lease.ok("fail", {"error": {"type": type, "message": "It broke."}, "retryable": False})
        return task_id

    async def dead_by_owner(self, task_id: str) -> str:
        """Fail a task as its owner."""
        answer = await self.member.post(f"/tasks/{task_id}/fail", {"error": {"type": "Boom", "message": "x"}})
        assert answer.status == 200, answer
        return task_id

    async def letters(self, query: str = "") -> Any:
        """The letters that the list shows."""
        answer = await self.admin.get(f"/dead-letter{query}")
        assert answer.status == 200, answer
        return answer.json()["items"]

    async def letter(self, task_id: str) -> Any:
        """The only open letter of a task, with everything."""
        (found,) = [each for each in await self.letters() if each["task_id"] == task_id]
        return (await self.admin.get(f"/dead-letter/{found['id']}")).json()

    async def later(self, seconds: float) -> None:
        """Let time pass and do what is due. People sign in again, because access tokens expire."""
        clock.travel(seconds)
        self.member = await self.kit.sign_in(self.member.user["email"])
        self.admin = await self.kit.sign_in(self.admin.user["email"])
        await self.tick()


@pytest.fixture
async def morgue(make_kit: Callable[..., Any]) -> Morgue:
    """A world with dead letters, on each engine."""
    world = Morgue()
    await world.build(await make_kit(plugins=PLUGINS))
    return world
