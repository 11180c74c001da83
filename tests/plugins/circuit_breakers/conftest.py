"""A kernel with circuit breakers, an admin, and a target whose behaviour a test sets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from corral.errors import Problem
from corral.testing.kit import Client, Kit
from corral_plugins.circuit_breakers.api import CircuitOpen
from corral_plugins.circuit_breakers.service.breakers import BreakersService

NAME = "http:api.example.com"


class Panel:
    """The breakers as an admin sees them, and calls that they guard. `calls` counts the calls that reach the target."""

    kit: Kit
    admin: Client

    async def build(self, kit: Kit) -> Panel:
        self.kit, self.admin, self.calls = kit, await kit.as_user("admin"), 0
        self.breakers = kit.service(BreakersService)
        self.breakers.declare("http")
        return self

    async def call(self, outcome: Any = "fine", name: str = NAME) -> Any:
        """Make a guarded call with this outcome: an exception is raised. Return the exception, if any."""

        async def target() -> Any:
            self.calls += 1
            if isinstance(outcome, Exception):
                raise outcome
            return await outcome() if callable(outcome) else outcome

        try:
            return await self.breakers.guard(name, target)
        except Exception as error:
            return error

    async def fails(self, times: int, name: str = NAME) -> None:
        """Let calls fail."""
        for _ in range(times):
            await self.call(ConnectionError("refused"), name)

    async def sync(self) -> None:
        """Do what every process does twice a second."""
        await self.breakers.sync()

    async def get(self, name: str = NAME) -> Any:
        """Read a breaker after all calls are reported."""
        await self.sync()
        answer = await self.admin.get(f"/circuit-breakers/{name}")
        assert answer.status == 200, answer
        return answer.json()

    async def configure(self, name: str = NAME, *, status: int = 201, **fields: Any) -> Any:
        """Configure a breaker."""
        answer = await self.admin.post("/circuit-breakers", {"name": name, **fields})
        assert answer.status == status, answer
        await self.sync()
        return answer.json()

    async def act(self, action: str, name: str = NAME, **body: Any) -> Any:
        """Force or reset a breaker."""
        answer = await self.admin.post(f"/circuit-breakers/{name}/{action}", None if action == "reset" else body)
        assert answer.status == 200, answer
        await self.sync()
        return answer.json()


async def until(condition: Callable[[], Any]) -> None:
    """Return when the condition is met."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  (no event)
            await asyncio.sleep(0.001)


def is_rejected(outcome: Any) -> bool:
    """Whether the breaker rejected the call."""
    return isinstance(outcome, CircuitOpen)


def problem(status: int) -> Problem:
    """An error response of a target."""
    found = Problem("no", code="internal")
    found.status = status
    return found


@pytest.fixture
async def panel(make_kit: Callable[..., Any]) -> Panel:
    return await Panel().build(await make_kit(plugins=["audit", "circuit_breakers", "settings"]))
