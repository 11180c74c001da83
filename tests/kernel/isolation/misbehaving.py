"""Plugins of a third party that misbehave as a test says, beside one that goes on."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

from corral.auth.principal import PUBLIC
from corral.events.consumers import ConsumerRow
from corral.http.routes import Routes
from corral.plugin import Plugin, hookimpl
from corral.testing.kit import Kit


def plugin(name: str, **hooks: Callable[..., Any]) -> type[Plugin]:
    """A plugin with these hooks; each takes `self`. `start` is its own."""
    body = {hook: hookimpl(each) if hook.startswith("corral_") else each for hook, each in hooks.items()}
    return type(f"{name.title()}Plugin", (Plugin,), {"__doc__": "Of one test.", "name": name, **body})


def routes(name: str) -> Routes:
    """One public route at `/<name>` that answers."""
    group = Routes(f"/{name}", tag=name.title())

    @group.get("/", needs=PUBLIC)
    def read_it() -> dict[str, str]:
        """Answer."""
        return {"plugin": name}

    return group


class Gate:
    """Does what it is told to."""

    def __init__(self, act: Callable[[], Any] = lambda: None) -> None:
        self.act, self.calls = act, 0

    def check(self, client_ip: str, method: str, path: str) -> None:
        self.calls += 1
        return self.act()  # type: ignore[no-any-return]  # also what it may not


async def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    """Wait for it."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s"
        await asyncio.sleep(0.02)


async def placed(kit: Kit, name: str) -> int:
    """The cursor of a consumer."""
    row = await kit.kernel.database.work(lambda: ConsumerRow.get_by_id(name), read=True)
    return int(row.cursor)


async def told(kit: Kit, name: str) -> list[tuple[str, str]]:
    """`plugin.state` of a plugin, oldest first."""
    return [(data["from"], data["to"]) for data in await payloads(kit, "plugin.state") if data["name"] == name]


async def payloads(kit: Kit, kind: str) -> list[dict[str, Any]]:
    """What the events of a kind tell, oldest first."""
    return [json.loads(each.data) for each in await kit.events() if each.type == kind]


async def alerts(kit: Kit) -> list[tuple[str, str]]:
    """The alerts that there are, once there is one: kind and plugin."""
    for _ in range(1200):
        if found := await payloads(kit, "system.alert"):
            return [(each["kind"], each["object"]["id"]) for each in found]
        await asyncio.sleep(0.05)
    raise AssertionError("there was no alert")
