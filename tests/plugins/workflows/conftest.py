"""A kernel that runs workflows, and the calls that its tests make."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from corral.testing.kit import Answer, Client, Kit

PLUGINS = ("admin", "agents", "workers", "tasks", "workflows", "expressions")
SECONDS = 60.0
FINAL = ("completed", "failed", "cancelled")


def transform(name: str, value: Any = None, **fields: Any) -> dict[str, Any]:
    """A step that computes a value."""
    return {"name": name, "step_type": "transform", "config": {"value": value}, **fields}


def step(name: str, step_type: str, config: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """Any step."""
    return {"name": name, "step_type": step_type, "config": config or {}, **fields}


class World:
    """A kernel with a member, who owns the workflows."""

    def __init__(self, kit: Kit, member: Client, admin: Client) -> None:
        self.kit, self.member, self.admin = kit, member, admin

    async def ok(self, method: str, path: str, body: Any = None, *, by: Client | None = None) -> Any:
        """Send a request that must succeed, and return the body of the response."""
        answer: Answer = await (by or self.member).request(method, path, body)
        assert answer.status < 300, answer
        return answer.json() if answer.body else None

    async def workflow(self, *steps: dict[str, Any], config: dict[str, Any] | None = None, **fields: Any) -> str:
        """Create a workflow, and return its id."""
        body = {"name": "a workflow", "steps": list(steps), "config": config or {}, **fields}
        found: str = (await self.ok("POST", "/workflows", body))["id"]
        return found

    async def start(self, workflow_id: str, input: Any = None, **fields: Any) -> str:
        """Start a run, and return its id."""
        body = {"input": {} if input is None else input, **fields}
        found: str = (await self.ok("POST", f"/workflows/{workflow_id}/run", body))["id"]
        return found

    async def read(self, run_id: str) -> dict[str, Any]:
        """Return the run now."""
        found: dict[str, Any] = await self.ok("GET", f"/workflow-runs/{run_id}")
        return found

    async def until(self, run_id: str, *statuses: str) -> dict[str, Any]:
        """Advance the run until it has one of these statuses, and return it."""
        wanted = statuses or FINAL
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SECONDS):
                while True:
                    await self.settle()
                    run = await self.read(run_id)
                    if run["status"] in wanted:
                        return run
                    await asyncio.sleep(0.02)
        raise AssertionError(f"the run did not become {wanted}: {await self.read(run_id)}")

    async def settle(self) -> None:
        """Handle all events, and run all jobs that are due."""
        await self.kit.run_consumers()
        while await self.kit.run_jobs():
            await self.kit.run_consumers()

    async def run(self, *steps: dict[str, Any], input: Any = None, **fields: Any) -> dict[str, Any]:
        """Create a workflow, run it to its end, and return the run."""
        return await self.until(await self.start(await self.workflow(*steps, **fields), input))


def steps_of(run: dict[str, Any]) -> dict[str, Any]:
    """Return the steps of a run by name, with the iteration as in `name[0]`."""
    return {each["name"] + "".join(f"[{n}]" for n in each["iteration"]): each for each in run["steps"]}


def statuses(run: dict[str, Any], *names: str) -> Sequence[str]:
    """Return the statuses of steps, by name."""
    found = steps_of(run)
    return [found[name]["status"] for name in names]


@pytest.fixture
async def world(make_kit: Callable[..., Awaitable[Kit]]) -> World:
    """A world on each engine."""
    kit = await make_kit(plugins=PLUGINS)
    return World(kit, await kit.as_user("member"), await kit.as_user("admin"))
