"""A desk on which requests for approvals arrive: the world of the tools' tests, with the plugin `approvals`."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from tests.plugins.tools.conftest import Run, World

from corral.testing.kit import Client, Kit


class Desk(World):
    """`member` owns the agents and their tasks; `other` is another member."""

    other: Client

    async def set_up(
        self, make_kit: Callable[..., Awaitable[Kit]], *, also: Sequence[str] = (), **options: Any
    ) -> Desk:
        await self.build(make_kit, more=["approvals", "audit", "settings", *also], **options)
        assert self.kit.loaded("approvals").active, self.kit.loaded("approvals").reason
        self.other = await self.kit.as_user("member")
        return self

    async def ask(self, by: Client | None = None, /, **fields: Any) -> Any:
        """A new request of the member."""
        answer = await (by or self.member).post("/approvals", {"title": "May I?", **fields})
        assert answer.status == 201, answer
        return answer.json()

    async def read(self, approval_id: str) -> Any:
        """The approval now."""
        answer = await self.admin.get(f"/approvals/{approval_id}")
        assert answer.status == 200, answer
        return answer.json()

    async def task(self, task_id: str) -> Any:
        """The task now."""
        return (await self.member.get(f"/tasks/{task_id}")).json()

    async def waiting(self, **approval: Any) -> tuple[Run, str]:
        """A run that waits for an approval of a step; the id of the approval."""
        run = await self.run()
        body = {"approval": {"title": "Go on?", **approval}}
        answer = await run.agent.post(f"/tasks/{run.task_id}/wait", body)
        assert answer.status == 200, answer
        task = answer.json()
        assert (task["status"], task["waiting_for"]["kind"]) == ("waiting", "approval")
        return run, task["waiting_for"]["id"]

    async def held(self, name: str = "test.danger", text: str = "hello", **options: Any) -> tuple[Run, str]:
        """A run that waits for the approval of a tool call; the id of the approval."""
        run = await self.run(name, **options)
        answer = await run.say(name, text)
        assert answer.status == 202, answer
        approval_id = answer.json()["approval_id"]
        waits = await run.agent.post(f"/tasks/{run.task_id}/wait", {"approval_id": approval_id})
        assert (waits.status, waits.json()["status"]) == (200, "waiting"), waits
        return run, approval_id

    async def resumed(self, task_id: str) -> Any:
        """What the task is given when its worker claims it again; the claim's `resume`."""
        task = await self.task(task_id)
        assert task["status"] == "pending", task
        run = await self.claim(task["agent_id"])
        assert run.task_id == task_id
        return run.claim["resume"]

    async def changes(self) -> list[str]:
        """What the events about changed approvals tell."""
        updated = [event for event in await self.kit.events() if event.type == "approval.updated"]
        return [json.loads(event.data)["change"] for event in updated]

    async def audited(self, action: str) -> list[Any]:
        """The rows of the audit log with this action."""
        answer = await self.admin.get(f"/admin/audit?action={action}")
        assert answer.status == 200, answer
        items: list[Any] = answer.json()["items"]
        return items


@pytest.fixture
async def desk(make_kit: Callable[..., Awaitable[Kit]]) -> Desk:
    """The desk on each engine."""
    return await Desk().set_up(make_kit)
