"""The tools `http.fetch` and `http.request` call a host through its circuit breaker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.tools.conftest import World
from tests.plugins.tools.receiver import receiver

from corral import clock
from corral_plugins.circuit_breakers.service.breakers import BreakersService

pytestmark = pytest.mark.one_engine


async def test_a_host_that_fails_is_left_alone(make_kit: Callable[..., Any]) -> None:
    async with receiver() as server:

        async def with_breakers(*, plugins: Any, **options: Any) -> Any:
            return await make_kit(plugins=[*plugins, "circuit_breakers"], **options)

        world = await World().build(with_breakers, config={"egress.allow": [f"127.0.0.1:{server.port}"]})
        rule = {"http.fetch": {"policy": "allow", "when_tainted": "allow"}}
        agent_id = await world.agent("http.fetch", tool_policy=rule, by=world.admin)
        assert (await world.member.post("/tasks", {"title": "work", "agent_id": agent_id})).status == 201
        run = await world.claim(agent_id)

        async def fetch(path: str) -> Any:
            call = (await run.tool("http.fetch", {"url": server.url(path)})).json()
            return call["error"]["type"] if call["error"] else call["result"]["status"]

        server.pages["/broken"] = (500, {}, b"")
        assert [await fetch("/missing") for _ in range(12)] == [404] * 12
        assert [await fetch("/broken") for _ in range(12)] == [500] * 10 + ["circuit_open"] * 2
        assert len(server.seen) == 22
        await world.kit.service(BreakersService).sync()
        found = (await world.admin.get("/circuit-breakers/http:127.0.0.1")).json()
        assert (found["state"], found["guarded"], found["counts"]["neutral"]) == ("open", True, 12)
        server.pages["/fine"] = (200, {"Content-Type": "text/plain"}, b"x")
        clock.travel(31)
        await world.kit.service(BreakersService).sync()
        assert await fetch("/fine") == 200
        assert await fetch("/broken") == 500
